"""Federated learning by model distillation (FedMD) in JAX.

Clients own private data and their own network. They never share weights: each round they score a public subset, the
server averages the scores into a consensus, and each client digests the consensus, then revisits its private data.

Reference:
  Li and Wang, FedMD: Heterogenous Federated Learning via Model Distillation, 2019 (arXiv 1910.03581).
"""

from fedmd_jax.clients import (
    ArchitectureGroup,
    client_keys,
    client_mesh,
    map_clients,
    shard_clients,
    stack_private,
)
from fedmd_jax.communication import Communication, communication_bytes
from fedmd_jax.consensus import total_weight, weighted_consensus
from fedmd_jax.evaluate import Evaluation, evaluate
from fedmd_jax.federation import (
    ClientMetrics,
    Federation,
    RoundMetrics,
    fedmd,
    labelled_dataset,
    public_dataset,
    run_federation,
)
from fedmd_jax.local import Training, digest, fit, init_client, pretrain, revisit, score, transfer_learn
from fedmd_jax.losses import cross_entropy, kl, mae
from fedmd_jax.models import architecture_from_linen, architecture_from_nnx
from fedmd_jax.optimizers import adam
from fedmd_jax.round import consensus_weights, fedmd_round
from fedmd_jax.subset import draw_public_subset, draw_stratified_subset, take_in_order
from fedmd_jax.types import Architecture, ClientState, PrivateDataset, PublicDataset, RoundInfo

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "ArchitectureGroup",
    "ClientMetrics",
    "ClientState",
    "Communication",
    "Evaluation",
    "Federation",
    "PrivateDataset",
    "PublicDataset",
    "RoundInfo",
    "RoundMetrics",
    "Training",
    "adam",
    "architecture_from_linen",
    "architecture_from_nnx",
    "client_keys",
    "client_mesh",
    "communication_bytes",
    "consensus_weights",
    "cross_entropy",
    "digest",
    "draw_public_subset",
    "draw_stratified_subset",
    "evaluate",
    "fedmd",
    "fedmd_round",
    "fit",
    "init_client",
    "kl",
    "labelled_dataset",
    "mae",
    "map_clients",
    "pretrain",
    "public_dataset",
    "revisit",
    "run_federation",
    "score",
    "shard_clients",
    "stack_private",
    "take_in_order",
    "total_weight",
    "transfer_learn",
    "weighted_consensus",
]
