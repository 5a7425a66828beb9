"""The size of the consensus in the info of a round: the mean distance of a score from the mean over the classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import fedmd_jax as fmd

A = fmd.algorithms
PUBLIC, KEY = toys.public(), jax.random.key(3)
GROUPS = toys.groups(linear=(1.0, 2.0, 0.5), mlp=(1.0, 1.5))
PRIVATE = toys.private(GROUPS)
PLAIN = toys.federation(GROUPS)


def start(federation):
    states = federation.init(jax.random.key(0), PUBLIC, PRIVATE)
    return federation.start(states, PUBLIC, jax.random.key(1)), federation.shard(PRIVATE)


def expected():
    """In NumPy, from the scores of all clients."""
    scores = PLAIN.score(start(PLAIN)[0], PUBLIC, KEY)
    every = np.concatenate([np.asarray(scores[name], np.float64) for name in GROUPS])
    consensus = np.average(every, axis=0, weights=[weight for group in GROUPS.values() for weight in group.weights])
    return np.mean([np.abs(row - row.mean()).mean() for row in consensus])


def median(scores, weights):
    del weights
    return jnp.median(scores, axis=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mesh": fmd.client_mesh(4)},
        {"algorithm": A.fedmd(), "server": toys.linear()},
        {"algorithm": A.exchange_algorithm("gathering", aggregate_all=lambda reports, *_: (reports.values, ()))},
    ],
    ids=["plain", "mesh", "exchange", "from all reports"],
)
def test_it_is_that_of_numpy(settings):
    whole = toys.federation(GROUPS, **settings)
    states, private = start(whole)
    _, info = whole.round(states, PUBLIC, private, KEY)
    np.testing.assert_allclose(info.consensus_size, expected(), rtol=1e-5)


def test_of_a_rule_of_the_users_and_of_a_consensus_from_elsewhere():
    scores = PLAIN.score(start(PLAIN)[0], PUBLIC, KEY)
    consensus = np.median(np.concatenate([scores[name] for name in GROUPS]), axis=0)
    size = np.abs(consensus - consensus.mean(axis=1, keepdims=True)).mean()
    whole = toys.federation(GROUPS, aggregator=fmd.aggregators.from_all_scores(median))
    _, info = whole.round(*start(whole)[:1], PUBLIC, PRIVATE, KEY)
    np.testing.assert_allclose(info.consensus_size, size, rtol=1e-5)
    _, info = PLAIN.learn(*start(PLAIN)[:1], PUBLIC, PRIVATE, jnp.asarray(consensus), KEY)
    np.testing.assert_allclose(info.consensus_size, size, rtol=1e-5)


def test_a_history_has_it_in_rounds_with_a_consensus():
    """Also of cohorts. Of round 2 all scores are NaN."""
    test = fmd.labelled_dataset(*toys.examples(50, 8))

    def break_clients(metrics, states):
        if metrics.round == 1:
            for state in states.values():
                for name in state.params:
                    state.params[name] = jnp.full_like(state.params[name], jnp.nan)

    how = {"num_rounds": 2, "test": test, "callback": break_clients}
    _, history = fmd.run_federation(PLAIN, start(PLAIN)[0], PUBLIC, PRIVATE, KEY, **how)
    first = history[1].consensus_size
    assert [metrics.consensus_size for metrics in history] == [None, first, None]
    assert first > 0
    assert ["consensus_size" in record for record in history.to_dicts()] == [False] * 5 + [True] * 5 + [False] * 5
    sizes = {name: group.num_clients for name, group in GROUPS.items()}
    population = fmd.simulation.init_population(PLAIN, jax.random.key(0), PUBLIC, PRIVATE, cohort_size=sizes)
    how = {"cohort_size": sizes, "num_rounds": 1, "test": test}
    _, [metrics] = fmd.simulation.run_population(PLAIN, population, PUBLIC, KEY, **how)
    np.testing.assert_allclose(metrics.consensus_size, first, rtol=1e-5)


@pytest.mark.parametrize("algorithm", [A.ds_fl(), A.fd(), A.fedavg()])
def test_other_methods_do_not_have_it(algorithm):
    whole = toys.federation(GROUPS, algorithm=algorithm)
    states, _ = start(whole)
    shapes = jax.eval_shape(whole.programs["round"], states, PUBLIC, PRIVATE, KEY)[1]
    assert shapes.consensus_size is None
