"""Federated learning by model distillation (FedMD) in JAX.

Clients own private data and their own network. They never share weights: each round they score a public subset, the
server averages the scores into a consensus, and each client digests the consensus, then revisits its private data.

Reference:
  Li and Wang, FedMD: Heterogenous Federated Learning via Model Distillation, 2019 (arXiv 1910.03581).
"""

from fedmd_jax.attendance import all_clients, draw_attendance, simulate_attendance
from fedmd_jax.clients import ArchitectureGroup, client_keys, stack_private
from fedmd_jax.cohorts import Cohort, cohort_sizes, draw_cohort, put_clients, take_clients
from fedmd_jax.communication import Communication, communication_bytes
from fedmd_jax.consensus import bound_scores, weighted_consensus
from fedmd_jax.datasets import labelled_dataset, public_dataset
from fedmd_jax.devices import client_costs, map_groups, sum_groups
from fedmd_jax.evaluate import Evaluation, evaluate
from fedmd_jax.federation import Federation, fedmd, run_federation, run_local, vmap_federation
from fedmd_jax.local import Training, digest, fit, init_client, pretrain, revisit, score, transfer_learn
from fedmd_jax.losses import cross_entropy, kl, mae, mse
from fedmd_jax.mapping import client_mesh, map_clients, shard_clients, weighted_sum_clients
from fedmd_jax.metrics import ClientMetrics, RoundMetrics
from fedmd_jax.models import architecture_from_linen, architecture_from_nnx
from fedmd_jax.optimizers import adam
from fedmd_jax.population import (
    Population,
    evaluate_population,
    init_population,
    population_round,
    run_population,
    transfer_learn_population,
)
from fedmd_jax.processes import on_host
from fedmd_jax.round import fedmd_round
from fedmd_jax.spread import Spread, gather_clients, share_with_clients, spread_clients
from fedmd_jax.stopping import EarlyStopping
from fedmd_jax.subset import draw_public_subset, draw_stratified_subset, take_in_order
from fedmd_jax.types import (
    Architecture,
    Attendance,
    ClientState,
    Participants,
    PrivateDataset,
    PublicDataset,
    RoundInfo,
    TrainingInfo,
    TransferInfo,
)

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "ArchitectureGroup",
    "Attendance",
    "ClientMetrics",
    "ClientState",
    "Cohort",
    "Communication",
    "EarlyStopping",
    "Evaluation",
    "Federation",
    "Participants",
    "Population",
    "PrivateDataset",
    "PublicDataset",
    "RoundInfo",
    "RoundMetrics",
    "Spread",
    "Training",
    "TrainingInfo",
    "TransferInfo",
    "adam",
    "all_clients",
    "architecture_from_linen",
    "architecture_from_nnx",
    "bound_scores",
    "client_costs",
    "client_keys",
    "client_mesh",
    "cohort_sizes",
    "communication_bytes",
    "cross_entropy",
    "digest",
    "draw_attendance",
    "draw_cohort",
    "draw_public_subset",
    "draw_stratified_subset",
    "evaluate",
    "evaluate_population",
    "fedmd",
    "fedmd_round",
    "fit",
    "gather_clients",
    "init_client",
    "init_population",
    "kl",
    "labelled_dataset",
    "mae",
    "map_clients",
    "map_groups",
    "mse",
    "on_host",
    "population_round",
    "pretrain",
    "public_dataset",
    "put_clients",
    "revisit",
    "run_federation",
    "run_local",
    "run_population",
    "score",
    "shard_clients",
    "share_with_clients",
    "simulate_attendance",
    "spread_clients",
    "stack_private",
    "sum_groups",
    "take_clients",
    "take_in_order",
    "transfer_learn",
    "transfer_learn_population",
    "vmap_federation",
    "weighted_consensus",
    "weighted_sum_clients",
]
