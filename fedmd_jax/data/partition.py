"""Seeded partitions of a labelled data set among clients.

A partition is a list with one index array per client. Every function takes arrays first, settings as keywords, and
`rng` last; the same generator state gives the same partition. No example goes to two clients. Impossible requests are
refused before `rng` is used.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fedmd_jax.checks import as_array, as_list, check_count, check_positive, describe_value, one_line

Weights = Callable[[np.random.Generator, int], np.ndarray]  # generator, number of clients n -> weights [n], positive


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
      Per client the positions of its examples in `labels`, [len(classes) * examples_per_class], integers, class after
      class, in random order within a class.

    Raises:
      ValueError: a count is below 1, `classes` is empty or repeats a class, or a class has too few examples.

    References:
      Li and Wang, FedMD, 2019 (arXiv 1910.03581): the iid experiments.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> labels = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2])
      >>> rng = np.random.default_rng(0)
      >>> shares = fmd.data.split_by_class(labels, num_clients=2, examples_per_class=2, classes=[0, 1], rng=rng)
      >>> [labels[share].tolist() for share in shares]
      [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    labels, classes = _check_request(labels, classes, num_clients, rng)
    check_count("examples_per_class", examples_per_class)
    request = f"{num_clients} clients with {examples_per_class} examples per class"
    _check_supply(labels, classes, num_clients * examples_per_class, request)
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
      Per client the positions of its examples in `labels`, [classes_per_client * examples_per_class], integers, class
      after class in the order of `classes`, in random order within a class.

    Raises:
      ValueError: a count is below 1, `classes` is empty or repeats a class, a client is to have more classes than there
        are, or a class has too few examples for as many clients as may draw it.

    References:
      McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017, section 3, where
      each client has examples of at most two classes.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> labels = np.repeat([0, 1, 2], 4)
      >>> rng = np.random.default_rng(0)
      >>> shares = fmd.data.split_k_classes(labels, num_clients=3, classes_per_client=2, examples_per_class=2, rng=rng)
      >>> [len(set(labels[share].tolist())) for share in shares], np.bincount(labels[np.concatenate(shares)]).tolist()
      ([2, 2, 2], [4, 4, 4])
    """
    labels, classes = _check_request(labels, classes, num_clients, rng)
    check_count("classes_per_client", classes_per_client)
    check_count("examples_per_class", examples_per_class)
    if classes_per_client > len(classes):
        raise ValueError(f"classes_per_client is {classes_per_client}, but there are {len(classes)} classes")
    # The largest number of clients of a class; some classes have one less.
    most = -(-num_clients * classes_per_client // len(classes))
    what = f"{examples_per_class} examples of each of {classes_per_client} classes"
    request = f"{num_clients} clients with {what}, up to {most} clients to a class,"
    _check_supply(labels, classes, most * examples_per_class, request)
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

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> writers, labels = np.array([7, 8, 7, 9, 9, 7]), np.array([0, 0, 1, 1, 0, 5])
      >>> rng = np.random.default_rng(0)
      >>> shares = fmd.data.split_by_writer(writers, labels, num_clients=2, min_examples=2, classes=[0, 1], rng=rng)
      >>> sorted(share.tolist() for share in shares)
      [[0, 2], [3, 4]]
    """
    labels, classes = _check_request(labels, classes, num_clients, rng)
    check_count("min_examples", min_examples)
    writers = as_array("writers", writers)
    if writers.dtype.kind not in "iuU":
        raise ValueError(f"writers must be integers or strings [N], got {writers.dtype} {list(writers.shape)}")
    if writers.shape != labels.shape:
        raise ValueError(f"writers must be [N] like labels, got {list(writers.shape)} and {list(labels.shape)}")
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
      Per client the positions of its examples, [len(superclasses) * examples_per_class], integers, superclass after
      superclass, in random order within one.

    Raises:
      ValueError: a count is below 1, `superclasses` is empty or repeats one or has one without examples, the arrays are
        not of one length, a fine class is in two superclasses, or a fine class has too few examples.

    References:
      Li and Wang, FedMD, 2019 (arXiv 1910.03581): the non-iid experiment on CIFAR.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> fine = np.repeat([0, 1, 2, 3], 2)
      >>> coarse = fine // 2
      >>> rng = np.random.default_rng(0)
      >>> shares = fmd.data.split_by_superclass(fine, coarse, num_clients=4, examples_per_class=1, rng=rng)
      >>> [coarse[share].tolist() for share in shares]
      [[0, 1], [0, 1], [0, 1], [0, 1]]
      >>> fine[shares[0]].tolist() == fine[shares[2]].tolist() != fine[shares[1]].tolist()
      True
    """
    coarse, superclasses = _check_request(coarse, superclasses, num_clients, rng, names=("coarse", "superclasses"))
    check_count("examples_per_class", examples_per_class)
    fine = _check_labels("fine", fine)
    if fine.shape != coarse.shape:
        raise ValueError(f"fine and coarse must be of one length, got {len(fine)} and {len(coarse)}")
    families = _families(fine, coarse, superclasses)
    for superclass, family in families.items():
        what = f"one of the {len(family)} fine classes of superclass {superclass}"
        request = f"{num_clients} clients with {examples_per_class} examples each of {what}"
        _check_supply(fine, family, -(-num_clients // len(family)) * examples_per_class, request)
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
    for label in np.unique(fine).tolist():
        own = np.unique(coarse[fine == label]).tolist()
        if len(own) > 1:
            raise ValueError(f"a fine class has one superclass, but class {label} has {own}")
    return families


def split_dirichlet(
    labels: np.ndarray,
    *,
    num_clients: int,
    alpha: float,
    min_examples: int = 1,
    classes: Sequence[int] | None = None,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Divides the examples of every class among the clients in proportions drawn from a Dirichlet distribution.

    Every example of the classes goes to exactly one client. A client with fewer than `min_examples` gets random
    examples of the client with the most. (Other implementations draw all proportions again until every client has
    enough, which may not terminate for small alpha.)

    Args:
      labels: class of each example, [N], integers.
      num_clients: number of clients, at least 1.
      alpha: the concentration, above 0: a class goes to few clients if small (0.1), evenly to all if large (100).
      min_examples: examples that every client has at least, at least 1.
      classes: the classes to hand out; all classes in `labels` if None.
      rng: the source of randomness; it advances.

    Returns:
      Per client the positions of its examples, [n] with n at least `min_examples` and its own for each client,
      integers, ascending.

    Raises:
      ValueError: a count is below 1, alpha is not above 0 and finite, `classes` is empty or repeats a class, or there
        are too few examples for the minimum of all clients.

    References:
      Yurochkin et al., Bayesian Nonparametric Federated Learning of Neural Networks, 2019, section 4: proportions over
      clients, drawn for each class.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> labels = np.repeat([0, 1], 50)
      >>> rng = np.random.default_rng(0)
      >>> shares = fmd.data.split_dirichlet(labels, num_clients=3, alpha=0.1, min_examples=5, rng=rng)
      >>> sorted(np.concatenate(shares).tolist()) == list(range(100)), min(len(share) for share in shares) >= 5
      (True, True)
    """
    labels, classes = _check_request(labels, classes, num_clients, rng)
    check_positive("alpha", alpha)
    _check_total(int(np.isin(labels, classes).sum()), num_clients, min_examples)
    pieces = []
    for c in classes:
        indices = rng.permutation(np.flatnonzero(labels == c))
        pieces.append(_cut(indices, rng.dirichlet(np.full(num_clients, alpha))))
    shares = [np.concatenate(share) for share in zip(*pieces, strict=True)]
    return _raise_to_minimum(shares, min_examples, rng)


def split_dirichlet_labels(
    labels: np.ndarray,
    *,
    num_clients: int,
    alpha: float,
    examples_per_client: int,
    classes: Sequence[int] | None = None,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Gives every client the same number of examples, in class proportions of its own.

    The proportions of each client are drawn from a Dirichlet distribution, and the numbers of examples from these
    proportions. Labels are skewed and quantities are not. A client's share does not depend on the number of clients
    after it.

    Args:
      labels: class of each example, [N], integers.
      num_clients: number of clients, at least 1.
      alpha: the concentration, above 0: a client has few classes if small (0.1), all classes evenly if large (100).
      examples_per_client: examples that each client gets, at least 1.
      classes: the classes to hand out; all classes in `labels` if None.
      rng: the source of randomness; it advances.

    Returns:
      Per client the positions of its examples, [examples_per_client], integers, class after class in the order of
      `classes`, in random order within a class.

    Raises:
      ValueError: a count is below 1, alpha is not above 0 and finite, `classes` is empty or repeats a class, or a class
        has too few examples for the draw in which all clients have this class only.

    References:
      Hsu et al., Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification, 2019
      (arXiv 1909.06335), section 3.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> labels = np.repeat([0, 1], 50)
      >>> rng = np.random.default_rng(0)
      >>> shares = fmd.data.split_dirichlet_labels(labels, num_clients=3, alpha=0.1, examples_per_client=9, rng=rng)
      >>> [len(share) for share in shares], len(set(np.concatenate(shares).tolist()))
      ([9, 9, 9], 27)
    """
    labels, classes = _check_request(labels, classes, num_clients, rng)
    check_count("examples_per_client", examples_per_client)
    check_positive("alpha", alpha)
    _check_supply(
        labels,
        classes,
        needed=num_clients * examples_per_client,
        request=f"{num_clients} clients with {examples_per_client} examples of classes that are drawn",
    )
    shuffled = [rng.permutation(np.flatnonzero(labels == c)) for c in classes]
    shares, starts = [], np.zeros(len(classes), int)
    for _ in range(num_clients):
        ends = starts + rng.multinomial(examples_per_client, rng.dirichlet(np.full(len(classes), alpha)))
        cuts = zip(shuffled, starts, ends, strict=True)
        shares.append(np.concatenate([indices[start:end] for indices, start, end in cuts]))
        starts = ends
    return shares


def split_by_quantity(
    labels: np.ndarray,
    *,
    num_clients: int,
    weights: Weights,
    min_examples: int = 1,
    classes: Sequence[int] | None = None,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Divides the examples among clients of different sizes, independently of their classes.

    Every example of the classes goes to exactly one client. A client with fewer than `min_examples` gets random
    examples of the client with the most.

    Args:
      labels: class of each example, [N], integers.
      num_clients: number of clients, at least 1.
      weights: sizes are proportional to them: `lognormal(sigma)`, `power_law(exponent)`, or any function
        `(rng, num_clients) -> [num_clients]`.
      min_examples: examples that every client has at least, at least 1.
      classes: the classes to hand out; all classes in `labels` if None.
      rng: the source of randomness; it advances.

    Returns:
      Per client the positions of its examples, [n] with n at least `min_examples` and its own for each client,
      integers, ascending.

    Raises:
      ValueError: a count is below 1, `classes` is empty or repeats a class, there are too few examples for the minimum
        of all clients, or the weights are not positive numbers [num_clients].

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> labels = np.zeros(100, int)
      >>> rng = np.random.default_rng(0)
      >>> shares = fmd.data.split_by_quantity(labels, num_clients=4, weights=fmd.data.power_law(1.0), rng=rng)
      >>> sorted(len(share) for share in shares)
      [12, 16, 24, 48]
    """
    labels, classes = _check_request(labels, classes, num_clients, rng)
    wanted = np.flatnonzero(np.isin(labels, classes))
    _check_total(len(wanted), num_clients, min_examples)
    drawn = np.asarray(weights(rng, num_clients), np.float64)
    if drawn.shape != (num_clients,) or not np.all(np.isfinite(drawn) & (drawn > 0)):
        raise ValueError(f"weights must give {num_clients} positive numbers, got {drawn.tolist()}")
    return _raise_to_minimum(_cut(rng.permutation(wanted), drawn / drawn.sum()), min_examples, rng)


def lognormal(sigma: float) -> Weights:
    """Weights whose logarithms are normally distributed.

    Args:
      sigma: standard deviation of the logarithms, above 0; at 1 one client in six has more than 2.7 times the median.

    Raises:
      ValueError: sigma is not above 0 and finite.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> fmd.data.lognormal(0.5)(np.random.default_rng(0), 3).shape
      (3,)
    """
    check_positive("sigma", sigma)
    return lambda rng, n: _over_the_largest(sigma * rng.standard_normal(n))


def power_law(exponent: float) -> Weights:
    """Weights that decrease with the rank of the client, rank ** -exponent. Ranks are drawn at random.

    Args:
      exponent: rate of the decrease, above 0; at 1 the second weight is half of the first (Zipf's law).

    Raises:
      ValueError: the exponent is not above 0 and finite.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> sorted(fmd.data.power_law(1.0)(np.random.default_rng(0), 3).tolist())
      [0.3333333333333333, 0.5, 1.0]
    """
    check_positive("exponent", exponent)
    return lambda rng, n: _over_the_largest(-exponent * np.log(rng.permutation(n) + 1.0))


def _over_the_largest(logarithms):
    """Weights from their logarithms, scaled so that the largest is 1 and none is 0."""
    return np.exp(np.maximum(logarithms - logarithms.max(), np.log(np.finfo(np.float64).tiny)))


def _cut(indices, proportions):
    """Consecutive pieces of the indices in these proportions, which add up to 1; together all of the indices."""
    cuts = np.rint(np.cumsum(proportions)[:-1] * len(indices)).astype(int)
    return np.split(indices, np.minimum(cuts, len(indices)))


def _raise_to_minimum(shares, min_examples, rng):
    for poor in range(len(shares)):
        while (lacking := min_examples - len(shares[poor])) > 0:
            # There are enough examples in total, so while a client is below the minimum, the largest is above it.
            rich = max(range(len(shares)), key=lambda client: len(shares[client]))
            given, kept = np.split(rng.permutation(shares[rich]), [min(lacking, len(shares[rich]) - min_examples)])
            shares[poor], shares[rich] = np.concatenate([shares[poor], given]), kept
    return [np.sort(share) for share in shares]


def _check_total(total, num_clients, min_examples):
    check_count("min_examples", min_examples)
    if total < num_clients * min_examples:
        raise ValueError(
            f"{num_clients} clients with at least {min_examples} examples need {num_clients * min_examples}, "
            f"but there are {total}"
        )


def _check_request(labels, classes, num_clients, rng, names=("labels", "classes")):
    """The labels as an array, and the requested classes, all that there are if None."""
    check_count("num_clients", num_clients)
    if not isinstance(rng, np.random.Generator):
        raise ValueError(f"rng must be a numpy.random.Generator, got {describe_value(rng)}")
    labels = _check_labels(names[0], labels)
    classes = np.unique(labels).tolist() if classes is None else as_list(names[1], classes)
    if not all(isinstance(label, (int, np.integer)) and not isinstance(label, bool) for label in classes):
        raise ValueError(f"{names[1]} must be integers, got {describe_value(classes)}")
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(f"{names[1]} must be one or more different labels, got {describe_value(classes)}")
    return labels, [int(label) for label in classes]


def _check_labels(name, labels):
    labels = as_array(name, labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers [N], got {labels.dtype} {list(labels.shape)}")
    return labels


def _check_supply(labels: np.ndarray, classes: Iterable[int], needed: int, request: str) -> None:
    """Checks that every class has as many examples as are needed; `request` begins the error message."""
    supply = {c: int(np.sum(labels == c)) for c in classes}
    short = one_line(", ".join(f"class {c} has {supply[c]}" for c in supply if supply[c] < needed), longest=400)
    if short:
        raise ValueError(f"{request} need {needed} of each, but {short}")
