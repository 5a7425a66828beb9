from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import fedmd_jax as fmd
from fedmd_jax.mapping.packing import place_clients
from fedmd_jax.mapping.sharding import ShardedClients

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
    sharded = fmd.mapping.shard_clients(clients, fmd.client_mesh(num_devices))
    chex.assert_trees_all_equal(fmd.gather_clients(sharded), dict(clients))
    chex.assert_trees_all_equal_dtypes(fmd.gather_clients(sharded), dict(clients))
    moved = fmd.mapping.shard_clients(fmd.gather_clients(sharded), fmd.client_mesh(4))
    chex.assert_trees_all_equal(fmd.gather_clients(moved), dict(clients))


def test_every_device_holds_its_clients_and_no_others():
    sharded = fmd.mapping.shard_clients(STATES, fmd.client_mesh(4))
    assert set(sharded.stacked) == {"normed"}
    assert len(sharded.rows) == 1
    for leaf in jax.tree.leaves(sharded):
        assert leaf.shape[0] in (4, 8)
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {leaf.shape[0] // 4}


def test_sharded_clients_are_a_tree_and_a_mapping():
    sharded = fmd.mapping.shard_clients(STATES, fmd.client_mesh(4))
    assert list(sharded) == sorted(STATES)
    assert len(sharded) == 3
    assert "other" not in sharded
    with pytest.raises(KeyError):
        sharded["other"]
    twice = jax.tree.map(lambda leaf: 2 * leaf, sharded)
    assert isinstance(twice, ShardedClients)
    chex.assert_trees_all_equal(fmd.gather_clients(twice), jax.tree.map(lambda leaf: 2 * leaf, STATES))
    assert jax.tree.structure(twice) == jax.tree.structure(sharded)
    assert hash(jax.tree.structure(twice)) == hash(jax.tree.structure(sharded))
    on_host = jax.device_get(sharded)
    assert all(isinstance(leaf, np.ndarray) for name in on_host for leaf in jax.tree.leaves(on_host[name]))
    chex.assert_trees_all_equal(dict(on_host), STATES)


def test_shapes_are_sharded_and_read_like_arrays():
    mesh = fmd.client_mesh(4)
    shapes = fmd.mapping.shard_clients(jax.eval_shape(lambda: STATES), mesh)
    sharded = fmd.mapping.shard_clients(STATES, mesh)
    assert jax.tree.structure(shapes) == jax.tree.structure(sharded)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(sharded), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        assert shape.sharding == leaf.sharding
    chex.assert_trees_all_equal_shapes_and_dtypes(fmd.gather_clients(shapes), STATES)


def test_a_program_reads_a_group_too():
    sharded = fmd.mapping.shard_clients(STATES, fmd.client_mesh(4))
    chex.assert_trees_all_equal(jax.jit(lambda sharded: dict(sharded))(sharded), STATES)


def test_without_a_mesh_clients_are_unchanged():
    assert fmd.mapping.shard_clients(STATES, None) is STATES
    assert fmd.gather_clients(STATES) == STATES


def test_what_was_gathered_outlives_states_that_are_donated():
    mesh = fmd.client_mesh(4)
    sharded = fmd.mapping.shard_clients({name: STATES[name] for name in ("normed", "mlp")}, mesh)
    kept = fmd.gather_clients(sharded)
    jax.block_until_ready(jax.jit(partial(jax.tree.map, lambda leaf: -leaf - 1), donate_argnums=0)(sharded))
    chex.assert_trees_all_equal(kept, {name: STATES[name] for name in kept})


def test_costs_determine_the_placement():
    clients = {name: jnp.zeros((1, 2)) for name in "abc"}
    sharded = fmd.mapping.shard_clients(clients, fmd.client_mesh(2), costs={"a": 1, "b": 9, "c": 2})
    assert sharded.placement.device_rows == ((("b", 0), ("c", 0)), (None, ("a", 0)))


def test_clients_of_several_numbers_are_refused():
    with pytest.raises(ValueError, match=r"group 'a': leaves must have .*, got \[2, 3\]"):
        fmd.mapping.shard_clients({"a": (jnp.zeros(2), jnp.zeros(3))}, fmd.client_mesh(2))
    with pytest.raises(ValueError, match=r"clients {'a': 3} are wanted, per group, got {'a': 2}"):
        fmd.mapping.sharding.arrange({"a": jnp.zeros(2)}, place_clients({"a": 3}, 2))


def test_fetched_arrays_equal_those_on_devices():
    sharded = fmd.mapping.shard_clients(STATES, fmd.client_mesh(4))
    on_host = fmd.mapping.fetch_to_host((sharded, jnp.arange(3), np.ones(2), None))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(on_host))
    chex.assert_trees_all_equal(dict(on_host[0]), STATES)
    chex.assert_trees_all_equal(on_host[1:], (np.arange(3), np.ones(2), None))
