"""What must hold for a round of every member of the family, whatever it computes."""

import functools

import chex
import faults
import jax
import jax.numpy as jnp
import members
import numpy as np
import pytest
import toys

import fedmd_jax as fmd
from fedmd_jax.algorithms.base import split_states

pytestmark = pytest.mark.parametrize("name", members.MEMBERS)
GROUPS = toys.groups(linear=(1.0, 2.0, 0.5), mlp=(1.0, 1.5))
PUBLIC, KEY = toys.public(), jax.random.key(3)
# SGD, so that rounding stays rounding: grouping, order and sharding agree to this.
TOLERANCE = {"rtol": 5e-5, "atol": 5e-6}


@functools.cache
def federation(name):
    return members.federation(name, GROUPS, server=True)


def start(federation, *, parameters=lambda client_id, leaf: leaf):
    """States, with changed parameters of some clients, and private data, on the devices of the federation."""
    private = toys.private(federation.groups)
    states = fmd.gather_clients(federation.init(jax.random.key(0), PUBLIC, private))
    for group_name, group in federation.groups.items():
        own = [
            jax.tree.map(lambda leaf, k=k, i=i: parameters(i, leaf[k]), states[group_name].params)
            for k, i in enumerate(group.client_ids)
        ]
        states[group_name] = states[group_name]._replace(params=jax.tree.map(lambda *leaves: jnp.stack(leaves), *own))
    states = federation.start(federation.shard(states), PUBLIC, jax.random.key(1))
    return states, federation.shard(private)


def run(federation, num_rounds=2, *, participation=None, **how):
    """Results of some rounds by client id, and of the server."""
    states, private = start(federation, **how)
    participants = None if participation is None else fmd.algorithms.all_clients(federation.groups, participation)
    for round_ in range(num_rounds):
        states, info = federation.round(states, PUBLIC, private, jax.random.fold_in(KEY, round_), participants)
    clients, *server = split_states(states)
    losses = fmd.gather_clients(info.digest_loss), fmd.gather_clients(info.revisit_loss)
    by_client = [toys.by_client(federation.groups, fmd.gather_clients(tree)) for tree in (clients, *losses)]
    return {"clients": by_client[0], "digest": by_client[1], "revisit": by_client[2]}, server, info


@functools.cache
def plain(name):
    return run(federation(name))


def test_every_client_learns_something(name):
    before = toys.by_client(GROUPS, split_states(start(federation(name))[0]).clients)
    results, _, info = plain(name)
    for client_id, state in results["clients"].items():
        moved = [
            not np.array_equal(*leaves)
            for leaves in zip(*map(jax.tree.leaves, (state, before[client_id])), strict=True)
        ]
        assert any(moved)
    assert bool(info.digested)
    chex.assert_tree_all_finite(results)


def test_order_and_devices_change_nothing(name):
    """Groups and clients of a group in another order, one by one on three devices.

    One group is stacked over the devices, the clients of the other are placed one by one.
    """
    groups = {
        "mlp": fmd.ArchitectureGroup(GROUPS["mlp"].architecture, (4, 3), (1.5, 1.0)),
        "linear": fmd.ArchitectureGroup(GROUPS["linear"].architecture, (2, 0, 1), (0.5, 1.0, 2.0)),
    }
    if federation(name).algorithm.common_start:  # the first client of a group names the start of the group
        groups["mlp"] = GROUPS["mlp"]
        groups["linear"] = fmd.ArchitectureGroup(GROUPS["linear"].architecture, (0, 2, 1), (1.0, 0.5, 2.0))
    on_devices = members.federation(name, groups, server=True, clients_per_chunk=1, mesh=fmd.client_mesh(3))
    results, server, _ = run(on_devices)
    chex.assert_trees_all_close((results, server), plain(name)[:2], **TOLERANCE)


def test_grouping_and_chunks_change_nothing(name):
    linear, mlp = (group.architecture for group in GROUPS.values())
    groups = {
        "first": fmd.ArchitectureGroup(linear, (0,), (1.0,)),
        "rest": fmd.ArchitectureGroup(linear, (1, 2), (2.0, 0.5)),
        "mlp": fmd.ArchitectureGroup(mlp, (3, 4), (1.0, 1.5)),
    }
    if name in members.WITHIN_GROUPS:  # the groups decide what is averaged
        groups = GROUPS
    results, _, _ = run(members.federation(name, groups, server=True, clients_per_chunk=2))
    chex.assert_trees_all_close(results, plain(name)[0], **TOLERANCE)


def test_a_client_with_nan_is_as_good_as_absent(name):
    """To the bit for all others, in the same program. FedAvg mends it in the next round."""
    federation_, num_rounds = federation(name), 1 if name in members.WITHIN_GROUPS else 2
    everybody = faults.participation(GROUPS)
    absent, absent_server, _ = run(federation_, num_rounds, participation=faults.participation(GROUPS, dropped={1}))
    broken, broken_server, info = run(
        federation_,
        num_rounds,
        participation=everybody,
        parameters=lambda client_id, leaf: jnp.where(client_id == 1, jnp.nan, leaf),
    )
    assert [i for i, finite in toys.by_client(GROUPS, info.scores_finite).items() if not finite] == [1]
    for results in (absent, broken):
        for of_clients in results.values():
            del of_clients[1]
    chex.assert_trees_all_equal(broken["clients"], absent["clients"])
    chex.assert_trees_all_equal(broken_server, absent_server)
    chex.assert_tree_all_finite((broken, broken_server))


def test_an_absent_client_stays_as_it_is_and_one_program_serves_all_rounds(name):
    federation_ = federation(name)
    (states, private), round_ = start(federation_), federation_.programs["round"]
    before = toys.by_client(GROUPS, jax.device_get(split_states(states).clients))
    num_programs = round_._cache_size()
    for number in range(3):
        participation = faults.participation(GROUPS, dropped={1}, stragglers={3})
        participants = fmd.algorithms.all_clients(GROUPS, participation)
        states, _ = federation_.round(states, PUBLIC, private, jax.random.fold_in(KEY, number), participants)
    after = toys.by_client(GROUPS, split_states(states).clients)
    for client_id in (1, 3):
        chex.assert_trees_all_equal(after[client_id], before[client_id])
    assert round_._cache_size() - num_programs <= 1


def test_a_cohort_of_all_clients_is_the_federation(name):
    """The server's memory and its network travel with the population; a cohort is a part of it."""
    federation_, private = federation(name), toys.private(GROUPS)
    how = {"num_rounds": 2, "test": fmd.labelled_dataset(*toys.examples(50, 8))}
    states, history = fmd.run_federation(
        federation_, federation_.init(jax.random.key(0), PUBLIC, private), PUBLIC, private, KEY, **how
    )
    sizes = {group: GROUPS[group].num_clients for group in GROUPS}
    population = fmd.simulation.init_population(federation_, jax.random.key(0), PUBLIC, private, cohort_size=sizes)
    population, found = fmd.simulation.run_population(federation_, population, PUBLIC, KEY, cohort_size=sizes, **how)
    clients, memory, model = split_states(states)
    chex.assert_trees_all_close(population.states, jax.device_get(clients), **TOLERANCE)
    chex.assert_trees_all_close((population.memory, population.model), (memory, model), **TOLERANCE)
    assert [metrics.server_accuracy for metrics in found] == [metrics.server_accuracy for metrics in history[1:]]


def test_states_that_leave_the_device_and_come_back_go_on_to_the_bit(name):
    """As a checkpoint does: one round, to the host and back, another round."""
    federation_ = federation(name)
    states, private = start(federation_)
    for round_ in range(2):
        states = jax.tree.map(jnp.asarray, jax.device_get(states))
        states, _ = federation_.round(states, PUBLIC, private, jax.random.fold_in(KEY, round_))
    clients, *server = split_states(states)
    results, expected_server, _ = plain(name)
    chex.assert_trees_all_equal(toys.by_client(GROUPS, clients), results["clients"])
    chex.assert_trees_all_equal(server, expected_server)


def test_identical_clients_feel_no_gradient(name):
    """The loss of their digest is zero and, with SGD, so is the memory of its optimizer."""
    if name not in members.AGREE:
        pytest.skip("the target is another one, or rounding decides on the sign of the gradient")
    groups = {"linear": fmd.ArchitectureGroup(toys.linear(), (0, 1))}
    federation_ = members.federation(name, groups)
    states = federation_.init(jax.random.key(0), PUBLIC, toys.private(groups))
    same = jax.tree.map(lambda leaf: jnp.stack(2 * [leaf[0]]), states["linear"].params)
    states = {"linear": states["linear"]._replace(params=same)}
    states, info = federation_.round(states, PUBLIC, toys.private(groups), KEY)
    learned = states["linear"].digest_opt_state, info.digest_loss["linear"]
    chex.assert_trees_all_close(learned, jax.tree.map(jnp.zeros_like, learned), atol=2e-6)


def test_bytes_are_those_of_the_arrays_that_are_sent(name):
    """A transform is given what a client sends."""
    if name not in members.SEND_ROWS:
        pytest.skip("parameters, tables or codes are sent")
    sent = []

    def record(values, key):
        del key
        sent.append(values.size * values.dtype.itemsize)
        return values

    federation_ = members.federation(name, GROUPS, server=True, transforms=[record])
    states, private = start(federation(name))
    federation_.programs["round"].eval_shape(states, PUBLIC, private, KEY)
    clients = split_states(states).clients
    sizes = fmd.algorithms.Sizes(GROUPS, clients, PUBLIC.inputs, subset_size=12, num_classes=toys.NUM_CLASSES)
    traffic = federation_.algorithm.traffic(sizes)
    assert sent
    assert {*sent, traffic.up, traffic.down} == {traffic.up}
