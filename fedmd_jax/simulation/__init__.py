"""Many clients on your devices: federations, populations, participation, metrics."""

from fedmd_jax.simulation.cohorts import Cohort, cohort_sizes, draw_cohort, get_rows, set_rows
from fedmd_jax.simulation.communication import CommunicationCost, communication_bytes
from fedmd_jax.simulation.federation import Federation, fedmd, run_federation, run_local_only, vmap_federation
from fedmd_jax.simulation.federation_data import labelled_dataset, public_dataset
from fedmd_jax.simulation.metrics import ClientMetrics, RoundMetrics
from fedmd_jax.simulation.participation import draw_participation, simulate_participation
from fedmd_jax.simulation.population import (
    Population,
    evaluate_population,
    init_population,
    population_round,
    run_population,
    transfer_learn_population,
)

__all__ = [
    "ClientMetrics",
    "Cohort",
    "CommunicationCost",
    "Federation",
    "Population",
    "RoundMetrics",
    "cohort_sizes",
    "communication_bytes",
    "draw_cohort",
    "draw_participation",
    "evaluate_population",
    "fedmd",
    "get_rows",
    "init_population",
    "labelled_dataset",
    "population_round",
    "public_dataset",
    "run_federation",
    "run_local_only",
    "run_population",
    "set_rows",
    "simulate_participation",
    "transfer_learn_population",
    "vmap_federation",
]
