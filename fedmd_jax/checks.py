"""Checks of user input, made before anything is compiled.

Every error is a `ValueError` of one line: what was wanted and what came.
"""

import contextlib
import difflib
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def unknown(what: str, word: str, known: Collection[str]) -> str:
    """An error message for an unknown word, with suggestions of similar known words.

    Args:
      what: kind of the word, such as "command".
      word: the unknown word.
      known: the known words.

    >>> unknown("command", "rum", ["run", "report"])
    "unknown command 'rum', perhaps you meant run"
    >>> unknown("command", "xyz", ["run", "report"])
    "unknown command 'xyz', known are run, report"
    """
    close = difflib.get_close_matches(word, known, n=3)
    if close:
        return f"unknown {what} {word!r}, perhaps you meant {' or '.join(close)}"
    return f"unknown {what} {word!r}, known are {', '.join(known)}"


def one_line(text: str, *, longest: int = 1000) -> str:
    r"""A message on one line, without unprintable characters.

    Args:
      text: the message.
      longest: maximum number of characters; a longer message keeps its beginning and its end.

    >>> one_line("cannot read\n  a\x1b[31m")
    'cannot read a?[31m'
    """
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} ... {line[-half:]}"


@contextlib.contextmanager
def value_errors_as(kind: type[ValueError]) -> Iterator[None]:
    """A context, and a decorator, in which a `ValueError` becomes one of a kind with the same message.

    >>> with value_errors_as(UnicodeError):
    ...     raise ValueError("wanted this, got that")
    Traceback (most recent call last):
    UnicodeError: wanted this, got that
    """
    try:
        yield
    except ValueError as error:
        raise kind(str(error)) from error


def check_examples(what: str, inputs: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Converts examples to arrays that a network can be trained on.

    Args:
      what: name of the examples in the error message, such as "client 3".
      inputs: [N, ...], N at least 1, as in `check_inputs`.
      labels: [N], integers from 0.

    Returns:
      Inputs as `check_inputs` returns them, labels in int32.

    Raises:
      ValueError: anything else.
    """
    given, inputs = inputs, check_inputs(what, inputs)
    labels = as_array(f"{what}: labels", labels)
    if labels.ndim != 1 or not _is_integer(labels.dtype):
        raise ValueError(f"{what}: labels must be integers of shape [N], got {labels.dtype} of shape {labels.shape}")
    if len(inputs) != len(labels):
        several = isinstance(given, (tuple, list)) and inputs.shape[1] == len(labels)
        hint = "; inputs must be one array, not several" if several else ""
        raise ValueError(
            f"{what}: as many labels as inputs are needed, got {len(inputs)} inputs, {len(labels)} labels{hint}"
        )
    if labels.min() < 0:
        raise ValueError(f"{what}: labels must not be negative, got {labels.min()}")
    return inputs, _as_int32(f"{what}: labels", labels)


def check_inputs(what: str, inputs: Any) -> np.ndarray:
    """Converts inputs to a dtype that networks accept.

    Args:
      what: name of the inputs in the error message.
      inputs: one array, [N, ...], N at least 1. Integers must fit into int32, floats must be finite.

    Returns:
      Integers of any width in int32, so that `x - 128` of a pixel does not wrap and a token id is exact; float16,
      bfloat16 and float32 as they are; wider floats in float32, as JAX converts them.

    Raises:
      ValueError: anything else, such as bool, float8, a pytree, or images [N, C, H, W].
    """
    given, inputs = inputs, as_array(f"{what}: inputs", inputs)
    if inputs.dtype == object or hasattr(given, "_fields"):  # a NamedTuple of arrays of one shape would be stacked
        raise ValueError(f"{what}: inputs must be one array of numbers, no other pytree, got {describe_value(given)}")
    if inputs.ndim < 2 or 0 in inputs.shape[1:]:
        raise ValueError(f"{what}: inputs must have shape [N, ...], got {inputs.shape}")
    if len(inputs) == 0:
        raise ValueError(f"{what}: at least one example is needed, got none")
    check_channels_last(what, inputs.shape)
    if _is_integer(inputs.dtype):
        return _as_int32(f"{what}: inputs", inputs)
    inputs = _as_float(what, inputs)
    bad = np.flatnonzero(~np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1))
    if bad.size:
        raise ValueError(f"{what}: inputs must be finite, got NaN or infinity in {bad.size} rows, first row {bad[0]}")
    return inputs


def check_channels_last(what: str, shape: tuple[int, ...]) -> None:
    """A `ValueError` if images look like [N, C, H, W].

    Shapes that also occur with the channels last pass: [N, 1, 1, 512] and [N, 3, 3, 64] (features), [N, 1, 128, 9]
    (a signal of nine channels).

    >>> check_channels_last("images", (60, 28, 28, 1))
    """
    if len(shape) != 4 or shape[1] not in (1, 3):
        return
    shorter, longer = sorted(shape[2:])
    if shorter > 4 and longer <= 2 * shorter:
        raise ValueError(
            f"{what}: images must be [N, H, W, C], got {shape}, which looks like [N, C, H, W]: "
            "np.moveaxis(inputs, 1, -1) converts them"
        )


def check_one_dtype(dtypes: Mapping[str, Any]) -> None:
    """A `ValueError` if the inputs of a federation are of several dtypes, which a network would treat differently.

    Args:
      dtypes: name of a part of the data -> its dtype.
    """
    first: dict[str, str] = {}
    for part, dtype in dtypes.items():
        # As JAX takes them: arrays that were not made by our own functions may be of 64 bits.
        first.setdefault(jax.dtypes.canonicalize_dtype(dtype).name, part)
    if len(first) > 1:
        found = " and ".join(f"{name} ({part})" for name, part in first.items())
        raise ValueError(f"all inputs of a federation must have one dtype, got {found}")


def as_array(what: str, value: Any) -> np.ndarray:
    """Converts to a NumPy array; raises ValueError if that fails, as for lists of different lengths."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{what} must be one array, got {describe_value(value)}") from error


def as_list(what: str, values: Any) -> list:
    """Converts an iterable to a list; raises ValueError if it is not iterable."""
    try:
        return list(values)
    except TypeError as error:
        raise ValueError(f"{what} must be a list, got {describe_value(values)}") from error


def describe_value(value: Any) -> str:
    """A value as error messages show it: dtype and shape of an array, else `repr`, in one short line."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and shape and dtype is not None:
        return f"{dtype} of shape {shape}"
    return one_line(repr(value), longest=80)


def is_number(value: Any) -> bool:
    """Whether a value is a real scalar of Python, NumPy or JAX, and not a bool."""
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return isinstance(value, (np.generic, np.ndarray, jax.Array)) and np.ndim(value) == 0 and value.dtype.kind in "fiu"


def check_count(name: str, value: Any, *, minimum: int = 1, bits: int = 31) -> None:
    """Raises ValueError if a setting is not an integer from `minimum` to 2**bits - 1."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {describe_value(value)}")
    if value >= 2**bits:
        raise ValueError(f"{name} must be below 2**{bits}, got {describe_value(value)}")


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError if a setting is not a finite number above 0."""
    if not is_number(value) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be positive and finite, got {describe_value(value)}")


def check_not_negative(name: str, value: Any) -> None:
    """Raises ValueError if a setting is not a finite number of at least 0."""
    if not is_number(value) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and not negative, got {describe_value(value)}")


def check_share(name: str, value: Any) -> None:
    """Raises ValueError if a setting is not a number from 0 to 1."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {describe_value(value)}")


def check_numbers(what: str, array: Any, *, kind: Any = jnp.number, rank: int | None = None) -> None:
    """Raises ValueError if a value is not an array of numbers. Only shape and dtype are used, so it works under jit.

    Args:
      what: name of the array in the error message.
      array: a NumPy or JAX array.
      kind: kind of numbers, such as `jnp.floating`.
      rank: number of dimensions that the array must have.
    """
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if not isinstance(shape, tuple) or not _is_of(dtype, kind):
        raise ValueError(f"{what} must be an array of {kind.__name__} numbers, got {describe_value(array)}")
    if rank is not None and len(shape) != rank:
        raise ValueError(f"{what} must be of rank {rank}, got shape {shape}")


def check_clients(what: str, tree: Any) -> int | None:
    """The number of clients of a stacked tree, K; None if it has no arrays.

    Raises:
      ValueError: a leaf is not an array [K, ...] with K at least 1, or leaves differ in K.
    """
    shapes: list[Any] = [getattr(leaf, "shape", None) for leaf in jax.tree.leaves(tree)]
    if not all(isinstance(shape, tuple) and shape and shape[0] > 0 for shape in shapes):
        bad = next(leaf for leaf, shape in zip(jax.tree.leaves(tree), shapes, strict=True) if not shape or not shape[0])
        raise ValueError(f"{what} must be arrays [K, ...] of at least one client, got {describe_value(bad)}")
    sizes = {shape[0] for shape in shapes}
    if len(sizes) > 1:
        raise ValueError(f"{what} must have the same number of clients, got {sorted(sizes)}")
    return sizes.pop() if sizes else None


def check_labels_in_head(what: str, labels: Any, num_classes: int) -> None:
    """Raises ValueError if a label is not below the number of outputs."""
    largest = int(np.max(labels))
    if largest >= num_classes:
        raise ValueError(
            f"{what}: labels must be below the number of outputs of the networks, {num_classes}, got {largest}"
        )


def _is_integer(dtype):
    return jnp.issubdtype(dtype, jnp.integer) and dtype.kind != "m"  # NumPy counts time differences among the integers


def _as_int32(what, integers):
    limits = np.iinfo(np.int32)
    for value in (integers.min(), integers.max()):
        if not limits.min <= int(value) <= limits.max:
            raise ValueError(f"{what} must fit into int32, got {value}")
    return integers.astype(np.int32, copy=False)


def _as_float(what, inputs):
    dtype = inputs.dtype.newbyteorder("=")
    if dtype in (np.float16, jnp.bfloat16, np.float32):
        return inputs.astype(dtype, copy=False)
    if dtype in (np.float64, np.longdouble):
        with np.errstate(over="ignore"):  # too large values become infinite, and are refused by the caller
            return inputs.astype(np.float32)
    if jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{what}: inputs must be of a dtype that JAX combines with float32 parameters, got {dtype}: "
            "inputs.astype(np.float32) converts them exactly"
        )
    hint = ": inputs.astype(np.float32) or inputs.astype(np.int32) converts them" if dtype.kind == "b" else ""
    raise ValueError(f"{what}: inputs must be numbers, got dtype {inputs.dtype}{hint}")


def _is_of(dtype: Any, kind: Any) -> bool:
    try:
        known = jax.dtypes.issubdtype(jax.dtypes.canonicalize_dtype(dtype), kind)
    except (TypeError, ValueError):  # strings, objects, dates; keys
        return False
    return known and dtype.isnative and dtype.itemsize <= (16 if dtype.kind == "c" else 8)  # no long doubles
