import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings, strategies as st

import fedmd_jax as fmd

# An "architecture" is whatever a function of one client makes of it: here how its numbers are shaped.
SHAPES = {"many": (2,), "some": (3, 2), "one": (4,), "other": ()}
SIZES = {"many": 5, "some": 2, "one": 1, "other": 1}
GROUPS = {
    name: fmd.ArchitectureGroup(SHAPES[name], range(10 * g, 10 * g + SIZES[name])) for g, name in enumerate(SIZES)
}
OWN = {
    name: {
        "x": jnp.arange(1.0, 1 + SIZES[name] * np.prod(shape, dtype=int)).reshape(SIZES[name], *shape),
        "n": jnp.arange(SIZES[name]),
    }
    for name, shape in SHAPES.items()
}
KEYS = {name: fmd.mapping.client_keys(jax.random.key(0), group.client_ids) for name, group in GROUPS.items()}


def one_client(shape, own, shared, key):
    """Results of the client's own shape, of one shape, and of another dtype."""
    noise = jax.random.uniform(key, shape)
    return {"x": own["x"] * shared + noise, "n": own["n"] + 1}, jnp.sum(own["x"]), own["x"].ravel()[0] > 2


def everybody(mesh):
    return jax.jit(map_everybody(mesh))(OWN, jnp.float32(2), KEYS)


def map_everybody(mesh):
    return fmd.mapping.map_groups(one_client, (0, None, 0), groups=GROUPS, mesh=mesh)


@pytest.mark.parametrize("num_devices", [None, 1, 2, 4])
def test_every_client_is_mapped_as_if_alone(num_devices):
    """Five, two, one and one client, on devices of which some have more to do and some have nothing."""
    mesh = None if num_devices is None else fmd.client_mesh(num_devices)
    results = everybody(mesh)
    for name, group in GROUPS.items():
        for k in range(group.num_clients):
            alone = one_client(SHAPES[name], jax.tree.map(lambda leaf, k=k: leaf[k], OWN[name]), 2.0, KEYS[name][k])
            mine = tuple(jax.tree.map(lambda leaf, k=k: leaf[k], result[name]) for result in results)
            chex.assert_trees_all_close(mine, alone, rtol=1e-6)
            chex.assert_trees_all_equal_dtypes(mine, jax.tree.map(jnp.asarray, alone))


def test_sharded_arguments_give_the_same_without_moving():
    mesh = fmd.client_mesh(4)
    program = jax.jit(map_everybody(mesh)).lower(fmd.mapping.shard_clients(OWN, mesh), jnp.float32(2), KEYS).compile()
    assert toys.collectives(program.as_text()) == {}
    results = program(fmd.mapping.shard_clients(OWN, mesh), jnp.float32(2), KEYS)
    chex.assert_trees_all_equal([*map(fmd.gather_clients, results)], [*map(fmd.gather_clients, everybody(mesh))])


def test_padding_and_empty_seats_are_not_in_the_sum():
    """Clients with weight zero or non-finite results are excluded as well; all are reported."""
    own = {**OWN, "one": jax.tree.map(lambda leaf: leaf.astype(float).at[0].set(jnp.nan), OWN["one"])}
    weights = {
        "many": jnp.array([1.0, 2, 0, 1, 4]),
        "some": jnp.array([0.5, 3]),
        "one": jnp.ones(1),
        "other": jnp.ones(1),
    }

    def total(shape, own):
        del shape
        return jnp.sum(own["x"]) * jnp.ones(3)

    expected = sum(
        weights[name][k] * jnp.sum(own[name]["x"][k]) for name in ("many", "some", "other") for k in range(SIZES[name])
    )
    for mesh in (None, fmd.client_mesh(4)):
        sums = jax.jit(fmd.mapping.sum_groups(total, (0,), groups=GROUPS, mesh=mesh))(weights, own)
        np.testing.assert_allclose(jnp.sum(sums.total, axis=0), expected * jnp.ones(3), rtol=1e-6)
        np.testing.assert_allclose(jnp.sum(sums.weight), 12.5)
        assert {name: sums.finite[name].tolist() for name in GROUPS} == {
            name: [name != "one"] * size for name, size in SIZES.items()
        }


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=5, deadline=None)
def test_groups_of_any_sizes_on_any_number_of_devices(sizes, num_devices):
    groups = {str(g): fmd.ArchitectureGroup((g + 1,), range(10 * g, 10 * g + size)) for g, size in enumerate(sizes)}
    own = {str(g): jnp.arange(float(size * (g + 1))).reshape(size, g + 1) for g, size in enumerate(sizes)}
    double = fmd.mapping.map_groups(lambda _, own: 2 * own, (0,), groups=groups, mesh=fmd.client_mesh(num_devices))
    chex.assert_trees_all_equal(fmd.gather_clients(jax.jit(double)(own)), jax.tree.map(lambda leaf: 2 * leaf, own))


def test_arguments_sharded_in_two_ways_are_refused():
    mesh, add = fmd.client_mesh(2), lambda _, own, more: own + more
    clients = {name: jnp.zeros(1) for name in "abc"}
    groups = {name: fmd.ArchitectureGroup((), (number,)) for number, name in enumerate("abc")}
    ways = [fmd.mapping.shard_clients(clients, mesh, costs={"a": a, "b": 2, "c": 1}) for a in (1, 9)]
    with pytest.raises(ValueError, match="sharded over the 2 devices of the mesh in one way, got 2 ways"):
        fmd.mapping.map_groups(add, (0, 0), groups=groups, mesh=mesh)(*ways)
    elsewhere = fmd.mapping.shard_clients(clients, fmd.client_mesh(4))
    with pytest.raises(ValueError, match=r"over the 2 devices .* 1 ways, over \[4\] devices"):
        fmd.mapping.map_groups(add, (0, 0), groups=groups, mesh=mesh)(elsewhere, clients)


def test_costs_are_proportional_to_the_batch():
    """Also if a large batch is computed in parts."""
    groups = {"cnn": fmd.ArchitectureGroup(fmd.architecture_from_linen(fmd.models.CNN((16, 16), 3)), (0,))}
    costs = [fmd.mapping.client_costs(groups, jnp.zeros((n, 28, 28, 1)))["cnn"] for n in (1, 256)]
    assert costs[1] == 256 * costs[0] > 0


def test_a_larger_network_costs_more():
    groups = {str(n): fmd.ArchitectureGroup(toys.tanh_mlp(n), (n,)) for n in (2, 4, 8)}
    costs = fmd.mapping.client_costs(groups, jnp.zeros((3, 5)))
    assert 0 < costs["2"] < costs["4"] < costs["8"]
    sharded = fmd.mapping.shard_clients({name: jnp.zeros(1) for name in groups}, fmd.client_mesh(2), costs=costs)
    assert sharded.placement.device_rows == ((("8", 0), ("4", 0)), (None, ("2", 0)))
