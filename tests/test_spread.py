from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import fedmd_jax as fmd
from fedmd_jax.placement import place_clients
from fedmd_jax.spread import (
    Spread,
)

GROUPS = {
    "normed": fmd.ArchitectureGroup(toys.normed(), (0, 1, 2, 3, 4)),  # with integers in its state
    "linear": fmd.ArchitectureGroup(toys.linear(), (7, 5)),
    "mlp": fmd.ArchitectureGroup(toys.tanh_mlp(), (6,)),
}
PRIVATE = toys.private(GROUPS)
STATES = toys.federation(GROUPS).new_states(jax.random.key(0), toys.public().inputs[:1])


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize(
    "clients", [PRIVATE, STATES, {"a": jnp.arange(3, dtype=jnp.bfloat16), "b": np.ones((1, 2), bool)}]
)
def test_there_and_back_is_the_same_to_the_bit_whatever_the_mesh(num_devices, clients):
    spread = fmd.spread_clients(clients, fmd.client_mesh(num_devices))
    chex.assert_trees_all_equal(fmd.gather_clients(spread), dict(clients))
    chex.assert_trees_all_equal_dtypes(fmd.gather_clients(spread), dict(clients))
    moved = fmd.spread_clients(fmd.gather_clients(spread), fmd.client_mesh(4))
    chex.assert_trees_all_equal(fmd.gather_clients(moved), dict(clients))


def test_every_device_holds_its_clients_and_no_others():
    spread = fmd.spread_clients(STATES, fmd.client_mesh(4))
    assert set(spread.stacked) == {"normed"}
    assert len(spread.rows) == 1
    for leaf in jax.tree.leaves(spread):
        assert leaf.shape[0] in (4, 8)
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {leaf.shape[0] // 4}


def test_a_spread_is_a_tree_and_a_mapping():
    spread = fmd.spread_clients(STATES, fmd.client_mesh(4))
    assert list(spread) == sorted(STATES)
    assert len(spread) == 3
    assert "other" not in spread
    with pytest.raises(KeyError):
        spread["other"]
    twice = jax.tree.map(lambda leaf: 2 * leaf, spread)
    assert isinstance(twice, Spread)
    chex.assert_trees_all_equal(fmd.gather_clients(twice), jax.tree.map(lambda leaf: 2 * leaf, STATES))
    assert jax.tree.structure(twice) == jax.tree.structure(spread)
    assert hash(jax.tree.structure(twice)) == hash(jax.tree.structure(spread))
    on_host = jax.device_get(spread)
    assert all(isinstance(leaf, np.ndarray) for name in on_host for leaf in jax.tree.leaves(on_host[name]))
    chex.assert_trees_all_equal(dict(on_host), STATES)


def test_shapes_are_spread_and_read_as_arrays_are():
    mesh = fmd.client_mesh(4)
    shapes = fmd.spread_clients(jax.eval_shape(lambda: STATES), mesh)
    spread = fmd.spread_clients(STATES, mesh)
    assert jax.tree.structure(shapes) == jax.tree.structure(spread)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(spread), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        assert shape.sharding == leaf.sharding
    chex.assert_trees_all_equal_shapes_and_dtypes(fmd.gather_clients(shapes), STATES)


def test_a_program_reads_a_group_too():
    spread = fmd.spread_clients(STATES, fmd.client_mesh(4))
    chex.assert_trees_all_equal(jax.jit(lambda spread: dict(spread))(spread), STATES)


def test_without_a_mesh_nothing_happens():
    assert fmd.spread_clients(STATES, None) is STATES
    assert fmd.gather_clients(STATES) == STATES


def test_what_was_gathered_outlives_states_that_are_donated():
    mesh = fmd.client_mesh(4)
    spread = fmd.spread_clients({name: STATES[name] for name in ("normed", "mlp")}, mesh)
    kept = fmd.gather_clients(spread)
    jax.block_until_ready(jax.jit(partial(jax.tree.map, lambda leaf: -leaf - 1), donate_argnums=0)(spread))
    chex.assert_trees_all_equal(kept, {name: STATES[name] for name in kept})


def test_costs_decide_who_is_where():
    clients = {name: jnp.zeros((1, 2)) for name in "abc"}
    spread = fmd.spread_clients(clients, fmd.client_mesh(2), costs={"a": 1, "b": 9, "c": 2})
    assert spread.placement.rows == ((("b", 0), ("c", 0)), (None, ("a", 0)))


def test_clients_of_several_numbers_are_refused():
    with pytest.raises(ValueError, match=r"group 'a': all that is per client must be .*, got \[2, 3\]"):
        fmd.spread_clients({"a": (jnp.zeros(2), jnp.zeros(3))}, fmd.client_mesh(2))
    with pytest.raises(ValueError, match=r"clients {'a': 3} are wanted, per group, got {'a': 2}"):
        fmd.spread.arrange({"a": jnp.zeros(2)}, place_clients({"a": 3}, 2))


def test_what_is_on_host_is_what_was_on_devices():
    spread = fmd.spread_clients(STATES, fmd.client_mesh(4))
    on_host = fmd.on_host((spread, jnp.arange(3), np.ones(2), None))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(on_host))
    chex.assert_trees_all_equal(dict(on_host[0]), STATES)
    chex.assert_trees_all_equal(on_host[1:], (np.arange(3), np.ones(2), None))
