"""What every partition asks of its arguments; the complaints are `ValueError`s of one line with the numbers."""

from collections.abc import Iterable, Sequence

import numpy as np

from fedmd_jax.checks import as_array, as_list, check_count, told
from fedmd_jax.hints import one_line


def check_generator(rng: np.random.Generator) -> None:
    """A `ValueError` where a source of randomness is none of NumPy's."""
    if not isinstance(rng, np.random.Generator):
        raise ValueError(f"rng must be a numpy.random.Generator, got {told(rng)}")


def check_labels(labels: np.ndarray, name: str = "labels") -> np.ndarray:
    """The labels as an array, [N], integers.

    Args:
      labels: what was given.
      name: what it is called in the complaint.

    Raises:
      ValueError: they are something else.
    """
    labels = as_array(name, labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers [N], got {labels.dtype} {list(labels.shape)}")
    return labels


def check_counts(**counts: int) -> None:
    """Refuses counts that are not integers of at least 1.

    Args:
      **counts: the counts by name.

    Raises:
      ValueError: one is something else.
    """
    for name, count in counts.items():
        check_count(name, count)


def check_classes(labels: np.ndarray, classes: Sequence[int] | None, name: str = "classes") -> list[int]:
    """The classes asked for, or all there are.

    Args:
      labels: class of each example, [N].
      classes: the request; None for all, ascending.
      name: what they are called in the complaint.

    Raises:
      ValueError: there are none, one is repeated, or one is no integer.
    """
    classes = np.unique(labels).tolist() if classes is None else as_list(name, classes)
    if not all(isinstance(label, (int, np.integer)) and not isinstance(label, bool) for label in classes):
        raise ValueError(f"{name} must be integers, got {told(classes)}")
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(f"{name} must be one or more different labels, got {told(classes)}")
    return [int(label) for label in classes]


def check_supply(labels: np.ndarray, classes: Iterable[int], *, needed: int, request: str) -> None:
    """Refuses a request that a class cannot meet.

    Args:
      labels: class of each example, [N].
      classes: the classes that are asked for.
      needed: examples of each of them.
      request: what is asked for, in words, in front of "need 4 of each".

    Raises:
      ValueError: a class has less.
    """
    supply = {c: int(np.sum(labels == c)) for c in classes}
    short = one_line(", ".join(f"class {c} has {supply[c]}" for c in supply if supply[c] < needed), longest=400)
    if short:
        raise ValueError(f"{request} need {needed} of each, but {short}")
