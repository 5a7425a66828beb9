import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmd_jax.data import split_by_class


@st.composite
def requests(draw):
    """Labels in any order, and a request that they can just about meet."""
    num_clients, examples_per_class = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    classes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
    supply = [num_clients * examples_per_class + draw(st.integers(0, 3)) for _ in classes]
    labels = np.repeat([*classes, 11], [*supply, draw(st.integers(0, 3))])  # 11 is not asked for
    labels = np.random.default_rng(draw(st.integers(0, 99))).permutation(labels)
    return labels, {"num_clients": num_clients, "examples_per_class": examples_per_class, "classes": classes}


def split(labels, *, seed, **request):
    return split_by_class(labels, rng=np.random.default_rng(seed), **request)


@given(requests(), st.integers(0, 2**32))
def test_every_client_gets_what_was_asked_without_overlap(request_, seed):
    labels, request = request_
    shares = split(labels, seed=seed, **request)
    assert len(shares) == request["num_clients"]
    everything = np.concatenate(shares)
    assert len(np.unique(everything)) == len(everything)
    expected = np.repeat(request["classes"], request["examples_per_class"])
    for share in shares:
        np.testing.assert_array_equal(labels[share], expected)


@given(requests(), st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_split(request_, seed):
    labels, request = request_
    np.testing.assert_array_equal(split(labels, seed=seed, **request), split(labels, seed=seed, **request))


@given(requests(), st.integers(0, 2**32))
def test_a_share_does_not_depend_on_the_clients_after_it(request_, seed):
    labels, request = request_
    shares = split(labels, seed=seed, **request)
    fewer = split(labels, seed=seed, **{**request, "num_clients": 1})
    np.testing.assert_array_equal(fewer[0], shares[0])


def test_another_seed_gives_another_split():
    labels = np.repeat(range(3), 100)
    first, second = (split(labels, seed=seed, num_clients=2, examples_per_class=10) for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_every_example_is_as_likely_as_any_other():
    labels = np.repeat(range(2), 10)
    rng = np.random.default_rng(0)
    shares = [split_by_class(labels, num_clients=2, examples_per_class=1, rng=rng)[1] for _ in range(2000)]
    counts = np.bincount(np.concatenate(shares), minlength=20)
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200)


def test_all_classes_ascending_by_default():
    labels = np.array([7, 3, 7, 3, 5])
    (share,) = split(labels, seed=0, num_clients=1, examples_per_class=1)
    assert labels[share].tolist() == [3, 5, 7]


@given(requests(), st.integers(0, 3))
def test_more_than_there_is_is_refused_with_the_numbers(request_, which):
    labels, request = request_
    scarce = request["classes"][which % len(request["classes"])]
    needed = request["num_clients"] * request["examples_per_class"]
    labels = np.delete(labels, np.flatnonzero(labels == scarce)[needed - 1 :])
    with pytest.raises(ValueError, match=rf"need {needed} of each, but class {scarce} has {needed - 1}$"):
        split(labels, seed=0, **request)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_clients": 0}, "num_clients must be an integer of at least 1, got 0"),
        ({"examples_per_class": -2}, "examples_per_class must be an integer of at least 1, got -2"),
        ({"classes": []}, r"classes must be one or more different labels, got \[\]"),
        ({"classes": [1, 0, 1]}, r"classes must be one or more different labels, got \[1, 0, 1\]"),
        ({"classes": [0, 9]}, "1 clients with 2 examples per class need 2 of each, but class 9 has 0"),
        ({"labels": np.zeros(4)}, r"labels must be integers \[N\], got float64 \[4\]"),
        ({"labels": np.zeros((4, 1), int)}, r"labels must be integers \[N\], got int64 \[4, 1\]"),
        ({"labels": np.zeros(0, int)}, "classes must be one or more different labels"),
    ],
)
def test_impossible_requests_are_refused(change, message):
    request = {"labels": np.repeat(range(3), 4), "num_clients": 1, "examples_per_class": 2} | change
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    with pytest.raises(ValueError, match=message):
        split_by_class(request.pop("labels"), rng=rng, **request)
    assert rng.bit_generator.state == before
