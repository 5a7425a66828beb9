"""Aggregators: how the reports of all clients become one consensus, without leaving the device.

An aggregator is a function `(report, in_axes, **over) -> aggregate`, given to a round as `aggregator=`. `report`
computes the report of one client, scores [M, C], and `in_axes` says which of its arguments are per client (0) or shared
(None); `over` are the `groups`, `mesh` and `clients_per_chunk` of `map_groups`. `aggregate(weights, *arguments)`
returns an `Aggregate`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmd_jax.checks import check_numbers, check_positive
from fedmd_jax.clients import check_per_client
from fedmd_jax.devices import map_groups, sum_groups
from fedmd_jax.mapping import ClientSums, add_devices, only_usable, weighted_sum_clients

PerGroup = Mapping[str, chex.Array]


class Aggregate(NamedTuple):
    """What the server makes of the reports of all clients."""

    consensus: chex.Array  # [M, C]; zeros if there is none
    exists: chex.Array  # [], bool: False if no client with a weight reported finite scores; no client digests then
    finite: PerGroup  # per group [K], bool: whether all scores of a client were finite; others are excluded


Aggregator = Callable[..., Callable[..., Aggregate]]


def weighted_mean(report: Callable, in_axes: Sequence[int | None], *, mesh: Mesh | None = None, **over) -> Callable:
    """The aggregator of FedMD: the weighted mean, summed while the clients report, so that no device holds all scores.

    One all-reduce of [M + 1, C] crosses devices. Arguments and result as of every aggregator (see this module).

    References:
      Li and Wang 2019, Algorithm 1, "Aggregate".
    """
    sum_reports = sum_groups(report, in_axes, mesh=mesh, **over)

    def aggregate(weights, *arguments):
        sums = sum_reports(scale_weights(weights), *arguments)
        return Aggregate(*mean_of_sums([sums], mesh), sums.finite)

    return aggregate


def from_all_scores(rule: Callable[[chex.Array, chex.Array], chex.Array]) -> Aggregator:
    """An aggregator out of a rule that needs the scores of all clients at once, such as a median.

    All scores are held on, and sent to, every device: [K, M, C] of all K clients instead of their sum.

    Args:
      rule: (scores [K, M, C], weights [K]) -> consensus [M, C]. Weights are zero for clients that are excluded; their
        scores are zeros then.

    Example:
      >>> import fedmd_jax as fmd
      >>> def median(scores, weights):
      ...     return jnp.nanmedian(jnp.where(weights[:, None, None] > 0, scores, jnp.nan), axis=0)
      >>> aggregate = from_all_scores(median)(lambda architecture, own: own, (0,), groups={"a": None, "b": None})
    """

    def aggregator(report, in_axes, *, groups, mesh=None, **over):
        map_reports = map_groups(report, in_axes, groups=groups, mesh=mesh, **over)

        def aggregate(weights, *arguments):
            scores = map_reports(*arguments)
            finite = {name: jnp.isfinite(scores[name]).all(axis=(1, 2)) for name in groups}
            heard = [jnp.where(finite[name], only_usable(weights[name]), 0.0) for name in groups]
            weight = jnp.concatenate(heard)
            every = jnp.concatenate([scores[name] for name in groups])
            exists = jnp.any(weight > 0)
            consensus = rule(jnp.where(weight[:, None, None] > 0, every, 0.0), weight)
            return Aggregate(jnp.where(exists, consensus, 0.0), exists, finite)

        return aggregate

    return aggregator


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


def bound_scores(scores: chex.Array, key: chex.PRNGKey | None = None, *, bound: float) -> chex.Array:
    """Clips every score to [-bound, bound]; non-finite scores stay non-finite, so that their client is excluded.

    A transform: `fedmd(..., transforms=(partial(bound_scores, bound=10.0),))`.

    Args:
      scores: [M, C].
      key: not used; every transform is given one.
      bound: positive and finite. One of n clients of equal weight then moves no entry of the consensus by more than
        2 * bound / n, whatever it sends.

    Raises:
      ValueError: a bound that is not positive and finite.

    References:
      Not in Li and Wang 2019. Norm bounding of contributions: Sun et al. 2019, "Can You Really Backdoor Federated
      Learning?", there of weight updates.

    >>> bound_scores(jnp.array([[1.0, -9.0, jnp.inf]]), bound=2.0).tolist()
    [[1.0, -2.0, inf]]
    """
    del key
    check_positive("bound", bound)
    return jnp.where(jnp.isfinite(scores), jnp.clip(scores, -bound, bound), scores)
