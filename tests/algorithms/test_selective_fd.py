"""Selective-FD: which rows are kept, and that dropped rows leave no trace."""

import chex
import faults
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import fedmd_jax as fmd
from fedmd_jax.algorithms.selective_fd import confidence, digest_kept, num_kept, report_confident, send_clear

KEY = jax.random.key(3)
GROUPS = toys.groups(linear=(1.0, 2.0, 0.5))


def client(architecture, num_epochs=2, **training):
    config = toys.sgd(5, num_epochs, **training)
    state = fmd.init_client(architecture, jax.random.key(1), jnp.zeros((1, 5)), digest=config, revisit=config)
    return state, config


def one_round(federation, private, **participation):
    states = federation.init(jax.random.key(0), toys.public(), private)
    participants = fmd.algorithms.all_clients(GROUPS, faults.participation(GROUPS, **participation))
    return federation.round(states, toys.public(), private, KEY, participants)


def test_if_all_rows_are_kept_it_is_the_plain_mean_of_ds_fl():
    private = toys.private(GROUPS)
    members = fmd.algorithms.selective_fd(share=1.0), fmd.algorithms.ds_fl(temperature=None)
    results = [one_round(toys.federation(GROUPS, algorithm=algorithm), private) for algorithm in members]
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_a_client_that_keeps_nothing_is_as_good_as_absent():
    """Client 1 is far more confident of its private data than of any public row. To the bit, in the same program."""
    data = {i: toys.examples(i, 7 + i) for i in range(5)}
    data[1] = (1000 * data[1][0], data[1][1])
    private = fmd.stack_private(GROUPS, data)
    federation = toys.federation(GROUPS, algorithm=fmd.algorithms.selective_fd(of_private=True))
    (present, info), (absent, _) = (one_round(federation, private, dropped=dropped) for dropped in ((), (1,)))
    present, absent = (toys.by_client(GROUPS, states) for states in (present, absent))
    del present[1], absent[1]
    chex.assert_trees_all_equal(present, absent)
    assert bool(info.scores_finite["linear"].all())


@pytest.mark.parametrize(("share", "expected"), [(0.75, 31), (1.0, 41), (0.0, 1)])
def test_the_quartile_keeps_three_quarters_of_the_rows_whatever_the_padding(share, expected):
    """Of the public subset or, if that is the private dataset, of the private one; the row at the quantile is kept."""
    architecture = toys.tanh_mlp()
    (state, _), (inputs, labels) = client(architecture), toys.examples(0, 41)
    padded = np.concatenate([inputs, 100 * inputs, 0 * inputs]), np.tile(labels, 3)
    subset = fmd.public_dataset(inputs)
    for (rows, classes), of_private in (((inputs, labels), False), ((inputs, labels), True), (padded, True)):
        private = fmd.PrivateDataset(jnp.asarray(rows), jnp.asarray(classes), jnp.int32(41))
        report = report_confident(architecture, state, subset, private, share=share, of_private=of_private)
        assert int(report.weights.sum()) == expected == num_kept(41, share)
    probabilities = jax.nn.softmax(fmd.score(architecture, state, jnp.asarray(inputs)))
    np.testing.assert_allclose(report.values, probabilities, rtol=1e-6)
    dropped, kept = (np.asarray(probabilities.max(axis=1))[np.asarray(report.weights) == w] for w in (0, 1))
    assert dropped.max(initial=0.0) <= kept.min()


def test_bytes_are_those_of_the_rows_that_are_kept_and_of_the_mask():
    sizes = fmd.algorithms.Sizes(None, {}, None, subset_size=5000, num_classes=10)
    assert fmd.algorithms.selective_fd(share=0.75).traffic(sizes) == (4 * 3750 * 10 + 625, 4 * 5000 * 10 + 625)
    assert fmd.algorithms.selective_fd(of_private=True).traffic(sizes).up == 4 * 5000 * 10 + 625


def test_confidence_orders_rows_as_the_largest_probability_does():
    logits = np.random.default_rng(0).normal(size=(200, 4)) * 5
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    largest = 1 / exponentials.sum(axis=1)
    found = confidence(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(found, np.log(largest / (1 - largest)), rtol=1e-4, atol=1e-4)


def test_rows_that_are_dropped_leave_no_trace():
    """Neither in the parameters nor in the batch statistics, whatever they hold."""
    architecture = toys.normed()
    state, training = client(architecture)
    inputs, probabilities = jnp.asarray(toys.examples(0, 12)[0]), jnp.full((12, 4), 0.25)
    left = jnp.arange(12) % 3 > 0
    digest = jax.jit(lambda *arrays: digest_kept(architecture, state, *arrays, KEY, training=training))
    results = digest(inputs, (probabilities, left))
    spoiled = jnp.where(left[:, None], inputs, jnp.nan), (jnp.where(left[:, None], probabilities, 7.0), left)
    chex.assert_trees_all_equal(digest(*spoiled), results)
    chex.assert_tree_all_finite(results)


def test_the_digest_is_that_of_the_rows_that_are_left():
    architecture = toys.linear()
    state, training = client(architecture, shuffle=False)
    inputs = jnp.asarray(toys.examples(0, 12)[0])
    probabilities = jax.nn.softmax(3 * inputs[:, :4])
    left = np.arange(12) % 3 > 0
    results = digest_kept(architecture, state, inputs, (probabilities, jnp.asarray(left)), KEY, training=training)
    distance = fmd.client.kl_of_probabilities
    alone = fmd.digest(
        architecture, state, inputs[left], probabilities[left], KEY, training=training, distance=distance
    )
    chex.assert_trees_all_close(results, alone, rtol=1e-5, atol=1e-6)


def test_without_rows_no_client_changes():
    architecture = toys.tanh_mlp()
    state, training = client(architecture)
    targets = jnp.zeros((12, 4)), jnp.zeros(12, bool)
    after, info = digest_kept(
        architecture, state, jnp.asarray(toys.examples(0, 12)[0]), targets, KEY, training=training
    )
    chex.assert_trees_all_equal(after, state)
    assert info.loss.tolist() == [0.0, 0.0]
    assert bool(info.finite)


def test_the_server_drops_rows_that_no_client_kept_and_rows_without_a_clear_mean():
    values = jnp.array([[0.75, 0.25], [0.5, 0.5], [0.0, 0.0], [0.125, 0.875]])
    mean = fmd.algorithms.Mean(values, jnp.array([1.0, 3.0, 0.0, 0.5]))
    for min_probability, expected in ((0.0, [1, 1, 0, 1]), (0.75, [1, 0, 0, 1]), (0.8, [0, 0, 0, 1])):
        (targets, left), _ = send_clear(mean, None, (), None, min_probability=min_probability)
        assert left.tolist() == expected
        chex.assert_trees_all_equal(targets, values)


@pytest.mark.parametrize("setting", [{"share": 1.5}, {"min_probability": -0.1}])
def test_shares_are_between_0_and_1(setting):
    with pytest.raises(ValueError, match=r"^(share|min_probability) must be between 0 and 1, got .*$"):
        fmd.algorithms.selective_fd(**setting)
