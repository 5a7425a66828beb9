"""The server's part: many clients' scores become one consensus, without leaving the device."""

from collections.abc import Mapping
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

Groups = Mapping[str, chex.Array]


def weighted_consensus(scores: Groups, weights: Groups, *, mesh: Mesh | None = None) -> chex.Array:
    """Weighted mean of the scores of all clients of all groups.

    A client of weight zero contributes nothing, not even a NaN. Where all weights are zero there is no consensus: the
    result is zeros, and the caller decides what to do (`fedmd_round` lets nobody digest).

    Args:
      scores: per group, [K, M, C].
      weights: per group, [K], not negative; they need not sum to one.
      mesh: where the clients of each group are sharded over its only axis; the one collective is an all-reduce of
        [M, C].

    Returns:
      Consensus, [M, C].

    References:
      Li and Wang 2019, Algorithm 1, "Aggregate", and supplement: the weighted average with one c_k per client.

    >>> scores = {"a": jnp.array([[[1.0, 0.0]], [[3.0, 0.0]]]), "b": jnp.array([[[8.0, 4.0]]])}
    >>> weighted_consensus(scores, {"a": jnp.array([1.0, 1.0]), "b": jnp.array([2.0])}).tolist()
    [[5.0, 2.0]]
    """
    chex.assert_rank(list(scores.values()), 3)
    chex.assert_rank(list(weights.values()), 1)
    scores, weights = dict(scores), dict(weights)
    if mesh is None:
        total = _weighted_sum(scores, weights)
    else:
        (axis,) = mesh.axis_names
        clients = PartitionSpec(axis)
        total = jax.shard_map(
            partial(_weighted_sum, axis_name=axis),
            mesh=mesh,
            in_specs=(clients, clients),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(scores, weights)
    return total / _or_one(total_weight(weights))


def total_weight(weights: Groups) -> chex.Array:
    """Sum of the weights of all clients, []."""
    return sum(jnp.sum(weight) for weight in weights.values())


def _weighted_sum(scores, weights, axis_name=None):
    # Group by group, so that the scores of all clients are never one array.
    total = sum(
        jnp.einsum("k,kmc->mc", weights[name], _silence_unweighted(scores[name], weights[name])) for name in scores
    )
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _silence_unweighted(scores, weights):
    return jnp.where((weights > 0)[:, None, None], scores, 0.0)  # 0 * NaN would be NaN


def _or_one(weight):
    return jnp.where(weight > 0, weight, 1.0)
