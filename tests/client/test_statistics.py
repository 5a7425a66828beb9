"""Batch statistics that are estimated from given inputs."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import fedmd_jax as fmd

INPUTS = jax.random.normal(jax.random.key(0), (13, 6)) * jnp.arange(1.0, 7.0)[None] + 3.0


class Linen(nn.Module):
    """Two norms of flax, dropout between them."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="first")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.relu(nn.Dense(4, name="dense")(x))
        x = nn.BatchNorm(use_running_average=not train, name="second")(x)
        return nn.Dense(3)(x)


class Nnx(nnx.Module):
    """The same in nnx."""

    def __init__(self, rngs):
        self.first = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(6, 4, rngs=rngs)
        self.second = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.second(nnx.relu(self.dense(self.dropout(self.first(x))))))


def client(architecture, inputs=INPUTS):
    return fmd.ClientState(*architecture.init(jax.random.key(1), inputs), (), ())


NETWORKS = {"linen": lambda: fmd.architecture_from_linen(Linen()), "nnx": lambda: fmd.architecture_from_nnx(Nnx)}


def norms(state):
    statistics = state.model_state.get("batch_stats", state.model_state)
    return statistics["first"], statistics["second"]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("batch_size", [13, 100, 5])
def test_they_are_those_of_a_direct_computation(network, batch_size):
    architecture = NETWORKS[network]()
    state = client(architecture)
    found = jax.jit(lambda state: fmd.client.estimate_statistics(architecture, state, INPUTS, batch_size=batch_size))(
        state
    )
    chex.assert_trees_all_equal(found.params, state.params)
    first, second = norms(found)
    x = np.asarray(INPUTS, np.float64)
    np.testing.assert_allclose(first["mean"], x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(first["var"], x.var(axis=0), rtol=1e-5)
    dense = state.params["dense"]
    num_batches = -(-13 // batch_size)
    batches = np.split(x, np.arange(1, num_batches) * -(-13 // num_batches))
    hidden = []
    for batch in batches:  # each is normalized by its own statistics, without dropout
        normalized = (batch - batch.mean(axis=0)) / np.sqrt(batch.var(axis=0) + 1e-5)
        hidden.append(np.maximum(normalized @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"]), 0))
    hidden = np.concatenate(hidden)
    np.testing.assert_allclose(second["mean"], hidden.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(second["var"], hidden.var(axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("filters", [(2, 3), (2, 3, 4)])
def test_scores_with_the_statistics_of_a_batch_are_those_of_training_without_dropout(filters):
    """With one batch: for the paper's networks, whose norms are folded into convolutions."""
    images = jax.random.normal(jax.random.key(2), (80, 12, 12, 1)) + 1.0
    architecture = fmd.architecture_from_linen(fmd.models.CNN(filters, num_classes=5, dropout=0.0))
    state = client(architecture, images)
    estimated = fmd.client.estimate_statistics(architecture, state, images)
    trained, _ = architecture.apply(*state[:2], images, train=True, key=jax.random.key(3))
    # The moving variance is unbiased, that of a training step is biased.
    np.testing.assert_allclose(fmd.score(architecture, estimated, images), trained, rtol=2e-2, atol=2e-2)
    dropping = fmd.architecture_from_linen(fmd.models.CNN(filters, num_classes=5, dropout=0.5))
    chex.assert_trees_all_equal(
        fmd.client.estimate_statistics(dropping, state, images).model_state, estimated.model_state
    )


def test_padding_rows_do_not_count():
    architecture = NETWORKS["linen"]()
    state, padded = client(architecture), jnp.concatenate([INPUTS, jnp.full((7, 6), jnp.nan)])
    for batch_size in (5, 100):
        estimate = partial(fmd.client.estimate_statistics, architecture, state, batch_size=batch_size)
        some = jax.jit(estimate)(padded, jnp.int32(10)).model_state
        chex.assert_tree_all_finite(some)
        if batch_size == 100:
            expected = estimate(INPUTS[:10]).model_state
            chex.assert_trees_all_close(some, expected, rtol=1e-5, atol=1e-6)


def test_a_norm_that_is_called_twice_has_the_mean_of_both_calls():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="first")
            return norm(x) + norm(x)

    architecture = fmd.architecture_from_linen(Twice())
    found = fmd.client.estimate_statistics(architecture, client(architecture), INPUTS)
    np.testing.assert_allclose(found.model_state["batch_stats"]["first"]["mean"], INPUTS.mean(axis=0), rtol=1e-5)


class Scaled(nn.Module):
    """A norm behind a constant and a weight whose own state normalizes it."""

    @nn.compact
    def __call__(self, x, train):
        x = x * self.variable("constants", "scale", lambda: jnp.float32(3.0)).value
        x = nn.SpectralNorm(nn.Dense(4, name="dense"))(x, update_stats=False)
        nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return x


def test_other_state_than_statistics_keeps_its_value():
    architecture = fmd.architecture_from_linen(Scaled())
    state = client(architecture)
    logits = np.asarray(architecture.apply(*state[:2], INPUTS, train=False)[0], np.float64)
    found = fmd.client.estimate_statistics(architecture, state, INPUTS).model_state
    norm = found["batch_stats"].pop("norm")
    np.testing.assert_allclose(norm["mean"], logits.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(norm["var"], logits.var(axis=0), rtol=1e-4)
    del state.model_state["batch_stats"]["norm"]
    chex.assert_trees_all_equal(found, state.model_state)


def test_norms_in_a_scan_over_layers_are_refused():
    """Flax traces the body of a scan twice, so that the number of moves is not known."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.BatchNorm(use_running_average=False, name="norm")(x), None

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            del train
            layers = nn.scan(
                Layer, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2
            )
            return layers(name="layers")(x, None)[0]

    architecture = fmd.architecture_from_linen(Layers(), train_argument="train")
    variables = Layers().init(jax.random.key(0), INPUTS, train=True)
    with pytest.raises(ValueError, match="BatchNorm layers/norm is traced more than once"):
        architecture.statistics(variables.pop("params"), variables, INPUTS)


def test_dropout_that_cannot_be_switched_off_is_refused():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            attention = nn.MultiHeadDotProductAttention(1, dropout_rate=0.5, deterministic=not train, name="attention")
            x = attention(x[:, None, :])[:, 0]
            return nn.BatchNorm(use_running_average=not train)(x)

    architecture = fmd.architecture_from_linen(Attention())
    with pytest.raises(ValueError, match="the deterministic of MultiHeadDotProductAttention 'attention' is set in its"):
        fmd.client.estimate_statistics(architecture, client(architecture), INPUTS)


def test_vmapped_clients_are_clients_one_by_one():
    architecture = NETWORKS["linen"]()
    keys = jax.random.split(jax.random.key(4), 3)
    states = jax.vmap(lambda key: fmd.ClientState(*architecture.init(key, INPUTS), (), ()))(keys)

    def estimate(state):
        return fmd.client.estimate_statistics(architecture, state, INPUTS, batch_size=5)

    together, alone = jax.vmap(estimate)(states), jax.lax.map(estimate, states)
    chex.assert_trees_all_close(together, alone, rtol=1e-5, atol=1e-6)


def test_networks_without_them_are_unchanged_and_unknown_ones_are_refused():
    architecture = fmd.architecture_from_linen(fmd.models.MLP((4,), num_classes=3))
    state = client(architecture)
    assert fmd.client.estimate_statistics(architecture, state, INPUTS) is state
    by_hand = fmd.Architecture(lambda key, inputs: ({}, {"count": jnp.zeros(())}), None)
    with pytest.raises(ValueError, match="does not say how its batch statistics are computed"):
        fmd.client.estimate_statistics(by_hand, fmd.ClientState({}, {"count": jnp.zeros(())}, (), ()), INPUTS)
