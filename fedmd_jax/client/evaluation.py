"""Evaluation of one client on labelled examples."""

from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from fedmd_jax.checks import as_array, check_numbers
from fedmd_jax.client.losses import cross_entropy
from fedmd_jax.client.scoring import compute_accuracy, score
from fedmd_jax.types import Architecture, ClientState, PrivateDataset


class Evaluation(NamedTuple):
    """Results of one client over the real examples; stacked [K] for a group.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> found = fmd.client.Evaluation(np.float32(0.75), np.float32(0.5), confusion=np.array([[3, 1], [0, 0]]))
      >>> float(found.accuracy), found.class_accuracy.tolist()
      (0.75, [0.75, nan])
    """

    accuracy: chex.Array  #: [], 0..1
    loss: chex.Array  #: [], mean cross entropy in nats
    #: [C, C], int32: number of examples by label (row) and predicted class (column); None unless asked for.
    confusion: chex.Array | None = None

    @property
    def class_accuracy(self) -> np.ndarray:
        """Accuracy on the examples of each class, [C] or [K, C], see `class_accuracy`; needs `confusion`."""
        if self.confusion is None:
            raise ValueError("accuracies of classes need the confusion counts: evaluate with confusion=True")
        return class_accuracy(self.confusion)


def evaluate(
    architecture: Architecture,
    state: ClientState,
    test: PrivateDataset,
    *,
    batch_size: int | None = None,
    confusion: bool = False,
) -> Evaluation:
    """Accuracy and cross entropy of one client, in inference mode, over all classes of its head.

    Args:
      architecture: the client's network.
      state: the client.
      test: inputs [N, ...], labels [N], and the number of real rows; padding rows are ignored.
      batch_size: as in `score`.
      confusion: whether to count examples by label and predicted class, too: C * C more integers.

    Returns:
      Accuracy and loss, which are zero if there is no real example; and the confusion counts if asked for.

    Raises:
      ValueError: arrays that do not form such a dataset, or as in `score`.

    Example:
      >>> import jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> identity = fmd.Architecture(
      ...     lambda key, inputs: ({}, {}), lambda params, state, inputs, **_: (inputs, state))
      >>> client = fmd.ClientState({}, {}, {}, {})
      >>> scores = np.array([[5., 0., 0.], [5., 0., 0.], [0., 5., 0.], [0., 5., 0.]])
      >>> test = fmd.labelled_dataset(scores, np.array([0, 0, 1, 0]))
      >>> found = fmd.evaluate(identity, client, test, confusion=True)
      >>> found.confusion.tolist()  # one of three examples of class 0 is taken for class 1
      [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
      >>> found.class_accuracy.round(2).tolist()  # there is no example of class 2
      [0.67, 1.0, nan]
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
    counts = _count(logits, test.labels, real) if confusion else None
    return Evaluation(accuracy, loss / num_real.astype(loss.dtype), counts)


def class_accuracy(confusion: chex.Array) -> np.ndarray:
    """Accuracy on the examples of each class.

    Args:
      confusion: counts by label and predicted class, [..., C, C], as in `Evaluation.confusion`; sums over clients or
        seeds are such counts, too.

    Returns:
      Accuracies, [..., C], float64; NaN for a class without examples.

    Raises:
      ValueError: counts of another shape.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> fmd.client.class_accuracy(np.array([[3, 1], [0, 0]]))
      array([0.75,  nan])
    """
    confusion = as_array("confusion", confusion)
    if confusion.ndim < 2 or confusion.shape[-1] != confusion.shape[-2]:
        raise ValueError(f"confusion counts must have shape [..., C, C], got {confusion.shape}")
    num_examples = confusion.sum(axis=-1)
    correct = np.diagonal(confusion, axis1=-2, axis2=-1)
    return np.where(num_examples > 0, correct / np.maximum(num_examples, 1), np.nan)


def _count(logits: chex.Array, labels: chex.Array, real: chex.Array) -> chex.Array:
    """Numbers of real examples by label and predicted class, [C, C]; a label outside of the head is not counted."""
    num_classes = logits.shape[-1]
    rows = jnp.where(real & (labels >= 0), labels.astype(jnp.int32), num_classes)  # beyond the last row, for padding
    # A product of one-hot matrices takes 3 to 2,000 times as long on a CPU (C from 16 to 1,000).
    return jnp.zeros((num_classes,) * 2, jnp.int32).at[rows, jnp.argmax(logits, axis=-1)].add(1, mode="drop")
