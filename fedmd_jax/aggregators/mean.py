"""The weighted mean of the clients' scores, as in FedMD."""

import math
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmd_jax.aggregators.base import Aggregate, PerGroup
from fedmd_jax.checks import check_numbers
from fedmd_jax.mapping.chunking import PartialSums, all_reduce, valid_weights, weighted_sum_clients
from fedmd_jax.mapping.grouped import sum_groups
from fedmd_jax.mapping.groups import check_per_client


def weighted_mean(report: Callable, in_axes: Sequence[int | None], *, mesh: Mesh | None = None, **over) -> Callable:
    """The aggregator of FedMD: the weighted mean, as a streamed sum, so that no device holds all scores.

    Its only collective is one all-reduce of [M + 1, C]. Arguments and result are those of every aggregator, see
    `aggregators.base`.

    References:
      Li and Wang 2019, Algorithm 1, "Aggregate".

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> groups = {"a": fmd.ArchitectureGroup(None, client_ids=(0, 1))}
      >>> def report(architecture, scores, bias):  # one client's; usually the scores of its network
      ...     return scores + bias
      >>> aggregate = fmd.aggregators.weighted_mean(report, (0, None), groups=groups)
      >>> scores = {"a": jnp.array([[[0.0, 4.0]], [[8.0, 0.0]]])}  # K = 2, M = 1, C = 2
      >>> aggregate({"a": jnp.array([3.0, 1.0])}, scores, 1.0).consensus.tolist()
      [[3.0, 4.0]]
    """
    sum_reports = sum_groups(report, in_axes, mesh=mesh, **over)

    def aggregate(weights, *arguments):
        sums = sum_reports(scale_weights(weights), *arguments)
        return Aggregate(*finish_mean([sums], mesh), sums.finite)

    return aggregate


def weighted_consensus(scores: PerGroup, weights: PerGroup, *, mesh: Mesh | None = None) -> chex.Array:
    """Weighted mean of the scores of all clients of all groups.

    Clients with weight zero or with non-finite scores are excluded. If that excludes all clients the result is zeros;
    `fedmd_round` then skips the digests.

    Args:
      scores: per group, [K, M, C].
      weights: per group, [K]; they need not sum to one. Negative and non-finite weights count as zero.
      mesh: mesh over whose only axis the clients of each group are sharded. The only collective is an all-reduce of
        [M + 1, C].

    Returns:
      Consensus, [M, C].

    Raises:
      ValueError: scores and weights differ in their groups or numbers of clients; there are no scores, or they are not
        floats, or they differ in shape.

    References:
      Li and Wang 2019, Algorithm 1, "Aggregate", and supplement: the weighted average with one c_k per client.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> scores = {"a": jnp.array([[[1.0, 0.0]], [[3.0, 0.0]]]), "b": jnp.array([[[8.0, 4.0]]])}
      >>> fmd.weighted_consensus(scores, {"a": jnp.array([1.0, 1.0]), "b": jnp.array([2.0])}).tolist()
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
    return finish_mean([add_scores(weights[name], scores[name]) for name in scores], mesh)[0]


def finish_mean(sums: Sequence[PartialSums], mesh: Mesh | None = None) -> tuple[chex.Array, chex.Array]:
    """The weighted mean from partial sums of scores.

    The sum of weights is one more row of the array of scores, so that a single all-reduce is enough.

    Args:
      sums: partial sums of each group, total [D, M, C].
      mesh: mesh of the sums.

    Returns:
      The mean [M, C], zeros if no client is in it, and whether any client is, [].

    >>> mean, any_client = finish_mean([PartialSums(jnp.array([[[3.0, 6.0]]]), jnp.array([1.5]), None)])
    >>> mean.tolist(), bool(any_client)
    ([[2.0, 4.0]], True)
    """
    total, weight = sum(each.total for each in sums), sum(each.weight for each in sums)
    row = jnp.broadcast_to(weight[:, None, None].astype(total.dtype), (*weight.shape, 1, total.shape[-1]))
    reduced = all_reduce(jnp.concatenate([total, row], axis=1), mesh)  # [M + 1, C]
    scores, weight = reduced[:-1], reduced[-1, 0]
    return scores / jnp.where(weight > 0, weight, 1.0), weight > 0


def scale_weights(weights: PerGroup) -> dict[str, chex.Array]:
    """Scales weights so that they sum to at most 1, and sums of scores times weights do not overflow.

    The factor is a power of two and therefore exact: the mean over the clients that take part does not depend, to the
    bit, on the weights of dropped clients.

    Args:
      weights: per group, [K]. Negative and non-finite weights become zero. Weights 1e30 times smaller than the largest
        may underflow to zero.

    >>> scaled = scale_weights({"a": jnp.array([1.0, 3.0]), "b": jnp.array([-1.0])})
    >>> {name: weight.tolist() for name, weight in scaled.items()}
    {'a': [0.0625, 0.1875], 'b': [0.0]}
    """
    weights = {name: valid_weights(weight) for name, weight in weights.items()}
    largest = jax.lax.stop_gradient(jnp.max(jnp.stack([jnp.max(weight) for weight in weights.values()])))
    _, exponent = jnp.frexp(largest)  # the largest is below 2**exponent
    num_clients = sum(math.prod(weight.shape) for weight in weights.values())
    unit = jnp.ldexp(jnp.ones_like(largest), -exponent - (num_clients - 1).bit_length())
    return {name: weight * unit for name, weight in weights.items()}
