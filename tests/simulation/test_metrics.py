import copy
import pickle

from fedmd_jax.simulation import ClientMetrics, History, RoundMetrics


def history(num_rounds=3):
    return History(
        RoundMetrics(r, tuple(ClientMetrics(i, "cnn", (i + r) / 8, None, r * 0.5) for i in (3, 5)), digested=True)
        for r in range(num_rounds)
    )


def test_a_history_is_a_list_with_a_short_repr():
    found = history()
    assert repr(found) == "History(rounds 0 to 2, 2 clients, mean accuracy 0.500 to 0.750)"
    assert repr(History()) == "History(no rounds)"
    assert found == list(found) == copy.deepcopy(found) == pickle.loads(pickle.dumps(found))
    assert [type(part) for part in (found[1:], found + found, found[-1])] == [History, History, RoundMetrics]


def test_a_history_as_a_table():
    records = history().to_dicts()
    names = ["round", "client_id", "architecture", "accuracy", "digest_loss", "revisit_loss", "status"]
    assert [list(record) for record in records] == [names] * 6
    assert [tuple(record.values()) for record in records[3:5]] == [
        (1, 5, "cnn", 0.75, None, 0.5, "ok"),
        (2, 3, "cnn", 0.625, None, 1.0, "ok"),
    ]
