import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings, strategies as st

import fedmd_jax as fmd


def groups_of(*sizes):
    """Groups named a, b, ..., ids counting on."""
    starts = np.cumsum([0, *sizes])
    return {
        chr(ord("a") + i): fmd.ArchitectureGroup(toys.linear(), range(start, start + size))
        for i, (start, size) in enumerate(zip(starts, sizes, strict=False))
    }


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.data())
@settings(max_examples=30, deadline=None)
def test_a_cohort_is_divided_by_the_sizes_of_the_groups(sizes, data):
    groups = groups_of(*sizes)
    cohort_size = data.draw(st.integers(len(sizes), sum(sizes)))
    shares = fmd.simulation.cohort_sizes(groups, cohort_size)
    assert sum(shares.values()) == cohort_size
    for name, group in groups.items():
        assert 1 <= shares[name] <= group.num_clients
        assert shares[name] <= max(1, np.ceil(cohort_size * group.num_clients / sum(sizes)))
    assert fmd.simulation.cohort_sizes(dict(reversed(groups.items())), cohort_size) == shares


def test_cohorts_have_no_repetition_and_differ_between_rounds(key):
    groups = {
        "a": fmd.ArchitectureGroup(toys.linear(), (40, 10, 30, 20), (1.0, 2.0, 3.0, 0.0)),
        "b": fmd.ArchitectureGroup(toys.linear(), range(50, 150)),
    }
    seen = set()
    for round_ in range(20):
        cohort = fmd.simulation.draw_cohort(jax.random.fold_in(key, round_), groups, {"a": 2, "b": 5})
        for name, size in (("a", 2), ("b", 5)):
            rows = cohort.rows[name].tolist()
            assert len(set(rows)) == size
            assert rows == sorted(rows)
            assert cohort.client_ids[name].tolist() == [groups[name].client_ids[k] for k in rows]
            assert cohort.weights[name].tolist() == [groups[name].weights[k] for k in rows]
        seen.add(tuple(cohort.client_ids["b"].tolist()))
    assert len(seen) == 20


def test_the_order_of_a_group_does_not_affect_the_draw(key):
    ids = np.random.default_rng(0).permutation(1000)
    drawn = [
        fmd.simulation.draw_cohort(key, {"a": fmd.ArchitectureGroup(toys.linear(), order.tolist())}, 30).client_ids["a"]
        for order in (ids, ids[::-1], np.sort(ids))
    ]
    assert set(drawn[0]) == set(drawn[1]) == set(drawn[2])


def test_all_clients_are_equally_likely(key):
    """Each of 20 clients is drawn in 100 of 400 cohorts, within five standard deviations."""
    groups = groups_of(20)
    draws = [fmd.simulation.draw_cohort(jax.random.fold_in(key, i), groups, 5).rows["a"] for i in range(400)]
    counts = np.bincount(np.concatenate(draws), minlength=20)
    assert (abs(counts - 100) < 5 * np.sqrt(400 * 0.25 * 0.75)).all()


@pytest.mark.parametrize(
    ("cohort_size", "message"),
    [
        (1, "at least one client of each of the 2 groups and at most all 7 clients, got 1"),
        (8, "at least one client of each of the 2 groups and at most all 7 clients, got 8"),
        (0, "cohort_size must be an integer of at least 1, got 0"),
        (2.5, "cohort_size must be an integer of at least 1, got 2.5"),
        ({"a": 1}, r"a cohort size is needed for the groups \['a', 'b'\], got \['a'\]"),
        ({"a": 1, "b": 0}, "the cohort size of group 'b' must be an integer of at least 1, got 0"),
        ({"a": 4, "b": 1}, "group 'a': a cohort of 4 clients of 3"),
    ],
)
def test_impossible_cohorts_are_refused(key, cohort_size, message):
    with pytest.raises(ValueError, match=message):
        fmd.simulation.draw_cohort(key, groups_of(3, 4), cohort_size)


@pytest.mark.parametrize("as_array", [np.array, jnp.array])
def test_only_the_rows_of_the_cohort_change(as_array):
    """Reading copies; writing is in place, in the same memory if JAX donates it."""
    numbers = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    tree = {"x": as_array(numbers), "n": as_array(np.arange(50))}
    where = {name: pointer(leaf) for name, leaf in tree.items()}
    rows = np.array([4, 17, 40])
    taken = fmd.simulation.get_rows(tree, rows)
    assert all(isinstance(leaf, np.ndarray if as_array is np.array else jax.Array) for leaf in taken.values())
    np.testing.assert_array_equal(taken["x"], numbers[rows])
    tree = fmd.simulation.set_rows(tree, rows, {"x": 2 * jnp.asarray(taken["x"]), "n": jnp.asarray(taken["n"]) + 100})
    expected = numbers.copy()
    expected[rows] *= 2
    chex.assert_trees_all_equal(tree, {"x": expected, "n": np.arange(50) + 100 * np.isin(np.arange(50), rows)})
    assert {name: pointer(leaf) for name, leaf in tree.items()} == where


def pointer(leaf):
    return leaf.ctypes.data if isinstance(leaf, np.ndarray) else leaf.unsafe_buffer_pointer()
