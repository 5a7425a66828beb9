"""Federated learning by model distillation (FedMD) in JAX.

Clients own private data and their own network. They never share weights: each round they score a public subset, the
server averages the scores into a consensus, and each client digests the consensus, then revisits its private data.

Reference:
  Li and Wang, FedMD: Heterogenous Federated Learning via Model Distillation, 2019 (arXiv 1910.03581).
"""

from fedmd_jax import aggregators, algorithms, client, data, mapping, models, simulation, transforms
from fedmd_jax.aggregators import weighted_consensus
from fedmd_jax.algorithms import draw_public_subset, draw_stratified_subset, fedmd_round
from fedmd_jax.client import (
    EarlyStopping,
    TrainingConfig,
    adam,
    cross_entropy,
    digest,
    evaluate,
    init_client,
    kl,
    mae,
    mse,
    pretrain,
    revisit,
    score,
    transfer_learn,
)
from fedmd_jax.mapping import ArchitectureGroup, client_mesh, gather_clients, stack_private
from fedmd_jax.models import architecture_from_linen, architecture_from_nnx
from fedmd_jax.simulation import (
    Federation,
    communication_bytes,
    fedmd,
    labelled_dataset,
    public_dataset,
    run_federation,
    run_local_only,
    simulate_participation,
    vmap_federation,
)
from fedmd_jax.types import (
    Architecture,
    ClientState,
    Participants,
    Participation,
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
    "ClientState",
    "EarlyStopping",
    "Federation",
    "Participants",
    "Participation",
    "PrivateDataset",
    "PublicDataset",
    "RoundInfo",
    "TrainingConfig",
    "TrainingInfo",
    "TransferInfo",
    "adam",
    "aggregators",
    "algorithms",
    "architecture_from_linen",
    "architecture_from_nnx",
    "client",
    "client_mesh",
    "communication_bytes",
    "cross_entropy",
    "data",
    "digest",
    "draw_public_subset",
    "draw_stratified_subset",
    "evaluate",
    "fedmd",
    "fedmd_round",
    "gather_clients",
    "init_client",
    "kl",
    "labelled_dataset",
    "mae",
    "mapping",
    "models",
    "mse",
    "pretrain",
    "public_dataset",
    "revisit",
    "run_federation",
    "run_local_only",
    "score",
    "simulate_participation",
    "simulation",
    "stack_private",
    "transfer_learn",
    "transforms",
    "vmap_federation",
    "weighted_consensus",
]
