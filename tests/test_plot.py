import numpy as np
import pytest
from matplotlib import pyplot

import fedmd_jax as fmd
from fedmd_jax.simulation import ClientMetrics, History, RoundMetrics


@pytest.fixture(autouse=True)
def _no_figures_are_left():
    yield
    pyplot.close("all")


def history(accuracies, first_round=0, status="ok"):
    """Accuracies [R, K] of clients 10, 11, ..., all in the architecture of their parity."""
    return History(
        RoundMetrics(
            first_round + r,
            tuple(
                ClientMetrics(10 + k, ("even", "odd")[k % 2], float(a), None, None, status if k == r == 1 else "ok")
                for k, a in enumerate(of_round)
            ),
            digested=True,
        )
        for r, of_round in enumerate(accuracies)
    )


def lines(ax):
    """The labelled lines."""
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


ACCURACIES = np.array([[0.1, 0.2, 0.6], [0.3, 0.4, 0.2], [0.5, 0.8, 0.7]])


@pytest.mark.parametrize("as_records", [False, True])
def test_a_line_per_client_and_their_mean(as_records):
    given = history(ACCURACIES)
    ax = fmd.plot.accuracy(given.to_dicts() if as_records else given)
    found = lines(ax)
    assert list(found) == ["client 10", "client 11", "client 12", "mean of all clients"]
    for label, expected in zip(found, [*ACCURACIES.T, ACCURACIES.mean(axis=1)], strict=True):
        np.testing.assert_array_equal(found[label].get_xdata(), [0, 1, 2])
        np.testing.assert_allclose(found[label].get_ydata(), expected)
    assert found["client 10"].get_color() == found["client 12"].get_color() != found["client 11"].get_color()
    assert not ax.collections  # no band


def test_baselines_faults_and_given_axes():
    _, given = pyplot.subplots()
    baselines = {"local": history(ACCURACIES / 2), "pooled": {10: 0.9, 11: 0.8, 12: 0.7}}
    ax = fmd.plot.accuracy(history(ACCURACIES, status="dropped"), **baselines, ax=given)
    assert ax is given
    np.testing.assert_allclose(lines(ax)["mean of local only (no digest)"].get_ydata(), ACCURACIES.mean(axis=1) / 2)
    bounds = [line.get_ydata()[0] for line in ax.get_lines() if len(line.get_xdata()) == 2]
    np.testing.assert_allclose(bounds, [0.9, 0.8, 0.7, 0.8])
    crosses = [line for line in ax.get_lines() if line.get_marker() == "x" and len(line.get_xdata())]
    assert [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in crosses] == [([1], [0.4])]
    named = {text.get_text() for text in ax.get_legend().get_texts()}
    assert {"even", "odd", "pooled upper bound", "mean of local only (no digest)", "dropped or failed"} <= named


def test_several_seeds_are_means_with_bands():
    ax = fmd.plot.accuracy([history(ACCURACIES), history(ACCURACIES + 0.2)], pooled={10: [0.8, 0.9], 11: 1, 12: 1})
    np.testing.assert_allclose(lines(ax)["client 11"].get_ydata(), ACCURACIES[:, 1] + 0.1)
    low, high = ax.collections[0].get_datalim(ax.transData).intervaly
    std = 0.2 / np.sqrt(2)
    np.testing.assert_allclose([low, high], [0.2 - std, 0.6 + std])  # of client 10


def test_clients_of_cohorts_and_rounds_that_continue():
    rounds = [metrics._replace(clients=metrics.clients[r % 2 :: 2]) for r, metrics in enumerate(history(ACCURACIES, 4))]
    found = lines(fmd.plot.accuracy(rounds))
    assert found["client 11"].get_xdata().tolist() == [5]
    np.testing.assert_array_equal(found["mean of all clients"].get_xdata(), [4, 5, 6])
    np.testing.assert_allclose(found["mean of all clients"].get_ydata(), [0.35, 0.4, 0.6])


def test_what_cannot_be_drawn():
    for given in ([], History(), [History()], [history(ACCURACIES), history(ACCURACIES[:2])]):
        with pytest.raises(ValueError, match="at least one round are needed, all with the same clients"):
            fmd.plot.accuracy(given)
    with pytest.raises(ValueError, match="local must have one history for each of history"):
        fmd.plot.accuracy(history(ACCURACIES[:2]), local=history(ACCURACIES))


def test_the_confusion_matrix_shows_shares_of_each_class():
    counts = np.array([[6, 2, 0, 0], [0, 0, 0, 0], [1, 0, 4, 0], [0, 0, 0, 0]])
    ax = fmd.plot.confusion_matrix(counts, labels="abcd")
    np.testing.assert_allclose(ax.get_images()[0].get_array(), [[75, 25, 0], [20, 0, 80]])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a 0.75", "c 0.80"]
    for wrong, message in (((counts[:2],), "must have shape"), ((0 * counts,), "at least one example")):
        with pytest.raises(ValueError, match=message):
            fmd.plot.confusion_matrix(*wrong)
    with pytest.raises(ValueError, match="a label for each of the 4 classes is needed, got 2"):
        fmd.plot.confusion_matrix(counts, labels=["a", "b"])
