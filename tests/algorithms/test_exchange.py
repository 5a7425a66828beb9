"""The round of all algorithms that exchange reports: its defaults are FedMD, and its further functions."""

from functools import partial

import chex
import faults
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys

import fedmd_jax as fmd

A = fmd.algorithms
GROUPS = toys.groups(linear=(1.0, 2.0, 0.0), mlp=(0.5, 1.0))
PUBLIC, PRIVATE, KEY = toys.public(), toys.private(GROUPS), jax.random.key(3)
WEIGHTS = np.array([1.0, 2.0, 0.0, 0.5, 1.0])
NETWORKS = {
    "linear": fmd.ArchitectureGroup(faults.breakable(), (0, 1, 2), (1.0, 2.0, 0.5)),
    "mlp": fmd.ArchitectureGroup(faults.breakable(toys.tanh_mlp), (3, 4)),
}
# Participation and faults of a round.
ROUNDS = {
    "all": ((), (), {}),
    "dropped and stragglers": ((0, 3), (4,), {}),
    "not finite": ((), (), {0: faults.SCORES, 1: faults.DIGEST, 2: faults.REVISIT, 3: faults.LOSS}),
    "no consensus": ((0, 1), (2,), {2: faults.SCORES, 3: faults.SCORES, 4: faults.SCORES}),
}


def noise(scores, key):
    return scores + jax.random.normal(key, scores.shape)


def keep_target(targets, own, mean):
    return targets


def rounds_of(groups, **functions):
    how = {"groups": groups, "subset_size": 12, "transforms": (partial(fmd.transforms.clip_scores, bound=2.0), noise)}
    how |= {"digest_training": toys.sgd(5, 2), "revisit_training": toys.sgd(3, 2)}
    return jax.jit(partial(A.exchange_round, **how, **functions)), jax.jit(partial(fmd.fedmd_round, **how))


@pytest.fixture(scope="module")
def compiled():
    """The round with its defaults, with a target for each client, and `fedmd_round`."""
    exchange, fedmd = rounds_of(NETWORKS)
    personal, _ = rounds_of(NETWORKS, personal_target=keep_target)
    return exchange, personal, fedmd


@pytest.mark.parametrize("what", ROUNDS)
def test_the_defaults_are_fedmd_to_the_bit(compiled, what):
    """With weights, two transforms, and memories of optimizers; also if each client has its own copy of the target."""
    dropped, stragglers, broken = ROUNDS[what]
    participants = A.all_clients(NETWORKS, faults.participation(NETWORKS, dropped=dropped, stragglers=stragglers))
    private = toys.private(NETWORKS)
    states = toys.federation(NETWORKS).init(jax.random.key(0), PUBLIC, private)
    states, _ = compiled[-1](states, PUBLIC, private, KEY)
    states = faults.switched(NETWORKS, states, broken)
    exchange, personal, fedmd = (each(states, PUBLIC, private, KEY, participants=participants) for each in compiled)
    chex.assert_trees_all_equal(exchange, fedmd)
    chex.assert_trees_all_equal(personal, fedmd)
    assert bool(fedmd[1].digested) == (what != "no consensus")


def probabilities(states):
    """Of all clients in float64, [K, M, C], in the order of the groups; for `first_examples`."""
    subset = np.asarray(PUBLIC.inputs[:12], np.float64)
    return np.stack([oracle.softmax(oracle.scores(state.params, subset)) for *_, state in toys.clients(GROUPS, states)])


def targets_of(*, report=A.probabilities_report, mesh=None, server=None, participants=None, **functions):
    """The targets that each client gets: a digest that writes them into its loss."""

    def digest(architecture, state, inputs, targets, key, *, training):
        return state, fmd.TrainingInfo(targets.reshape(-1), jnp.int32(1), jnp.array(True))

    algorithm = A.exchange_algorithm("seen", report=report, digest=digest, **functions)
    settings = {"algorithm": algorithm, "draw_subset": A.first_examples, "mesh": mesh, "server": server}
    federation = toys.federation(GROUPS, **settings)
    states = federation.init(jax.random.key(0), PUBLIC, PRIVATE)
    clients = jax.device_get(fmd.gather_clients(states))
    _, info = federation.round(states, PUBLIC, federation.shard(PRIVATE), KEY, participants)
    losses = toys.by_client(GROUPS, fmd.gather_clients(info.digest_loss))
    return clients, np.stack([losses[i].reshape(12, -1) for i in range(5)])


def row_weights(architecture, state, subset, private):
    """Confident rows count more; some not at all, so that their values do not matter."""
    values = A.probabilities_report(architecture, state, subset, private).values
    weights = _confidence(values)
    return A.Report(jnp.where(weights[:, None] > 0, values, jnp.nan), weights)


def _confidence(values):
    top = values.max(axis=-1)
    return (top > 0.35) * top


def others(targets, own, mean):
    rest = (mean.weights - own.weights)[:, None]
    sums = mean.values * mean.weights[:, None] - own.values * own.weights[:, None]
    return jnp.where(rest > 1e-6, sums / jnp.where(rest > 1e-6, rest, 1.0), 0.25)


@pytest.mark.parametrize("num_devices", [3])
def test_rows_are_a_ratio_of_sums_and_each_client_hears_the_others(num_devices):
    """Leave-one-out by brute force; rows that no other client reports get 1/4."""
    mesh = None if num_devices is None else fmd.client_mesh(num_devices)
    clients, found = targets_of(report=row_weights, personal_target=others, mesh=mesh)
    values = probabilities(clients)
    weights = WEIGHTS[:, None] * _confidence(values)  # [K, M]
    for k in range(5):
        rest = [j for j in range(5) if j != k]
        for row in range(12):
            total = sum(weights[j, row] for j in rest)
            expected = sum(weights[j, row] * values[j, row] for j in rest) / total if total > 0 else np.full(4, 0.25)
            np.testing.assert_allclose(found[k, row], expected, rtol=1e-4, atol=1e-5)
    assert (weights == 0).any()
    assert (weights.sum(axis=0) > 0).any()


def mean_of_all(reports, subset, memory, key):
    mean = jnp.einsum("kr,krd->rd", reports.weights, reports.values) / reports.weights.sum(axis=0)[:, None]
    return jnp.broadcast_to(mean, reports.values.shape), memory


def own_report(reports, subset, memory, key):
    return reports.values, memory


@pytest.mark.parametrize("num_devices", [3])
def test_all_reports_are_those_of_the_clients_in_order(num_devices):
    """Their mean is the streamed one; each client gets the row of its own; excluded clients are zeros."""
    mesh = None if num_devices is None else fmd.client_mesh(num_devices)
    participants = A.all_clients(GROUPS, faults.participation(GROUPS, dropped={1}))
    how = {"mesh": mesh, "participants": participants}
    clients, streamed = targets_of(**how)
    _, gathered = targets_of(aggregate_all=mean_of_all, **how)
    np.testing.assert_allclose(gathered, streamed, rtol=1e-5, atol=1e-6)
    weights = WEIGHTS * (np.arange(5) != 1)
    expected = np.einsum("k,kmc->mc", weights, probabilities(clients)) / weights.sum()
    np.testing.assert_allclose(streamed, np.broadcast_to(expected, streamed.shape), rtol=1e-5, atol=1e-6)
    _, own = targets_of(aggregate_all=own_report, **how)
    np.testing.assert_allclose(own, probabilities(clients) * (weights > 0)[:, None, None], rtol=1e-5, atol=1e-6)


def test_a_network_of_the_server_learns_and_is_evaluated():
    """If all clients are excluded it does not change."""
    federation = toys.federation(GROUPS, algorithm=A.fedmd(), server=toys.tanh_mlp())
    test = fmd.labelled_dataset(*toys.examples(50, 60))
    states = federation.init(jax.random.key(0), PUBLIC, PRIVATE)
    unlabelled = PUBLIC._replace(labels=None)  # the server begins untrained
    states, history = fmd.run_federation(federation, states, unlabelled, PRIVATE, KEY, num_rounds=6, test=test)
    accuracies = [metrics.server_accuracy for metrics in history]
    assert accuracies[-1] > accuracies[0] + 0.1
    assert accuracies[-1] == float(federation.evaluate_server(states, test).accuracy)
    before = jax.device_get(states.model)
    nobody = A.all_clients(GROUPS, faults.participation(GROUPS, dropped=range(5)))
    states, info = federation.round(states, unlabelled, PRIVATE, KEY, nobody)
    chex.assert_trees_all_equal(states.model, before)
    assert not info.digested
    with pytest.raises(ValueError, match=r"call federation\.start before the first round"):
        federation.round(states.clients, unlabelled, PRIVATE, KEY)
    with pytest.raises(ValueError, match=r"revisit takes the clients alone, `states\.clients`"):
        federation.revisit(states, PRIVATE, KEY)
    assert federation.evaluate_server(states, PRIVATE) is None


@pytest.mark.parametrize("functions", [{}, {"personal_target": others}], ids=["common", "personal"])
def test_the_only_collective_is_one_all_reduce(functions):
    algorithm = A.exchange_algorithm("exchange", **functions)
    federation = toys.federation(GROUPS, algorithm=algorithm, mesh=fmd.client_mesh(3), server=toys.linear())
    states = federation.start(federation.init(jax.random.key(0), PUBLIC, PRIVATE), PUBLIC, KEY)
    private = federation.shard(PRIVATE)
    lowered = federation.programs["round"].lower(states, PUBLIC, private, KEY, participants=None)
    assert toys.collectives(lowered.compile().as_text()) == {"all-reduce": 1}
    for round_ in range(2):
        states, _ = federation.round(states, PUBLIC, private, jax.random.fold_in(KEY, round_))
    assert federation.programs["round"]._cache_size() == 1
