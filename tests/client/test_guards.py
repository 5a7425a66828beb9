"""A fault of one client does not affect the others, to the bit."""

import dataclasses

import chex
import faults
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings, strategies as st

import fedmd_jax as fmd
from fedmd_jax.client.guards import all_finite, keep_if_finite, zero_where_not_finite_before
from fedmd_jax.mapping.groups import group_client_ids

PUBLIC = toys.public()
TEST = fmd.labelled_dataset(*toys.examples(200, 30))
KEY = jax.random.key(7)
LINEAR, MLP = faults.breakable(), faults.breakable(toys.tanh_mlp)
GROUPS = {
    "stack": fmd.ArchitectureGroup(LINEAR, (0, 1, 2), (1.0, 2.5, 0.7)),
    "alone": fmd.ArchitectureGroup(MLP, (3,), (1.3,)),
}
PAIRS = {
    "four": fmd.ArchitectureGroup(LINEAR, (0, 1, 2, 3), (1.0, 2.5, 0.7, 1.0)),
    "two": fmd.ArchitectureGroup(MLP, (4, 5), (1.3, 0.2)),
}
SETUPS = [(GROUPS, None, 1), (GROUPS, None, 2), (GROUPS, None, None), (PAIRS, 2, None)]


class Rounds:
    """One compiled round, to be run again and again from the same states."""

    def __init__(self, groups, num_devices, clients_per_chunk):
        mesh = None if num_devices is None else fmd.client_mesh(num_devices)
        self.groups = groups
        self.federation = toys.federation(groups, mesh=mesh, clients_per_chunk=clients_per_chunk)
        self.private = toys.private(groups)
        self.states = self.federation.init(jax.random.key(0), PUBLIC, self.private)
        # No zeros, so that a memory that is lost makes a difference.
        self.states = jax.tree.map(lambda leaf: leaf + 0.01, self.states)
        self.private = fmd.mapping.sharding.shard_tree(self.private, mesh)
        self.weights = fmd.algorithms.all_clients(groups).weights
        self.mesh, self.compiled = mesh, None

    def __call__(self, broken=None, *, weights=None, **attending):
        """After the round: {client id: (state, losses)}, and the `RoundInfo`."""
        states = faults.switched(self.groups, self.states, broken or {})
        states = fmd.mapping.sharding.shard_tree(jax.tree.map(jnp.copy, states), self.mesh)
        participants = fmd.algorithms.all_clients(self.groups, faults.participation(self.groups, **attending))
        runtime = {"participants": participants._replace(weights=weights or self.weights)}
        arguments = (states, PUBLIC, self.private, KEY)
        if self.compiled is None:
            self.compiled = self.federation.programs["round"].lower(*arguments, **runtime).compile()
        states, info = jax.device_get(self.compiled(*arguments, **runtime))
        return self.by_client(states, info.digest_loss, info.revisit_loss), info

    def before(self, broken=None):
        """{client id: state}, before the round."""
        states = faults.switched(self.groups, self.states, broken or {})
        return {client_id: state for client_id, (state,) in self.by_client(states).items()}

    def by_client(self, *trees):
        """{client id: (state without its switch, ...)}."""
        found = {}
        for _, client_id, state, *others in toys.clients(self.groups, *jax.device_get(trees)):
            params = {key: leaf for key, leaf in state.params.items() if key != "switch"}
            found[client_id] = (state._replace(params=params), *others)
        return found

    def status(self, info):
        evaluations = {
            name: fmd.client.Evaluation(np.zeros(group.num_clients), np.zeros(group.num_clients))
            for name, group in self.groups.items()
        }
        metrics = fmd.simulation.metrics.round_metrics(self.groups, 1, evaluations, info)
        return {client.client_id: client.status for client in metrics.clients}


@pytest.fixture(scope="module", params=SETUPS, ids=lambda setup: f"devices={setup[1]},chunk={setup[2]}")
def rounds(request):
    return Rounds(*request.param)


def without(clients, victim):
    return {client_id: client for client_id, client in clients.items() if client_id != victim}


def changed(after, before, field):
    leaves = zip(*(jax.tree.leaves(getattr(state, field)) for state in (after, before)), strict=True)
    return any((new != old).any() for new, old in leaves)


@pytest.mark.parametrize("sign", [1, -1], ids=["NaN", "infinity"])
def test_a_client_with_nonfinite_scores_does_not_affect_others(rounds, sign):
    for victim in (1, 3):
        after, info = rounds({victim: sign * faults.SCORES})
        expected, _ = rounds(dropped=[victim])
        chex.assert_trees_all_equal(without(after, victim), without(expected, victim))
        assert rounds.status(info)[victim] == "scores not finite"
        # It is excluded from the consensus, but digests it.
        assert all_finite(after[victim])
        assert changed(after[victim][0], rounds.before()[victim], "digest_opt_state")


@pytest.mark.parametrize("sign", [1, -1], ids=["NaN", "infinity"])
def test_nonfinite_training_is_reverted(rounds, sign):
    sound, _ = rounds()
    undigested, _ = rounds(weights=jax.tree.map(jnp.zeros_like, rounds.weights))
    for victim in (1, 3):
        before = rounds.before()[victim]
        for fault, what in ((faults.DIGEST, "digest"), (faults.REVISIT, "revisit")):
            after, info = rounds({victim: sign * fault})
            chex.assert_trees_all_equal(without(after, victim), without(sound, victim))
            state = after[victim][0]
            assert all_finite(state)
            assert not changed(state, before, f"{what}_opt_state")
            assert rounds.status(info) == {**dict.fromkeys(after, "ok"), victim: f"{what} not finite"}
            if what == "digest":  # the revisit remains
                chex.assert_trees_all_equal(state, undigested[victim][0])
            else:
                chex.assert_trees_all_equal(state.digest_opt_state, sound[victim][0].digest_opt_state)
                assert changed(state, before, "params")


def test_a_nonfinite_loss_reverts_a_finite_state(rounds):
    after, info = rounds({1: faults.LOSS})
    chex.assert_trees_all_equal(without(after, 1), without(rounds()[0], 1))
    chex.assert_trees_all_equal(after[1][0], rounds.before()[1])
    assert rounds.status(info)[1] == "digest not finite, revisit not finite"


def test_dropped_clients_and_stragglers_do_not_change(rounds):
    sound, before = rounds()[0], rounds.before()
    for victim in (1, 3):
        after, info = rounds(dropped=[victim])
        chex.assert_trees_all_equal(after[victim][0], before[victim])
        assert rounds.status(info)[victim] == "dropped"
        after, info = rounds(stragglers=[victim])
        chex.assert_trees_all_equal(after[victim][0], before[victim])
        chex.assert_trees_all_equal(without(after, victim), without(sound, victim))
        assert rounds.status(info)[victim] == "straggler"


def test_only_one_array_crosses_devices_once(rounds):
    rounds()
    crossing = toys.collectives(rounds.compiled.as_text())
    assert crossing == ({} if rounds.mesh is None else {"all-reduce": 1})


@pytest.fixture(scope="module")
def plain():
    return Rounds(GROUPS, None, "auto")


@given(st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3)))
@settings(max_examples=8, deadline=None)
def test_dropped_equals_zero_weight_equals_excluded(plain, silent, stragglers):
    silent_weights = {
        name: jnp.array([w * (i not in silent) for i, w in zip(group.client_ids, group.weights, strict=True)])
        for name, group in GROUPS.items()
    }
    expected, info = plain(dropped=silent, stragglers=stragglers)
    assert info.digested == (len(silent) < 4)
    for after, _ in (
        plain(weights=silent_weights, stragglers=stragglers),
        plain(dict.fromkeys(silent, faults.SCORES), stragglers=stragglers),
    ):
        for client_id in set(range(4)) - silent:
            chex.assert_trees_all_equal(after[client_id], expected[client_id])


def test_a_round_without_clients_changes_nothing(plain):
    after, info = plain(dropped=range(4))
    assert not info.digested
    chex.assert_trees_all_equal({i: client[0] for i, client in after.items()}, plain.before())
    assert set(plain.status(info).values()) == {"dropped"}


def test_without_a_consensus_clients_still_revisit(plain):
    after, info = plain(dict.fromkeys(range(4), faults.SCORES), stragglers=[2])
    expected, _ = plain(weights=jax.tree.map(jnp.zeros_like, plain.weights), stragglers=[2])
    assert not info.digested
    chex.assert_trees_all_equal(after, expected)
    chex.assert_trees_all_equal(after[2][0], plain.before()[2])
    status = plain.status(info)
    assert (status[0], status[2]) == ("scores not finite", "straggler, scores not finite")
    for name, losses in info.digest_loss.items():
        assert not losses.any()
        assert info.digest_finite[name].all()


def test_a_nonfinite_state_does_not_affect_others(plain):
    """NaN as it may come from a damaged file."""
    states = plain.states
    params = states["stack"].params
    plain.states = {**states, "stack": states["stack"]._replace(params={**params, "w": params["w"].at[1].set(jnp.nan)})}
    after, info = plain()
    plain.states = states
    chex.assert_trees_all_equal(without(after, 1), without(plain(dropped=[1])[0], 1))
    assert plain.status(info)[1] == "scores not finite, digest not finite, revisit not finite"


def test_a_mask_of_infinities_is_not_a_fault():
    """Training selects it with `where`, so that it is another array afterwards."""

    def train(architecture, state, step):
        model_state = {"mask": jnp.where(step > 0, state.model_state["mask"], 0.0), "count": state.model_state["count"]}
        new = state._replace(params=state.params + step, model_state=model_state)
        finite = all_finite(jax.tree.map(zero_where_not_finite_before, new, state))
        return new, fmd.TrainingInfo(jnp.zeros(1), jnp.int32(1), finite)

    client = fmd.ClientState(jnp.zeros(2), {"mask": jnp.array([-jnp.inf, 0.0]), "count": jnp.array(1)}, {}, {})
    trained = jax.jit(keep_if_finite(train))
    state, info = trained(None, True, client, 1.0)
    assert bool(info.finite)
    assert state.params.tolist() == [1.0, 1.0]
    for completed, step in ((True, jnp.inf), (False, jnp.inf), (False, 1.0)):
        state, info = trained(None, completed, client, step)
        assert bool(info.finite) == (step == 1)  # also if the training is discarded
        chex.assert_trees_all_equal(state, client)


@pytest.mark.parametrize("phase", ["pretrain", "train_private", "train_pooled", "revisit"])
def test_other_phases_revert_nonfinite_training(plain, phase):
    pooled = fmd.labelled_dataset(*toys.examples(300, 33))
    fault, data = {
        "pretrain": (faults.PUBLIC, PUBLIC),
        "train_private": (faults.PRIVATE, plain.private),
        "train_pooled": (faults.POOL, pooled),
        "revisit": (faults.REVISIT, plain.private),
    }[phase]

    def after(broken):
        states = jax.tree.map(jnp.copy, faults.switched(GROUPS, plain.states, broken))
        states, info = getattr(plain.federation, phase)(states, data, KEY)
        return plain.by_client(states, info), fmd.simulation.federation.reverted_clients(group_client_ids(GROUPS), info)

    (broken, reverted), (sound, none) = after({1: fault, 3: -fault}), after({})
    assert (reverted, none) == ([1, 3], [])
    for client_id, before in plain.before().items():
        if client_id in (1, 3):
            chex.assert_trees_all_equal(broken[client_id][0], before)
            assert changed(sound[client_id][0], before, "params")
        else:
            chex.assert_trees_all_equal(broken[client_id], sound[client_id])


def test_local_only_reports_reverted_clients(plain):
    def reported(federation, broken, **settings):
        states = jax.tree.map(jnp.copy, faults.switched(GROUPS, plain.states, broken))
        settings |= {"num_rounds": 2, "test": TEST}
        _, history = fmd.run_local_only(federation, states, plain.private, KEY, **settings)
        assert [metrics.round for metrics in history] == [0, 1, 2]
        assert {client.status for metrics in history for client in metrics.clients} <= {"ok", "revisit not finite"}
        return [[client.client_id for client in each.clients if client.status != "ok"] for each in history[1:]]

    assert reported(plain.federation, {1: faults.REVISIT, 3: -faults.REVISIT}) == [[1, 3], [1, 3]]
    assert reported(plain.federation, {}) == [[], []]
    # Dropped clients are not reported as reverted.
    finite = {"stack": jnp.array([True, False, True]), "alone": jnp.array([False])}
    info = {name: fmd.TrainingInfo(None, None, each) for name, each in finite.items()}
    programs = {**plain.federation.programs, "revisit": lambda states, *_: (states, info)}
    failing = dataclasses.replace(plain.federation, programs=programs)
    absent = {1: {"dropped": [3]}, 2: {"stragglers": [1]}}
    policy = lambda round_, _: faults.participation(GROUPS, **absent[round_])  # noqa: E731
    assert reported(failing, {}, participation=policy) == [[1], [3]]


def test_early_stopping_may_leave_out_losses(plain):
    """Epochs after early stopping have no loss, which reverts no client."""
    training = fmd.TrainingConfig(
        num_epochs=6, batch_size=4, optimizer=toys.sgd(1).optimizer, early_stopping=fmd.EarlyStopping(patience=1)
    )
    federation = toys.federation(GROUPS, private_training=training)
    states, info = federation.train_private(jax.tree.map(jnp.copy, plain.states), plain.private, KEY, TEST)
    assert any((each.num_epochs < 6).any() for each in info.values())
    assert fmd.simulation.federation.reverted_clients(group_client_ids(GROUPS), info) == []
    after = plain.by_client(states)
    assert all(changed(after[i][0], before, "params") for i, before in plain.before().items())


def test_faults_before_a_round_are_in_its_status():
    statuses = enumerate(["ok", "ok", "dropped"])
    clients = tuple(fmd.simulation.ClientMetrics(i, "a", 0.5, None, None, status) for i, status in statuses)
    before = {"x": {0, 2}, "y": {0}, "z": set()}
    metrics = fmd.simulation.metrics.with_faults(fmd.simulation.RoundMetrics(0, clients, True), before)
    assert [client.status for client in metrics.clients] == ["x, y", "ok", "x, dropped"]
