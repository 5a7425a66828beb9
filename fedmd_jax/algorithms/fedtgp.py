"""FedTGP: FedProto whose server trains the prototypes, so that they lie apart from each other."""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedmd_jax.algorithms.base import Algorithm, keep_unless
from fedmd_jax.algorithms.exchange import Mean, Report
from fedmd_jax.algorithms.fedproto import prototypes_algorithm
from fedmd_jax.checks import check_count, check_positive
from fedmd_jax.client.losses import cross_entropy
from fedmd_jax.client.training import Learner, TrainingConfig, fit
from fedmd_jax.models import MLP, architecture_from_linen
from fedmd_jax.types import Architecture, PublicDataset


class Generator(NamedTuple):
    """What the server remembers: a vector for each class, and the network that makes prototypes of them."""

    params: chex.ArrayTree
    exists: chex.Array  #: [], bool: False before the first round with reports


def fedtgp(
    *,
    weight: float = 10.0,
    max_margin: float = 100.0,
    num_steps: int = 200,
    learning_rate: float = 0.1,
    feature_size: int | None = None,
) -> Algorithm:
    """FedTGP: FedProto with prototypes that the server trains to be near those of the clients and apart by a margin.

    The server classifies each prototype of each client by its distances to the trained ones. The true distance is
    increased by a margin: the largest distance of a class to the nearest other one, of the mean prototypes. It needs
    the tables of all clients, not only their mean, so that they are gathered on every device, [K, C, D + 1].

    Bytes: [C, D] features and [C] weights, up and down. No public data is needed but for the start.

    Args:
      weight: factor of the mean squared error of features and prototype.
      max_margin: the margin is at most this.
      num_steps: steps of the server in each round, each on the prototypes of all clients.
      learning_rate: of the server's SGD.
      feature_size: as of `fedproto`.

    Raises:
      ValueError: as of `fedproto`, or a setting is not positive.

    References:
      Zhang et al. 2024 (arXiv 2401.03230), Algorithm 1, and its code in HtFLlib. As there, prototypes count equally,
      whatever the number of examples. The code trains in 100 epochs of batches of ten at a rate of 0.01; steps on all
      prototypes do not depend on the order of the clients. Its gradient is NaN at distance 0.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((4,), num_classes=3))
      >>> groups = {"small": fmd.ArchitectureGroup(network, (0, 1))}
      >>> fmd.make_federation(groups, fmd.algorithms.fedtgp(weight=5.0), subset_size=100)
      Federation(clients={'small': 2}, algorithm='fedtgp')
    """
    for name, value in {"max_margin": max_margin, "learning_rate": learning_rate}.items():
        check_positive(name, value)
    check_count("num_steps", num_steps)
    how: dict = {"max_margin": max_margin, "num_steps": num_steps, "learning_rate": learning_rate}
    return prototypes_algorithm(
        "fedtgp",
        weight=weight,
        feature_size=feature_size,
        new_memory=_new_memory,
        aggregate_all=partial(send_trained, **how),
    )


def send_trained(
    reports: Report,
    subset: PublicDataset,
    memory: Generator,
    key: chex.PRNGKey,
    *,
    max_margin: float,
    num_steps: int,
    learning_rate: float,
) -> tuple[Mean, Generator]:
    """The server: trains its generator on all prototypes, [K, C, D], and sends to each client what it generates."""
    del subset
    (num_clients, num_classes, size), reported = reports.values.shape, reports.weights > 0
    params = keep_unless(memory.exists, memory.params, _init(key, num_classes, size))
    margin = find_margin(reports.values, reported, max_margin=max_margin)
    # Prototypes that were reported come first, as the real rows of `fit`.
    order = jnp.argsort(~reported.reshape(-1), stable=True)
    prototypes, labels = reports.values.reshape(-1, size)[order], jnp.tile(jnp.arange(num_classes), num_clients)[order]
    training = TrainingConfig(
        num_epochs=num_steps, batch_size=len(labels), optimizer=optax.sgd(learning_rate), shuffle=False
    )
    learner, loss = Learner(params, {}, training.optimizer.init(params)), partial(margin_loss, margin=margin)
    learner, info = fit(CLASSIFIER, loss, learner, prototypes, labels, reported.sum(), key, training=training)
    memory = Generator(keep_unless(info.finite, learner.params, params), memory.exists | (reported.any() & info.finite))
    table = Mean(generate(memory.params), jnp.full(num_classes, memory.exists, jnp.float32))
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_clients, *leaf.shape)), table), memory


def find_margin(prototypes: chex.Array, reported: chex.Array, *, max_margin: float) -> chex.Array:
    """The largest distance of a class to the nearest other one, of the mean prototypes; `max_margin` at most.

    Args:
      prototypes: [K, C, D].
      reported: [K, C], bool.
      max_margin: also the margin if less than two classes are reported.
    """
    num_reports = reported.sum(axis=0)
    means = jnp.where(reported[..., None], prototypes, 0.0).sum(axis=0) / jnp.maximum(num_reports, 1)[:, None]
    known = num_reports > 0
    others = known[:, None] & known[None] & ~jnp.eye(len(known), dtype=bool)
    nearest = jnp.where(others, _distances(means, means), jnp.inf).min(axis=1)
    return jnp.minimum(jnp.where(known, nearest, 0.0).max(), max_margin)


def margin_loss(logits: chex.Array, labels: chex.Array, *, margin: chex.Array) -> chex.Array:
    """The cross entropy of negative distances [B, C], the true one of which is increased by the margin."""
    return cross_entropy(logits - margin * jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype), labels)


def generate(params: chex.ArrayTree) -> chex.Array:
    """The prototypes of all classes, [C, D]."""
    return _network(params["vectors"].shape[1]).apply(params["network"], {}, params["vectors"], train=False)[0]


def _init(key, num_classes, size):
    key_vectors, key_network = jax.random.split(key)
    vectors = jax.random.normal(key_vectors, (num_classes, size))
    return {"vectors": vectors, "network": _network(size).init(key_network, vectors)[0]}


def _new_memory(num_classes, size):
    params = jax.eval_shape(partial(_init, num_classes=num_classes, size=size), jax.random.key(0))
    return Generator(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params), jnp.array(False))


def _network(size):
    return architecture_from_linen(MLP((size,), num_classes=size))


def _distances(left, right):
    """Euclidean distances, [A, B]; their gradient is finite at 0."""
    return jnp.sqrt(jnp.sum((left[:, None] - right[None]) ** 2, axis=-1) + 1e-12)


def _classify(params, model_state, prototypes, **_):
    return -_distances(prototypes, generate(params)), model_state


# The generator as a network of `fit`: the logits of a prototype are its negative distances to those of all classes.
CLASSIFIER = Architecture(lambda key, prototypes: (_init(key, *prototypes.shape), {}), _classify)
