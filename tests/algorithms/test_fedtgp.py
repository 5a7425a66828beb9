"""The server of FedTGP against NumPy."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmd_jax.algorithms import Report, fedtgp
from fedmd_jax.algorithms.fedtgp import CLASSIFIER, _new_memory, find_margin, generate, margin_loss, send_trained

K, C, D, KEY = 6, 4, 5, jax.random.key(0)
SEND = jax.jit(partial(send_trained, max_margin=100.0, learning_rate=0.1), static_argnames="num_steps")


def reports(seed=0):
    """Prototypes of classes that lie apart; class 3 is of no client."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, (K, C)) * (rng.random((K, C)) < 0.7) * (np.arange(C) != 3)
    values = 3 * np.eye(C, D) + rng.normal(size=(K, C, D))
    return Report(jnp.float32(values * (counts > 0)[..., None]), jnp.float32(counts))


@pytest.mark.parametrize("seed", range(3))
def test_the_margin_against_numpy(seed):
    values, weights = map(np.asarray, reports(seed))
    known = [c for c in range(C) if (weights[:, c] > 0).any()]
    means = {c: values[weights[:, c] > 0, c].astype(np.float64).mean(axis=0) for c in known}
    nearest = {c: min(np.linalg.norm(means[c] - means[d]) for d in known if d != c) for c in known}
    margin = find_margin(jnp.array(values), weights > 0, max_margin=100.0)
    np.testing.assert_allclose(margin, max(nearest.values()), rtol=1e-5)
    assert find_margin(jnp.array(values), weights > 0, max_margin=0.5) == 0.5


def test_the_margin_of_a_single_class_is_the_largest():
    values, _ = reports()
    assert find_margin(values, jnp.zeros((K, C), bool).at[:, 1].set(True), max_margin=7.0) == 7.0


def test_the_margin_is_added_to_the_true_distance():
    distances, labels, margin = np.random.default_rng(0).uniform(1, 4, (3, C)), np.array([0, 2, 2]), 1.5
    moved = -(distances + margin * np.eye(C)[labels])
    expected = [np.log(np.exp(row).sum()) - row[label] for row, label in zip(moved, labels, strict=True)]
    losses = margin_loss(jnp.float32(-distances), jnp.array(labels), margin=jnp.float32(margin))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def loss(params, sent):
    """The loss of the server, of prototypes that were reported."""
    margin = find_margin(sent.values, sent.weights > 0, max_margin=100.0)
    logits, _ = CLASSIFIER.apply(params, {}, sent.values.reshape(-1, D))
    losses = margin_loss(logits, jnp.tile(jnp.arange(C), K), margin=margin)
    return jnp.mean(losses, where=sent.weights.reshape(-1) > 0)


def test_the_loss_of_the_server_falls_and_classes_move_apart():
    sent, memory = reports(), _new_memory(C, D)
    losses = []
    for num_steps in (1, 20, 200):
        (table, weights), trained = SEND(sent, None, memory, KEY, num_steps=num_steps)
        losses.append(float(loss(trained.params, sent)))
    assert losses[0] > losses[1] > losses[2]
    chex.assert_trees_all_equal(table, jnp.broadcast_to(generate(trained.params), (K, C, D)))
    assert (weights == 1).all()
    distances = np.linalg.norm(np.asarray(table[0])[:3, None] - np.asarray(table[0])[None, :3], axis=-1)
    assert distances[~np.eye(3, dtype=bool)].min() > 1.0


def test_a_step_of_the_server_is_one_of_sgd_on_all_reported_prototypes():
    sent, memory = reports(), _new_memory(C, D)
    _, first = SEND(sent, None, memory, KEY, num_steps=1)
    _, second = SEND(sent, None, first, KEY, num_steps=1)
    gradient = jax.grad(loss)(first.params, sent)
    expected = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, first.params, gradient)
    chex.assert_trees_all_close(second.params, expected, atol=1e-6)


def test_the_gradient_at_distance_zero_is_finite_and_zero():
    """The prototypes of the clients are those of the server, so that all distances that can be are 0."""
    _, memory = SEND(reports(), None, _new_memory(C, D), KEY, num_steps=1)
    table = generate(memory.params)
    chex.assert_tree_all_finite(jax.grad(lambda params: CLASSIFIER.apply(params, {}, table)[0].sum())(memory.params))
    same = Report(jnp.broadcast_to(table, (K, C, D)), jnp.ones((K, C)))
    chex.assert_tree_all_finite(SEND(same, None, memory, KEY, num_steps=1))


def test_the_server_goes_on_where_it_was_and_the_key_is_that_of_the_first_round():
    sent = reports()
    _, first = SEND(sent, None, _new_memory(C, D), KEY, num_steps=20)
    _, other = SEND(sent, None, _new_memory(C, D), jax.random.key(1), num_steps=20)
    assert not np.array_equal(first.params["vectors"], other.params["vectors"])
    results = [SEND(sent, None, first, jax.random.key(key), num_steps=20) for key in (1, 2)]
    chex.assert_trees_all_equal(*results)


def test_without_reports_nothing_is_sent_until_there_were_some():
    nothing = Report(jnp.zeros((K, C, D)), jnp.zeros((K, C)))
    (_, weights), memory = SEND(nothing, None, _new_memory(C, D), KEY, num_steps=20)
    assert not weights.any()
    assert not memory.exists
    _, memory = SEND(reports(), None, memory, KEY, num_steps=20)
    (_, weights), after = SEND(nothing, None, memory, KEY, num_steps=20)
    assert weights.all()
    chex.assert_trees_all_equal(after, memory)


@pytest.mark.parametrize("name", ["max_margin", "num_steps", "learning_rate"])
def test_settings_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        fedtgp(**{name: 0})
