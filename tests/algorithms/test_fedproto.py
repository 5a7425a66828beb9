"""FedProto against NumPy, and where it is local training or FD."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import linen as nn

import fedmd_jax as fmd
from fedmd_jax.algorithms import Mean, fd, fedproto, fedtgp
from fedmd_jax.algorithms.fd import mean_probabilities
from fedmd_jax.algorithms.fedproto import _revisit, prototypes
from fedmd_jax.algorithms.fedtgp import send_trained

PUBLIC, KEY = toys.public(), jax.random.key(3)


def test_weight_zero_is_local_training_to_the_bit():
    groups = toys.groups()  # of 4 and 6 features
    federation, private = toys.federation(groups, algorithm=fedproto(weight=0.0)), toys.private(groups)
    states = federation.init(jax.random.key(0), PUBLIC, private)
    local, _ = federation.revisit(jax.tree.map(jnp.copy, states), private, KEY)
    rounds, _ = federation.round(states, PUBLIC, private, KEY)
    chex.assert_trees_all_equal(rounds, local)


def test_a_round_against_numpy():
    """One step of SGD on all examples. The table is the mean of the features of all examples of a class."""
    labels = {0: [0, 0, 1, 3], 1: [0, 1, 1, 2, 2], 2: [1, 2]}
    weight, rate, rng = 3.0, 0.05, np.random.default_rng(1)
    inputs = {k: rng.normal(size=(len(labels[k]), toys.NUM_FEATURES)).astype(np.float32) for k in labels}
    groups = {"linear": fmd.ArchitectureGroup(toys.linear(), tuple(labels))}
    private = fmd.stack_private(groups, {k: (inputs[k], labels[k]) for k in labels})
    federation = toys.federation(groups, algorithm=fedproto(weight=weight), revisit_training=toys.sgd(8))
    states = federation.init(jax.random.key(0), PUBLIC, private)
    w = np.asarray(states["linear"].params["w"], np.float64)
    states, info = federation.round(states, PUBLIC, private, KEY)

    features = {k: inputs[k].astype(np.float64) @ w[k] for k in labels}  # and the logits, since the biases are zero
    pooled, pooled_labels = np.concatenate([*features.values()]), np.concatenate([*labels.values()])
    table = np.stack([pooled[pooled_labels == c].mean(axis=0) for c in range(4)])
    for k in labels:
        probabilities, one_hot = np.exp(features[k]), np.eye(4)[labels[k]]
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        apart = features[k] - table[labels[k]]
        slope = probabilities - one_hot + weight * 2 * apart / 4
        loss = -np.log((probabilities * one_hot).sum(axis=1)) + weight * (apart**2).mean(axis=1)
        expected = w[k] - rate * inputs[k].T @ slope / len(labels[k])
        np.testing.assert_allclose(states["linear"].params["w"][k], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(info.revisit_loss["linear"][k, 0], loss.mean(), rtol=1e-5)


def client(architecture=None, num_padding=2):
    """A network, a client of it and its private dataset."""
    architecture = architecture or toys.tanh_mlp()
    inputs, labels = toys.examples(0, 9)
    private = fmd.PrivateDataset(jnp.asarray(inputs), jnp.asarray(labels, jnp.int32), jnp.int32(9 - num_padding))
    state = fmd.init_client(architecture, KEY, private.inputs, digest=toys.sgd(3), revisit=toys.sgd(3))
    return architecture, state, private


def test_with_probabilities_as_features_the_table_is_that_of_fd():
    network, state, private = client()

    def features(*arguments, **how):
        logits, model_state = network.apply(*arguments, **how)
        return (logits, jax.nn.softmax(logits)), model_state

    of_fedproto = prototypes(network._replace(features=features), state, PUBLIC, private, size=toys.NUM_CLASSES)
    chex.assert_trees_all_equal(of_fedproto, mean_probabilities(network, state, PUBLIC, private))


def test_classes_without_prototypes_have_no_term():
    """With an unknown table the revisit is that of FedMD; with one known row only its class has a term."""
    network, state, private = client()
    training = toys.sgd(16)

    @jax.jit
    def revisit(weights):
        table = Mean(jnp.full((toys.NUM_CLASSES, 6), 3.0), weights)
        return _revisit(network, state, private, table, KEY, training=training, size=6, weight=2.0)

    alone, expected = jax.jit(lambda: fmd.revisit(network, state, private, KEY, training=training))()
    unknown, info = revisit(jnp.zeros(toys.NUM_CLASSES))
    chex.assert_trees_all_equal((unknown.params, info.loss), (alone.params, expected.loss))
    for c in range(toys.NUM_CLASSES):
        _, info = revisit(jnp.zeros(toys.NUM_CLASSES).at[c].set(1.0))
        inputs, labels = private.inputs[:7], private.labels[:7]
        (_, features), _ = network.features(state.params, {}, inputs, train=False)
        apart = ((np.asarray(features, np.float64) - 3.0) ** 2).mean(axis=1)[labels == c].sum() / 7
        np.testing.assert_allclose(info.loss[0] - expected.loss[0], 2.0 * apart, rtol=1e-5, atol=1e-6)


def test_padding_rows_are_in_no_prototype():
    network, state, private = client()
    (_, features), _ = network.features(state.params, {}, private.inputs[:7], train=False)
    table = prototypes(network, state, PUBLIC, private, size=6)
    assert table.weights.sum() == 7
    for c in range(toys.NUM_CLASSES):
        of_class = np.asarray(features, np.float64)[private.labels[:7] == c]
        np.testing.assert_allclose(table.values[c], of_class.mean(axis=0) if len(of_class) else 0.0, atol=1e-6)


class Silent(nn.Module):
    """Sows no features."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(toys.NUM_CLASSES)(x)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (toys.linear()._replace(features=None), "group 'other': a network with features is wanted"),
        (fmd.architecture_from_linen(Silent()), "Silent must sow its features once"),
    ],
)
def test_networks_without_features_are_refused_before_anything_is_trained(network, message):
    groups = {**toys.groups(), "other": fmd.ArchitectureGroup(network, (7,))}
    private = toys.private(groups)
    toys.federation(groups, algorithm=fd()).init(KEY, PUBLIC, private)
    with pytest.raises(ValueError, match=message):
        toys.federation(groups, algorithm=fedproto()).init(KEY, PUBLIC, private)


@pytest.mark.parametrize(("name", "value"), [("weight", -1.0), ("weight", np.nan), ("feature_size", 0)])
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        fedproto(**{name: value})


@pytest.mark.parametrize(("feature_size", "size"), [(None, 4), (5, 5), (9, 9)])
@pytest.mark.parametrize("member", [fedproto, fedtgp])
def test_bytes_are_those_of_the_arrays_that_a_client_sends_and_gets(member, feature_size, size):
    groups, algorithm = toys.groups(), member(feature_size=feature_size)
    network, state, private = client()
    sizes = fmd.algorithms.Sizes(groups, {}, PUBLIC.inputs, subset_size=12, num_classes=toys.NUM_CLASSES)
    report = prototypes(network, state, PUBLIC, private, size=size)
    if member is fedproto:
        targets, _ = fmd.algorithms.send_table(Mean(*report), PUBLIC, (), KEY)
    else:
        memory = algorithm.new_memory(groups, {}, PUBLIC)
        server = partial(send_trained, max_margin=1.0, num_steps=1, learning_rate=0.1)
        targets, _ = jax.eval_shape(server, jax.tree.map(lambda leaf: leaf[None], report), PUBLIC, memory, KEY)
        targets = jax.eval_shape(lambda targets: jax.tree.map(lambda leaf: leaf[0], targets), targets)
    sent = [sum(leaf.size * leaf.dtype.itemsize for leaf in tree) for tree in (report, targets)]
    assert tuple(algorithm.traffic(sizes)) == tuple(sent) == (4 * 4 * (size + 1),) * 2
