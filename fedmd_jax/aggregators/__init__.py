"""How the server combines what the clients report.

A new aggregation rule is a new file here. The short way: a function `rule(scores [K, M, C], weights [K]) -> consensus
[M, C]` over all K clients, made an aggregator by `from_all_scores(rule)`. A rule that is a sum over clients, and so
need not hold all scores, is an `Aggregator` itself: `(report, in_axes, *, groups, mesh, clients_per_chunk) ->
(weights, *arguments) -> Aggregate`, as in `mean.weighted_mean`. `base` describes both. It is used by `fedmd(...,
aggregator=...)`.
"""

from fedmd_jax.aggregators.base import (
    Aggregate as Aggregate,
    Aggregator as Aggregator,
    from_all_scores as from_all_scores,
)
from fedmd_jax.aggregators.mean import weighted_consensus as weighted_consensus, weighted_mean as weighted_mean
