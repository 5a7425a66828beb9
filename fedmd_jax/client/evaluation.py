"""Evaluation of one client on labelled examples."""

from typing import NamedTuple

import chex
import jax.numpy as jnp

from fedmd_jax.checks import check_numbers
from fedmd_jax.client.losses import cross_entropy
from fedmd_jax.client.scoring import compute_accuracy, score
from fedmd_jax.types import Architecture, ClientState, PrivateDataset


class Evaluation(NamedTuple):
    """Means over the real examples; stacked [K] for a group."""

    accuracy: chex.Array  #: [], 0..1
    loss: chex.Array  #: [], nats


def evaluate(
    architecture: Architecture, state: ClientState, test: PrivateDataset, *, batch_size: int | None = None
) -> Evaluation:
    """Accuracy and cross entropy of one client, in inference mode, over all classes of its head.

    Args:
      architecture: the client's network.
      state: the client.
      test: inputs [N, ...], labels [N], and the number of real rows; padding rows are ignored.
      batch_size: as in `score`.

    Returns:
      Two scalars; both are zero if there is no real example.

    Raises:
      ValueError: arrays that do not form such a dataset, or as in `score`.
    """
    check_numbers("labels", test.labels, kind=jnp.integer, rank=1)
    if not isinstance(test.num_examples, int):
        check_numbers("num_examples", test.num_examples, kind=jnp.integer, rank=0)
    check_numbers("inputs", test.inputs)
    if test.inputs.shape[:1] != test.labels.shape:
        raise ValueError(f"as many labels as inputs are needed, got shapes {test.labels.shape} and {test.inputs.shape}")
    logits = score(architecture, state, test.inputs, batch_size=batch_size)  # [N, C]
    real = jnp.arange(test.labels.shape[0]) < test.num_examples
    num_real = jnp.maximum(test.num_examples, 1)
    accuracy = compute_accuracy(logits, test)
    loss = jnp.sum(jnp.where(real, cross_entropy(logits, test.labels), 0.0))
    return Evaluation(accuracy, loss / num_real.astype(loss.dtype))
