"""Skewed partitions of all examples: in the classes (Dirichlet) or in the number of examples (quantity)."""

import sys
from collections.abc import Callable, Sequence

import numpy as np

from fedmd_jax.checks import describe_value, is_number
from fedmd_jax.data.partition.checks import check_classes, check_counts, check_generator, check_labels

Weights = Callable[[np.random.Generator, int], np.ndarray]  # generator, number of clients n -> weights [n], positive


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

    >>> labels = np.repeat([0, 1], 50)
    >>> shares = split_dirichlet(labels, num_clients=3, alpha=0.1, min_examples=5, rng=np.random.default_rng(0))
    >>> sorted(np.concatenate(shares).tolist()) == list(range(100)), min(len(share) for share in shares) >= 5
    (True, True)
    """
    labels = check_labels(labels)
    check_generator(rng)
    check_counts(num_clients=num_clients, min_examples=min_examples)
    _check_positive("alpha", alpha)
    classes = check_classes(labels, classes)
    _check_total(int(np.isin(labels, classes).sum()), num_clients, min_examples)
    pieces = []
    for c in classes:
        indices = rng.permutation(np.flatnonzero(labels == c))
        pieces.append(_cut(indices, rng.dirichlet(np.full(num_clients, alpha))))
    shares = [np.concatenate(share) for share in zip(*pieces, strict=True)]
    return _raise_to_minimum(shares, min_examples, rng)


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

    >>> labels = np.zeros(100, int)
    >>> rng = np.random.default_rng(0)
    >>> shares = split_by_quantity(labels, num_clients=4, weights=power_law(1.0), rng=rng)
    >>> sorted(len(share) for share in shares)
    [12, 16, 24, 48]
    """
    labels = check_labels(labels)
    check_generator(rng)
    check_counts(num_clients=num_clients, min_examples=min_examples)
    wanted = np.flatnonzero(np.isin(labels, check_classes(labels, classes)))
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

    >>> lognormal(0.5)(np.random.default_rng(0), 3).shape
    (3,)
    """
    _check_positive("sigma", sigma)
    return lambda rng, n: _over_the_largest(sigma * rng.standard_normal(n))


def power_law(exponent: float) -> Weights:
    """Weights that decrease with the rank of the client, rank ** -exponent. Ranks are drawn at random.

    Args:
      exponent: rate of the decrease, above 0; at 1 the second weight is half of the first (Zipf's law).

    Raises:
      ValueError: the exponent is not above 0 and finite.

    >>> sorted(power_law(1.0)(np.random.default_rng(0), 3).tolist())
    [0.3333333333333333, 0.5, 1.0]
    """
    _check_positive("exponent", exponent)
    return lambda rng, n: _over_the_largest(-exponent * np.log(rng.permutation(n) + 1.0))


def _over_the_largest(logarithms):
    """Weights from their logarithms, scaled so that the largest is 1 and none is 0."""
    return np.exp(np.maximum(logarithms - logarithms.max(), np.log(np.finfo(np.float64).tiny)))


def _cut(indices, proportions):
    """Consecutive pieces of the indices in these proportions, which add up to 1; together all of the indices."""
    cuts = np.rint(np.cumsum(proportions)[:-1] * len(indices)).astype(int)
    return np.split(indices, np.minimum(cuts, len(indices)))


def _raise_to_minimum(shares, min_examples, rng):
    shares = list(shares)
    for poor in range(len(shares)):
        while (lacking := min_examples - len(shares[poor])) > 0:
            # There are enough examples in total, so while a client is below the minimum, the largest is above it.
            rich = max(range(len(shares)), key=lambda client: len(shares[client]))
            given, kept = np.split(rng.permutation(shares[rich]), [min(lacking, len(shares[rich]) - min_examples)])
            shares[poor], shares[rich] = np.concatenate([shares[poor], given]), kept
    return [np.sort(share) for share in shares]


def _check_total(total, num_clients, min_examples):
    if total < num_clients * min_examples:
        raise ValueError(
            f"{num_clients} clients with at least {min_examples} examples need {num_clients * min_examples}, "
            f"but there are {total}"
        )


def _check_positive(name, number):
    if not is_number(number) or not 0 < number <= sys.float_info.max:
        raise ValueError(f"{name} must be a finite number above 0, got {describe_value(number)}")
