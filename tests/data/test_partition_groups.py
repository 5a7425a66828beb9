"""Partitions other than by class: k classes, writers, superclasses, Dirichlet, quantity."""

from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedmd_jax.data import (
    lognormal,
    power_law,
    split_by_quantity,
    split_by_superclass,
    split_by_writer,
    split_dirichlet,
    split_k_classes,
)

SEEDS = st.integers(0, 2**32)
modest = settings(max_examples=40, deadline=None)


def generator(seed):
    return np.random.default_rng(seed)


def shuffled(seed, *arrays):
    order = generator(seed).permutation(len(arrays[0]))
    return [array[order] for array in arrays]


def disjoint(shares):
    everything = np.concatenate(shares)
    return len(np.unique(everything)) == len(everything)


def same(shares, others):
    return len(shares) == len(others) and all(map(np.array_equal, shares, others))


# K classes per client.


@st.composite
def k_class_requests(draw):
    """Labels in any order of exactly the supply that is asked of every class."""
    classes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True))
    request = {
        "num_clients": draw(st.integers(1, 8)),
        "classes_per_client": draw(st.integers(1, len(classes))),
        "examples_per_class": draw(st.integers(1, 3)),
        "classes": classes,
    }
    most = -(-request["num_clients"] * request["classes_per_client"] // len(classes))
    (labels,) = shuffled(
        draw(SEEDS), np.repeat([*classes, 11], [*[most * request["examples_per_class"]] * len(classes), 2])
    )
    return labels, request


@modest
@given(k_class_requests(), SEEDS)
def test_k_classes_are_k_of_equal_number_and_all_classes_are_as_common(request_, seed):
    labels, request = request_
    shares = split_k_classes(labels, **request, rng=generator(seed))
    assert len(shares) == request["num_clients"]
    assert disjoint(shares)
    owners = dict.fromkeys(request["classes"], 0)
    for share in shares:
        own, counts = np.unique(labels[share], return_counts=True)
        assert len(own) == request["classes_per_client"]
        assert set(counts) == {request["examples_per_class"]}
        for label in own.tolist():
            owners[label] += 1
    assert max(owners.values()) - min(owners.values()) <= 1
    assert same(shares, split_k_classes(labels, **request, rng=generator(seed)))
    fewer = split_k_classes(labels, **{**request, "num_clients": 1}, rng=generator(seed))
    assert same(fewer, shares[:1])


@modest
@given(k_class_requests(), st.integers(0, 9), SEEDS)
def test_k_classes_refuses_what_chance_might_not_meet(request_, which, seed):
    labels, request = request_
    scarce = request["classes"][which % len(request["classes"])]
    supply = np.sum(labels == scarce)
    labels = np.delete(labels, np.flatnonzero(labels == scarce)[0])
    with pytest.raises(ValueError, match=rf"need {supply} of each, but class {scarce} has {supply - 1}$"):
        split_k_classes(labels, **request, rng=generator(seed))


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
    shares = split(writers, num_clients=num_clients, rng=generator(seed))
    owners = []
    for share in shares:
        (owner,) = set(writers[share].tolist())
        owners.append(owner)
        assert owner in enough
        assert set(labels[share].tolist()) <= {0, 1}
        assert len(share) == totals[owner]
    assert len(set(owners)) == num_clients
    assert same(shares, split(writers, num_clients=num_clients, rng=generator(seed)))
    assert same(shares[:1], split(writers, num_clients=1, rng=generator(seed)))
    names = np.array([f"f{w:03}" for w in range(6)])  # in the order of the numbers
    assert same(shares, split(names[writers], num_clients=num_clients, rng=generator(seed)))


def test_every_writer_is_as_likely_as_any_other():
    writers = np.repeat(range(5), 2)
    labels = np.zeros(10, int)
    rng = generator(0)
    drawn = [
        writers[split_by_writer(writers, labels, num_clients=1, min_examples=2, rng=rng)[0][0]] for _ in range(1000)
    ]
    assert np.abs(np.bincount(drawn, minlength=5) - 200).max() < 5 * np.sqrt(200)


# Superclasses.


@st.composite
def superclass_requests(draw):
    """Superclasses of one to five fine classes, numbered in any order, with exactly the supply asked of each."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    coarse_of = generator(draw(SEEDS)).permutation(np.repeat(np.arange(len(sizes)) + 10, sizes))
    request = {"num_clients": draw(st.integers(1, 12)), "examples_per_class": draw(st.integers(1, 3))}
    most = np.array([-(-request["num_clients"] // sizes[c - 10]) for c in coarse_of])
    fine = np.repeat(np.arange(len(coarse_of)), most * request["examples_per_class"])
    (fine,) = shuffled(draw(SEEDS), fine)
    return fine, coarse_of[fine], sizes, request


@modest
@given(superclass_requests(), SEEDS)
def test_every_client_gets_one_fine_class_of_each_superclass_in_turn(request_, seed):
    fine, coarse, sizes, request = request_
    shares = split_by_superclass(fine, coarse, **request, rng=generator(seed))
    assert len(shares) == request["num_clients"]
    assert disjoint(shares)
    superclasses = range(10, 10 + len(sizes))
    for share in shares:
        assert coarse[share].tolist() == np.repeat(superclasses, request["examples_per_class"]).tolist()
    kinds = [[fine[share][coarse[share] == c] for c in superclasses] for share in shares]
    for i, size in enumerate(sizes):
        own = [kind[i][0] for kind in kinds]
        assert all((kind[i] == first).all() for kind, first in zip(kinds, own, strict=True))
        assert own[size:] == own[:-size]
        assert len(set(own)) == min(size, request["num_clients"])
    assert same(shares, split_by_superclass(fine, coarse, **request, rng=generator(seed)))
    fewer = split_by_superclass(fine, coarse, **{**request, "num_clients": 1}, rng=generator(seed))
    assert same(fewer, shares[:1])


@modest
@given(superclass_requests(), st.integers(0, 99), SEEDS)
def test_superclasses_refuse_what_there_is_not_enough_of(request_, which, seed):
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
    (share,) = split_by_superclass(
        fine, fine // 2, num_clients=1, examples_per_class=2, superclasses=[2, 0], rng=generator(0)
    )
    assert (fine[share] // 2).tolist() == [2, 2, 0, 0]


# Everything to somebody.

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


@pytest.mark.parametrize(
    "split",
    [partial(split_dirichlet, alpha=1.0), partial(split_by_quantity, weights=power_law(1.0))],
)
def test_a_skew_refuses_a_minimum_that_there_is_not_enough_for(split):
    rng = generator(0)
    with pytest.raises(ValueError, match=r"^4 clients with at least 3 examples need 12, but there are 11$"):
        split(np.arange(20) // 11, num_clients=4, min_examples=3, classes=[0], rng=rng)
    assert rng.bit_generator.state == generator(0).bit_generator.state


def test_alpha_says_how_uneven_the_classes_are():
    labels = np.repeat(range(10), 500)

    def largest_part(alpha):
        """Of the examples of a class, the part that goes to the client with the most; the mean over classes."""
        shares = split_dirichlet(labels, num_clients=5, alpha=alpha, rng=generator(0))
        return np.mean(np.max([np.bincount(labels[share], minlength=10) for share in shares], axis=0)) / 500

    assert largest_part(1e-3) > 0.95
    assert 0.35 < largest_part(1.0) < 0.7  # the expectation is (1 + 1/2 + 1/3 + 1/4 + 1/5) / 5 = 0.46
    assert largest_part(1e5) < 0.21


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


@pytest.mark.parametrize("weights", [[1, 2], [1, 0, 1], [1, np.nan, 1], [1, np.inf, 1]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match=r"^weights must give 3 positive numbers, got \[1"):
        split_by_quantity(np.zeros(9, int), num_clients=3, weights=lambda rng, n: np.array(weights), rng=generator(0))


# Requests that make no sense.

LABELS = np.repeat(range(3), 4)
CALLS = {
    "k classes": (split_k_classes, (LABELS,), {"num_clients": 2, "classes_per_client": 2, "examples_per_class": 1}),
    "writer": (split_by_writer, (LABELS, LABELS), {"num_clients": 2, "min_examples": 1}),
    "superclass": (split_by_superclass, (LABELS, LABELS), {"num_clients": 2, "examples_per_class": 1}),
    "dirichlet": (split_dirichlet, (LABELS,), {"num_clients": 2, "alpha": 1.0}),
    "quantity": (split_by_quantity, (LABELS,), {"num_clients": 2, "weights": power_law(1.0)}),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_clients_are_refused_before_anything_is_drawn(call):
    split, arrays, settings_ = CALLS[call]
    rng = generator(0)
    with pytest.raises(ValueError, match=r"^num_clients must be an integer of at least 1, got 0$"):
        split(*arrays, **settings_ | {"num_clients": 0}, rng=rng)
    with pytest.raises(ValueError, match=r"must be integers \[N\], got float64 \[12\]$"):
        split(*(array * 1.0 for array in arrays), **settings_, rng=rng)
    classes = {"superclasses" if call == "superclass" else "classes": [1, 1]}
    with pytest.raises(ValueError, match=r"classes must be one or more different labels, got \[1, 1\]$"):
        split(*arrays, **settings_ | classes, rng=rng)
    assert rng.bit_generator.state == generator(0).bit_generator.state


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        ("k classes", {"classes_per_client": 4}, "classes_per_client is 4, but there are 3 classes"),
        ("k classes", {"classes_per_client": 0}, "classes_per_client must be an integer of at least 1, got 0"),
        (
            "k classes",
            {"examples_per_class": 3},
            "with 3 examples of each of 2 classes, up to 2 clients .* need 6 of each, but class 0 has 4, class",
        ),
        ("k classes", {"classes": [0, 9]}, "need 2 of each, but class 9 has 0"),
        ("writer", {"min_examples": 0}, "min_examples must be an integer of at least 1, got 0"),
        (
            "writer",
            {"classes": [9]},
            r"of the classes \[9\], but 0 of 3 writers have them \(the most is 0\)",
        ),
        ("superclass", {"superclasses": [0, 9]}, r"no examples of the superclasses \[9\], there are \[0, 1, 2\]"),
        ("dirichlet", {"alpha": 0.0}, "alpha must be a finite number above 0, got 0.0"),
        ("dirichlet", {"alpha": np.inf}, "alpha must be a finite number above 0, got inf"),
        ("dirichlet", {"min_examples": 0}, "min_examples must be an integer of at least 1, got 0"),
    ],
)
def test_impossible_requests_are_refused(call, change, message):
    split, arrays, settings_ = CALLS[call]
    with pytest.raises(ValueError, match=message):
        split(*arrays, **settings_ | change, rng=generator(0))


def test_arrays_of_two_lengths_are_refused():
    with pytest.raises(ValueError, match=r"^writers must be \[N\] like labels, got \[11\] and \[12\]$"):
        split_by_writer(LABELS[1:], LABELS, num_clients=1, min_examples=1, rng=generator(0))
    with pytest.raises(ValueError, match=r"^fine and coarse must be of one length, got 12 and 11$"):
        split_by_superclass(LABELS, LABELS[1:], num_clients=1, examples_per_class=1, rng=generator(0))


def test_a_fine_class_in_two_superclasses_is_refused():
    coarse = LABELS.copy()
    coarse[-1] = 0
    with pytest.raises(ValueError, match=r"^a fine class has one superclass, but class 2 has \[0, 2\]$"):
        split_by_superclass(LABELS, coarse, num_clients=1, examples_per_class=1, rng=generator(0))


@pytest.mark.parametrize("make", [lognormal, power_law])
@pytest.mark.parametrize("number", [0, -1.0, np.nan, np.inf])
def test_a_spread_that_is_none_is_refused(make, number):
    with pytest.raises(ValueError, match="must be a finite number above 0, got"):
        make(number)
