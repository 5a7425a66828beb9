import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.custom_batching import custom_vmap

import fedmd_jax as fmd
from fedmd_jax.mapping.chunking import all_reduce, check_chunks, choose_chunk, chunk_of, chunk_rows


def one_client(own, shared, more):
    return {"sum": own @ shared + more, "twice": 2 * own}


OWN, SHARED, MORE = jnp.arange(24.0).reshape(8, 3) - 7.0, jnp.array([1.0, -1.0, 2.0]), jnp.arange(8.0)


@pytest.fixture
def mesh(request):
    return None if request.param is None else fmd.client_mesh(request.param)


@pytest.mark.parametrize("clients_per_chunk", [None, 1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("mesh", [None, 2, 4], indirect=True)
def test_mapping_is_one_by_one_in_chunks_of_any_size_on_any_mesh(clients_per_chunk, mesh):
    mapped = fmd.mapping.map_clients(one_client, (0, None, 0), mesh, clients_per_chunk=clients_per_chunk)
    alone = [one_client(own, SHARED, more) for own, more in zip(OWN, MORE, strict=True)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    chex.assert_trees_all_close(jax.jit(mapped)(OWN, SHARED, MORE), expected)


@pytest.mark.parametrize("clients_per_chunk", [None, 1, 3, 8])
@pytest.mark.parametrize("mesh", [None, 2], indirect=True)
def test_a_weighted_sum_is_that_of_a_loop(clients_per_chunk, mesh):
    """Also if the last chunk is not full, and if a result without weight or with one is not finite."""
    sum_results = fmd.mapping.weighted_sum_clients(one_client, (0, None, 0), mesh, clients_per_chunk=clients_per_chunk)
    weights = jnp.array([0.5, 1.0, 2.0, 0.0, 3.0, 0.25, 1.0, 4.0])
    heard = weights.at[6].set(0.0)
    results = [one_client(OWN[k], SHARED, MORE[k]) for k in range(8)]
    expected = jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(heard, leaves, strict=True)), *results)
    own, more = OWN.at[3, 0].set(jnp.nan), MORE.at[6].set(jnp.inf)  # of the latter only one of two results is infinite
    sums = jax.jit(sum_results)(weights, own, SHARED, more)
    assert sums.total["twice"].shape == (mesh.size if mesh else 1, 3)
    add = jax.jit(all_reduce, static_argnums=1)
    chex.assert_trees_all_close(add(sums.total, mesh), expected, rtol=1e-6)
    np.testing.assert_allclose(add(sums.weight, mesh), heard.sum())
    assert sums.finite.tolist() == [True, True, True, False, True, True, False, True]


def test_one_by_one_maps_nothing():
    """On a CPU it is `vmap` that moves a client's activations out of the cache."""
    ranks = []

    @custom_vmap
    def one(own):
        return 2 * own

    @one.def_vmap
    def many(axis_size, in_batched, own):
        ranks.append(own.ndim)
        return 2 * own, in_batched[0]

    for clients_per_chunk, seen in ((None, [2]), (3, [2]), (1, [])):
        ranks.clear()
        jax.eval_shape(fmd.mapping.map_clients(one, (0,), clients_per_chunk=clients_per_chunk), OWN)
        jax.eval_shape(fmd.mapping.weighted_sum_clients(one, (0,), clients_per_chunk=clients_per_chunk), MORE, OWN)
        assert sorted(set(ranks)) == seen


@pytest.mark.parametrize("clients_per_chunk", [None, 1, 8])
def test_arguments_that_are_returned_are_not_copied(clients_per_chunk):
    """As the optimizer state of another phase: each copy would be compiled, and made for each client."""
    mapped = fmd.mapping.map_clients(lambda own, kept: (own + 1, kept), (0, 0), clients_per_chunk=clients_per_chunk)
    traced = jax.make_jaxpr(mapped)(OWN, MORE).jaxpr
    assert traced.outvars[1] is traced.invars[1]


@given(st.integers(1, 50), st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_every_client_is_in_one_chunk_and_no_chunk_is_larger_than_asked_for(num_clients, clients_per_chunk):
    rows, real = chunk_rows(num_clients, clients_per_chunk)
    assert rows[real].tolist() == list(range(num_clients))
    assert rows.shape[1] <= clients_per_chunk
    assert (rows[~real] == num_clients - 1).all()
    assert (~real).sum() < len(rows)


@pytest.mark.parametrize("clients_per_chunk", [None, 2])
@pytest.mark.parametrize("mesh", [None, 2], indirect=True)
def test_weights_of_others_than_the_clients_are_refused(clients_per_chunk, mesh):
    sum_results = fmd.mapping.weighted_sum_clients(one_client, (0, None, 0), mesh, clients_per_chunk=clients_per_chunk)
    with pytest.raises(ValueError, match=r"one weight per client is needed, of shape \(8,\), got \(9,\)"):
        sum_results(jnp.ones(9), OWN, SHARED, MORE)


@pytest.mark.parametrize("make", [fmd.mapping.map_clients, fmd.mapping.weighted_sum_clients])
@pytest.mark.parametrize("clients_per_chunk", [0, -1, 1.5, "all"])
def test_chunks_that_make_no_sense_are_refused(make, clients_per_chunk):
    with pytest.raises(ValueError, match="clients_per_chunk must be an integer of at least 1, got"):
        make(one_client, (0, None, 0), clients_per_chunk=clients_per_chunk)


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("sizes", [(4, 2), (1, 3)])
def test_arguments_of_different_numbers_of_clients_are_refused(sizes, chunk):
    add = fmd.mapping.map_clients(jnp.add, (0, 0), clients_per_chunk=chunk)
    with pytest.raises(ValueError, match="the same number of clients"):
        add(*map(jnp.ones, sizes))


def test_the_setting_of_a_group_or_what_is_fastest():
    dense, conv = {"kernel": jnp.zeros((4, 5, 6))}, {"kernel": jnp.zeros((4, 3, 3, 1, 8)), "bias": jnp.zeros((4, 8))}
    assert choose_chunk(conv, platform="cpu") == 1
    assert choose_chunk(dense, platform="cpu") > 1
    assert choose_chunk(conv, platform="gpu") is None
    assert choose_chunk({}, platform="cpu") == choose_chunk(dense, platform="cpu")  # a network that learns nothing
    assert chunk_of("auto", "a", conv) == choose_chunk(conv) == chunk_of({"b": 2}, "a", conv)
    assert [chunk_of({"a": chunk}, "a", conv) for chunk in (None, 2)] == [None, 2]


@pytest.mark.parametrize("setting", ["auto", None, 3, {"a": "auto"}, {"a": None, "b": 2}])
def test_settings_of_chunks(setting):
    check_chunks(setting, ["a", "b"])


@pytest.mark.parametrize("setting", ["all", 0, {"a": "all"}, {"b": 1.5}])
def test_settings_of_chunks_that_are_refused(setting):
    with pytest.raises(ValueError, match="clients_per_chunk must be an integer of at least 1, got"):
        check_chunks(setting, ["a", "b"])


@pytest.mark.parametrize("num_devices", [0, 5])
def test_a_mesh_of_devices_that_are_not_there_is_refused(num_devices):
    with pytest.raises(ValueError, match=f"num_devices must be from 1 to 4, the devices .*, got {num_devices}"):
        fmd.client_mesh(num_devices)
