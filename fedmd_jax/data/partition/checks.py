"""Checks of the arguments of partitions. Every error is a `ValueError` of one line with the numbers."""

from collections.abc import Iterable, Sequence

import numpy as np

from fedmd_jax.checks import as_array, as_list, check_count, describe_value, one_line


def check_generator(rng: np.random.Generator) -> None:
    """Raises ValueError if `rng` is not a generator of NumPy."""
    if not isinstance(rng, np.random.Generator):
        raise ValueError(f"rng must be a numpy.random.Generator, got {describe_value(rng)}")


def check_labels(labels: np.ndarray, name: str = "labels") -> np.ndarray:
    """Returns the labels as an array of integers, [N].

    Args:
      labels: the labels.
      name: name of the labels in the error message.

    Raises:
      ValueError: the labels are not integers [N].
    """
    labels = as_array(name, labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers [N], got {labels.dtype} {list(labels.shape)}")
    return labels


def check_counts(**counts: int) -> None:
    """Checks that counts are integers of at least 1.

    Args:
      **counts: the counts by name.

    Raises:
      ValueError: a count is not an integer of at least 1.
    """
    for name, count in counts.items():
        check_count(name, count)


def check_classes(labels: np.ndarray, classes: Sequence[int] | None, name: str = "classes") -> list[int]:
    """Returns the requested classes, or all classes.

    Args:
      labels: class of each example, [N].
      classes: the requested classes; None for all, ascending.
      name: name of the classes in the error message.

    Raises:
      ValueError: there is no class, a class is repeated, or a class is not an integer.
    """
    classes = np.unique(labels).tolist() if classes is None else as_list(name, classes)
    if not all(isinstance(label, (int, np.integer)) and not isinstance(label, bool) for label in classes):
        raise ValueError(f"{name} must be integers, got {describe_value(classes)}")
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(f"{name} must be one or more different labels, got {describe_value(classes)}")
    return [int(label) for label in classes]


def check_supply(labels: np.ndarray, classes: Iterable[int], *, needed: int, request: str) -> None:
    """Checks that every class has enough examples.

    Args:
      labels: class of each example, [N].
      classes: the requested classes.
      needed: number of examples needed of each class.
      request: the request in words, followed by "need 4 of each" in the error message.

    Raises:
      ValueError: a class has fewer examples.
    """
    supply = {c: int(np.sum(labels == c)) for c in classes}
    short = one_line(", ".join(f"class {c} has {supply[c]}" for c in supply if supply[c] < needed), longest=400)
    if short:
        raise ValueError(f"{request} need {needed} of each, but {short}")
