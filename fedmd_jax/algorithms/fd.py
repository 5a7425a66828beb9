"""FD: clients send their mean probabilities of each class; each is regularised by those of the others."""

from functools import partial

import chex
import jax.numpy as jnp

from fedmd_jax.algorithms.base import Algorithm, Sizes, Traffic
from fedmd_jax.algorithms.class_tables import (
    class_means,
    revisit_with_table,
    send_table,
    with_private_statistics,
)
from fedmd_jax.algorithms.exchange import Mean, Report, exchange_algorithm, probabilities_report
from fedmd_jax.checks import check_not_negative
from fedmd_jax.client.losses import cross_entropy, kl_of_probabilities
from fedmd_jax.types import Architecture, ClientState, PrivateDataset, PublicDataset


def fd(*, gamma: float = 1.0) -> Algorithm:
    """FD: private training in which each example is also drawn towards the other clients' mean output for its label.

    A client sends the mean of its probabilities over its private examples of each class, and their numbers, by which
    the server weighs the means. For a class that no other client has, there is no regulariser.

    Bytes: [C, C] probabilities and [C] weights, up and down. No public data is needed but for the start.

    Args:
      gamma: factor of the regulariser; 0 for private training alone. The paper gives no value.

    Raises:
      ValueError: gamma is negative.

    References:
      Jeong et al. 2018 (arXiv 1811.11479), Algorithm 1. There the probabilities are collected while the client trains;
      here they are those of the network at the start of the round, without dropout, with the batch statistics of the
      private examples. There clients count equally, and a class that a client lacks is undefined. The cross entropy
      with the mean is here the KL divergence, which has the same gradient. Re-implementations that average logits, or
      include the client's own mean, are not FD.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((4,), num_classes=3))
      >>> groups = {"small": fmd.ArchitectureGroup(network, (0, 1))}
      >>> fmd.make_federation(groups, fmd.algorithms.fd(gamma=0.5), subset_size=100)
      Federation(clients={'small': 2}, algorithm='fd')
    """
    check_not_negative("gamma", gamma)
    return exchange_algorithm(
        "fd",
        report=mean_probabilities,
        aggregate=send_table,
        personal_target=leave_one_out,
        digest=None,
        revisit=partial(revisit_with_table, loss=partial(_loss, gamma=gamma)),
        traffic=_traffic,
    )


def mean_probabilities(
    architecture: Architecture, state: ClientState, subset: PublicDataset, private: PrivateDataset
) -> Report:
    """The mean of the probabilities over the private examples of each class, [C, C]."""
    del subset
    state = with_private_statistics(architecture, state, private)
    probabilities = probabilities_report(architecture, state, PublicDataset(private.inputs, None), private).values
    return class_means(probabilities, private, probabilities.shape[1])


def leave_one_out(targets: Mean, own: Report, mean: Mean) -> Mean:
    """The mean over all other clients, from the mean over all; rows have weight 0 if no other client has them.

    Other clients whose weights are less than a millionth of the row's are rounding errors, and count as none.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> own = fmd.algorithms.Report(jnp.array([[1.0], [2.0]]), jnp.array([1.0, 3.0]))
      >>> mean = fmd.algorithms.Mean(jnp.array([[4.0], [2.0]]), jnp.array([2.0, 3.0]))
      >>> others = fmd.algorithms.leave_one_out(mean, own, mean)
      >>> others.values.tolist(), others.weights.tolist()
      ([[7.0], [0.0]], [1.0, 0.0])
    """
    del targets
    weights = mean.weights - own.weights
    known = weights > 1e-6 * mean.weights
    others = mean.weights[:, None] * mean.values - own.weights[:, None] * own.values
    values = jnp.where(known[:, None], others / jnp.where(known, weights, 1.0)[:, None], 0.0)
    return Mean(values, jnp.where(known, weights, 0.0))


def _loss(logits: chex.Array, targets, *, gamma: float) -> chex.Array:
    labels, (probabilities, known) = targets
    to_others = kl_of_probabilities(logits, jnp.maximum(probabilities, 0.0))  # rounding may leave less than 0
    return cross_entropy(logits, labels) + gamma * jnp.where(known, to_others, 0.0)


def _traffic(sizes: Sizes) -> Traffic:
    return Traffic(*2 * (4 * sizes.num_classes * (sizes.num_classes + 1),))
