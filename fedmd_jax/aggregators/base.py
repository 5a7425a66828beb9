"""What an aggregator is: a function that combines the reports of all clients into a consensus, on the accelerator.

A round takes an aggregator as its argument `aggregator=`, and calls it as
`aggregator(report, in_axes, *, groups, mesh, clients_per_chunk)`, where `report(architecture, *arguments)` is what one
client sends, scores [M, C]. `in_axes` has an entry for each of `arguments`, not for `architecture`: 0 if it is per
client, None if it is shared, as in `map_groups`. The result is a function of weights and arguments that returns an
`Aggregate`. Read `from_all_scores` first, which makes an aggregator of a rule `(scores [K, M, C], weights
[K]) -> consensus [M, C]`; `mean.weighted_mean` is the one that adds scores without holding all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import chex
import jax.numpy as jnp

from fedmd_jax.mapping.chunking import valid_weights
from fedmd_jax.mapping.grouped import map_groups

PerGroup = Mapping[str, chex.Array]


class Aggregate(NamedTuple):
    """The result of an aggregation.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> groups = {"a": fmd.ArchitectureGroup(None, client_ids=(0, 1))}
      >>> aggregate = fmd.aggregators.weighted_mean(lambda architecture, own: own, (0,), groups=groups)
      >>> scores = {"a": jnp.array([[[1.0, 2.0]], [[jnp.nan, 0.0]]])}  # K = 2, M = 1, C = 2
      >>> result = aggregate({"a": jnp.ones(2)}, scores)
      >>> result.consensus.tolist(), bool(result.exists), result.finite["a"].tolist()
      ([[1.0, 2.0]], True, [True, False])
    """

    consensus: chex.Array  #: [M, C]; zeros if there is none
    exists: chex.Array  #: [], bool: False if no client with a weight reported finite scores; no client digests then
    finite: PerGroup  #: per group [K], bool: whether all scores of a client were finite; others are excluded


Aggregator = Callable[..., Callable[..., Aggregate]]  # (report, in_axes, **over) -> (weights, *arguments) -> Aggregate


def from_all_scores(rule: Callable[[chex.Array, chex.Array], chex.Array]) -> Aggregator:
    """Makes an aggregator of a rule that needs the scores of all clients at once, such as a median.

    All scores are gathered on every device: [K, M, C] for all K clients instead of their sum.

    Args:
      rule: (scores [K, M, C], weights [K]) -> consensus [M, C]. An excluded client has weight 0 and scores of 0: the
        rule must leave it out by its weight.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> def median(scores, weights):
      ...     return jnp.nanmedian(jnp.where(weights[:, None, None] > 0, scores, jnp.nan), axis=0)
      >>> median_of_clients = fmd.aggregators.from_all_scores(median)  # fmd.fedmd(..., aggregator=median_of_clients)
      >>> groups = {"all": fmd.ArchitectureGroup(None, (0, 1, 2))}
      >>> aggregate = median_of_clients(lambda architecture, own: own, (0,), groups=groups)
      >>> scores = jnp.array([[[1.0]], [[7.0]], [[jnp.nan]]])  # the last client is excluded
      >>> aggregate({"all": jnp.ones(3)}, {"all": scores}).consensus.tolist()
      [[4.0]]
    """

    def aggregator(report, in_axes, *, groups, mesh=None, **over):
        map_reports = map_groups(report, in_axes, groups=groups, mesh=mesh, **over)

        def aggregate(weights, *arguments):
            scores = map_reports(*arguments)
            every, weight, finite = concatenate_clients(scores, weights, list(groups))
            exists = jnp.any(weight > 0)
            consensus = rule(every, weight)
            return Aggregate(jnp.where(exists, consensus, 0.0), exists, finite)

        return aggregate

    return aggregator


def concatenate_clients(
    scores: PerGroup, weights: PerGroup, names: Sequence[str]
) -> tuple[chex.Array, chex.Array, PerGroup]:
    """The scores [K, M, C] and weights [K] of all clients, both 0 for excluded ones, and which scores are finite.

    Args:
      scores: per group, [K, M, C].
      weights: per group, [K].
      names: the groups in the order of the result; JAX sorts the names of mappings.

    >>> scores = {"a": jnp.array([[[1.0]], [[jnp.nan]]]), "b": jnp.ones((1, 1, 1))}
    >>> every, weight, finite = concatenate_clients(scores, {"a": jnp.ones(2), "b": jnp.ones(1)}, ["b", "a"])
    >>> every.tolist(), weight.tolist(), finite["a"].tolist()
    ([[[1.0]], [[1.0]], [[0.0]]], [1.0, 1.0, 0.0], [True, False])
    """
    finite = {name: jnp.isfinite(scores[name]).all(axis=(1, 2)) for name in names}
    valid = [jnp.where(finite[name], valid_weights(weights[name]), 0.0) for name in names]
    weight = jnp.concatenate(valid)
    every = jnp.concatenate([scores[name] for name in names])
    return jnp.where(weight[:, None, None] > 0, every, 0.0), weight, finite
