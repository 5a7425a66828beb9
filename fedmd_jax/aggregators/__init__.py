"""How the server combines what the clients report."""

from fedmd_jax.aggregators.base import Aggregate, Aggregator, from_all_scores
from fedmd_jax.aggregators.mean import weighted_consensus, weighted_mean

__all__ = [
    "Aggregate",
    "Aggregator",
    "from_all_scores",
    "weighted_consensus",
    "weighted_mean",
]
