"""Partitions by group: one writer per client, or one fine class of each superclass per client."""

from collections.abc import Sequence

import numpy as np

from fedmd_jax.checks import as_array
from fedmd_jax.data.partition.checks import check_classes, check_counts, check_generator, check_labels, check_supply


def split_by_writer(
    writers: np.ndarray,
    labels: np.ndarray,
    *,
    num_clients: int,
    min_examples: int,
    classes: Sequence[int] | None = None,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Gives every client all examples of one writer, drawn among the writers with enough examples.

    This is the non-iid setting of FedMD for letters, in which a writer needs 18 images of the letters a-f in total. A
    client's share does not depend on the number of clients after it.

    Args:
      writers: writer of each example, [N], integers or strings.
      labels: class of each example, [N], integers.
      num_clients: number of clients, at least 1.
      min_examples: examples of the classes, taken together, that a writer must have, at least 1.
      classes: the classes to hand out; all classes in `labels` if None.
      rng: the source of randomness; it advances.

    Returns:
      Per client the positions of its examples, [n] with n at least `min_examples` and its own for each client,
      integers, ascending.

    Raises:
      ValueError: a count is below 1, `classes` is empty or repeats a class, the arrays are not of one length, or
        too few writers have enough.

    References:
      Li and Wang, FedMD, 2019 (arXiv 1910.03581): the non-iid experiment on FEMNIST.

    >>> writers, labels = np.array([7, 8, 7, 9, 9, 7]), np.array([0, 0, 1, 1, 0, 5])
    >>> rng = np.random.default_rng(0)
    >>> shares = split_by_writer(writers, labels, num_clients=2, min_examples=2, classes=[0, 1], rng=rng)
    >>> sorted(share.tolist() for share in shares)
    [[0, 2], [3, 4]]
    """
    writers, labels = as_array("writers", writers), check_labels(labels)
    if writers.dtype.kind not in "iuU":
        raise ValueError(f"writers must be integers or strings [N], got {writers.dtype} {list(writers.shape)}")
    if writers.shape != labels.shape:
        raise ValueError(f"writers must be [N] like labels, got {list(writers.shape)} and {list(labels.shape)}")
    check_generator(rng)
    check_counts(num_clients=num_clients, min_examples=min_examples)
    classes = check_classes(labels, classes)
    wanted = np.isin(labels, classes)
    names, counts = np.unique(writers[wanted], return_counts=True)
    names, most = names[counts >= min_examples], counts.max(initial=0)
    if len(names) < num_clients:
        raise ValueError(
            f"{num_clients} clients need as many writers with at least {min_examples} examples of the classes "
            f"{classes}, but {len(names)} of {len(np.unique(writers))} writers have them (the most is {most})"
        )
    return [np.flatnonzero(wanted & (writers == name)) for name in rng.permutation(names)[:num_clients]]


def split_by_superclass(
    fine: np.ndarray,
    coarse: np.ndarray,
    *,
    num_clients: int,
    examples_per_class: int,
    superclasses: Sequence[int] | None = None,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Gives every client one fine class of each superclass, with the same number of examples of each.

    This is the non-iid setting of FedMD for CIFAR-100: clients classify superclasses, and each has examples of one fine
    class only (of the carnivores, wolves or bears). The fine classes of each superclass are assigned in random order
    and cyclically: with five in each, clients i and i + 5 have the same fine classes, as in the released code, but
    never the same images. A client's share does not depend on the number of clients after it.

    Args:
      fine: fine class of each example, [N], integers.
      coarse: superclass of each example, [N], integers; the same for all examples of a fine class.
      num_clients: number of clients, at least 1.
      examples_per_class: examples of each superclass, all of one fine class, that each client gets, at least 1.
      superclasses: the superclasses to hand out, in this order; all in `coarse`, ascending, if None.
      rng: the source of randomness; it advances.

    Returns:
      Per client the positions of its examples, [len(superclasses) * examples_per_class], integers: superclass after
      superclass, in random order within one.

    Raises:
      ValueError: a count is below 1, `superclasses` is empty or repeats one or has one without examples, the arrays are
        not of one length, a fine class is in two superclasses, or a fine class has too few examples.

    References:
      Li and Wang, FedMD, 2019 (arXiv 1910.03581): the non-iid experiment on CIFAR.

    >>> fine = np.repeat([0, 1, 2, 3], 2)
    >>> coarse = fine // 2
    >>> rng = np.random.default_rng(0)
    >>> shares = split_by_superclass(fine, coarse, num_clients=4, examples_per_class=1, rng=rng)
    >>> [coarse[share].tolist() for share in shares]
    [[0, 1], [0, 1], [0, 1], [0, 1]]
    >>> fine[shares[0]].tolist() == fine[shares[2]].tolist() != fine[shares[1]].tolist()
    True
    """
    fine, coarse = check_labels(fine, "fine"), check_labels(coarse, "coarse")
    if fine.shape != coarse.shape:
        raise ValueError(f"fine and coarse must be of one length, got {len(fine)} and {len(coarse)}")
    check_generator(rng)
    check_counts(num_clients=num_clients, examples_per_class=examples_per_class)
    families = _families(fine, coarse, check_classes(coarse, superclasses, "superclasses"))
    for superclass, family in families.items():
        most = -(-num_clients // len(family))
        check_supply(
            fine,
            family,
            needed=most * examples_per_class,
            request=f"{num_clients} clients with {examples_per_class} examples each of one of the {len(family)} fine "
            f"classes of superclass {superclass}",
        )
    shares = [[] for _ in range(num_clients)]
    for family in families.values():
        shuffled = [rng.permutation(np.flatnonzero(fine == c)) for c in rng.permutation(family)]
        for client, share in enumerate(shares):
            turn, which = divmod(client, len(family))
            share.append(shuffled[which][turn * examples_per_class : (turn + 1) * examples_per_class])
    return [np.concatenate(share) for share in shares]


def _families(fine, coarse, superclasses):
    """The fine classes of each superclass, ascending."""
    families = {superclass: np.unique(fine[coarse == superclass]).tolist() for superclass in superclasses}
    missing = [superclass for superclass, family in families.items() if not family]
    if missing:
        raise ValueError(f"no examples of the superclasses {missing}, there are {np.unique(coarse).tolist()}")
    pairs = np.unique(np.stack([fine, coarse]), axis=1)
    repeated = pairs[0, 1:][pairs[0, 1:] == pairs[0, :-1]]
    if len(repeated):
        own = pairs[1, pairs[0] == repeated[0]].tolist()
        raise ValueError(f"a fine class has one superclass, but class {repeated[0]} has {own}")
    return families
