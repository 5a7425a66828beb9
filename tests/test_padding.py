"""The padding of groups and batches does not influence training, whatever the network computes."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from flax import linen as nn

import fedmd_jax as fmd
from fedmd_jax.models import BatchNorm


class Normalising(nn.Module):
    """Divides by the standard deviation of each example, which is zero in a row of zeros."""

    @nn.compact
    def __call__(self, x):
        mean = x.mean(-1, keepdims=True)
        return nn.Dense(3)((x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True)))


class Logarithmic(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(jnp.log(jnp.abs(x)) / jnp.linalg.norm(x, axis=-1, keepdims=True))


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.3, deterministic=not train)(nn.tanh(nn.Dense(4)(x)))
        return nn.Dense(3)(x)


class LayerNormalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm(epsilon=0.0)(x))


class BatchNormalised(nn.Module):
    """The batch norms of flax and of this package; a large epsilon, since some batches have one row."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, epsilon=0.1, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dense(3)(BatchNorm(epsilon=0.1)(nn.tanh(x), train=train))


NETWORKS = [Normalising, Logarithmic, Dropping, LayerNormalised, BatchNormalised]
ARCHITECTURES = {network.__name__: fmd.architecture_from_linen(network()) for network in NETWORKS}


def sgd(batch_size, num_epochs=2):
    return fmd.TrainingConfig(num_epochs=num_epochs, batch_size=batch_size, optimizer=optax.sgd(0.05))


def data(seed, num_examples, dtype=np.float32):
    inputs, labels = toys.examples(seed, num_examples)
    return jnp.asarray(inputs, dtype), jnp.asarray(labels % 3)


def padded(inputs, labels, num_rows, content):
    extra = num_rows - len(labels)
    inputs = jnp.pad(inputs, ((0, extra), (0, 0)), constant_values=content)
    return fmd.PrivateDataset(inputs, jnp.pad(labels, (0, extra)), jnp.int32(len(labels)))


@partial(jax.jit, static_argnums=(0, 1))
def train_group(network, batch_size, states, private, key, client_ids):
    revisit = partial(fmd.revisit, ARCHITECTURES[network], training=sgd(batch_size))
    return fmd.mapping.map_clients(revisit, (0, 0, 0))(states, private, fmd.mapping.client_keys(key, client_ids))


@pytest.mark.parametrize(
    ("network", "sizes", "batch_size", "dtype"),
    [
        *((network, (7, 12), 5, np.float32) for network in ARCHITECTURES),
        ("BatchNormalised", (1, 4), 9, np.float32),
        ("Dropping", (6, 3), 1, np.float32),
        ("Normalising", (7, 12), 5, jnp.bfloat16),
    ],
)
def test_a_client_in_a_padded_group_trains_as_it_does_alone(network, sizes, batch_size, dtype, key):
    client_ids, training = np.arange(2), sgd(batch_size)
    start = fmd.init_client(ARCHITECTURES[network], key, jnp.zeros((1, 5), dtype), digest=training, revisit=training)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), start)
    examples = [data(seed, size, dtype) for seed, size in enumerate(sizes)]
    alone = [
        train_group(
            network,
            batch_size,
            jax.tree.map(lambda leaf: leaf[None], start),
            jax.tree.map(lambda leaf: leaf[None], padded(*examples[k], sizes[k], 0.0)),
            key,
            client_ids[k : k + 1],
        )
        for k in range(2)
    ]
    expected = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *alone)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is np.float32 else {"rtol": 1e-2, "atol": 1e-3}
    for content in (0.0, np.nan, np.inf, -1e30):
        private = [padded(*each, max(sizes), content) for each in examples]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *private)
        found = train_group(network, batch_size, states, stacked, key, client_ids)
        assert found[1].finite.all()
        chex.assert_trees_all_close(found, expected, **tolerance)


def test_a_normalising_network_trains_as_numpy_does():
    """Two clients with 20 and 13 examples, batches of 8 in the order of `fit`, SGD in float64."""
    training, architecture, key = sgd(8), ARCHITECTURES["Normalising"], jax.random.key(3)
    groups = {"all": fmd.ArchitectureGroup(architecture, (0, 1))}
    examples = {client_id: tuple(map(np.asarray, data(client_id, size))) for client_id, size in ((0, 20), (1, 13))}
    private = fmd.stack_private(groups, examples)
    federation = fmd.fedmd(groups, subset_size=4, private_training=training, pooled_training=training,
                           digest_training=training, revisit_training=training)  # fmt: skip
    states = federation.init(key, toys.public()._replace(labels=None), private)
    start = jax.device_get(states["all"].params)
    states, info = federation.train_private(states, private, key)
    assert info["all"].finite.all()
    for client_id, (inputs, labels) in examples.items():
        own_key = jax.random.fold_in(key, client_id)
        indices, mask, _ = fmd.client.training.draw_batches(own_key, 20, len(labels), training=training)
        weights = {name: start["Dense_0"][name][client_id].astype(np.float64) for name in ("kernel", "bias")}
        x = inputs.astype(np.float64)
        x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
        for epoch in np.asarray(indices):
            for rows, real in zip(epoch, np.asarray(mask), strict=True):
                rows = rows[real]
                if not len(rows):
                    continue
                logits = x[rows] @ weights["kernel"] + weights["bias"]
                error = np.exp(logits - logits.max(-1, keepdims=True))
                error = error / error.sum(-1, keepdims=True) - np.eye(3)[labels[rows]]
                weights["kernel"] -= 0.05 * x[rows].T @ error / len(rows)
                weights["bias"] -= 0.05 * error.mean(0)
        for name, expected in weights.items():
            np.testing.assert_allclose(states["all"].params["Dense_0"][name][client_id], expected, rtol=1e-4, atol=1e-6)


def test_padding_of_scores_evaluation_validation_and_a_mesh():
    """Intermediate results are not NaN either: `jax_debug_nans` checks the results of every program."""
    architecture, key = ARCHITECTURES["Normalising"], jax.random.key(3)
    groups = {"many": fmd.ArchitectureGroup(architecture, range(3)), "one": fmd.ArchitectureGroup(architecture, [3])}
    private = fmd.stack_private(groups, {i: tuple(map(np.asarray, data(i, 5 + 4 * i))) for i in range(4)})
    public = fmd.public_dataset(*map(np.asarray, data(100, 23)))
    test = padded(*data(200, 9), 14, 0.0)
    how = fmd.TrainingConfig(
        num_epochs=4, batch_size=6, optimizer=optax.sgd(0.05), early_stopping=fmd.EarlyStopping(patience=1)
    )
    phases = {f"{name}_training": sgd(6) for name in ("pooled", "digest", "revisit")}
    results = []
    for mesh in (None, fmd.client_mesh(2)):
        federation = fmd.fedmd(
            groups, subset_size=11, public_training=how, private_training=how, **phases, mesh=mesh, clients_per_chunk=2
        )
        with jax.debug_nans(True):
            states = federation.init(key, public, private)
            validation = padded(*data(300, 5), 8, 0.0)
            states, info = federation.transfer_learn(states, public, private, key, validation, private)
            assert all((each.num_epochs <= 4).all() for each in info.public.values())
            states, history = fmd.run_federation(federation, states, public, private, key, num_rounds=1, test=test)
            results.append((fmd.gather_clients(states), history))
            one = jax.tree.map(lambda leaf: leaf[0], fmd.gather_clients(states)["many"])
            fmd.score(architecture, one, public.inputs, batch_size=7)
        assert {client.status for metrics in history for client in metrics.clients} == {"ok"}
        own = fmd.evaluate(architecture, one, fmd.PrivateDataset(*(rows[:9] for rows in test[:2]), 9))
        assert history[-1].clients[0].accuracy == own.accuracy
    (states, history), (on_mesh, history_on_mesh) = results
    chex.assert_trees_all_close(on_mesh, states, rtol=1e-4, atol=1e-5)
    assert [metrics.mean_accuracy for metrics in history] == [metrics.mean_accuracy for metrics in history_on_mesh]


@pytest.mark.parametrize("num_examples", [0, 3])
def test_masked_rows_repeat_a_real_row_of_their_batch(num_examples):
    indices, mask, _ = fmd.client.training.draw_batches(jax.random.key(0), 10, num_examples, training=sgd(4))
    for epoch in np.asarray(indices):
        for rows, real in zip(epoch, np.asarray(mask), strict=True):
            assert set(rows[~real]) <= ({rows[0]} if real.any() else {0})
