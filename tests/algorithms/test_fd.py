"""FD against NumPy, and where its regulariser must vanish."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import fedmd_jax as fmd
from fedmd_jax.algorithms import Mean, Report, fd, leave_one_out

PUBLIC = toys.public()


def tables(num_clients, num_classes=4, seed=0):
    """Tables [K, C, C], numbers of examples [K, C] and client weights [K]."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, (num_clients, num_classes)) * (rng.random((num_clients, num_classes)) < 0.6)
    values = rng.dirichlet(np.ones(num_classes), (num_clients, num_classes)) * (counts > 0)[..., None]
    return values, counts, rng.uniform(0.2, 3.0, num_clients)


@jax.jit
def of_others(values, weights):
    """The target of each client, as a round computes it, from tables [K, C, C] and weights of rows [K, C]."""
    total = jnp.einsum("kr,krd->rd", weights, values, precision="highest")
    sums = weights.sum(axis=0)
    mean = Mean(total / jnp.where(sums > 0, sums, 1.0)[:, None], sums)
    return jax.vmap(lambda *own: leave_one_out(mean, Report(*own), mean))(values, weights)


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_is_the_mean_of_the_others(seed):
    values, counts, client_weights = tables(5, seed=seed)
    counts[:, 1] = [0, 0, 7, 0, 0]  # a class of one client
    counts[:, 2] = 0  # a class of none
    weights = counts * client_weights[:, None]
    targets = of_others(jnp.float32(values), jnp.float32(weights))
    for k in range(5):
        for c in range(4):
            others = [j for j in range(5) if j != k and weights[j, c] > 0]
            expected = sum(weights[j, c] * values[j, c] for j in others) / max(sum(weights[others, c]), 1e-9)
            assert (targets.weights[k, c] > 0) == bool(others)
            np.testing.assert_allclose(targets.weights[k, c], sum(weights[others, c]), rtol=2e-6, atol=1e-6)
            np.testing.assert_allclose(targets.values[k, c], expected, rtol=2e-5, atol=2e-6)


def test_a_row_of_one_client_has_weight_zero_for_it_whatever_its_weight():
    """Products of weights and numbers of examples are rounded; none may be taken for another client's."""
    counts, client_weights = np.arange(1, 2001), np.random.default_rng(0).uniform(1e-3, 1.0, 2000)
    weights = np.zeros((2, 2000), np.float32)
    weights[0] = counts * client_weights
    own = jnp.float32(client_weights) * jnp.float32(counts)

    @jax.jit
    def target(counts, client_weights, sums):
        report = Report(jnp.ones((2000, 1)), counts * client_weights)
        mean = Mean(jnp.ones((2000, 1)), sums)
        return leave_one_out(mean, report, mean)

    others = target(jnp.float32(counts), jnp.float32(client_weights), own)
    assert not others.weights.any()
    assert not others.values.any()


def test_two_clients_swap_their_tables():
    values, _, _ = tables(2)
    targets = of_others(jnp.float32(values), jnp.array([[1.0, 2, 3, 4], [5, 6, 7, 8]]))
    np.testing.assert_allclose(targets.values, values[::-1], atol=1e-6)
    np.testing.assert_allclose(targets.weights, [[5, 6, 7, 8], [1, 2, 3, 4]])


def test_the_mean_of_the_targets_is_the_mean_of_the_tables():
    values, _, _ = tables(5)
    targets = of_others(jnp.float32(values), jnp.ones((5, 4)))
    np.testing.assert_allclose(targets.values.mean(axis=0), values.mean(axis=0), atol=1e-6)


def test_gamma_zero_is_local_training_to_the_bit():
    groups = toys.groups()
    federation, private = toys.federation(groups, algorithm=fd(gamma=0.0)), toys.private(groups)
    states, key = federation.init(jax.random.key(0), PUBLIC, private), jax.random.key(3)
    local, _ = federation.revisit(jax.tree.map(jnp.copy, states), private, key)
    rounds, _ = federation.round(states, PUBLIC, private, key)
    chex.assert_trees_all_equal(rounds, local)


def test_classes_of_no_other_client_have_no_term():
    """If clients share no class, a round is local training, to the bit."""
    groups = {"mlp": fmd.ArchitectureGroup(toys.tanh_mlp(), (0, 1), (0.3, 1.7))}
    inputs, _ = toys.examples(0, 6)
    private = fmd.stack_private(groups, {0: (inputs, [0, 1, 1] * 2), 1: (inputs, [2, 3, 3] * 2)})
    federation = toys.federation(groups, algorithm=fd(gamma=5.0))
    states, key = federation.init(jax.random.key(0), PUBLIC, private), jax.random.key(3)
    local, _ = federation.revisit(jax.tree.map(jnp.copy, states), private, key)
    rounds, _ = federation.round(states, PUBLIC, private, key)
    chex.assert_trees_all_equal(rounds, local)


def test_identical_clients_at_agreement_feel_no_gradient():
    """One example of each class, so that its probabilities are the row; the first step is that of local training."""
    groups = {"mlp": fmd.ArchitectureGroup(toys.tanh_mlp(), (0, 1, 2))}
    inputs, _ = toys.examples(0, 4)
    private = fmd.stack_private(groups, {i: (inputs, [0, 1, 2, 3]) for i in range(3)})
    federation = toys.federation(groups, algorithm=fd(gamma=5.0), revisit_training=toys.sgd(4))
    states, key = federation.init(jax.random.key(0), PUBLIC, private), jax.random.key(3)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 3), states)
    local, _ = federation.revisit(jax.tree.map(jnp.copy, states), private, key)
    rounds, _ = federation.round(states, PUBLIC, private, key)
    chex.assert_trees_all_close(rounds["mlp"].params, local["mlp"].params, atol=1e-6)


def test_a_round_against_numpy():
    """One step of SGD on all examples. Clients have weights; class 3 is of one client only, class 2 of two."""
    labels = {0: [0, 0, 1, 3], 1: [0, 1, 1, 2, 2], 2: [1, 2]}
    weights, gamma, rate = {0: 1.0, 1: 3.0, 2: 0.5}, 0.7, 0.05
    rng = np.random.default_rng(1)
    inputs = {k: rng.normal(size=(len(labels[k]), toys.NUM_FEATURES)).astype(np.float32) for k in labels}
    group = fmd.ArchitectureGroup(toys.linear(), tuple(labels), tuple(weights.values()))
    private = fmd.stack_private({"linear": group}, {k: (inputs[k], labels[k]) for k in labels})
    federation = toys.federation({"linear": group}, algorithm=fd(gamma=gamma), revisit_training=toys.sgd(8))
    states = federation.init(jax.random.key(0), PUBLIC, private)
    before = jax.tree.map(partial(np.asarray, dtype=np.float64), states["linear"].params)
    states, info = federation.round(states, PUBLIC, private, jax.random.key(1))

    def softmax(k):
        scores = np.exp(inputs[k].astype(np.float64) @ before["w"][k] + before["b"][k])
        return scores / scores.sum(axis=1, keepdims=True)

    for k in labels:
        probabilities, one_hot = softmax(k), np.eye(4)[labels[k]]
        slope, loss = probabilities - one_hot, -np.log((probabilities * one_hot).sum(axis=1))
        for n, label in enumerate(labels[k]):
            others = [(j, row) for j in labels if j != k for row, c in enumerate(labels[j]) if c == label]
            if others:
                target = np.average(
                    [softmax(j)[row] for j, row in others], axis=0, weights=[weights[j] for j, _ in others]
                )
                slope[n] += gamma * (probabilities[n] - target)
                loss[n] += gamma * np.sum(target * np.log(target / probabilities[n]))
        expected = before["w"][k] - rate * inputs[k].T @ slope / len(labels[k])
        np.testing.assert_allclose(states["linear"].params["w"][k], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(info.revisit_loss["linear"][k, 0], loss.mean(), rtol=1e-5)


def test_bytes_are_those_of_the_arrays_that_a_client_sends_and_gets():
    groups = toys.groups()
    federation, private = toys.federation(groups, algorithm=fd()), toys.private(groups)
    states, one_round = federation.init(jax.random.key(0), PUBLIC, private), federation.algorithm.round.keywords
    client, own = (jax.tree.map(lambda leaf: leaf[0], tree["linear"]) for tree in (states, private))
    report = one_round["report"](groups["linear"].architecture, client, PUBLIC, own)
    targets = one_round["personal_target"](report, report, Mean(*report))
    sizes = fmd.algorithms.Sizes(groups, states, PUBLIC.inputs, subset_size=12, num_classes=toys.NUM_CLASSES)
    sent = [sum(leaf.nbytes for leaf in tree) for tree in (report, targets)]
    assert tuple(federation.algorithm.traffic(sizes)) == tuple(sent) == (80, 80)
