"""Partitions by class: the same number of examples of every class, or of some classes, for each client."""

from collections.abc import Sequence

import numpy as np

from fedmd_jax.data.partition.checks import check_classes, check_counts, check_generator, check_labels, check_supply


def split_by_class(
    labels: np.ndarray,
    *,
    num_clients: int,
    examples_per_class: int,
    classes: Sequence[int] | None = None,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Gives every client the same number of examples of every class.

    This is the iid setting of FedMD. A client's share does not depend on the number of clients after it: with the same
    seed, the first ten of twenty clients are those of a federation of ten.

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
    labels = check_labels(labels)
    check_generator(rng)
    check_counts(num_clients=num_clients, examples_per_class=examples_per_class)
    classes = check_classes(labels, classes)
    check_supply(
        labels,
        classes,
        needed=num_clients * examples_per_class,
        request=f"{num_clients} clients with {examples_per_class} examples per class",
    )
    shuffled = [rng.permutation(np.flatnonzero(labels == c)) for c in classes]
    starts = range(0, num_clients * examples_per_class, examples_per_class)
    return [np.concatenate([indices[start : start + examples_per_class] for indices in shuffled]) for start in starts]


def split_k_classes(
    labels: np.ndarray,
    *,
    num_clients: int,
    classes_per_client: int,
    examples_per_class: int,
    classes: Sequence[int] | None = None,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Gives every client the same number of examples of a few classes.

    The classes of a client are drawn among those with the fewest clients so far, so that the numbers of clients of two
    classes differ by at most one. A client's share does not depend on the number of clients after it.

    Args:
      labels: class of each example, [N], integers.
      num_clients: number of clients, at least 1.
      classes_per_client: different classes that each client gets, at least 1 and at most all.
      examples_per_class: examples of each of its classes that each client gets, at least 1.
      classes: the classes to hand out; all classes in `labels` if None.
      rng: the source of randomness; it advances.

    Returns:
      Per client the positions of its examples in `labels`, [classes_per_client * examples_per_class], integers: class
      after class in the order of `classes`, in random order within a class.

    Raises:
      ValueError: a count is below 1, `classes` is empty or repeats a class, a client is to have more classes than there
        are, or a class has too few examples for as many clients as may draw it.

    References:
      McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017, section 3, where
      each client has examples of at most two classes.

    >>> labels = np.repeat([0, 1, 2], 4)
    >>> rng = np.random.default_rng(0)
    >>> shares = split_k_classes(labels, num_clients=3, classes_per_client=2, examples_per_class=2, rng=rng)
    >>> [len(set(labels[share].tolist())) for share in shares], np.bincount(labels[np.concatenate(shares)]).tolist()
    ([2, 2, 2], [4, 4, 4])
    """
    labels = check_labels(labels)
    check_generator(rng)
    check_counts(num_clients=num_clients, classes_per_client=classes_per_client, examples_per_class=examples_per_class)
    classes = check_classes(labels, classes)
    if classes_per_client > len(classes):
        raise ValueError(f"classes_per_client is {classes_per_client}, but there are {len(classes)} classes")
    most = -(
        -num_clients * classes_per_client // len(classes)
    )  # largest number of clients of a class; some classes have one less
    check_supply(
        labels,
        classes,
        needed=most * examples_per_class,
        request=f"{num_clients} clients with {examples_per_class} examples of each of {classes_per_client} classes, "
        f"up to {most} clients to a class,",
    )
    shuffled = [rng.permutation(np.flatnonzero(labels == c)) for c in classes]
    num_owners = np.zeros(len(classes), int)
    shares = []
    for _ in range(num_clients):
        rarest_first = np.lexsort((rng.random(len(classes)), num_owners))
        own = np.sort(rarest_first[:classes_per_client])
        starts = examples_per_class * num_owners[own]
        taken = [shuffled[c][start : start + examples_per_class] for c, start in zip(own, starts, strict=True)]
        shares.append(np.concatenate(taken))
        num_owners[own] += 1
    return shares
