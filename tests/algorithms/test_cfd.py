"""CFD: the quantiser against all codes, and its limits."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings, strategies as st

import fedmd_jax as fmd
from fedmd_jax.algorithms.cfd import code_bytes, quantize, quantized_answer

PROBABILITIES = np.random.default_rng(0).dirichlet(np.full(10, 0.3), size=200).astype(np.float32)


def all_codes(num_classes, bits):
    """All vectors of multiples of 1 / (2^bits - 1) that sum to 1."""
    steps = 2**bits - 1
    counts = itertools.product(range(steps + 1), repeat=num_classes)
    return np.array([row for row in counts if sum(row) == steps]) / steps


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=4).filter(any), st.integers(1, 3))
@settings(max_examples=100)
def test_no_code_is_nearer(counts, bits):
    row = np.array(counts) / sum(counts)
    codes = all_codes(len(row), bits)
    found = np.asarray(quantize(jnp.asarray(row, jnp.float32), bits=bits), float)
    assert np.abs(codes - found).sum(axis=1).min() < 1e-6  # it is a code
    np.testing.assert_allclose(np.abs(found - row).sum(), np.abs(codes - row).sum(axis=1).min(), atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_codes_sum_to_one_and_are_their_own_codes(bits):
    codes = quantize(PROBABILITIES, bits=bits)
    counts = np.asarray(codes, float) * (2**bits - 1)
    np.testing.assert_allclose(counts, counts.round(), atol=1e-2)
    np.testing.assert_array_equal(counts.round().sum(axis=1), 2**bits - 1)
    np.testing.assert_array_equal(quantize(codes, bits=bits), codes)
    assert np.abs(codes - PROBABILITIES).max() <= 1 / (2**bits - 1)


def test_one_bit_is_the_predicted_class():
    np.testing.assert_array_equal(quantize(PROBABILITIES, bits=1), np.eye(10)[PROBABILITIES.argmax(axis=1)])


def test_ties_are_broken_by_the_class_index():
    np.testing.assert_allclose(quantize(jnp.full(4, 0.25), bits=1), [1, 0, 0, 0])
    np.testing.assert_allclose(quantize(jnp.full(5, 0.2), bits=2), np.array([1, 1, 1, 0, 0]) / 3, rtol=1e-6)


def test_a_row_that_is_not_finite_stays_so():
    """So that the client is excluded."""
    assert not np.isfinite(quantize(jnp.array([[jnp.nan, 0.5, 0.5], [jnp.nan] * 3]), bits=2)).all(axis=1).any()


# log2 of binom(2^bits + 8, 9).
@pytest.mark.parametrize(("bits", "expected"), [(1, 3.32), (2, 7.78), (4, 20.3), (8, 53.7)])
def test_bytes_are_those_of_the_number_of_codes(bits, expected):
    np.testing.assert_allclose(8 * code_bytes(80_000, 10, bits=bits) / 80_000, expected, atol=0.05)
    if bits < 4:
        assert code_bytes(800, 3, bits=bits) == np.ceil(100 * np.log2(len(all_codes(3, bits))))


def test_bytes_up_and_down():
    traffic = fmd.algorithms.cfd(bits=1, down_bits=2).traffic(
        fmd.algorithms.Sizes(None, {}, None, subset_size=5000, num_classes=10)
    )
    assert traffic == (code_bytes(5000, 10, bits=1), code_bytes(5000, 10, bits=2)) == (2077, 4864)


def test_many_bits_are_the_plain_mean_of_ds_fl():
    groups, public = toys.groups(linear=(1.0, 2.0, 0.5)), toys.public()
    private = toys.private(groups)
    results = []
    for algorithm in (fmd.algorithms.cfd(bits=16), fmd.algorithms.ds_fl(temperature=None)):
        federation = toys.federation(groups, algorithm=algorithm)
        states = federation.init(jax.random.key(0), public, private)
        results.append(federation.round(states, public, private, jax.random.key(1)))
    chex.assert_trees_all_close(*results, atol=1e-4)


def test_what_goes_down_is_the_quantised_mean_or_the_quantised_network_of_the_server():
    mean = jnp.asarray(PROBABILITIES[:, :4] / PROBABILITIES[:, :4].sum(axis=1, keepdims=True))
    subset, network = toys.public(), toys.linear()
    np.testing.assert_array_equal(quantized_answer(None, (), subset, mean, bits=2), quantize(mean, bits=2))
    training = toys.sgd(5)
    model = fmd.init_client(network, jax.random.key(0), subset.inputs, digest=training, revisit=training)
    probabilities = jax.nn.softmax(fmd.score(network, model, subset.inputs))
    answer = quantized_answer(network, model, subset, mean, bits=2)
    np.testing.assert_array_equal(answer, quantize(probabilities, bits=2))


@pytest.mark.parametrize("setting", [{"bits": 0}, {"bits": 17}, {"down_bits": 17}])
def test_bits_are_from_1_to_16(setting):
    with pytest.raises(ValueError, match=r"^(down_)?bits must be (an integer of at least 1|at most 16), got \d+$"):
        fmd.algorithms.cfd(**setting)
