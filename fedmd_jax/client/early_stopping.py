"""Early stopping of a training phase."""

import dataclasses
from typing import NamedTuple

import chex
import jax.numpy as jnp

from fedmd_jax.checks import check_count, check_not_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Stops training if the validation accuracy has not improved for some epochs. The last parameters are kept.

    Attributes:
      patience: number of epochs without an improvement after which training stops.
      min_delta: minimum increase over the best accuracy so far that counts as an improvement.

    Raises:
      ValueError: a patience below 1, or a min_delta that is negative or not finite.

    References:
      `keras.callbacks.EarlyStopping(monitor="val_accuracy")`, as the released FedMD code uses it.

    Example:
      >>> import fedmd_jax as fmd
      >>> training = fmd.TrainingConfig(num_epochs=50, early_stopping=fmd.EarlyStopping(patience=3))
      >>> training.early_stopping
      EarlyStopping(patience=3, min_delta=0.0)
    """

    patience: int
    min_delta: float = 0.0

    def __post_init__(self):
        check_count("patience", self.patience)
        check_not_negative("min_delta", self.min_delta)


class Patience(NamedTuple):
    """State of early stopping between epochs."""

    best: chex.Array  #: [], best accuracy so far
    num_waited: chex.Array  #: [], int32: epochs since then
    stopped: chex.Array  #: [], bool


def initial_patience() -> Patience:
    """The state before the first epoch, which always counts as an improvement."""
    return Patience(jnp.float32(-jnp.inf), jnp.int32(0), jnp.array(False))


def update_patience(stopping: EarlyStopping, patience: Patience, accuracy: chex.Array) -> Patience:
    """The state after an epoch.

    Args:
      stopping: the rule.
      patience: the state before this epoch.
      accuracy: validation accuracy after it, [].

    >>> stopping, patience = EarlyStopping(patience=2, min_delta=0.1), initial_patience()
    >>> for accuracy in (0.5, 0.55, 0.6):  # the last is no more than 0.1 above the first
    ...     patience = update_patience(stopping, patience, jnp.float32(accuracy))
    >>> bool(patience.stopped), int(patience.num_waited)
    (True, 2)
    """
    accuracy = accuracy.astype(patience.best.dtype)
    improved = accuracy - stopping.min_delta > patience.best
    num_waited = jnp.where(improved, 0, patience.num_waited + 1)
    best = jnp.where(improved, accuracy, patience.best)
    return Patience(best, num_waited, num_waited >= stopping.patience)
