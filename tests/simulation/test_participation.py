import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import fedmd_jax as fmd

MANY = {"a": jnp.arange(3000), "b": jnp.arange(3000, 4000)}
PUBLIC = toys.public()
TEST = fmd.labelled_dataset(*toys.examples(200, 30))


def by_client(client_ids, masks):
    return {int(i): bool(m) for name in client_ids for i, m in zip(client_ids[name], masks[name], strict=True)}


def test_the_shares_are_those_asked_for_and_only_available_clients_complete(key):
    participation = fmd.simulation.draw_participation(key, MANY, availability=0.7, completion=0.5)
    available, completed = (np.concatenate(list(masks.values())) for masks in participation)
    deviation = 4 * np.sqrt(0.25 / 4000)  # four standard deviations of a share among 4000, at most
    assert abs(available.mean() - 0.7) < deviation
    assert abs(completed.mean() - 0.35) < deviation
    assert not (completed & ~available).any()


def test_grouping_order_and_other_clients_do_not_matter(key):
    other = {"x": jnp.arange(10, 50)[::-1], "y": jnp.array([3990, 2])}
    for ours, theirs in zip(
        fmd.simulation.draw_participation(key, MANY, availability=0.5, completion=0.5),
        fmd.simulation.draw_participation(key, other, availability=0.5, completion=0.5),
        strict=True,
    ):
        ours, theirs = by_client(MANY, ours), by_client(other, theirs)
        assert theirs == {client_id: ours[client_id] for client_id in theirs}


def test_certainty_and_impossibility_and_rounds_that_differ(key):
    always, never = (
        fmd.simulation.draw_participation(key, MANY),
        fmd.simulation.draw_participation(key, MANY, availability=0.0),
    )
    assert all(mask.all() for mask in jax.tree.leaves(always))
    assert not any(mask.any() for mask in jax.tree.leaves(never))
    policy = fmd.simulate_participation(key, availability=0.5)
    chex.assert_trees_all_equal(policy(3, MANY), policy(3, MANY))
    assert (policy(3, MANY).available["a"] != policy(4, MANY).available["a"]).any()


def test_a_probability_for_each_client(key):
    ids = {"a": jnp.array([5, 2]), "b": jnp.array([9])}
    participation = fmd.simulation.draw_participation(
        key, ids, availability={2: 1.0, 5: 0.0, 9: 1.0}, completion={2: 0, 5: 1, 9: 1}
    )
    assert by_client(ids, participation.available) == {5: False, 2: True, 9: True}
    assert by_client(ids, participation.completed) == {5: False, 2: False, 9: True}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"availability": 1.5}, r"availability must be between 0 and 1, got \[1.5, 1.5\]"),
        ({"completion": {1: 0.5, 2: float("nan")}}, r"completion must be between 0 and 1, got \[0.5, nan\]"),
        ({"availability": {1: 0.5}}, r"availability is needed for every client, missing for \[2\]"),
    ],
)
def test_invalid_probabilities_are_refused(key, settings, message):
    with pytest.raises(ValueError, match=message):
        fmd.simulation.draw_participation(key, {"a": jnp.array([1, 2])}, **settings)


def test_participation_of_other_clients_is_refused(key):
    groups = toys.groups()
    participation = fmd.simulation.draw_participation(key, {"linear": jnp.arange(2), "mlp": jnp.arange(2)})
    participants = fmd.algorithms.all_clients(groups, participation)
    with pytest.raises(ValueError, match=r"one availability per client is needed.*'linear': \(3,\).*'linear': \(2,\)"):
        toys.federation(groups).round({}, PUBLIC, toys.private(groups), key, participants=participants)


def test_a_federation_and_a_population_with_dropouts_and_stragglers(key):
    """Cohorts of all clients have the rounds of the federation; one compiled round serves any participation."""
    traces = []

    def apply(*args, **kwargs):
        traces.append(kwargs["train"])
        return toys.linear().apply(*args, **kwargs)

    groups = {"only": fmd.ArchitectureGroup(toys.linear()._replace(apply=apply), range(4))}
    federation, private = toys.federation(groups), toys.private(groups)
    policy = fmd.simulate_participation(jax.random.key(2), availability={0: 1, 1: 0.5, 2: 1, 3: 0}, completion=0.5)
    states, counts = federation.init(key, PUBLIC, private), []
    population = fmd.simulation.init_population(federation, key, PUBLIC, private, cohort_size=4)
    settings = {"num_rounds": 4, "test": TEST, "participation": policy}
    states, history = fmd.run_federation(
        federation, states, PUBLIC, private, key, callback=lambda *_: counts.append(len(traces)), **settings
    )
    assert counts[1:] == [counts[1]] * 4
    for metrics in history[1:]:
        expected = policy(metrics.round, {"only": jnp.arange(4)})
        for client, available, completed in zip(metrics.clients, *(m["only"] for m in expected), strict=True):
            assert client.status == ("ok" if completed else "straggler" if available else "dropped")
            assert (client.revisit_loss is None) == (not completed)
    assert {client.status for metrics in history for client in metrics.clients} == {"ok", "dropped", "straggler"}
    population, cohorts = fmd.simulation.run_population(federation, population, PUBLIC, key, cohort_size=4, **settings)
    chex.assert_trees_all_close(population.states, jax.device_get(states), rtol=1e-5, atol=1e-6)
    assert [[c.status for c in m.clients] for m in cohorts] == [[c.status for c in m.clients] for m in history[1:]]
