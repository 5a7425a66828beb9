"""What is asked of data and settings at the front door, before anything is compiled.

Every complaint is a `ValueError` of one line: what was wanted and what came.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.hints import one_line

_MOST = 2**31  # of anything that is counted


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
    labels = as_array(f"{what}: labels", labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
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
    inputs = as_array(f"{what}: inputs", inputs)
    if inputs.ndim < 2 or 0 in inputs.shape[1:]:
        raise ValueError(f"{what}: inputs must have shape [N, ...], got {inputs.shape}")
    if len(inputs) == 0:
        raise ValueError(f"{what}: at least one example is needed, got none")
    if inputs.dtype.kind not in "fiu":
        raise ValueError(f"{what}: inputs must be numbers, got dtype {inputs.dtype}")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is told of below
        inputs = inputs.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1))
    if bad.size:
        raise ValueError(f"{what}: inputs must be finite, got NaN or infinity in {bad.size} rows, first row {bad[0]}")
    return inputs


def as_array(what: str, value: Any) -> np.ndarray:
    """As NumPy's; a `ValueError` where it is none, such as lists of different lengths."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{what} must be an array, got {told(value)}") from error


def as_list(what: str, values: Any) -> list:
    """What can be gone through, as a list; a `ValueError` where it cannot."""
    try:
        return list(values)
    except TypeError as error:
        raise ValueError(f"{what} must be a list, got {told(values)}") from error


def told(value: Any) -> str:
    """A value in a complaint: arrays by dtype and shape, everything else as Python writes it, in one short line."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and shape and dtype is not None:
        return f"{dtype} of shape {shape}"
    return one_line(repr(value), longest=80)


def is_number(value: Any) -> bool:
    """Whether a value is one real number, of Python, NumPy or JAX, and no flag."""
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return isinstance(value, (np.generic, np.ndarray, jax.Array)) and np.ndim(value) == 0 and value.dtype.kind in "fiu"


def check_count(name: str, value: Any, *, minimum: int = 1) -> None:
    """A `ValueError` where a setting is not an integer of at least the minimum, or cannot be counted to."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {told(value)}")
    if value >= _MOST:
        raise ValueError(f"{name} must be below 2**31, got {told(value)}")


def check_positive(name: str, value: Any) -> None:
    """A `ValueError` where a setting is not a finite number above 0."""
    if not is_number(value) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be positive and finite, got {told(value)}")


def check_not_negative(name: str, value: Any) -> None:
    """A `ValueError` where a setting is not a finite number of at least 0."""
    if not is_number(value) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and not negative, got {told(value)}")


def check_numbers(what: str, array: Any, *, kind: Any = jnp.number, rank: int | None = None) -> None:
    """A `ValueError` where something is no array of numbers for JAX; looks at shape and dtype only, also in programs.

    Args:
      what: how the message names it.
      array: of NumPy or of JAX.
      kind: of numbers, such as `jnp.floating`.
      rank: how many dimensions it must have.
    """
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if not isinstance(shape, tuple) or not _is_of(dtype, kind):
        raise ValueError(f"{what} must be an array of {kind.__name__} numbers, got {told(array)}")
    if rank is not None and len(shape) != rank:
        raise ValueError(f"{what} must be of rank {rank}, got shape {shape}")


def _is_of(dtype: Any, kind: Any) -> bool:
    try:
        known = jax.dtypes.issubdtype(jax.dtypes.canonicalize_dtype(dtype), kind)
    except (TypeError, ValueError):  # strings, objects, dates; keys
        return False
    return known and dtype.isnative and dtype.itemsize <= (16 if dtype.kind == "c" else 8)  # no long doubles


def check_clients(what: str, tree: Any) -> int | None:
    """The number of clients of a stacked tree, K; None where it has no arrays.

    Raises:
      ValueError: not everything is an array [K, ...], K at least 1, of one number of clients.
    """
    shapes = [getattr(leaf, "shape", None) for leaf in jax.tree.leaves(tree)]
    if not all(isinstance(shape, tuple) and shape and shape[0] > 0 for shape in shapes):
        bad = next(leaf for leaf, shape in zip(jax.tree.leaves(tree), shapes, strict=True) if not shape or not shape[0])
        raise ValueError(f"{what} must be arrays [K, ...] of at least one client, got {told(bad)}")
    sizes = {shape[0] for shape in shapes}
    if len(sizes) > 1:
        raise ValueError(f"{what} must be of one number of clients, got {sorted(sizes)}")
    return sizes.pop() if sizes else None


def check_labels_in_head(what: str, labels: Any, num_classes: int) -> None:
    """A `ValueError` where a label has no output of its own."""
    largest = int(np.max(labels))
    if largest >= num_classes:
        raise ValueError(
            f"{what}: labels must be below the number of outputs of the networks, {num_classes}, got {largest}"
        )
