"""What ONE client computes, arrays in, arrays out: the functions that a deployed client calls."""

from fedmd_jax.client.early_stopping import EarlyStopping as EarlyStopping
from fedmd_jax.client.evaluation import Evaluation as Evaluation, class_accuracy as class_accuracy, evaluate as evaluate
from fedmd_jax.client.features import pool_features as pool_features, with_features as with_features
from fedmd_jax.client.losses import (
    cross_entropy as cross_entropy,
    kl as kl,
    kl_of_probabilities as kl_of_probabilities,
    mae as mae,
    mse as mse,
)
from fedmd_jax.client.optimizers import adam as adam
from fedmd_jax.client.phases import (
    digest as digest,
    init_client as init_client,
    pretrain as pretrain,
    revisit as revisit,
    transfer_learn as transfer_learn,
)
from fedmd_jax.client.scoring import score as score
from fedmd_jax.client.statistics import estimate_statistics as estimate_statistics
from fedmd_jax.client.training import TrainingConfig as TrainingConfig, fit as fit
