"""Custom loops that resume from states of an Orbax checkpoint end with the same bits."""

import chex
import jax
import jax.numpy as jnp
import pytest
import toys
from orbax.checkpoint import v1 as ocp

import fedmd_jax as fmd


@pytest.fixture(scope="module")
def federated():
    """Three clients in chunks of two, with batch statistics and noise in every step, and their data."""
    groups = {"normed": fmd.ArchitectureGroup(toys.normed(noise=0.1), (0, 1, 2))}
    federation = toys.federation(groups, clients_per_chunk=2)
    test = fmd.labelled_dataset(*toys.examples(2, 9))
    return federation, toys.public(), toys.private(groups), test


@pytest.fixture
def checkpointer(tmp_path):
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        yield checkpointer


def test_rounds_are_resumed_to_the_bit(federated, checkpointer, key):
    federation, public, private, test = federated

    def run(states, **rounds):
        return fmd.run_federation(federation, states, public, private, key, test=test, **rounds)

    whole, history = run(
        federation.init(key, public, private),
        num_rounds=4,
        callback=lambda metrics, states: checkpointer.save(metrics.round, fmd.gather_clients(states), force=True),
    )
    for done in (2, 3):  # an even and an odd round
        loaded = checkpointer.load(done, fmd.gather_clients(whole))
        states, rest = run(loaded, num_rounds=4 - done, first_round=done + 1)
        assert rest == history[done + 1 :]
        chex.assert_trees_all_equal(dict(states), dict(whole))


def test_the_local_only_baseline_is_resumed_to_the_bit(federated, checkpointer, key):
    federation, public, private, test = federated
    states = federation.init(key, public, private)
    whole, history = fmd.run_local_only(
        federation,
        states,
        private,
        key,
        num_rounds=4,
        test=test,
        callback=lambda metrics, states: checkpointer.save(metrics.round, fmd.gather_clients(states), force=True),
    )
    loaded = checkpointer.load(3, fmd.gather_clients(whole))
    states, rest = fmd.run_local_only(federation, loaded, private, key, num_rounds=1, test=test, first_round=4)
    assert rest == history[4:]
    chex.assert_trees_all_equal(dict(states), dict(whole))


def test_a_population_is_resumed_to_the_bit(federated, key):
    federation, public, private, test = federated

    def start():
        return fmd.simulation.init_population(federation, key, public, private, cohort_size=2)

    def run(population, **rounds):
        return fmd.simulation.run_population(federation, population, public, key, cohort_size=2, test=test, **rounds)

    saved = {}
    whole, history = run(
        start(),
        num_rounds=5,
        callback=lambda metrics, now: saved.update({metrics.round: jax.tree.map(jnp.copy, dict(now.states))}),
    )
    assert len({tuple(client.client_id for client in metrics.clients) for metrics in history}) > 1
    population, rest = run(start()._replace(states=saved[3]), num_rounds=2, first_round=4)
    assert rest == history[3:]  # cohorts, too, depend only on key and round
    chex.assert_trees_all_equal(dict(population.states), dict(whole.states))


def test_a_first_round_below_one_is_refused(federated, key):
    federation, public, private, test = federated
    states = federation.init(key, public, private)
    with pytest.raises(ValueError, match="first_round must be an integer of at least 1, got 0"):
        fmd.run_federation(federation, states, public, private, key, num_rounds=1, test=test, first_round=0)
    with pytest.raises(ValueError, match="first_round must be an integer of at least 1, got 0"):
        fmd.run_local_only(federation, states, private, key, num_rounds=1, test=test, first_round=0)
