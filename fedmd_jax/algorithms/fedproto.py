"""FedProto: clients send their mean features of each class, and train their features towards the clients' mean."""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.algorithms.base import Algorithm, Sizes, Traffic
from fedmd_jax.algorithms.class_tables import (
    class_means,
    revisit_with_table,
    send_table,
    with_private_statistics,
)
from fedmd_jax.algorithms.exchange import Mean, Report, exchange_round
from fedmd_jax.checks import check_count, check_not_negative
from fedmd_jax.client.features import with_features
from fedmd_jax.client.losses import cross_entropy, mse
from fedmd_jax.client.scoring import score
from fedmd_jax.client.training import TrainingConfig
from fedmd_jax.mapping.groups import Groups
from fedmd_jax.types import Architecture, ClientState, PrivateDataset, PublicDataset, TrainingInfo


def fedproto(*, weight: float = 1.0, feature_size: int | None = None) -> Algorithm:
    """FedProto: private training in which the features of each example are drawn towards the prototype of its class.

    A prototype is the mean of the features of a class, [D], over the examples of all clients. A class without one has
    no such term. Networks must have features, `Architecture.features`; those of this package have. Clients are
    evaluated by their scores.

    Bytes: [C, D] features and [C] weights, up and down. No public data is needed but for the start.

    Args:
      weight: factor of the mean squared error of features and prototype; 0 for private training alone.
      feature_size: number of features that are exchanged, D. Those of a network that has more or fewer are pooled, see
        `client.pool_features`. None for the smallest number of all networks.

    Raises:
      ValueError: the weight is negative, or the size below 1. `Federation.init` raises it for networks without
        features.

    References:
      Tan et al. 2022 (arXiv 2105.00243), Algorithm 1, equations 3 and 6 to 8. Equation 6 divides once more by the
      number of clients, which shrinks the prototypes. The released code does not, and lets clients count equally; it
      collects prototypes in training mode while the network changes, here they are those of the start of the round,
      without dropout, with the batch statistics of the private examples, so that the first round has them, too. The
      paper also classifies by the nearest prototype. Pooling is from HtFLlib (arXiv 2506.03954).

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((4,), num_classes=3))
      >>> groups = {"small": fmd.ArchitectureGroup(network, (0, 1))}
      >>> fmd.make_federation(groups, fmd.algorithms.fedproto(weight=0.5), subset_size=100)
      Federation(clients={'small': 2}, algorithm='fedproto')
    """
    return prototypes_algorithm("fedproto", weight=weight, feature_size=feature_size, aggregate=send_table)


def prototypes_algorithm(
    name: str,
    *,
    weight: float,
    feature_size: int | None = None,
    new_memory: Callable[[int, int], chex.ArrayTree] | None = None,
    **functions: Any,
) -> Algorithm:
    """Makes an algorithm whose clients send prototypes and are trained towards those of the server.

    Args:
      name: as on the command line.
      weight: as of `fedproto`.
      feature_size: as of `fedproto`.
      new_memory: (C, D) -> what the server remembers before the first round.
      **functions: `aggregate` or `aggregate_all` of `exchange_round`, whose targets are a `Mean` of [C, D].

    Raises:
      ValueError: as of `fedproto`.

    Example:
      >>> import fedmd_jax as fmd
      >>> fmd.algorithms.prototypes_algorithm("fedproto", weight=1.0, aggregate=fmd.algorithms.send_table).name
      'fedproto'
    """
    check_not_negative("weight", weight)
    if feature_size is not None:
        check_count("feature_size", feature_size)

    def table_shape(groups, inputs):
        num_classes, smallest = _table_shape(groups, inputs)
        return num_classes, smallest if feature_size is None else feature_size

    def round_(states, public, *arguments, groups, **settings):
        size = table_shape(groups, public.inputs)[1]
        how: dict = {"report": partial(prototypes, size=size), "digest": None, **functions, **settings}
        how["revisit"] = partial(_revisit, size=size, weight=weight)
        return exchange_round(states, public, *arguments, groups=groups, **how)

    def traffic(sizes: Sizes):
        num_classes, size = table_shape(sizes.groups, sizes.inputs)
        return Traffic(*2 * (4 * num_classes * (size + 1),))

    def memory(groups, states, public):
        return new_memory(*table_shape(groups, public.inputs))

    more: dict = {} if new_memory is None else {"new_memory": memory}
    return Algorithm(name=name, round=round_, traffic=traffic, check=table_shape, **more)


def prototypes(
    architecture: Architecture, state: ClientState, subset: PublicDataset, private: PrivateDataset, *, size: int
) -> Report:
    """The mean of the features over the private examples of each class, [C, size]."""
    del subset
    state = with_private_statistics(architecture, state, private)
    outputs = score(with_features(architecture, size), state, private.inputs)
    return class_means(outputs[:, -size:], private, outputs.shape[1] - size)


def _revisit(
    architecture: Architecture,
    state: ClientState,
    private: PrivateDataset,
    table: Mean,
    key: chex.PRNGKey,
    *,
    training: TrainingConfig,
    size: int,
    weight: float,
) -> tuple[ClientState, TrainingInfo]:
    how: dict = {"training": training, "loss": partial(_loss, weight=weight)}
    return revisit_with_table(with_features(architecture, size), state, private, table, key, **how)


def _loss(outputs: chex.Array, targets, *, weight: float) -> chex.Array:
    labels, (rows, known) = targets
    num_classes = outputs.shape[1] - rows.shape[1]
    to_prototype = mse(outputs[:, num_classes:], rows)
    return cross_entropy(outputs[:, :num_classes], labels) + weight * jnp.where(known, to_prototype, 0.0)


def _table_shape(groups: Groups, inputs: chex.Array) -> tuple[int, int]:
    """Number of classes and the smallest number of features of all networks, without computing anything."""
    shapes = []
    for name, group in groups.items():
        network = group.architecture
        if network.features is None:
            raise ValueError(f"group {name!r}: a network with features is wanted, `Architecture.features`, got None")

        def outputs(key, inputs, network=network):
            return network.features(*network.init(key, inputs), inputs, train=False)[0]

        one = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype)
        logits, features = jax.eval_shape(outputs, jax.random.key(0), one)
        shapes.append((logits.shape[1], features.shape[1]))
    return shapes[0][0], min(size for _, size in shapes)
