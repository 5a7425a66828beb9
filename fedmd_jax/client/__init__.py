"""What ONE client computes, arrays in, arrays out: the functions that a deployed client calls."""

from fedmd_jax.client.early_stopping import EarlyStopping
from fedmd_jax.client.evaluation import Evaluation, evaluate
from fedmd_jax.client.losses import cross_entropy, kl, mae, mse
from fedmd_jax.client.optimizers import adam
from fedmd_jax.client.phases import digest, init_client, pretrain, revisit, transfer_learn
from fedmd_jax.client.scoring import score
from fedmd_jax.client.training import TrainingConfig, fit

__all__ = [
    "EarlyStopping",
    "Evaluation",
    "TrainingConfig",
    "adam",
    "cross_entropy",
    "digest",
    "evaluate",
    "fit",
    "init_client",
    "kl",
    "mae",
    "mse",
    "pretrain",
    "revisit",
    "score",
    "transfer_learn",
]
