"""Rounds of cohorts of a population."""

import types

import chex
import jax
import numpy as np
import pytest
import toys

import fedmd_jax as fmd

GROUPS = {
    "normed": fmd.ArchitectureGroup(toys.normed(noise=0.1), (3, 1, 4, 0, 5), (1.0, 2.0, 0.5, 1.0, 3.0)),
    "mlp": fmd.ArchitectureGroup(toys.tanh_mlp(), (9, 2, 6, 8), (1.0, 0.5, 2.0, 1.0)),
}
PUBLIC = toys.public()
PRIVATE = toys.private(GROUPS)
TEST = fmd.labelled_dataset(*toys.examples(200, 60))
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
FEDERATION = toys.federation(GROUPS)
COHORT = {"normed": 2, "mlp": 2}


def start(federation=FEDERATION, private=PRIVATE, *, cohort_size=None, **storage):
    """Initial states. Cohorts of two clients divide the mlps evenly, and the others not."""
    return fmd.simulation.init_population(
        federation, jax.random.key(1), PUBLIC, private, cohort_size=cohort_size or COHORT, **storage
    )


def run(key, population, *, federation=FEDERATION, **settings):
    settings = {"cohort_size": COHORT, "num_rounds": 3, "test": TEST, **settings}
    return fmd.simulation.run_population(federation, population, PUBLIC, key, **settings)


def transfer_learn(key, population, federation=FEDERATION, cohort_size=None):
    cohort_size = cohort_size or COHORT
    return fmd.simulation.transfer_learn_population(federation, population, PUBLIC, key, cohort_size=cohort_size)


def by_client(groups, states):
    """Copies, since rounds write to the arrays of a population."""
    return toys.by_client(groups, jax.tree.map(np.array, states))


@pytest.mark.parametrize("storage", ["host", "device"])
def test_cohorts_of_all_clients_equal_the_federation(key, storage):
    """Initialization, transfer learning, evaluation, and the rounds of a cohort of all clients."""

    def same_states(**tolerance):
        chex.assert_trees_all_close(jax.device_get(population.states), jax.device_get(states), **tolerance)

    population = start(storage=storage)
    states = FEDERATION.init(jax.random.key(1), PUBLIC, PRIVATE)
    assert all(isinstance(leaf, np.ndarray if storage == "host" else jax.Array) for leaf in jax.tree.leaves(population))
    same_states(**TOLERANCE)

    population, info = transfer_learn(key, population)
    states, expected_info = FEDERATION.transfer_learn(states, PUBLIC, PRIVATE, key)
    same_states(**TOLERANCE)
    chex.assert_trees_all_close(info, jax.device_get(expected_info), rtol=1e-4, atol=1e-5)
    evaluation = fmd.simulation.evaluate_population(FEDERATION, population, TEST, cohort_size=COHORT)
    chex.assert_trees_all_close(evaluation, jax.device_get(FEDERATION.evaluate(states, TEST)), rtol=1e-5)

    rounds = {"num_rounds": 2, "learning_rate_schedule": fmd.simulation.cosine_decay(2)}
    population, history = run(key, population, cohort_size=9, **rounds)
    states, plain = fmd.run_federation(FEDERATION, states, PUBLIC, PRIVATE, key, test=TEST, **rounds)
    same_states(rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(history, plain[1:], strict=True):
        assert [client[:2] for client in ours.clients] == [client[:2] for client in theirs.clients]
        assert ours.mean_accuracy == pytest.approx(theirs.mean_accuracy, abs=1e-2)


def test_only_clients_of_the_cohort_change(key):
    """Weights, batch statistics and both optimizer memories, bit for bit."""
    seen = [by_client(GROUPS, start().states)]
    _, history = run(key, start(), callback=lambda _, population: seen.append(by_client(GROUPS, population.states)))
    assert [metrics.round for metrics in history] == [1, 2, 3]
    for metrics, before, after in zip(history, seen[:-1], seen[1:], strict=True):
        there = {client.client_id for client in metrics.clients}
        assert len(there) == 4
        assert all(client.digest_loss > 0 and client.revisit_loss > 0 for client in metrics.clients)
        for client_id, state in after.items():
            if client_id not in there:
                chex.assert_trees_all_equal(state, before[client_id])
            else:
                for field in ("params", "digest_opt_state", "revisit_opt_state"):
                    new, old = (jax.tree.leaves(getattr(one, field)) for one in (state, before[client_id]))
                    assert any((a != b).any() for a, b in zip(new, old, strict=True)), field
    assert len({tuple(client.client_id for client in metrics.clients) for metrics in history}) > 1


def test_a_cohort_is_a_round_of_a_federation_of_its_own(key):
    """The consensus is that of the cohort, and each client's random numbers are its own."""
    population = start()
    before = by_client(GROUPS, population.states)
    population, (metrics,) = run(key, population, num_rounds=1)
    there = {client.client_id for client in metrics.clients}
    rows = {name: [k for k, i in enumerate(g.client_ids) if i in there] for name, g in GROUPS.items()}
    alone = {
        name: fmd.ArchitectureGroup(
            group.architecture,
            [group.client_ids[k] for k in rows[name]],
            [group.weights[k] for k in rows[name]],
        )
        for name, group in GROUPS.items()
    }
    states = {
        name: jax.tree.map(lambda *leaves: np.stack(leaves), *[before[i] for i in group.client_ids])
        for name, group in alone.items()
    }
    private = {name: fmd.simulation.get_rows(PRIVATE[name], np.array(rows[name])) for name in alone}
    states, _ = toys.federation(alone).round(states, PUBLIC, private, jax.random.fold_in(key, 1))
    after = by_client(GROUPS, population.states)
    for client_id, state in by_client(alone, states).items():
        chex.assert_trees_all_close(after[client_id], state, **TOLERANCE)


def test_the_order_of_the_population_does_not_matter(key):
    groups = {
        "mlp": fmd.ArchitectureGroup(GROUPS["mlp"].architecture, (8, 9, 6, 2), (1.0, 1.0, 2.0, 0.5)),
        "normed": fmd.ArchitectureGroup(GROUPS["normed"].architecture, (0, 1, 3, 4, 5), (1.0, 2.0, 1.0, 0.5, 3.0)),
    }
    federation = toys.federation(groups)
    permuted, history = run(key, start(federation, toys.private(groups)), federation=federation)
    population, expected = run(key, start())
    chex.assert_trees_all_close(by_client(groups, permuted.states), by_client(GROUPS, population.states), **TOLERANCE)
    for ours, theirs in zip(history, expected, strict=True):
        assert [client[:2] for client in ours.clients] == [client[:2] for client in theirs.clients]


def test_storage_and_chunks_do_not_matter(key, tmp_path):
    population, history = run(key, start())
    at_device, device_history = run(key, start(storage="device"))
    chex.assert_trees_all_equal(jax.device_get(at_device.states), population.states)
    in_files, file_history = run(key, start(folder=tmp_path))
    stored = np.concatenate([np.fromfile(file, np.uint8) for file in sorted(tmp_path.iterdir())])
    start(folder=tmp_path)  # replaces the files; the population that was in them keeps its states
    again = np.concatenate([np.fromfile(file, np.uint8) for file in sorted(tmp_path.iterdir())])
    assert len(stored) == len(again) >= sum(leaf.nbytes for leaf in jax.tree.leaves(population.states))
    assert not np.array_equal(stored, again)
    chex.assert_trees_all_equal(in_files.states, population.states)
    assert device_history == file_history == history
    federation = toys.federation(GROUPS, clients_per_chunk={"mlp": 1})
    chunked, _ = run(key, start(), federation=federation)
    chex.assert_trees_all_close(chunked.states, population.states, **TOLERANCE)


def test_a_disk_that_is_too_small_for_all_groups_is_refused_and_loses_nothing(key, tmp_path, monkeypatch):
    population = start(folder=tmp_path)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(states)) for states in population.states.values()]
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    allocated = sum(file.stat().st_blocks * 512 for file in files)
    free = max(sizes) * 1.1 - allocated  # enough for each group alone
    assert allocated + free < sum(sizes)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=free))
    with pytest.raises(ValueError, match="folder must have space for"):
        start(folder=tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_rounds_go_on_where_they_stopped(key):
    expected, history = run(key, start(), num_rounds=3)
    population, first = run(key, start(), num_rounds=1)
    population, rest = run(key, population, num_rounds=2, first_round=2)
    chex.assert_trees_all_equal(population.states, expected.states)
    assert first + rest == history


def test_one_program_serves_all_cohorts_and_a_test_set_per_client(key):
    traces, counts = [], []

    def apply(*args, **kwargs):
        traces.append(kwargs["train"])
        return toys.linear().apply(*args, **kwargs)

    groups = {"only": fmd.ArchitectureGroup(toys.linear()._replace(apply=apply), range(7))}
    private, federation = toys.private(groups), toys.federation(groups)
    settings = {"cohort_size": 3, "test": private, "num_rounds": 4, "callback": lambda *_: counts.append(len(traces))}
    run(key, start(federation, private, cohort_size=3), federation=federation, **settings)
    assert counts[0] > 0
    assert counts == [counts[0]] * 4


def test_on_a_mesh(key):
    """Twelve clients in cohorts of eight on four devices, also in the half full last cohort of transfer learning."""
    groups = {"mlp": fmd.ArchitectureGroup(toys.tanh_mlp(), range(12))}
    private = toys.private(groups)

    def end(mesh):
        federation = toys.federation(groups, mesh=mesh)
        population, info = transfer_learn(key, start(federation, private, cohort_size=8), federation, 8)
        return run(key, population, federation=federation, cohort_size=8, num_rounds=2)[0].states, info

    chex.assert_trees_all_close(end(fmd.client_mesh(4)), end(None), rtol=1e-4, atol=1e-5)


def test_examples_may_stay_on_the_host():
    data = {i: toys.examples(i, 7 + i) for group in GROUPS.values() for i in group.client_ids}
    stacked = fmd.stack_private(GROUPS, data, storage="host")
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(stacked))
    chex.assert_trees_all_equal(stacked, jax.device_get(PRIVATE))


def on_mesh(name):
    return toys.federation({name: GROUPS[name]}, mesh=fmd.client_mesh(4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: start(storage="moon"), "storage must be host or device, got 'moon'"),
        (lambda: fmd.stack_private(GROUPS, {}, storage="moon"), "storage must be host or device, got 'moon'"),
        (lambda: start(cohort_size=10), "at most all 9 clients, got 10"),
        (lambda: run(None, None, num_rounds=-1), "num_rounds must be an integer of at least 0, got -1"),
        (lambda: run(None, None, first_round=0), "first_round must be an integer of at least 1, got 0"),
        (lambda: run(None, None, cohort_size=1), "at least one client of each of the 2 groups"),
        (
            lambda: start(on_mesh("mlp"), cohort_size=3),
            "group 'mlp': the clients of a cohort must be a multiple of the 4 devices of the mesh, got 3",
        ),
        (
            lambda: start(on_mesh("normed"), cohort_size=4),
            "group 'normed': the clients of a population must be a multiple of the 4 devices of the mesh, got 5",
        ),
        (lambda: start(on_mesh("mlp"), cohort_size=4, storage="device"), "must be the host if there is a mesh"),
        (lambda: start(storage="device", folder="."), "must be the host if there is a folder"),
        (lambda: fmd.fedmd(GROUPS, clients_per_chunk=0), "clients_per_chunk must be an integer of at least 1, got 0"),
        (
            lambda: fmd.fedmd(GROUPS, clients_per_chunk={"x": 1}),
            r"of the groups \['mlp', 'normed'\], got one of \['x'\]",
        ),
    ],
)
def test_invalid_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("storage", ["host", "device"])
def test_a_population_that_was_consumed_is_refused(storage, key):
    population = start(storage=storage)
    after, _ = run(key, population, num_rounds=1)
    for again in (
        lambda: run(key, population, num_rounds=1),
        lambda: transfer_learn(key, population),
        lambda: fmd.simulation.evaluate_population(FEDERATION, population, TEST, cohort_size=COHORT),
    ):
        with pytest.raises(ValueError, match="this population was consumed by an earlier call: use what it returned"):
            again()
    fmd.simulation.evaluate_population(FEDERATION, after, TEST, cohort_size=COHORT)
