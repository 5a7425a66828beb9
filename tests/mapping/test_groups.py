import jax
import numpy as np
import pytest
import toys
from hypothesis import given, settings, strategies as st

import fedmd_jax as fmd

ARCHITECTURE = toys.linear()


def test_keys_belong_to_the_client_not_to_its_place(key):
    keys = jax.random.key_data(fmd.mapping.client_keys(key, (7, 2, 5)))
    other = jax.random.key_data(fmd.mapping.client_keys(key, (5, 7)))
    assert (keys[0] == other[1]).all()
    assert (keys[2] == other[0]).all()
    assert len({tuple(k) for k in keys.tolist()}) == 3


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_stacking_keeps_every_example_and_pads_the_rest(sizes, seed):
    group = fmd.ArchitectureGroup(ARCHITECTURE, tuple(range(10, 10 + len(sizes))))
    data = {10 + k: toys.examples(seed % 1000 + k, n) for k, n in enumerate(sizes)}
    stacked = fmd.stack_private({"all": group}, data)["all"]
    assert stacked.inputs.shape == (len(sizes), max(sizes), toys.NUM_FEATURES)
    assert stacked.num_examples.tolist() == sizes
    for k, n in enumerate(sizes):
        np.testing.assert_array_equal(stacked.inputs[k, :n], data[10 + k][0])
        np.testing.assert_array_equal(stacked.labels[k, :n], data[10 + k][1])
        np.testing.assert_array_equal(stacked.inputs[k, n:], np.repeat(data[10 + k][0][-1:], max(sizes) - n, axis=0))
        assert (stacked.labels[k, n:] == data[10 + k][1][-1]).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"client_ids": ()}, "at least one client, got none"),
        ({"client_ids": (1, 2, 1)}, r"got more than once: \[1\]"),
        ({"client_ids": (-1,)}, "integers from 0"),
        ({"client_ids": ("a",)}, "integers from 0"),
        ({"client_ids": (0, 1), "weights": (1.0,)}, "2 clients, 1 weights"),
        ({"client_ids": (0, 1), "weights": (1.0, -2.0)}, r"zero or between 1e-30 and 1e30, got \[1.0, -2.0\]"),
        ({"client_ids": (0,), "weights": (float("nan"),)}, "zero or between"),
        ({"client_ids": (0,), "weights": (1e39,)}, "zero or between"),
        ({"client_ids": (0,), "weights": (1e-50,)}, "zero or between"),
    ],
)
def test_groups_that_make_no_sense_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        fmd.ArchitectureGroup(ARCHITECTURE, **kwargs)


def test_a_client_in_two_groups_is_refused():
    groups = {"a": fmd.ArchitectureGroup(ARCHITECTURE, (0, 1)), "b": fmd.ArchitectureGroup(ARCHITECTURE, (1,))}
    with pytest.raises(ValueError, match=r"got more than once: \[1\]"):
        fmd.fedmd(groups)


def good():
    return np.zeros((3, 5), np.float32), np.zeros(3, np.int64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({0: good()}, r"missing for \[1\]"),
        ({0: good(), 1: good(), 9: good()}, r"not in any group \[9\]"),
        ({0: good(), 1: (np.zeros((3, 5)), np.zeros(2, int))}, "client 1.*3 inputs, 2 labels"),
        ({0: good(), 1: (np.zeros((0, 5)), np.zeros(0, int))}, "client 1.*at least one example is needed, got none"),
        ({0: good(), 1: (np.full((3, 5), np.nan), np.zeros(3, int))}, "client 1.*NaN or infinity in 3 rows"),
        ({0: good(), 1: (np.zeros((3, 5)), np.zeros(3))}, "client 1.*must be integers"),
        ({0: good(), 1: (np.zeros((3, 5)), np.array([0, -1, 2]))}, "client 1.*must not be negative, got -1"),
        ({0: good(), 1: (np.zeros((3, 6)), np.zeros(3, int))}, "must have one shape"),
        ({0: good(), 1: (np.zeros(3), np.zeros(3, int))}, r"must have shape \[N, ...\]"),
        ({0: good(), 1: (np.array([["a"]]), np.zeros(1, int))}, "must be numbers"),
    ],
)
def test_private_data_that_cannot_be_trained_on_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        fmd.stack_private({"a": fmd.ArchitectureGroup(ARCHITECTURE, (0, 1))}, data)
