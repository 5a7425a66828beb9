"""When a phase of training ends before its last epoch."""

import dataclasses
from typing import NamedTuple

import chex
import jax.numpy as jnp

from fedmd_jax.checks import check_count, check_not_negative


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Training stops where the accuracy on validation data has not improved for some epochs; the last weights are kept.

    Attributes:
      patience: epochs without an improvement that are borne; after as many, training stops.
      min_delta: an improvement is more than this above the best accuracy so far.

    Raises:
      ValueError: a patience below 1, or a min_delta that is negative or not finite.

    References:
      `keras.callbacks.EarlyStopping(monitor="val_accuracy")`, as the released FedMD code uses it.
    """

    patience: int
    min_delta: float = 0.0

    def __post_init__(self):
        check_count("patience", self.patience)
        check_not_negative("min_delta", self.min_delta)


class Patience(NamedTuple):
    """What is remembered between epochs."""

    best: chex.Array  # [], the accuracy that is to be improved on
    num_waited: chex.Array  # [], int32: epochs since then
    stopped: chex.Array  # [], bool


def full_patience() -> Patience:
    """Before the first epoch, which is an improvement whatever it reaches."""
    return Patience(jnp.float32(-jnp.inf), jnp.int32(0), jnp.array(False))


def wait(stopping: EarlyStopping, patience: Patience, accuracy: chex.Array) -> Patience:
    """What is left after an epoch.

    Args:
      stopping: the rule.
      patience: before this epoch.
      accuracy: after it, [].

    >>> stopping, patience = EarlyStopping(patience=2, min_delta=0.1), full_patience()
    >>> for accuracy in (0.5, 0.55, 0.6):  # the last is no more than 0.1 above the first
    ...     patience = wait(stopping, patience, jnp.float32(accuracy))
    >>> bool(patience.stopped), int(patience.num_waited)
    (True, 2)
    """
    accuracy = accuracy.astype(patience.best.dtype)
    improved = accuracy - stopping.min_delta > patience.best
    num_waited = jnp.where(improved, 0, patience.num_waited + 1)
    best = jnp.where(improved, accuracy, patience.best)
    return Patience(best, num_waited, num_waited >= stopping.patience)
