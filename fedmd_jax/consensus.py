"""The server's part: many clients' scores become one consensus, without leaving the device."""

from collections.abc import Mapping

import chex
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmd_jax.mapping import add_devices, weighted_sum_clients

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
    check_weights(weights, {name: score.shape[0] for name, score in scores.items()})
    shares = consensus_shares(weights)
    add_scores = weighted_sum_clients(lambda own: own, (0,), mesh)
    return add_devices(sum(add_scores(shares[name], scores[name]) for name in scores), mesh)


def consensus_shares(weights: PerGroup) -> dict[str, chex.Array]:
    """What each client's scores contribute to the consensus: weights that sum to one over all groups, or all zeros.

    Args:
      weights: per group, [K]; negative ones count as zero.

    >>> shares = consensus_shares({"a": jnp.array([1.0, 2.0]), "b": jnp.array([1.0])})
    >>> {name: share.tolist() for name, share in shares.items()}
    {'a': [0.25, 0.5], 'b': [0.25]}
    """
    # First by the largest, so that the sum cannot overflow.
    largest = jnp.max(jnp.stack([jnp.max(weight) for weight in weights.values()]))
    weights = {name: jnp.maximum(weight, 0.0) / _or_one(largest) for name, weight in weights.items()}
    total = _or_one(total_weight(weights))
    return {name: weight / total for name, weight in weights.items()}


def total_weight(weights: PerGroup) -> chex.Array:
    """Sum of the weights of all clients, []; negative ones count as zero."""
    return sum(jnp.sum(jnp.maximum(weight, 0.0)) for weight in weights.values())


def check_weights(weights: PerGroup, num_clients: Mapping[str, int]) -> None:
    """A `ValueError` where the groups, or the numbers of their clients, are not those of the weights."""
    wanted, found = {name: (k,) for name, k in num_clients.items()}, {name: w.shape for name, w in weights.items()}
    if wanted != found:
        raise ValueError(f"one weight per client is needed, of shapes {wanted}, got {found}")


def _or_one(weight):
    return jnp.where(weight > 0, weight, 1.0)
