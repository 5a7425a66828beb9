"""Who owns which example: seeded partitions of a labelled data set among clients.

A partition is a list with one index array per client. Every function here takes the labels first, its settings as
keywords, and `rng` last, and is a pure function of them: the same generator state gives the same partition.
"""

from collections.abc import Sequence

import numpy as np


def split_by_class(
    labels: np.ndarray,
    *,
    num_clients: int,
    examples_per_class: int,
    classes: Sequence[int] | None = None,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Gives every client the same number of examples of every class; no example goes to two clients.

    This is the iid setting of FedMD. A client's share does not depend on how many clients come after it: with the same
    seed, a federation of twenty begins with the ten clients of a federation of ten.

    Args:
      labels: class of each example, [N], integers.
      num_clients: number of clients, at least 1.
      examples_per_class: examples of each class that each client gets, at least 1.
      classes: the classes to hand out, in this order; all classes in `labels`, ascending, if None.
      rng: the source of randomness; it advances.

    Returns:
      Per client the positions of its examples in `labels`, [len(classes) * examples_per_class], integers: class after
      class, in random order within a class.

    Raises:
      ValueError: a count is below 1, `classes` is empty or repeats a class, or a class has too few examples.

    References:
      Li and Wang, FedMD, 2019 (arXiv 1910.03581): the iid experiments.

    >>> labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2])
    >>> rng = np.random.default_rng(0)
    >>> shares = split_by_class(labels, num_clients=2, examples_per_class=2, classes=[0, 1], rng=rng)
    >>> [labels[share].tolist() for share in shares]
    [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    labels = _check_labels(labels)
    _check_count("num_clients", num_clients)
    _check_count("examples_per_class", examples_per_class)
    classes = _check_classes(labels, classes)
    _check_supply(labels, classes, num_clients=num_clients, examples_per_class=examples_per_class)
    shuffled = [rng.permutation(np.flatnonzero(labels == c)) for c in classes]
    starts = range(0, num_clients * examples_per_class, examples_per_class)
    return [np.concatenate([indices[start : start + examples_per_class] for indices in shuffled]) for start in starts]


def _check_labels(labels):
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers [N], got {labels.dtype} {list(labels.shape)}")
    return labels


def _check_count(name, count):
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")


def _check_classes(labels, classes):
    classes = np.unique(labels).tolist() if classes is None else list(classes)
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(f"classes must be one or more different labels, got {classes}")
    return classes


def _check_supply(labels, classes, *, num_clients, examples_per_class):
    needed = num_clients * examples_per_class
    supply = {c: int(np.sum(labels == c)) for c in classes}
    short = ", ".join(f"class {c} has {supply[c]}" for c in classes if supply[c] < needed)
    if short:
        raise ValueError(
            f"{num_clients} clients with {examples_per_class} examples per class need {needed} of each, but {short}"
        )
