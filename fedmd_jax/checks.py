"""What is asked of data at the front door, on the host and with NumPy, before anything is compiled.

Every complaint is a `ValueError` of one line: what was wanted and what came.
"""

from typing import Any

import numpy as np


def check_examples(what: str, inputs: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Examples as arrays, or the reason why they cannot be trained on.

    Args:
      what: how the message names them, such as "client 3".
      inputs: [N, ...], N at least 1, finite.
      labels: [N], integers from 0.

    Returns:
      Inputs as they are in float32 (integers are converted), labels in int32.

    Raises:
      ValueError: anything else.
    """
    inputs = check_inputs(what, inputs)
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{what}: labels must be integers of shape [N], got {labels.dtype} of shape {labels.shape}")
    if len(inputs) != len(labels):
        raise ValueError(f"{what}: as many labels as inputs are needed, got {len(inputs)} inputs, {len(labels)} labels")
    if labels.min() < 0:
        raise ValueError(f"{what}: labels must not be negative, got {labels.min()}")
    if labels.max() > np.iinfo(np.int32).max:
        raise ValueError(f"{what}: labels must fit into int32, got {labels.max()}")
    return inputs, labels.astype(np.int32)


def check_inputs(what: str, inputs: Any) -> np.ndarray:
    """Inputs in float32, [N, ...]; a `ValueError` where there are none, or where one is not finite."""
    inputs = np.asarray(inputs)
    if inputs.ndim < 2:
        raise ValueError(f"{what}: inputs must have shape [N, ...], got {inputs.shape}")
    if len(inputs) == 0:
        raise ValueError(f"{what}: at least one example is needed, got none")
    if not (np.issubdtype(inputs.dtype, np.floating) or np.issubdtype(inputs.dtype, np.integer)):
        raise ValueError(f"{what}: inputs must be numbers, got dtype {inputs.dtype}")
    inputs = inputs.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1))
    if bad.size:
        raise ValueError(f"{what}: inputs must be finite, got NaN or infinity in {bad.size} rows, first row {bad[0]}")
    return inputs


def check_count(name: str, value: Any) -> None:
    """A `ValueError` where a setting is not an integer of at least 1."""
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_labels_in_head(what: str, labels: Any, num_classes: int) -> None:
    """A `ValueError` where a label has no output of its own."""
    largest = int(np.max(labels))
    if largest >= num_classes:
        raise ValueError(
            f"{what}: labels must be below the number of outputs of the networks, {num_classes}, got {largest}"
        )
