"""What an aggregator is: a function that combines the reports of all clients into a consensus, on the accelerator.

An aggregator is called as `aggregator(report, in_axes, **over)` and returns a function `aggregate`; a round takes it as
its argument `aggregator=`. `report` computes the report of one client, scores [M, C]. `in_axes` tells for each of its
arguments whether it is per client (0) or shared (None). `over` are the `groups`, `mesh` and `clients_per_chunk` of
`map_groups`. `aggregate(weights, *arguments)` returns an `Aggregate`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax.numpy as jnp

from fedmd_jax.mapping.chunking import valid_weights
from fedmd_jax.mapping.grouped import map_groups

PerGroup = Mapping[str, chex.Array]


class Aggregate(NamedTuple):
    """The result of an aggregation."""

    consensus: chex.Array  #: [M, C]; zeros if there is none
    exists: chex.Array  #: [], bool: False if no client with a weight reported finite scores; no client digests then
    finite: PerGroup  #: per group [K], bool: whether all scores of a client were finite; others are excluded


Aggregator = Callable[..., Callable[..., Aggregate]]


def from_all_scores(rule: Callable[[chex.Array, chex.Array], chex.Array]) -> Aggregator:
    """Makes an aggregator of a rule that needs the scores of all clients at once, such as a median.

    All scores are gathered on every device: [K, M, C] for all K clients instead of their sum.

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
            valid = [jnp.where(finite[name], valid_weights(weights[name]), 0.0) for name in groups]
            weight = jnp.concatenate(valid)
            every = jnp.concatenate([scores[name] for name in groups])
            exists = jnp.any(weight > 0)
            consensus = rule(jnp.where(weight[:, None, None] > 0, every, 0.0), weight)
            return Aggregate(jnp.where(exists, consensus, 0.0), exists, finite)

        return aggregate

    return aggregator
