"""How good one client is on labelled examples."""

from typing import NamedTuple

import chex
import jax.numpy as jnp

from fedmd_jax.checks import check_numbers
from fedmd_jax.local import score, share_correct
from fedmd_jax.losses import cross_entropy
from fedmd_jax.types import Architecture, ClientState, PrivateDataset


class Evaluation(NamedTuple):
    """Means over the real examples; a group holds them stacked, [K]."""

    accuracy: chex.Array  # [], 0..1
    loss: chex.Array  # [], nats


def evaluate(
    architecture: Architecture, state: ClientState, test: PrivateDataset, *, batch_size: int | None = None
) -> Evaluation:
    """Accuracy and cross entropy of one client, in inference mode, over all classes of its head.

    Args:
      architecture: the client's network.
      state: the client.
      test: inputs [N, ...], labels [N], and how many rows are real; padding rows count for nothing.
      batch_size: as of `score`.

    Returns:
      Two scalars; both are zero where there is no real example.

    Raises:
      ValueError: arrays that are none of such a dataset, or as of `score`.
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
    accuracy = share_correct(logits, test)
    loss = jnp.sum(jnp.where(real, cross_entropy(logits, test.labels), 0.0))
    return Evaluation(accuracy, loss / num_real.astype(loss.dtype))
