"""The server's part: many clients' scores become one consensus, without leaving the device."""

from collections.abc import Mapping
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

PerGroup = Mapping[str, chex.Array]


def weighted_consensus(scores: PerGroup, weights: PerGroup, *, mesh: Mesh | None = None) -> chex.Array:
    """Weighted mean of the scores of all clients of all groups.

    A client of weight zero contributes nothing, not even a NaN. Where all weights are zero there is no consensus: the
    result is zeros, and the caller decides what to do (`fedmd_round` lets nobody digest).

    Args:
      scores: per group, [K, M, C].
      weights: per group, [K], not negative (a negative one counts as zero); they need not sum to one.
      mesh: where the clients of each group are sharded over its only axis; the one collective is an all-reduce of
        [M, C].

    Returns:
      Consensus, [M, C].

    Raises:
      ValueError: scores and weights are of different groups, or of different numbers of clients.

    References:
      Li and Wang 2019, Algorithm 1, "Aggregate", and supplement: the weighted average with one c_k per client.

    >>> scores = {"a": jnp.array([[[1.0, 0.0]], [[3.0, 0.0]]]), "b": jnp.array([[[8.0, 4.0]]])}
    >>> weighted_consensus(scores, {"a": jnp.array([1.0, 1.0]), "b": jnp.array([2.0])}).tolist()
    [[5.0, 2.0]]
    """
    chex.assert_rank(list(scores.values()), 3)
    wanted = {name: (score.shape[0],) for name, score in scores.items()}
    found = {name: weight.shape for name, weight in weights.items()}
    if wanted != found:
        raise ValueError(f"one weight per client is needed, of shapes {wanted}, got {found}")
    scores, weights = dict(scores), _normalise(weights)
    if mesh is None:
        return _weighted_sum(scores, weights)
    (axis,) = mesh.axis_names
    reduce = partial(_weighted_sum_of_shards, axis_name=axis)
    # Every device has all weights: they are a few numbers, and normalising shards of them would need collectives.
    return jax.shard_map(
        reduce, mesh=mesh, in_specs=(PartitionSpec(axis), PartitionSpec()), out_specs=PartitionSpec(), check_vma=False
    )(scores, weights)


def total_weight(weights: PerGroup) -> chex.Array:
    """Sum of the weights of all clients, []; negative ones count as zero."""
    return sum(jnp.sum(jnp.maximum(weight, 0.0)) for weight in weights.values())


def _normalise(weights):
    """Weights that sum to one, or all zeros; first by the largest, so that the sum cannot overflow."""
    largest = jnp.max(jnp.stack([jnp.max(weight) for weight in weights.values()]))
    weights = {name: jnp.maximum(weight, 0.0) / _or_one(largest) for name, weight in weights.items()}
    total = _or_one(total_weight(weights))
    return {name: weight / total for name, weight in weights.items()}


def _weighted_sum(scores, weights):
    # Group by group, so that the scores of all clients are never one array.
    return sum(
        jnp.einsum("k,kmc->mc", weights[name], _silence_unweighted(scores[name], weights[name])) for name in scores
    )


def _weighted_sum_of_shards(scores, weights, *, axis_name):
    device = jax.lax.axis_index(axis_name)
    mine = {
        name: jax.lax.dynamic_slice_in_dim(weights[name], device * score.shape[0], score.shape[0])
        for name, score in scores.items()
    }
    return jax.lax.psum(_weighted_sum(scores, mine), axis_name)


def _silence_unweighted(scores, weights):
    return jnp.where((weights > 0)[:, None, None], scores, 0.0)  # 0 * NaN would be NaN


def _or_one(weight):
    return jnp.where(weight > 0, weight, 1.0)
