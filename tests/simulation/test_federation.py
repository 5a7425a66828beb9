import dataclasses
import os
import subprocess
import sys
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from flax import nnx

import fedmd_jax as fmd
from fedmd_jax.algorithms.fedmd import round_keys
from fedmd_jax.mapping.groups import group_client_ids

TRACES = []


def counted(architecture):
    def apply(*args, train, **kwargs):
        TRACES.append(train)
        return architecture.apply(*args, train=train, **kwargs)

    return architecture._replace(apply=apply)


GROUPS = {**toys.groups(), "linear": fmd.ArchitectureGroup(counted(toys.linear()), (0, 1, 2))}
FEDERATION = toys.federation(GROUPS)
PUBLIC, PRIVATE = toys.public(), toys.private(GROUPS)
TEST = fmd.labelled_dataset(*toys.examples(200, 60))
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def start(federation=FEDERATION):
    return federation.init(jax.random.key(0), PUBLIC, PRIVATE)


class Run(NamedTuple):
    """Transfer learning and three rounds."""

    before: Any  # evaluation of the first states
    states: Any
    history: list
    seen: list  # arguments of the callback, and how often networks were traced by then


def run(federation):
    key, seen = jax.random.key(0), []
    states = start(federation)
    before = federation.evaluate(states, TEST)
    states, _ = federation.transfer_learn(states, PUBLIC, PRIVATE, key)
    settings = {"num_rounds": 3, "test": TEST, "callback": lambda metrics, _: seen.append((metrics, len(TRACES)))}
    return Run(before, *fmd.run_federation(federation, states, PUBLIC, PRIVATE, key, **settings), seen)


@pytest.fixture(scope="module")
def whole():
    return run(FEDERATION)


def test_the_history_has_one_point_more_than_there_are_rounds(whole):
    history = whole.history
    assert [metrics for metrics, _ in whole.seen] == history
    assert [metrics.round for metrics in history] == [0, 1, 2, 3]
    assert [client.client_id for client in history[0].clients] == [0, 1, 2, 3, 4]
    assert all(client.digest_loss is None and client.revisit_loss is None for client in history[0].clients)
    assert all(client.digest_loss > 0 and client.revisit_loss > 0 for client in history[1].clients)
    accuracy = FEDERATION.evaluate(whole.states, TEST)["mlp"].accuracy
    assert [client.accuracy for client in history[-1].clients[3:]] == accuracy.tolist()


def test_it_learns(whole):
    after = FEDERATION.evaluate(whole.states, TEST)
    for name in GROUPS:
        assert after[name].accuracy.mean() > whole.before[name].accuracy.mean() + 0.2


def test_every_phase_is_traced_once(whole):
    """Rounds after the first trace no network."""
    counts = [count for _, count in whole.seen]
    assert counts[0] > 0
    assert counts[1:] == [counts[1]] * 3


def test_another_federation_with_the_same_seed_gives_the_same_bits(whole):
    again = run(toys.federation(GROUPS))
    chex.assert_trees_all_equal(again.states, whole.states)
    assert again.history == whole.history


def test_transfer_learning_is_that_of_every_client(key):
    """A client alone trains as in the federation, with the federation's key and its own id."""
    states, info = FEDERATION.transfer_learn(start(), PUBLIC, PRIVATE, key)
    halves = {f"{half}_training": getattr(FEDERATION, f"{half}_training") for half in ("public", "private")}
    train = {name: jax.jit(partial(fmd.transfer_learn, g.architecture, **halves)) for name, g in GROUPS.items()}
    for name, client_id, one, mine, *expected in toys.clients(GROUPS, start(), PRIVATE, states, *info):
        state, own_info = train[name](one, PUBLIC, mine, key, client_id=client_id)
        chex.assert_trees_all_close((state, *own_info), tuple(expected), **TOLERANCE)


def test_all_clients_train_on_the_pooled_data_from_their_state(key):
    states = start()
    after, infos = FEDERATION.train_pooled(states, fmd.labelled_dataset(*toys.examples(300, 33)), key)
    assert all((info.loss[:, -1] < info.loss[:, 0]).all() for info in infos.values())
    chex.assert_trees_all_equal_shapes(after, states)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(states))  # private training still needs them


ANEW = """
import hashlib, jax, toys
import fedmd_jax as fmd
normed, mlp = toys.normed(noise=0.1), toys.tanh_mlp()
groups = {"normed": fmd.ArchitectureGroup(normed, (4, 1)), "mlp": fmd.ArchitectureGroup(mlp, (2,))}
federation, key = toys.federation(groups), jax.random.key(5)
public, private = toys.public(), toys.private(groups)
states = federation.init(key, public, private)
for _ in range(2):
    states, _ = federation.round(states, public, private, key)
leaves = jax.device_get(jax.tree.leaves(states))
print(hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest())
"""


def test_new_processes_end_with_the_same_bits():
    """Neither the order of a dictionary nor a salted hash affects the results."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # each process compiles its own programs
    command = [sys.executable, "-c", ANEW]
    processes = [
        subprocess.Popen(command, env={**environment, "PYTHONHASHSEED": salt}, stdout=subprocess.PIPE)
        for salt in ("1", "2")
    ]
    first, second = (process.communicate()[0] for process in processes)
    assert len(first.strip()) == 64
    assert first == second


@pytest.fixture(scope="module")
def on_devices():
    """A group of five on four devices, one of two, and one of one with noise and batch statistics."""
    groups = {
        "linear": fmd.ArchitectureGroup(toys.linear(), (10, 11, 12, 13, 14), (1, 2, 0, 1, 1)),
        "mlp": fmd.ArchitectureGroup(toys.tanh_mlp(), (5, 3)),
        "normed": fmd.ArchitectureGroup(toys.normed(noise=0.1), (20,)),
    }
    costs = fmd.mapping.client_costs(groups, PUBLIC.inputs[:2])
    return toys.federation(groups, mesh=fmd.client_mesh(4), costs=costs), toys.federation(groups)


def every_phase(federation):
    """The states after initialization, transfer learning and two rounds; losses, evaluations and history."""
    key, private = jax.random.key(1), toys.private(federation.groups)
    states = federation.init(jax.random.key(0), PUBLIC, private)
    trees = {"fresh": fmd.gather_clients(jax.tree.map(jnp.copy, states))}
    states, info = federation.transfer_learn(states, PUBLIC, private, key)
    states, history = fmd.run_federation(federation, states, PUBLIC, private, key, num_rounds=2, test=TEST)
    trees |= {"public": info.public, "private": info.private, "states": states}
    trees["own"] = federation.evaluate(states, private)
    return jax.device_get({name: fmd.gather_clients(tree) for name, tree in trees.items()}), history


def test_many_devices_do_what_one_does(on_devices):
    (actual, history), (expected, expected_history) = map(every_phase, on_devices)
    for name, tree in expected.items():
        chex.assert_trees_all_close(actual[name], tree, rtol=1e-4, atol=1e-5, custom_message=name)
    for metrics, expected_metrics in zip(history, expected_history, strict=True):
        for client, other in zip(metrics.clients, expected_metrics.clients, strict=True):
            assert (*client[:2], client.status) == (*other[:2], other.status)
            np.testing.assert_allclose(client.accuracy, other.accuracy, atol=1.5 / 60)  # one example, at most
            if metrics.round > 0:
                losses = [(each.digest_loss, each.revisit_loss) for each in (client, other)]
                np.testing.assert_allclose(*losses, rtol=1e-4)


def test_states_are_donated_and_stay_on_their_devices(on_devices):
    """The consensus is the only array that crosses devices, and no program is compiled again."""
    federation, _ = on_devices
    key, private = jax.random.key(1), toys.private(federation.groups)
    states, private = federation.init(jax.random.key(0), PUBLIC, private), federation.shard(private)
    leaves = jax.tree.leaves(states)
    after, _ = federation.round(states, PUBLIC, private, key)
    assert all(leaf.is_deleted() for leaf in leaves)
    for before, leaf in zip(leaves, jax.tree.leaves(after), strict=True):
        assert before.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    program = federation.programs["round"].lower(after, PUBLIC, private, key).compile()
    assert toys.collectives(program.as_text()) == {"all-reduce": 1}


def test_states_move_from_one_mesh_to_another(on_devices):
    """A checkpoint does not depend on devices: gathered from four devices, it is restored on one."""
    many, one = on_devices
    key, private = jax.random.key(1), toys.private(one.groups)
    states = one.init(key, PUBLIC, private)
    kept = jax.device_get(fmd.gather_clients(many.shard(jax.tree.map(jnp.copy, states))))
    chex.assert_trees_all_equal(kept, jax.device_get(states))
    for phase, data in (("train_pooled", fmd.labelled_dataset(*toys.examples(300, 33))), ("revisit", private)):
        actual, _ = getattr(many, phase)(many.shard(kept), many.put(data), key)
        expected, _ = getattr(one, phase)(jax.tree.map(jnp.copy, states), data, key)
        chex.assert_trees_all_close(fmd.gather_clients(actual), dict(expected), **TOLERANCE)


def test_a_test_set_per_client():
    states = start()
    evaluate = {name: jax.jit(partial(fmd.evaluate, group.architecture)) for name, group in GROUPS.items()}
    found = FEDERATION.evaluate(states, PRIVATE)
    for name, _, one, mine, own in toys.clients(GROUPS, states, PRIVATE, found):
        n = int(mine.num_examples)
        alone = evaluate[name](one, fmd.labelled_dataset(mine.inputs[:n], mine.labels[:n]))
        np.testing.assert_allclose(own.accuracy, alone.accuracy)
        np.testing.assert_allclose(own.loss, alone.loss, rtol=1e-5)


def scalar_network():
    return toys.linear()._replace(apply=lambda params, state, x, *, train, mask=None, key=None: (x[:, 0], state))


def wider_network():
    def apply(params, state, x, *, train, mask=None, key=None):
        return jnp.concatenate([x, x], axis=1), state

    return toys.linear()._replace(apply=apply)


def with_part(name, **parts):
    """The private data, with other arrays in one group."""
    return {**PRIVATE, name: PRIVATE[name]._replace(**parts)}


def test_inputs_that_cannot_be_augmented_are_refused_before_anything_runs(key):
    federation = toys.federation(GROUPS, draw_subset=fmd.algorithms.draw_augmented_subset)
    with pytest.raises(ValueError, match="images that are warped must be of rank 4"):
        federation.init(key, PUBLIC, PRIVATE)


def test_bad_data_is_refused_before_anything_runs(key):
    labels, linear, mlp = PUBLIC.labels, PRIVATE["linear"], PRIVATE["mlp"]
    wide = fmd.public_dataset(np.zeros((30, 9), np.float32), np.zeros(30, int))
    nan = mlp.inputs.at[0, 0].set(jnp.nan)
    cases = {
        "at most the public dataset, 5 examples, got 12": (toys.public(5), PRIVATE),
        r"public dataset: labels must be below .* 4, got 9": (PUBLIC._replace(labels=labels + 6), PRIVATE),
        r"public dataset.*must not be negative": (PUBLIC._replace(labels=labels - 6), PRIVATE),
        r"public dataset.*23 inputs, 5 labels": (PUBLIC._replace(labels=labels[:5]), PRIVATE),
        r"group 'mlp': labels must be below .* 4, got 10": (PUBLIC, with_part("mlp", labels=mlp.labels + 7)),
        r"group 'mlp': num_examples must be between 0 and 11, got \[0, 99\]": (
            PUBLIC,
            with_part("mlp", num_examples=jnp.array([0, 99])),
        ),
        r"group 'mlp': inputs must be finite": (PUBLIC, with_part("mlp", inputs=nan)),
        r"group 'linear': .* do not go with labels": (PUBLIC, with_part("linear", labels=linear.labels[:, :3])),
        r"group 'linear': 3 clients, but data of 2": (
            PUBLIC,
            {**PRIVATE, "linear": jax.tree.map(lambda leaf: leaf[:2], linear)},
        ),
        r"private data is needed for the groups \['linear', 'mlp'\], got \['linear'\]": (PUBLIC, {"linear": linear}),
        r"group 'linear': inputs must have shape \(..., N, 9,\), got \(3, 9, 5\)": (wide, PRIVATE),
    }
    for message, data in cases.items():
        for call in (FEDERATION.check, partial(FEDERATION.init, key)):
            with pytest.raises(ValueError, match=message):
                call(*data)
    for test in (TEST._replace(labels=TEST.labels + 5), with_part("mlp", labels=mlp.labels + 5)):
        with pytest.raises(ValueError, match=r"labelled dataset 1, \w+: labels must be below"):
            fmd.run_federation(FEDERATION, None, PUBLIC, PRIVATE, key, num_rounds=1, test=test)
    with pytest.raises(ValueError, match=r"labelled dataset 1: one PrivateDataset, or .* got \['linear'\]"):
        FEDERATION.check(PUBLIC, PRIVATE, {"linear": linear})


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (scalar_network, ValueError, r"group 'odd': the network must give logits \[B, C\] alone.* of shape \(2,\)"),
        (wider_network, ValueError, r"same number of outputs, got {'linear': 4, 'odd': 10}"),
        (
            lambda: fmd.architecture_from_nnx(lambda rngs: nnx.Linear(3, 4, rngs=rngs)),
            TypeError,
            r"group 'odd': raised by the network for inputs float32 of shape \(2, 5\)",
        ),
    ],
)
def test_networks_that_do_not_fit_are_refused(network, error, message):
    groups = {"linear": GROUPS["linear"], "odd": fmd.ArchitectureGroup(network(), (7,))}
    with pytest.raises(error, match=message):
        toys.federation(groups).check(PUBLIC, toys.private(groups))


@pytest.mark.parametrize("optimizer", [fmd.adam(), optax.adagrad(0.1)])
def test_optimizers_that_cannot_share_a_memory_are_refused(optimizer):
    """Adagrad's memory has the leaves of SGD's with momentum, under another name."""
    federation = toys.federation(GROUPS, revisit_training=fmd.TrainingConfig(optimizer=optimizer))
    with pytest.raises(ValueError, match="share one optimizer memory"):
        federation.check(PUBLIC, PRIVATE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fmd.fedmd({}), "at least one architecture group"),
        (lambda: fmd.fedmd(GROUPS, subset_size=0), "subset_size must be an integer of at least 1, got 0"),
        (
            lambda: fmd.fedmd(GROUPS, mesh=fmd.client_mesh(2), costs={"linear": 1.0}),
            "group 'mlp': the cost of a client must be finite and not negative, got None",
        ),
        (
            lambda: fmd.vmap_federation(toys.federation(GROUPS, mesh=fmd.client_mesh(2))),
            "federations are vmapped on one device, got one on a mesh of 2",
        ),
        (
            lambda: fmd.run_federation(None, None, None, None, None, num_rounds=-1, test=None),
            "num_rounds must be an integer of at least 0, got -1",
        ),
        (
            lambda: fmd.run_local_only(None, None, None, None, num_rounds=-1, test=None),
            "num_rounds must be an integer of at least 0, got -1",
        ),
        (lambda: fmd.public_dataset(np.zeros((0, 3))), "at least one example"),
        (lambda: fmd.labelled_dataset(np.zeros((3, 3)), [0, 1]), "3 inputs, 2 labels"),
    ],
)
def test_invalid_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rounds_without_a_consensus_are_those_of_local_only(key):
    """There are no digests, which the history reports, also for clients that miss rounds."""
    federation = toys.federation(toys.groups(linear=(0, 0, 0), mlp=(0, 0)))
    rounds = {"num_rounds": 3, "participation": fmd.simulate_participation(key, availability=0.8, completion=0.7)}
    alone, _ = fmd.run_local_only(federation, start(federation), PRIVATE, key, **rounds, test=TEST)
    states, history = fmd.run_federation(federation, start(federation), PUBLIC, PRIVATE, key, **rounds, test=TEST)
    clients = [client for metrics in history for client in metrics.clients]
    assert len({client.status for client in clients}) == 3
    assert not any(metrics.digested for metrics in history[1:])
    assert all(client.digest_loss is None for client in clients)
    assert any(client.revisit_loss is not None and client.revisit_loss > 0 for client in clients)
    chex.assert_trees_all_close(alone, states, rtol=1e-6, atol=1e-7)


def test_local_only_has_no_digests(key):
    alone, _ = fmd.run_local_only(FEDERATION, start(), PRIVATE, key, num_rounds=2, test=TEST)
    train = {
        name: jax.jit(partial(fmd.revisit, group.architecture, training=toys.sgd(3, 2)))
        for name, group in GROUPS.items()
    }
    for name, client_id, one, mine, found in toys.clients(GROUPS, start(), PRIVATE, alone):
        for round_ in (1, 2):
            key_revisit = round_keys(jax.random.fold_in(key, round_)).revisit
            one, _ = train[name](one, mine, jax.random.fold_in(key_revisit, client_id))
        chex.assert_trees_all_close(found, one, **TOLERANCE)


def test_no_rounds_of_local_only_change_nothing(key):
    states = start()
    assert fmd.run_local_only(FEDERATION, states, PRIVATE, key, num_rounds=0, test=TEST)[0] is states


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def test_several_federations_at_once_do_what_each_does(key):
    """Seeds, public data and private data all differ; in the round not all clients take part."""
    at_once, keys = fmd.vmap_federation(FEDERATION), jax.random.split(key, 2)
    public = [fmd.public_dataset(*toys.examples(seed, 23)) for seed in (1, 2)]
    private = [fmd.stack_private(GROUPS, {i: toys.examples(10 * seed + i, 7 + i) for i in range(5)}) for seed in (1, 2)]
    pooled = [fmd.labelled_dataset(*toys.examples(seed, 31)) for seed in (3, 4)]
    policies = [fmd.simulate_participation(key, availability=0.5) for key in keys]
    participation = [fmd.algorithms.all_clients(GROUPS, policy(1, group_client_ids(GROUPS))) for policy in policies]

    def everything(federation, key, public, private, pooled, participation, inputs):
        states = federation.new_states(key, inputs)
        states, public_info = federation.pretrain(states, public, key)
        states, private_info = federation.train_private(states, private, key)
        bound, pooled_info = federation.train_pooled(states, pooled, key)
        states, info = federation.round(states, public, private, key, participants=participation)
        evaluations = [federation.evaluate(states, pooled) for states in (states, bound)]
        states, more = federation.revisit(states, private, key)
        infos = [public_info, private_info, pooled_info, more, info._replace(client_ids=None)]
        return states, bound, infos, evaluations

    per_seed = (keys, public, private, pooled, participation, [each.inputs[:1] for each in public])
    alone = [everything(FEDERATION, *each) for each in zip(*per_seed, strict=True)]
    together = everything(at_once, *(stacked(part) for part in per_seed))
    chex.assert_trees_all_close(stacked(alone), together, rtol=1e-5, atol=1e-6)
    # The place of a seed in the batch does not affect its bits.
    turned = everything(at_once, *(stacked(part[::-1]) for part in per_seed))
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[::-1], turned), together)


def test_states_that_were_donated_are_refused_in_one_clear_line(key):
    """As by running a notebook cell twice."""
    states = start()
    leaves = jax.tree.leaves(states)
    FEDERATION.round(states, PUBLIC, PRIVATE, key)
    assert all(leaf.is_deleted() for leaf in leaves)
    rounds = {"num_rounds": 1}
    for again in (
        lambda: FEDERATION.transfer_learn(states, PUBLIC, PRIVATE, key),
        lambda: FEDERATION.round(states, PUBLIC, PRIVATE, key),
        lambda: FEDERATION.revisit(states, PRIVATE, key),
        lambda: FEDERATION.evaluate(states, TEST),
        lambda: fmd.run_local_only(FEDERATION, states, PRIVATE, key, **rounds, test=TEST),
        lambda: fmd.run_federation(FEDERATION, states, PUBLIC, PRIVATE, key, **rounds, test=TEST),
    ):
        with pytest.raises(ValueError, match=r"these states were donated to an earlier call .*: use what it returned"):
            again()
    with pytest.raises(ValueError, match="the states of each group are needed, in a mapping, got a tuple"):
        FEDERATION.evaluate((states, None), TEST)


def test_reverted_transfer_learning_is_in_what_it_returns_and_in_the_history(key):
    """No finite training fits the private examples of client 1: its inputs overflow."""
    broken = with_part("linear", inputs=PRIVATE["linear"].inputs.at[1].set(3e38))
    with pytest.warns(UserWarning, match=r"private training not finite for clients \[1\]"):
        states, info = FEDERATION.transfer_learn(start(), PUBLIC, broken, key)
    assert info.private["linear"].finite.tolist() == [True, False, True]
    assert all(each.finite.all() for each in (*info.public.values(), info.private["mlp"]))
    assert info.public["linear"].loss.shape == (3, 2)
    assert info.private["mlp"].num_epochs.tolist() == [2, 2]
    after, before = (toys.by_client(GROUPS, tree)[1].revisit_opt_state for tree in (states, start()))
    chex.assert_trees_all_equal(after, before)
    rounds = {"num_rounds": 1, "test": TEST, "transfer": info}
    states, history = fmd.run_federation(FEDERATION, states, PUBLIC, PRIVATE, key, **rounds)
    assert [client.status for client in history[0].clients] == ["ok", "private training not finite", "ok", "ok", "ok"]
    assert {client.status for client in history[1].clients} == {"ok"}


def test_a_federation_is_shown_in_one_line():
    assert repr(FEDERATION) == "Federation(clients={'linear': 3, 'mlp': 2})"
    on_mesh = toys.federation(GROUPS, mesh=fmd.client_mesh(2))
    assert repr(on_mesh) == "Federation(clients={'linear': 3, 'mlp': 2}, devices=2)"


@pytest.fixture(scope="module")
def trained():
    """Clients after transfer learning, on the host."""
    return jax.device_get(FEDERATION.transfer_learn(start(), PUBLIC, PRIVATE, jax.random.key(0))[0])


def one_round(trained, *, factor, federation=FEDERATION, program="round"):
    states, public, private = federation.shard(jax.tree.map(jnp.array, trained)), PUBLIC, PRIVATE
    private = federation.put(private)
    data = (public, private) if program == "round" else (private,)
    call = getattr(federation, program)
    return jax.device_get(fmd.mapping.gather_clients(call(states, *data, jax.random.key(3), None, factor)[0]))


def with_rate(rate):
    training = {"num_epochs": 1, "batch_size": 8, "optimizer": fmd.adam(rate)}
    how = {name: fmd.TrainingConfig(**training) for name in ("digest_training", "revisit_training")}
    return fmd.fedmd(GROUPS, subset_size=20, **how)


@pytest.mark.parametrize("program", ["round", "revisit"])
def test_a_factor_of_the_learning_rate_is_another_learning_rate(program):
    fast, slow = map(with_rate, (0.01, 0.005))
    fresh = jax.device_get(start(fast))
    half = one_round(fresh, factor=0.5, federation=fast, program=program)
    chex.assert_trees_all_close(half, one_round(fresh, factor=None, federation=slow, program=program), **TOLERANCE)
    nothing = one_round(fresh, factor=0.0, federation=fast, program=program)
    for name in GROUPS:
        chex.assert_trees_all_equal(nothing[name].params, fresh[name].params)
        assert (nothing[name].revisit_opt_state.count > 0).all()


def test_bad_factors_are_refused(trained):
    with pytest.raises(ValueError, match=r"one number, got shape \(2,\)"):
        one_round(trained, factor=[1.0, 0.5])
    with pytest.raises(ValueError, match="rounds 1 to 2, got round 3"):
        fmd.simulation.cosine_decay(2)(3)


def test_a_factor_on_many_devices(trained):
    on_mesh = toys.federation(GROUPS, mesh=fmd.client_mesh(2))
    wanted = one_round(trained, factor=0.25)
    chex.assert_trees_all_close(one_round(trained, factor=0.25, federation=on_mesh), wanted, **TOLERANCE)


def test_learning_rates_decay_over_the_rounds_and_in_local_only(trained):
    factors, key = fmd.simulation.cosine_decay(2), jax.random.key(7)
    how = {"num_rounds": 2, "test": TEST, "learning_rate_schedule": factors}
    found, _ = fmd.run_federation(FEDERATION, jax.tree.map(jnp.array, trained), PUBLIC, PRIVATE, key, **how)
    local, _ = fmd.run_local_only(FEDERATION, jax.tree.map(jnp.array, trained), PRIVATE, key, **how)
    states, alone = (jax.tree.map(jnp.array, trained) for _ in range(2))
    for round_, factor in ((1, 1.0), (2, 0.5)):
        key_round = jax.random.fold_in(key, round_)
        states, _ = FEDERATION.round(states, PUBLIC, PRIVATE, key_round, learning_rate_factor=factor)
        alone, _ = FEDERATION.revisit(alone, PRIVATE, key_round, learning_rate_factor=factor)
    chex.assert_trees_all_equal((found, local), (states, alone))


def test_a_round_of_ones_own_takes_the_place_of_fedmds(key):
    """As the documentation says. This one counts its calls."""
    calls = []

    def my_round(states, public, private, key, *, participants=None):
        states, info = FEDERATION.round(states, public, private, key, participants)
        calls.append(public.inputs.shape)
        return states, info

    mine = dataclasses.replace(FEDERATION, programs={**FEDERATION.programs, "round": my_round})
    states, history = fmd.run_federation(mine, start(), PUBLIC, PRIVATE, key, num_rounds=2, test=TEST)
    expected, same = fmd.run_federation(FEDERATION, start(), PUBLIC, PRIVATE, key, num_rounds=2, test=TEST)
    assert (len(calls), history) == (2, same)
    chex.assert_trees_all_equal(states, expected)
