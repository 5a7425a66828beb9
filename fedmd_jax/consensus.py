"""The server's part: many clients' scores become one consensus, without leaving the device."""

import math
from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmd_jax.checks import check_numbers
from fedmd_jax.mapping import ClientSums, add_devices, only_usable, weighted_sum_clients

PerGroup = Mapping[str, chex.Array]


def weighted_consensus(scores: PerGroup, weights: PerGroup, *, mesh: Mesh | None = None) -> chex.Array:
    """Weighted mean of the scores of all clients of all groups.

    A client of weight zero, or whose scores are not all finite, contributes nothing, not even a NaN. Where that is
    everybody there is no consensus: the result is zeros, and the caller decides what to do (`fedmd_round` lets nobody
    digest).

    Args:
      scores: per group, [K, M, C].
      weights: per group, [K]; one that is negative or not finite counts as zero, and they need not sum to one.
      mesh: where the clients of each group are sharded over its only axis; the one collective is an all-reduce of
        [M + 1, C].

    Returns:
      Consensus, [M, C].

    Raises:
      ValueError: scores and weights are of different groups, or of different numbers of clients; no scores, or scores
        that are not floats or of different shapes.

    References:
      Li and Wang 2019, Algorithm 1, "Aggregate", and supplement: the weighted average with one c_k per client.

    >>> scores = {"a": jnp.array([[[1.0, 0.0]], [[3.0, 0.0]]]), "b": jnp.array([[[8.0, 4.0]]])}
    >>> weighted_consensus(scores, {"a": jnp.array([1.0, 1.0]), "b": jnp.array([2.0])}).tolist()
    [[5.0, 2.0]]
    """
    for name, score in scores.items():
        check_numbers(f"group {name!r}: scores", score, kind=jnp.floating, rank=3)
    if len({score.shape[1:] for score in scores.values()}) != 1 or any(0 in score.shape for score in scores.values()):
        shapes = {name: score.shape for name, score in scores.items()}
        raise ValueError(f"scores of one shape [K, M, C] but for K are needed, of at least one group, got {shapes}")
    check_per_client("weight", weights, {name: score.shape[0] for name, score in scores.items()})
    for name, weight in weights.items():
        check_numbers(f"group {name!r}: weights", weight)
    weights = scale_weights(weights)
    add_scores = weighted_sum_clients(lambda own: own, (0,), mesh)
    return mean_of_sums([add_scores(weights[name], scores[name]) for name in scores], mesh)[0]


def mean_of_sums(sums: Sequence[ClientSums], mesh: Mesh | None = None) -> tuple[chex.Array, chex.Array]:
    """The mean of all clients who are in these sums of scores.

    The weights travel with the scores, as one more row, so that one array crosses devices, once.

    Args:
      sums: of each group, total [D, M, C].
      mesh: of the sums.

    Returns:
      The mean [M, C], zeros where nobody is in it, and whether anybody is, [].

    >>> mean, anybody = mean_of_sums([ClientSums(jnp.array([[[3.0, 6.0]]]), jnp.array([1.5]), None)])
    >>> mean.tolist(), bool(anybody)
    ([[2.0, 4.0]], True)
    """
    total, weight = sum(each.total for each in sums), sum(each.weight for each in sums)
    row = jnp.broadcast_to(weight[:, None, None].astype(total.dtype), (*weight.shape, 1, total.shape[-1]))
    together = add_devices(jnp.concatenate([total, row], axis=1), mesh)  # [M + 1, C]
    scores, weight = together[:-1], together[-1, 0]
    return scores / jnp.where(weight > 0, weight, 1.0), weight > 0


def scale_weights(weights: PerGroup) -> dict[str, chex.Array]:
    """The same weights, in a unit in which they add up to 1 or less: no sum of scores times weights overflows.

    The unit is a power of two: it takes no bit of any weight, and so the mean of some clients does not hang on the
    weights of others, who are absent, to the bit.

    Args:
      weights: per group, [K]; those negative or not finite become zero. One that is 1e30 times smaller than the largest
        may vanish.

    >>> scaled = scale_weights({"a": jnp.array([1.0, 3.0]), "b": jnp.array([-1.0])})
    >>> {name: weight.tolist() for name, weight in scaled.items()}
    {'a': [0.0625, 0.1875], 'b': [0.0]}
    """
    weights = {name: only_usable(weight) for name, weight in weights.items()}
    largest = jax.lax.stop_gradient(jnp.max(jnp.stack([jnp.max(weight) for weight in weights.values()])))
    _, exponent = jnp.frexp(largest)  # the largest is below 2**exponent
    num_clients = sum(math.prod(weight.shape) for weight in weights.values())
    unit = jnp.ldexp(jnp.ones_like(largest), -exponent - (num_clients - 1).bit_length())
    return {name: weight * unit for name, weight in weights.items()}


def bound_scores(scores: chex.Array, bound: float | None) -> chex.Array:
    """Every score between -bound and bound; what is not finite stays so, since that is no score.

    Args:
      scores: [M, C].
      bound: positive; None leaves scores as they are. One of n clients of equal weight then moves no entry of the
        consensus by more than 2 * bound / n, whatever it sends.

    References:
      Not in Li and Wang 2019. Norm bounding of contributions: Sun et al. 2019, "Can You Really Backdoor Federated
      Learning?", there of weight updates.

    >>> bound_scores(jnp.array([[1.0, -9.0, jnp.inf]]), 2.0).tolist()
    [[1.0, -2.0, inf]]
    """
    return scores if bound is None else jnp.where(jnp.isfinite(scores), jnp.clip(scores, -bound, bound), scores)


def check_per_client(what: str, values: PerGroup, num_clients: Mapping[str, int]) -> None:
    """A `ValueError` where the groups, or the numbers of their clients, are not those of the values."""
    wanted, found = (
        {name: (k,) for name, k in num_clients.items()},
        {name: getattr(v, "shape", None) for name, v in values.items()},
    )
    if wanted != found:
        raise ValueError(f"one {what} per client is needed, of shapes {wanted}, got {found}")
