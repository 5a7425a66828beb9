import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from flax import nnx

import fedmd_jax as fmd
from fedmd_jax.mapping.groups import group_client_ids

GROUPS = toys.groups()
TEST = fmd.labelled_dataset(*toys.examples(200, 60))


def setup(groups=GROUPS, **settings):
    federation = toys.federation(groups, **settings)
    public, private = toys.public(), toys.private(groups)
    return federation, federation.init(jax.random.key(0), public, private), public, private


def test_the_history_has_one_point_more_than_there_are_rounds(key):
    federation, states, public, private = setup()
    seen = []
    states, _ = federation.transfer_learn(states, public, private, key)
    states, history = fmd.run_federation(
        federation,
        states,
        public,
        private,
        key,
        num_rounds=3,
        test=TEST,
        callback=lambda metrics, _: seen.append(metrics),
    )
    assert seen == history
    assert [metrics.round for metrics in history] == [0, 1, 2, 3]
    assert [client.client_id for client in history[0].clients] == [0, 1, 2, 3, 4]
    assert all(client.digest_loss is None and client.revisit_loss is None for client in history[0].clients)
    assert all(client.digest_loss > 0 and client.revisit_loss > 0 for client in history[1].clients)
    accuracy = federation.evaluate(states, TEST)["mlp"].accuracy
    assert [client.accuracy for client in history[-1].clients[3:]] == accuracy.tolist()


def test_it_learns(key):
    federation, states, public, private = setup()
    before = federation.evaluate(states, TEST)
    states, _ = federation.transfer_learn(states, public, private, key)
    states, _ = fmd.run_federation(federation, states, public, private, key, num_rounds=3, test=TEST)
    after = federation.evaluate(states, TEST)
    for name in GROUPS:
        assert after[name].accuracy.mean() > before[name].accuracy.mean() + 0.2


def test_transfer_learning_is_that_of_every_client(key):
    federation, states, public, private = setup()
    start = jax.tree.map(jnp.copy, states)
    states, _ = federation.transfer_learn(states, public, private, key)
    key_public, key_private = jax.random.split(key)
    for name, group in GROUPS.items():
        for k, client_id in enumerate(group.client_ids):
            one, mine = (jax.tree.map(lambda leaf, k=k: leaf[k], tree[name]) for tree in (start, private))
            one, _ = fmd.pretrain(
                group.architecture, one, public, jax.random.fold_in(key_public, client_id), training=toys.sgd(8, 2)
            )
            one, _ = fmd.revisit(
                group.architecture, one, mine, jax.random.fold_in(key_private, client_id), training=toys.sgd(4, 2)
            )
            chex.assert_trees_all_close(
                jax.tree.map(lambda leaf, k=k: leaf[k], states[name]), one, rtol=2e-5, atol=2e-6
            )


def test_one_client_alone_does_its_transfer_learning_with_the_key_of_the_federation(key):
    federation, states, public, private = setup()
    one, mine = (jax.tree.map(lambda leaf: leaf[1], tree["mlp"]) for tree in (states, private))
    halves = {f"{half}_training": getattr(federation, f"{half}_training") for half in ("public", "private")}
    alone, info = fmd.transfer_learn(GROUPS["mlp"].architecture, one, public, mine, key, **halves, client_id=4)
    states, infos = federation.transfer_learn(states, public, private, key)
    expected = jax.tree.map(lambda leaf: leaf[1], (states["mlp"], infos.public["mlp"], infos.private["mlp"]))
    chex.assert_trees_all_close((alone, *info), expected, rtol=2e-5, atol=2e-6)


def test_all_clients_train_on_the_pooled_data_from_their_state(key):
    federation, states, _, _ = setup()
    pooled = fmd.labelled_dataset(*toys.examples(300, 33))
    after, infos = federation.train_pooled(states, pooled, key)
    assert all((info.loss[:, -1] < info.loss[:, 0]).all() for info in infos.values())
    chex.assert_trees_all_equal_shapes(after, states)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(states))  # still needed for private training


def test_every_phase_is_traced_once(key):
    """Three architectures' worth of programs would otherwise grow with the rounds."""
    traces = []

    def counted(architecture):
        def apply(*args, train, **kwargs):
            traces.append(train)
            return architecture.apply(*args, train=train, **kwargs)

        return architecture._replace(apply=apply)

    groups = {"only": fmd.ArchitectureGroup(counted(toys.linear()), (0, 1))}
    federation, states, public, private = setup(groups)
    states, _ = federation.transfer_learn(states, public, private, key)
    counts = []
    fmd.run_federation(
        federation,
        states,
        public,
        private,
        key,
        num_rounds=4,
        test=TEST,
        callback=lambda metrics, states: counts.append(len(traces)),
    )
    assert counts[1:] == [counts[1]] * 4


def test_states_are_donated(key):
    federation, states, public, private = setup()
    leaves = jax.tree.leaves(states)
    federation.round(states, public, private, key)
    assert all(leaf.is_deleted() for leaf in leaves)


def test_twice_the_same_is_the_same_to_the_bit(key):
    def run():
        federation, states, public, private = setup()
        states, _ = federation.transfer_learn(states, public, private, key)
        return fmd.run_federation(federation, states, public, private, key, num_rounds=2, test=TEST)

    chex.assert_trees_all_equal(run()[0], run()[0])
    assert run()[1] == run()[1]


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


def test_processes_started_anew_end_with_the_same_bits():
    """Nor does the order of a dictionary or a hash that Python salts decide anything."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # each compiles for itself
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ANEW], env={**environment, "PYTHONHASHSEED": salt}, stdout=subprocess.PIPE
        )
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
    costs = fmd.mapping.client_costs(groups, toys.public().inputs[:2])
    return toys.federation(groups, mesh=fmd.client_mesh(4), costs=costs), toys.federation(groups)


def everything(federation):
    """States, metrics and results of every phase."""
    key, public, private = jax.random.key(1), toys.public(), toys.private(federation.groups)
    states = federation.init(jax.random.key(0), public, private)
    fresh = fmd.gather_clients(jax.tree.map(jnp.copy, states))
    states, _ = federation.transfer_learn(states, public, private, key)
    pooled, losses = federation.train_pooled(states, fmd.labelled_dataset(*toys.examples(300, 33)), key)
    alone = fmd.run_local_only(federation, jax.tree.map(jnp.copy, states), private, key, num_rounds=1)
    states, history = fmd.run_federation(federation, states, public, private, key, num_rounds=2, test=TEST)
    own = federation.evaluate(states, private)
    trees = {"fresh": fresh, "pooled": pooled, "losses": losses, "alone": alone, "states": states, "own": own}
    return jax.device_get({name: fmd.gather_clients(tree) for name, tree in trees.items()}), history


def test_many_devices_do_what_one_does(on_devices):
    (actual, history), (expected, expected_history) = map(everything, on_devices)
    for name, tree in expected.items():
        chex.assert_trees_all_close(actual[name], tree, rtol=1e-4, atol=1e-5, custom_message=name)
    for metrics, expected_metrics in zip(history, expected_history, strict=True):
        for client, other in zip(metrics.clients, expected_metrics.clients, strict=True):
            assert (*client[:2], client.status) == (*other[:2], other.status)
            np.testing.assert_allclose(client.accuracy, other.accuracy, atol=1.5 / 60)  # one example, at most
            if metrics.round > 0:
                np.testing.assert_allclose(client[3:5], other[3:5], rtol=1e-4)


def test_on_many_devices_states_are_donated_and_stay_where_they_are(on_devices):
    """No device waits for the arrays of another, and no program is compiled again."""
    federation, _ = on_devices
    key, public, private = jax.random.key(1), toys.public(), toys.private(federation.groups)
    states, private = federation.init(jax.random.key(0), public, private), federation.shard(private)
    leaves = jax.tree.leaves(states)
    after, _ = federation.round(states, public, private, key)
    assert all(leaf.is_deleted() for leaf in leaves)
    for before, leaf in zip(leaves, jax.tree.leaves(after), strict=True):
        assert before.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    program = federation.programs["round"].lower(after, public, private, key).compile()
    assert toys.collectives(program.as_text()) == {"all-reduce": 1}


def test_states_go_from_one_mesh_to_another(on_devices):
    """A checkpoint does not depend on devices: gathered from four, used on one."""
    many, one = on_devices
    key, public, private = jax.random.key(1), toys.public(), toys.private(one.groups)
    start = one.init(key, public, private)
    kept = jax.device_get(fmd.gather_clients(many.shard(jax.tree.map(jnp.copy, start))))
    chex.assert_trees_all_equal(kept, jax.device_get(start))
    states, _ = many.revisit(many.shard(kept), many.shard(private), key)
    expected, _ = one.revisit(start, private, key)
    chex.assert_trees_all_close(fmd.gather_clients(states), dict(expected), rtol=2e-5, atol=2e-6)


def test_costs_of_other_groups_are_refused():
    with pytest.raises(ValueError, match="group 'mlp': the cost of a client must be finite and not negative, got None"):
        fmd.fedmd(GROUPS, mesh=fmd.client_mesh(2), costs={"linear": 1.0})


def test_a_test_set_per_client(key):
    del key
    federation, states, _, private = setup()
    own = federation.evaluate(states, private)
    for name, group in GROUPS.items():
        for k in range(group.num_clients):
            one, mine = (jax.tree.map(lambda leaf, k=k: leaf[k], tree[name]) for tree in (states, private))
            n = int(mine.num_examples)
            alone = fmd.evaluate(group.architecture, one, fmd.labelled_dataset(mine.inputs[:n], mine.labels[:n]))
            np.testing.assert_allclose(own[name].accuracy[k], alone.accuracy)
            np.testing.assert_allclose(own[name].loss[k], alone.loss, rtol=1e-5)


def test_a_round_without_consensus_is_reported(key):
    federation, states, public, private = setup(toys.groups(linear=(0, 0, 0), mlp=(0, 0)))
    _, history = fmd.run_federation(federation, states, public, private, key, num_rounds=1, test=TEST)
    assert not history[1].digested
    assert all(client.digest_loss is None and client.revisit_loss > 0 for client in history[1].clients)


def scalar_network():
    return toys.linear()._replace(apply=lambda params, state, x, *, train, mask=None, key=None: (x[:, 0], state))


def wider_network():
    def apply(params, state, x, *, train, mask=None, key=None):
        return jnp.concatenate([x, x], axis=1), state

    return toys.linear()._replace(apply=apply)


def test_bad_data_is_refused_before_anything_runs(key):
    public, private = toys.public(), toys.private(GROUPS)
    init, check = toys.federation(GROUPS).init, toys.federation(GROUPS).check
    wide = fmd.public_dataset(np.zeros((30, 9), np.float32), np.zeros(30, int))
    linear, mlp = private["linear"], private["mlp"]
    cases = {
        "at most the public dataset, 5 examples, got 12": (toys.public(5), private),
        r"public dataset: labels must be below .* 4, got 9": (public._replace(labels=public.labels + 6), private),
        r"public dataset.*must not be negative": (public._replace(labels=public.labels - 6), private),
        r"public dataset.*23 inputs, 5 labels": (public._replace(labels=public.labels[:5]), private),
        r"group 'mlp': labels must be below .* 4, got 10": (
            public,
            {**private, "mlp": mlp._replace(labels=jnp.full((2, 11), 10))},
        ),
        r"group 'mlp': num_examples must be between 0 and 11, got \[0, 99\]": (
            public,
            {**private, "mlp": mlp._replace(num_examples=jnp.array([0, 99]))},
        ),
        r"group 'mlp': inputs must be finite": (
            public,
            {**private, "mlp": mlp._replace(inputs=mlp.inputs.at[0, 0].set(jnp.nan))},
        ),
        r"group 'linear': .* do not go with labels": (
            public,
            {**private, "linear": linear._replace(labels=linear.labels[:, :3])},
        ),
        r"group 'linear': 3 clients, but data of 2": (
            public,
            {**private, "linear": jax.tree.map(lambda leaf: leaf[:2], linear)},
        ),
        r"private data is needed for the groups \['linear', 'mlp'\], got \['linear'\]": (public, {"linear": linear}),
        r"group 'linear': inputs must have shape \(..., N, 9,\), got \(3, 9, 5\)": (wide, private),
    }
    for message, data in cases.items():
        with pytest.raises(ValueError, match=message):
            init(key, *data)
    for test in (TEST._replace(labels=TEST.labels + 5), {**private, "mlp": mlp._replace(labels=mlp.labels + 5)}):
        with pytest.raises(ValueError, match=r"labelled dataset 1, \w+: labels must be below"):
            check(public, private, test)
        with pytest.raises(ValueError, match=r"labelled dataset 1, \w+: labels must be below"):
            fmd.run_federation(toys.federation(GROUPS), None, public, private, key, num_rounds=1, test=test)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (scalar_network, r"group 'odd': the network must give scores of shape \[2, C\].*got \(2,\)"),
        (wider_network, r"same number of outputs, got {'linear': 4, 'odd': 10}"),
    ],
)
def test_networks_that_do_not_fit_are_refused(key, network, message):
    groups = {"linear": GROUPS["linear"], "odd": fmd.ArchitectureGroup(network(), (7,))}
    with pytest.raises(ValueError, match=message):
        toys.federation(groups).init(key, toys.public(), toys.private(groups))


@pytest.mark.parametrize("optimizer", [fmd.adam(), optax.adagrad(0.1)])
def test_optimizers_that_cannot_share_a_memory_are_refused(key, optimizer):
    """Adagrad's memory has the leaves of SGD's with momentum, under another name."""
    federation = toys.federation(GROUPS, revisit_training=fmd.TrainingConfig(optimizer=optimizer))
    with pytest.raises(ValueError, match="share one optimizer memory"):
        federation.init(key, toys.public(), toys.private(GROUPS))


def test_a_network_for_other_inputs_is_refused(key):
    groups = {
        "narrow": fmd.ArchitectureGroup(fmd.architecture_from_nnx(lambda rngs: nnx.Linear(3, 4, rngs=rngs)), (0,))
    }
    with pytest.raises(TypeError, match=r"group 'narrow': raised by the network for inputs float32 of shape \(2, 5\)"):
        toys.federation(groups).init(key, toys.public(), toys.private(groups))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fmd.fedmd({}), "at least one architecture group"),
        (lambda: fmd.fedmd(GROUPS, subset_size=0), "subset_size must be an integer of at least 1, got 0"),
        (
            lambda: fmd.run_federation(None, None, None, None, None, num_rounds=-1, test=None),
            "num_rounds must be an integer of at least 0, got -1",
        ),
        (lambda: fmd.public_dataset(np.zeros((0, 3))), "at least one example"),
        (lambda: fmd.labelled_dataset(np.zeros((3, 3)), [0, 1]), "3 inputs, 2 labels"),
    ],
)
def test_settings_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_local_only_makes_the_private_steps_of_the_rounds(key):
    """Without a consensus there are no digests, and the rounds equal local-only, also for clients that miss rounds."""
    federation, states, public, private = setup(toys.groups(linear=(0, 0, 0), mlp=(0, 0)))
    rounds = {"num_rounds": 3, "participation": fmd.simulate_participation(key, availability=0.8, completion=0.7)}
    alone = fmd.run_local_only(federation, jax.tree.map(jnp.copy, states), private, key, **rounds)
    states, history = fmd.run_federation(federation, states, public, private, key, **rounds, test=TEST)
    assert len({client.status for metrics in history for client in metrics.clients}) == 3
    chex.assert_trees_all_close(alone, states, rtol=1e-6, atol=1e-7)


def test_local_only_has_no_digests(key):
    federation, states, _, private = setup()
    start = jax.tree.map(jnp.copy, states)
    alone = fmd.run_local_only(federation, states, private, key, num_rounds=2)
    for name, group in GROUPS.items():
        for k, client_id in enumerate(group.client_ids):
            one, mine = (jax.tree.map(lambda leaf, k=k: leaf[k], tree[name]) for tree in (start, private))
            for round_ in (1, 2):
                own_key = jax.random.fold_in(
                    fmd.algorithms.fedmd.round_keys(jax.random.fold_in(key, round_)).revisit, client_id
                )
                one, _ = fmd.revisit(group.architecture, one, mine, own_key, training=toys.sgd(3, 2))
            chex.assert_trees_all_close(jax.tree.map(lambda leaf, k=k: leaf[k], alone[name]), one, rtol=2e-5, atol=2e-6)


def test_no_rounds_of_local_only_change_nothing(key):
    federation, states, _, private = setup()
    assert fmd.run_local_only(federation, states, private, key, num_rounds=0) is states
    with pytest.raises(ValueError, match="num_rounds must be an integer of at least 0, got -1"):
        fmd.run_local_only(federation, states, private, key, num_rounds=-1)


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def test_several_federations_at_once_do_what_each_does(key):
    """Seeds, public data and private data all differ; in the round not all clients take part."""
    federation = toys.federation(GROUPS)
    at_once = fmd.vmap_federation(federation)
    keys = jax.random.split(key, 2)
    public = [fmd.public_dataset(*toys.examples(seed, 23)) for seed in (1, 2)]
    private = [fmd.stack_private(GROUPS, {i: toys.examples(10 * seed + i, 7 + i) for i in range(5)}) for seed in (1, 2)]
    pooled = [fmd.labelled_dataset(*toys.examples(seed, 31)) for seed in (3, 4)]
    policies = [fmd.simulate_participation(key, availability=0.5) for key in keys]
    participation = [fmd.algorithms.all_clients(GROUPS, policy(1, group_client_ids(GROUPS))) for policy in policies]

    def everything(federation, key, public, private, pooled, participation, inputs):
        states, losses = federation.new_states(key, inputs), []
        for program, *data in (("pretrain", public), ("train_private", private)):
            states, loss = getattr(federation, program)(states, *data, key)
            losses.append(loss)
        bound, loss = federation.train_pooled(states, pooled, key)
        states, info = federation.round(states, public, private, key, participants=participation)
        evaluations = [federation.evaluate(states, pooled) for states in (states, bound)]
        states, more = federation.revisit(states, private, key)
        return states, bound, [*losses, loss, more], evaluations, info._replace(client_ids=None)

    per_seed = (keys, public, private, pooled, participation, [each.inputs[:1] for each in public])
    alone = [everything(federation, *each) for each in zip(*per_seed, strict=True)]
    together = everything(at_once, *(stacked(part) for part in per_seed))
    chex.assert_trees_all_close(stacked(alone), together, rtol=1e-5, atol=1e-6)
    # To the bit it does not matter in which place.
    turned = everything(at_once, *(stacked(part[::-1]) for part in per_seed))
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[::-1], turned), together)


def test_federations_on_a_mesh_are_not_batched():
    with pytest.raises(ValueError, match="federations are vmapped on one device, got one on a mesh of 2"):
        fmd.vmap_federation(toys.federation(GROUPS, mesh=fmd.client_mesh(2)))


@pytest.mark.parametrize(
    "again",
    [
        lambda f, states, public, private, key: f.transfer_learn(states, public, private, key),
        lambda f, states, public, private, key: f.round(states, public, private, key),
        lambda f, states, public, private, key: f.revisit(states, private, key),
        lambda f, states, public, private, key: f.evaluate(states, TEST),
        lambda f, states, public, private, key: fmd.run_local_only(f, states, private, key, num_rounds=1),
        lambda f, states, public, private, key: fmd.run_federation(
            f, states, public, private, key, num_rounds=1, test=TEST
        ),
    ],
)
def test_running_a_cell_twice_ends_in_one_clear_line(setup_once, again):
    federation, states, public, private = setup_once
    with pytest.raises(ValueError, match=r"these states were donated to an earlier call .*: use what it returned"):
        again(federation, states, public, private, jax.random.key(1))


@pytest.fixture(scope="module")
def setup_once():
    federation, states, public, private = setup()
    federation.train_private(states, private, jax.random.key(1))
    return federation, states, public, private


def test_states_that_are_none_are_refused(setup_once):
    federation, states, _, _ = setup_once
    with pytest.raises(ValueError, match="the states of each group are needed, in a mapping, got a tuple"):
        federation.evaluate((states, None), TEST)


def test_transfer_learning_that_is_reverted_is_told_by_what_it_returns_and_by_the_history():
    """Private labels of client 1 that no finite training can follow: its inputs overflow."""
    federation, states, public, private = setup()
    broken = jax.tree.map(jnp.copy, private)
    broken["linear"] = broken["linear"]._replace(inputs=broken["linear"].inputs.at[1].set(3e38))
    key = jax.random.key(1)
    before = jax.tree.map(jnp.copy, states)
    with pytest.warns(UserWarning, match=r"private training not finite for clients \[1\]"):
        states, info = federation.transfer_learn(states, public, broken, key)
    assert info.private["linear"].finite.tolist() == [True, False, True]
    assert all(each.finite.all() for each in (*info.public.values(), info.private["mlp"]))
    assert info.public["linear"].loss.shape == (3, 2)
    assert info.private["mlp"].num_epochs.tolist() == [2, 2]
    own_opt_state = jax.tree.map(lambda leaf: leaf[1], (states["linear"], before["linear"]))
    chex.assert_trees_all_equal(own_opt_state[0].revisit_opt_state, own_opt_state[1].revisit_opt_state)
    states, history = fmd.run_federation(
        federation, states, public, private, key, num_rounds=1, test=TEST, transfer=info
    )
    assert [client.status for client in history[0].clients] == ["ok", "private training not finite", "ok", "ok", "ok"]
    assert {client.status for client in history[1].clients} == {"ok"}


def test_a_federation_is_shown_in_one_line():
    assert repr(toys.federation(GROUPS)) == "Federation(clients={'linear': 3, 'mlp': 2})"
    on_mesh = toys.federation(GROUPS, mesh=fmd.client_mesh(2))
    assert repr(on_mesh) == "Federation(clients={'linear': 3, 'mlp': 2}, devices=2)"
