"""Partitions: what every client gets, that no example is given twice, and what is refused."""

from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from fedmd_jax.data import (
    lognormal,
    power_law,
    split_by_class,
    split_by_quantity,
    split_by_superclass,
    split_by_writer,
    split_dirichlet,
    split_dirichlet_labels,
    split_k_classes,
)

SEEDS = st.integers(0, 2**32)
modest = settings(max_examples=40, deadline=None)


def generator(seed):
    return np.random.default_rng(seed)


def same(shares, others):
    return len(shares) == len(others) and all(map(np.array_equal, shares, others))


def check_shares(split, seed, num_clients):
    """Shares of as many clients, disjoint, the same for a seed, and independent of the number of clients after them."""
    shares = split(num_clients=num_clients, rng=generator(seed))
    assert len(shares) == num_clients
    everything = np.concatenate(shares)
    assert len(np.unique(everything)) == len(everything)
    assert same(shares, split(num_clients=num_clients, rng=generator(seed)))
    assert same(shares[:1], split(num_clients=1, rng=generator(seed)))
    return shares


# By class: all, or K per client.


@st.composite
def class_requests(draw, some=True):
    """Labels in any order of exactly the supply that is asked of every class."""
    classes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True))
    request = {
        "num_clients": draw(st.integers(1, 8)),
        "examples_per_class": draw(st.integers(1, 3)),
        "classes": classes,
    }
    each = draw(st.integers(1, len(classes))) if some else len(classes)
    most = -(-request["num_clients"] * each // len(classes))
    labels = np.repeat([*classes, 11], [*[most * request["examples_per_class"]] * len(classes), 2])
    return generator(draw(SEEDS)).permutation(labels), request | ({"classes_per_client": each} if some else {})


@given(class_requests(some=False), SEEDS)
def test_every_client_gets_all_classes_in_their_order(request_, seed):
    labels, request = request_
    shares = check_shares(partial(split_by_class, labels, **request), seed, request["num_clients"])
    expected = np.repeat(request["classes"], request["examples_per_class"])
    for share in shares:
        np.testing.assert_array_equal(labels[share], expected)


@modest
@given(class_requests(), SEEDS)
def test_k_classes_are_k_of_equal_number_and_all_classes_are_as_common(request_, seed):
    labels, request = request_
    shares = check_shares(partial(split_k_classes, labels, **request), seed, request["num_clients"])
    owners = dict.fromkeys(request["classes"], 0)
    for share in shares:
        own, counts = np.unique(labels[share], return_counts=True)
        assert len(own) == request["classes_per_client"]
        assert set(counts) == {request["examples_per_class"]}
        for label in own.tolist():
            owners[label] += 1
    assert max(owners.values()) - min(owners.values()) <= 1


@pytest.mark.parametrize("split", [split_by_class, split_k_classes])
@modest
@given(st.data(), st.integers(0, 9), SEEDS)
def test_a_class_with_one_example_too_few_is_refused_with_the_numbers(split, data, which, seed):
    labels, request = data.draw(class_requests(some=split is split_k_classes))
    scarce = request["classes"][which % len(request["classes"])]
    supply = np.sum(labels == scarce)
    labels = np.delete(labels, np.flatnonzero(labels == scarce)[0])
    with pytest.raises(ValueError, match=rf"need {supply} of each, but class {scarce} has {supply - 1}$"):
        split(labels, **request, rng=generator(seed))


def test_another_seed_gives_another_split():
    labels = np.repeat(range(3), 100)
    first, second = (
        split_by_class(labels, rng=generator(seed), num_clients=2, examples_per_class=10) for seed in (0, 1)
    )
    assert not np.array_equal(first, second)


def test_every_example_and_every_writer_is_as_likely_as_any_other():
    labels, rng = np.repeat(range(2), 10), generator(0)
    shares = [split_by_class(labels, num_clients=2, examples_per_class=1, rng=rng)[1] for _ in range(2000)]
    writers = np.repeat(range(5), 2)
    split = partial(split_by_writer, writers, np.zeros(10, int), num_clients=1, min_examples=2, rng=rng)
    for counts in (
        np.bincount(np.concatenate(shares), minlength=20),
        np.bincount([writers[split()[0][0]] for _ in range(1000)], minlength=5),
    ):
        assert np.abs(counts - 200).max() < 5 * np.sqrt(200)


def test_all_classes_ascending_by_default():
    labels = np.array([7, 3, 7, 3, 5])
    (share,) = split_by_class(labels, rng=generator(0), num_clients=1, examples_per_class=1)
    assert labels[share].tolist() == [3, 5, 7]


# Writers.


@st.composite
def written(draw):
    writers = draw(st.lists(st.integers(0, 5), min_size=1, max_size=60))
    labels = draw(st.lists(st.integers(0, 3), min_size=len(writers), max_size=len(writers)))
    return np.array(writers), np.array(labels)


@modest
@given(written(), st.integers(1, 4), st.integers(1, 3), SEEDS)
def test_every_client_is_a_writer_with_all_of_its_examples_of_the_classes(written_, min_examples, num_clients, seed):
    writers, labels = written_
    totals = {w: int(np.sum((writers == w) & (labels < 2))) for w in np.unique(writers).tolist()}
    enough = [w for w, total in totals.items() if total >= min_examples]
    split = partial(split_by_writer, labels=labels, min_examples=min_examples, classes=[0, 1])
    if len(enough) < num_clients:
        with pytest.raises(
            ValueError, match=rf"{num_clients} clients need .* but {len(enough)} of {len(totals)} writers"
        ):
            split(writers, num_clients=num_clients, rng=generator(seed))
        return
    shares = check_shares(partial(split, writers), seed, num_clients)
    owners = []
    for share in shares:
        (owner,) = set(writers[share].tolist())
        owners.append(owner)
        assert owner in enough
        assert set(labels[share].tolist()) <= {0, 1}
        assert len(share) == totals[owner]
    assert len(set(owners)) == num_clients
    names = np.array([f"f{w:03}" for w in range(6)])  # in the order of the numbers
    assert same(shares, split(names[writers], num_clients=num_clients, rng=generator(seed)))


# Superclasses.


@st.composite
def superclass_requests(draw):
    """Superclasses of one to five fine classes, numbered in any order, with exactly the supply asked of each."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    coarse_of = generator(draw(SEEDS)).permutation(np.repeat(np.arange(len(sizes)) + 10, sizes))
    request = {"num_clients": draw(st.integers(1, 12)), "examples_per_class": draw(st.integers(1, 3))}
    most = np.array([-(-request["num_clients"] // sizes[c - 10]) for c in coarse_of])
    fine = np.repeat(np.arange(len(coarse_of)), most * request["examples_per_class"])
    fine = generator(draw(SEEDS)).permutation(fine)
    return fine, coarse_of[fine], sizes, request


@modest
@given(superclass_requests(), SEEDS)
def test_every_client_gets_one_fine_class_of_each_superclass_in_turn(request_, seed):
    fine, coarse, sizes, request = request_
    shares = check_shares(partial(split_by_superclass, fine, coarse, **request), seed, request["num_clients"])
    superclasses = range(10, 10 + len(sizes))
    for share in shares:
        assert coarse[share].tolist() == np.repeat(superclasses, request["examples_per_class"]).tolist()
    kinds = [[fine[share][coarse[share] == c] for c in superclasses] for share in shares]
    for i, size in enumerate(sizes):
        own = [kind[i][0] for kind in kinds]
        assert all((kind[i] == first).all() for kind, first in zip(kinds, own, strict=True))
        assert own[size:] == own[:-size]
        assert len(set(own)) == min(size, request["num_clients"])


@modest
@given(superclass_requests(), st.integers(0, 99), SEEDS)
def test_a_fine_class_with_one_example_too_few_is_refused(request_, which, seed):
    fine, coarse, _, request = request_
    scarce = fine[which % len(fine)]
    supply = np.sum(fine == scarce)
    assume(supply > 1)  # else the class is gone, and its superclass has one less
    keep = np.delete(np.arange(len(fine)), np.flatnonzero(fine == scarce)[0])
    superclass = coarse[fine == scarce][0]
    message = rf"classes of superclass {superclass} need {supply} of each, but class {scarce} has {supply - 1}$"
    with pytest.raises(ValueError, match=message):
        split_by_superclass(fine[keep], coarse[keep], **request, rng=generator(seed))


def test_only_the_superclasses_asked_for_and_in_their_order():
    fine = np.repeat(range(6), 3)
    request = {"num_clients": 1, "examples_per_class": 2, "superclasses": [2, 0]}
    (share,) = split_by_superclass(fine, fine // 2, **request, rng=generator(0))
    assert (fine[share] // 2).tolist() == [2, 2, 0, 0]


# Skewed partitions of all examples.

SPREADS = st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 1e3, 1e300])
SKEWS = {
    "dirichlet": SPREADS.map(lambda alpha: partial(split_dirichlet, alpha=alpha)),
    "lognormal": SPREADS.map(lambda sigma: partial(split_by_quantity, weights=lognormal(sigma))),
    "power law": SPREADS.map(lambda exponent: partial(split_by_quantity, weights=power_law(exponent))),
}


@pytest.mark.parametrize("skew", SKEWS)
@modest
@given(st.data(), SEEDS)
def test_a_skew_divides_all_classes_and_respects_the_minimum(skew, data, seed):
    draw = data.draw
    split = draw(SKEWS[skew])
    num_clients, min_examples = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    total = num_clients * min_examples + draw(st.integers(0, 40))
    labels = generator(draw(SEEDS)).integers(0, 3, total + 5)
    labels[:5] = 7  # not asked for
    request = {"num_clients": num_clients, "min_examples": min_examples, "classes": [2, 0, 1]}
    shares = split(labels, **request, rng=generator(seed))
    assert len(shares) == num_clients
    assert all(len(share) >= min_examples for share in shares)
    assert np.sort(np.concatenate(shares)).tolist() == list(range(5, total + 5))
    assert all((np.diff(share) > 0).all() for share in shares)
    assert same(shares, split(labels, **request, rng=generator(seed)))


def test_alpha_says_how_uneven_the_classes_are():
    labels = np.repeat(range(10), 500)

    def largest_part(alpha):
        """Of the examples of a class, the part that goes to the client with the most; the mean over classes."""
        shares = split_dirichlet(labels, num_clients=5, alpha=alpha, rng=generator(0))
        return np.mean(np.max([np.bincount(labels[share], minlength=10) for share in shares], axis=0)) / 500

    assert largest_part(1e-3) > 0.95
    assert 0.35 < largest_part(1.0) < 0.7  # the expectation is (1 + 1/2 + 1/3 + 1/4 + 1/5) / 5 = 0.46
    assert largest_part(1e5) < 0.21


@modest
@given(st.integers(1, 6), st.integers(1, 9), SPREADS, SEEDS, SEEDS)
def test_label_proportions_give_equal_sizes_and_no_example_twice(num_clients, size, alpha, seed, other_seed):
    labels = generator(other_seed).permutation(np.repeat([2, 0, 1, 7], num_clients * size))
    request = {"alpha": alpha, "examples_per_client": size, "classes": [2, 0, 1]}
    shares = split_dirichlet_labels(labels, num_clients=num_clients, **request, rng=generator(seed))
    owned = np.concatenate(shares)
    assert list(map(len, shares)) == [size] * num_clients
    assert len(set(owned.tolist())) == len(owned)
    assert 7 not in labels[owned]
    if num_clients > 1:
        fewer = split_dirichlet_labels(labels, num_clients=num_clients - 1, **request, rng=generator(seed))
        assert same(fewer, shares[:-1])


def test_alpha_says_how_uneven_the_label_proportions_are():
    labels = np.repeat(range(10), 5000)

    def largest_part(alpha):
        """Of the examples of a client, the part that is of its most frequent class; the mean over clients."""
        request = {"num_clients": 50, "examples_per_client": 100, "rng": generator(0)}
        shares = split_dirichlet_labels(labels, alpha=alpha, **request)
        return np.mean([np.bincount(labels[share]).max() for share in shares]) / 100

    assert largest_part(1e-3) > 0.95
    assert 0.25 < largest_part(1.0) < 0.37  # the expectation is (1 + 1/2 + ... + 1/10) / 10 = 0.29, and noise is added
    assert largest_part(1e5) < 0.2  # noise of 100 examples of even classes


def test_quantities_follow_the_weights_and_classes_do_not():
    labels = np.tile(range(5), 2000)
    shares = split_by_quantity(labels, num_clients=4, weights=power_law(1.0), rng=generator(0))
    sizes = sorted(map(len, shares), reverse=True)
    np.testing.assert_allclose(np.divide(sizes, sizes[0]), [1, 1 / 2, 1 / 3, 1 / 4], atol=1e-3)
    for share in shares:
        counts = np.bincount(labels[share])
        assert np.abs(counts - len(share) / 5).max() < 5 * np.sqrt(len(share) / 5)


def test_lognormal_weights_have_their_spread():
    weights = lognormal(0.7)(generator(0), 20_000)
    assert np.std(np.log(weights)) == pytest.approx(0.7, rel=0.03)


# What is refused.

LABELS = np.repeat(range(3), 4)
CALLS = {
    "class": (split_by_class, (LABELS,), {"examples_per_class": 1}),
    "k classes": (split_k_classes, (LABELS,), {"classes_per_client": 2, "examples_per_class": 1}),
    "writer": (split_by_writer, (LABELS, LABELS), {"min_examples": 1}),
    "superclass": (split_by_superclass, (LABELS, LABELS), {"examples_per_class": 1}),
    "dirichlet": (split_dirichlet, (LABELS,), {"alpha": 1.0}),
    "labels": (split_dirichlet_labels, (LABELS,), {"alpha": 1.0, "examples_per_client": 2}),
    "quantity": (split_by_quantity, (LABELS,), {"weights": power_law(1.0)}),
}


def refused(call, change, message, change_arrays=lambda array: array):
    """Every refusal comes before the generator is used."""
    split, arrays, settings_ = CALLS[call]
    rng = generator(0)
    with pytest.raises(ValueError, match=message):
        split(*map(change_arrays, arrays), **{"num_clients": 2} | settings_ | change, rng=rng)
    assert rng.bit_generator.state == generator(0).bit_generator.state


@pytest.mark.parametrize("call", CALLS)
def test_what_no_partition_takes(call):
    refused(call, {"num_clients": 0}, r"^num_clients must be an integer of at least 1, got 0$")
    refused(call, {}, r"must be integers \[N\], got float64 \[12\]$", lambda array: array * 1.0)
    refused(call, {}, r"must be integers \[N\], got int64 \[12, 1\]$", lambda array: array[:, None])
    refused(call, {}, r"classes must be one or more different labels, got \[\]$", lambda array: array[:0])
    for classes in ([], [1, 0, 1]):
        change = {"superclasses" if call == "superclass" else "classes": classes}
        refused(call, change, rf"classes must be one or more different labels, got \[{str(classes)[1:-1]}\]$")


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        ("class", {"examples_per_class": -2}, "examples_per_class must be an integer of at least 1, got -2"),
        ("class", {"classes": [0, 9]}, "2 clients with 1 examples per class need 2 of each, but class 9 has 0"),
        ("k classes", {"classes_per_client": 4}, "classes_per_client is 4, but there are 3 classes"),
        ("k classes", {"classes_per_client": 0}, "classes_per_client must be an integer of at least 1, got 0"),
        (
            "k classes",
            {"examples_per_class": 3},
            "with 3 examples of each of 2 classes, up to 2 clients .* need 6 of each, but class 0 has 4, class",
        ),
        ("writer", {"min_examples": 0}, "min_examples must be an integer of at least 1, got 0"),
        ("writer", {"classes": [9]}, r"of the classes \[9\], but 0 of 3 writers have them \(the most is 0\)"),
        ("superclass", {"superclasses": [0, 9]}, r"no examples of the superclasses \[9\], there are \[0, 1, 2\]"),
        ("dirichlet", {"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ("dirichlet", {"min_examples": 0}, "min_examples must be an integer of at least 1, got 0"),
        ("dirichlet", {"min_examples": 7}, "^2 clients with at least 7 examples need 14, but there are 12$"),
        ("labels", {"alpha": -1.0}, "alpha must be positive and finite, got -1.0"),
        ("labels", {"examples_per_client": 0}, "examples_per_client must be an integer of at least 1, got 0"),
        (
            "labels",
            {"examples_per_client": 3},
            "^2 clients with 3 examples .* need 6 of each, but class 0 has 4, class",
        ),
        ("quantity", {"min_examples": 7}, "^2 clients with at least 7 examples need 14, but there are 12$"),
    ],
)
def test_impossible_requests_are_refused(call, change, message):
    refused(call, change, message)


@pytest.mark.parametrize("weights", [[1, 2], [1, 0, 1], [1, np.nan, 1], [1, np.inf, 1]])
def test_weights_that_are_not_positive_numbers_are_refused(weights):
    message = r"^weights must give 3 positive numbers, got \[1"
    refused("quantity", {"num_clients": 3, "weights": lambda rng, n: np.array(weights)}, message)


def test_arrays_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"^writers must be \[N\] like labels, got \[11\] and \[12\]$"):
        split_by_writer(LABELS[1:], LABELS, num_clients=1, min_examples=1, rng=generator(0))
    split = partial(split_by_superclass, LABELS, num_clients=1, examples_per_class=1, rng=generator(0))
    with pytest.raises(ValueError, match=r"^fine and coarse must be of one length, got 12 and 11$"):
        split(LABELS[1:])
    with pytest.raises(ValueError, match=r"^a fine class has one superclass, but class 2 has \[0, 2\]$"):
        split(np.array([*LABELS[:-1], 0]))


@pytest.mark.parametrize("make", [lognormal, power_law])
@pytest.mark.parametrize("number", [0, -1.0, np.nan, np.inf])
def test_a_spread_that_is_not_positive_is_refused(make, number):
    with pytest.raises(ValueError, match="must be positive and finite, got"):
        make(number)
