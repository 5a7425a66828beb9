import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import fedmd_jax as fmd
from fedmd_jax.aggregators.mean import scale_weights
from fedmd_jax.transforms.clipping import clip_scores

RNG = np.random.default_rng(0)
SCORES = {
    "a": jnp.asarray(RNG.normal(size=(4, 6, 3)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=(8, 6, 3)), jnp.float32),
}
WEIGHTS = {"a": jnp.asarray(RNG.uniform(size=4), jnp.float32), "b": jnp.asarray(RNG.uniform(size=8), jnp.float32)}


def slow_mean(scores, weights):
    clients = [
        (w, z)
        for name in scores
        for w, z in zip(np.asarray(weights[name], float), np.asarray(scores[name], float), strict=True)
    ]
    return sum(w * z for w, z in clients) / sum(w for w, _ in clients)


@pytest.mark.parametrize("num_devices", [None, 1, 2, 4])
def test_against_a_loop_over_clients(num_devices):
    mesh = None if num_devices is None else fmd.client_mesh(num_devices)
    consensus = jax.jit(lambda s, w: fmd.weighted_consensus(s, w, mesh=mesh))(SCORES, WEIGHTS)
    np.testing.assert_allclose(consensus, slow_mean(SCORES, WEIGHTS), rtol=1e-5, atol=1e-6)


@given(st.permutations(range(8)), st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_neither_order_nor_scale_of_the_weights_matters(order, scale):
    order = jnp.asarray(order)
    permuted = fmd.weighted_consensus(
        {"b": SCORES["b"][order], "a": SCORES["a"]}, {"b": scale * WEIGHTS["b"][order], "a": scale * WEIGHTS["a"]}
    )
    np.testing.assert_allclose(permuted, fmd.weighted_consensus(SCORES, WEIGHTS), rtol=1e-4, atol=1e-5)


def test_a_client_without_weight_changes_nothing_not_even_with_nan():
    weights = {"a": WEIGHTS["a"].at[1].set(0.0), "b": WEIGHTS["b"]}
    without = {"a": jnp.delete(SCORES["a"], 1, axis=0), "b": SCORES["b"]}
    expected = fmd.weighted_consensus(without, {"a": jnp.delete(weights["a"], 1), "b": WEIGHTS["b"]})
    for poison in (1e30, np.nan, np.inf):
        scores = {"a": SCORES["a"].at[1].set(poison), "b": SCORES["b"]}
        np.testing.assert_allclose(fmd.weighted_consensus(scores, weights), expected, rtol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("num_devices", [None, 2])
def test_one_number_that_is_not_finite_is_as_no_weight_to_the_bit(poison, num_devices):
    mesh = None if num_devices is None else fmd.client_mesh(num_devices)
    consensus = jax.jit(lambda s, w: fmd.weighted_consensus(s, w, mesh=mesh))
    without = consensus(SCORES, {"a": WEIGHTS["a"].at[1].set(0.0), "b": WEIGHTS["b"]})
    broken = {"a": SCORES["a"].at[1, 2, 0].set(poison), "b": SCORES["b"]}
    np.testing.assert_array_equal(consensus(broken, WEIGHTS), without)
    # The size of its weight does not matter either.
    np.testing.assert_array_equal(consensus(broken, {"a": WEIGHTS["a"].at[1].set(1e4), "b": WEIGHTS["b"]}), without)


def test_the_consensus_of_no_client_is_zero():
    not_finite = jax.tree.map(lambda scores: jnp.full_like(scores, jnp.nan), SCORES)
    assert not fmd.weighted_consensus(not_finite, WEIGHTS).any()


def test_enormous_scores_do_not_overflow():
    largest = jax.tree.map(lambda scores: jnp.full_like(scores, 3e38), SCORES)
    np.testing.assert_allclose(fmd.weighted_consensus(largest, WEIGHTS), 3e38, rtol=1e-5)


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.integers(0, 7), st.lists(NUMBERS, min_size=18, max_size=18), st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_with_a_bound_one_of_n_clients_moves_the_consensus_by_two_nths_of_it_at_most(client, sent, bound):
    def consensus(scores):
        bounded = jax.vmap(lambda own: clip_scores(own, bound=bound))(scores)
        return fmd.weighted_consensus({"b": bounded}, {"b": jnp.ones(8)})

    moved = consensus(SCORES["b"].at[client].set(jnp.reshape(jnp.array(sent, jnp.float32), (6, 3))))
    assert (jnp.abs(moved) <= bound * (1 + 1e-5)).all()
    assert (jnp.abs(moved - consensus(SCORES["b"])) <= 2 * bound / 8 * (1 + 1e-5)).all()


def test_a_bound_keeps_scores_within_it_and_nonfinite_scores():
    scores = jnp.array([[-3.0, 0.5, jnp.nan], [jnp.inf, -jnp.inf, 2.0]])
    expected = [[-2.0, 0.5, np.nan], [np.inf, -np.inf, 2.0]]
    np.testing.assert_array_equal(clip_scores(scores, bound=2.0), expected)
    with pytest.raises(ValueError, match=r"bound must be positive and finite, got 0\.0"):
        clip_scores(scores, bound=0.0)


@given(st.lists(st.just(0.0) | st.floats(2.0**-20, 2.0**30, width=32), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_scaled_weights_are_the_same_to_the_bit_and_small(weights):
    (scaled,) = scale_weights({"a": jnp.array(weights, jnp.float32)}).values()
    scaled = np.asarray(scaled, float)
    assert scaled.sum() <= 1
    for weight, other in zip(weights, scaled, strict=True):
        assert weight * scaled.max() == other * max(weights)


def test_all_weights_zero_is_zero_and_not_nan():
    weights = jax.tree.map(jnp.zeros_like, WEIGHTS)
    assert not fmd.weighted_consensus(SCORES, weights).any()


def test_enormous_weights_do_not_overflow_and_tiny_ones_do_not_vanish():
    for weight in (1e30, 1e-30):
        weights = jax.tree.map(lambda w, weight=weight: jnp.full_like(w, weight), WEIGHTS)
        equal = fmd.weighted_consensus(SCORES, jax.tree.map(jnp.ones_like, WEIGHTS))
        np.testing.assert_allclose(fmd.weighted_consensus(SCORES, weights), equal, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "weights",
    [
        {"a": WEIGHTS["a"]},
        {**WEIGHTS, "c": jnp.ones(2)},
        {**WEIGHTS, "a": jnp.ones(1)},
        {**WEIGHTS, "a": jnp.ones(5)},
    ],
)
def test_weights_of_other_clients_than_the_scores_are_refused(weights):
    with pytest.raises(ValueError, match="one weight per client is needed"):
        fmd.weighted_consensus(SCORES, weights)


def test_the_consensus_is_differentiable_in_scores_and_weights():
    def loss(scores, weights):
        return jnp.sum(fmd.weighted_consensus(scores, weights) ** 2)

    scores_gradient, weights_gradient = jax.grad(loss, argnums=(0, 1))(SCORES, WEIGHTS)
    assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves((scores_gradient, weights_gradient)))
    all_zero = jax.grad(loss, argnums=1)(SCORES, jax.tree.map(jnp.zeros_like, WEIGHTS))
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(all_zero))


def test_the_only_collective_is_one_all_reduce():
    mesh = fmd.client_mesh(4)
    scores = fmd.mapping.sharding.shard_tree(SCORES, mesh)
    compiled = jax.jit(lambda s, w: fmd.weighted_consensus(s, w, mesh=mesh)).lower(scores, WEIGHTS).compile()
    text = compiled.as_text()
    assert text.count(" all-reduce(") == 1
    assert "all-gather" not in text
    assert compiled.output_shardings.is_fully_replicated
