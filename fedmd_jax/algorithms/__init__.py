"""Rounds of federated algorithms as pure functions: a file for each algorithm, and what their rounds share."""

from fedmd_jax.algorithms.fedmd import fedmd_round
from fedmd_jax.algorithms.participation import ParticipationPolicy, all_clients
from fedmd_jax.algorithms.public_subset import draw_public_subset, draw_stratified_subset, first_examples

__all__ = [
    "ParticipationPolicy",
    "all_clients",
    "draw_public_subset",
    "draw_stratified_subset",
    "fedmd_round",
    "first_examples",
]
