"""Federated learning by model distillation (FedMD) in JAX.

Clients own private data and their own network. They never share weights: each round they score a public subset, the
server averages the scores into a consensus, and each client digests the consensus, then revisits its private data.

Reference:
  Li and Wang, FedMD: Heterogenous Federated Learning via Model Distillation, 2019 (arXiv 1910.03581).
"""

from fedmd_jax import (
    aggregators as aggregators,
    algorithms as algorithms,
    client as client,
    data as data,
    loggers as loggers,
    mapping as mapping,
    models as models,
    plot as plot,
    simulation as simulation,
    transforms as transforms,
)
from fedmd_jax.aggregators import weighted_consensus as weighted_consensus
from fedmd_jax.algorithms import (
    draw_public_subset as draw_public_subset,
    draw_stratified_subset as draw_stratified_subset,
    fedmd_round as fedmd_round,
)
from fedmd_jax.client import (
    EarlyStopping as EarlyStopping,
    TrainingConfig as TrainingConfig,
    adam as adam,
    cross_entropy as cross_entropy,
    digest as digest,
    evaluate as evaluate,
    init_client as init_client,
    kl as kl,
    mae as mae,
    mse as mse,
    pretrain as pretrain,
    revisit as revisit,
    score as score,
    transfer_learn as transfer_learn,
)
from fedmd_jax.experiments.export import export_client as export_client, import_client as import_client
from fedmd_jax.experiments.trained_run import load_run as load_run
from fedmd_jax.mapping import (
    ArchitectureGroup as ArchitectureGroup,
    client_mesh as client_mesh,
    gather_clients as gather_clients,
    stack_private as stack_private,
)
from fedmd_jax.models import (
    architecture_from_linen as architecture_from_linen,
    architecture_from_nnx as architecture_from_nnx,
)
from fedmd_jax.simulation import (
    Ensemble as Ensemble,
    Federation as Federation,
    communication_bytes as communication_bytes,
    fedmd as fedmd,
    labelled_dataset as labelled_dataset,
    make_federation as make_federation,
    public_dataset as public_dataset,
    run_federation as run_federation,
    run_local_only as run_local_only,
    simulate_participation as simulate_participation,
    trained_clients as trained_clients,
    vmap_federation as vmap_federation,
)
from fedmd_jax.types import (
    Architecture as Architecture,
    ClientState as ClientState,
    FederationState as FederationState,
    Participants as Participants,
    Participation as Participation,
    PrivateDataset as PrivateDataset,
    PublicDataset as PublicDataset,
    RoundInfo as RoundInfo,
    TrainingInfo as TrainingInfo,
    TransferInfo as TransferInfo,
)

__version__ = "0.1.0"
