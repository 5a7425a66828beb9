"""FedAvg within groups, and what FedProx and FedDF share with it."""

import chex
import faults
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import toys

import fedmd_jax as fmd

A = fmd.algorithms
WEIGHTS = {"linear": (1.0, 2.0, 0.5), "mlp": (1.0, 1.5)}
PUBLIC, KEY = toys.public(), jax.random.key(3)
PROXIMAL, TEMPERATURE = 0.5, 2.0
MEMBERS = {
    "fedavg": A.fedavg(),
    "fedprox": A.fedprox(proximal=PROXIMAL),
    "feddf": A.feddf(temperature=TEMPERATURE),
}


def half():
    """A linear network whose parameters are bfloat16."""
    whole = toys.linear()

    def init(key, inputs):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), whole.init(key, inputs))

    return whole._replace(init=init)


def start(federation, **private):
    private = toys.private(federation.groups, **private)
    states = federation.init(jax.random.key(0), PUBLIC, private)
    return federation.start(states, PUBLIC, jax.random.key(1)), federation.shard(private)


def run(federation, num_rounds=1, *, participation=None):
    states, private = start(federation)
    participants = None if participation is None else A.all_clients(federation.groups, participation)
    for round_ in range(num_rounds):
        states, info = federation.round(states, PUBLIC, private, jax.random.fold_in(KEY, round_), participants)
    return states, info


def revisit(client, params, proximal):
    """The private training of one client in NumPy, from the parameters of its group."""
    client.params = {name: value.copy() for name, value in params.items()}
    for _ in range(2):
        for first in range(0, len(client.x), 3):
            x, y = client.x[first : first + 3], client.y[first : first + 3]
            _, score_gradient = oracle.cross_entropy(oracle.scores(client.params, x), y)
            gradients = oracle.gradients(client.params, x, score_gradient)
            for name, gradient in gradients.items():
                gradient = gradient + proximal * (client.params[name] - params[name])
                client.revisit_velocity[name] = gradient + oracle.MOMENTUM * client.revisit_velocity[name]
                client.params[name] = client.params[name] - oracle.LEARNING_RATE * client.revisit_velocity[name]


def kl(logits, targets):
    student, teacher = (oracle.softmax(each / TEMPERATURE) for each in (logits, targets))
    value = TEMPERATURE**2 * (teacher * (np.log(teacher) - np.log(student))).sum(axis=1)
    return value, TEMPERATURE * (student - teacher)


def mean(weights, values):
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("name", MEMBERS)
def test_rounds_against_numpy_loops(name):
    """Weights, partial last batches, momentum of the first round, and clients that come back or stay away."""
    groups = toys.groups(**WEIGHTS)
    settings = {"shuffle": False, "draw_subset": A.first_examples, "algorithm": MEMBERS[name]}
    federation = toys.federation(groups, **settings)
    (states, private), subset = start(federation), np.asarray(PUBLIC.inputs[:12], np.float64)
    clients, networks = {}, {}
    weights = A.all_clients(groups).weights
    for group, client_id, state, weight in toys.clients(groups, states.clients, weights):
        clients[client_id] = oracle.Client(state.params, *toys.examples(client_id, 7 + client_id), float(weight))
        networks[group] = clients[client_id].params
    for round_, absent in enumerate([{1}, {0, 4}, {3, 4}]):  # in the last round one group is not there at all
        participation = faults.participation(groups, dropped=absent - {4}, stragglers=absent & {4})
        participants = A.all_clients(groups, participation)
        states, info = federation.round(states, PUBLIC, private, jax.random.fold_in(KEY, round_), participants)
        completed = {group: [i for i in groups[group].client_ids if i not in absent] for group in groups}
        teachers = [clients[i] for ids in completed.values() for i in ids]
        for group, ids in completed.items():
            for i in ids:
                revisit(clients[i], networks[group], PROXIMAL if name == "fedprox" else 0.0)
        weights = [client.weight for client in teachers]
        consensus = mean(weights, [oracle.scores(client.params, subset) for client in teachers])
        for group, ids in completed.items():
            if ids:
                of_group = [clients[i] for i in ids]
                networks[group] = {
                    leaf: mean([client.weight for client in of_group], [client.params[leaf] for client in of_group])
                    for leaf in networks[group]
                }
                losses = np.zeros(0)  # nothing is digested
                if name == "feddf":
                    fresh, how = oracle.zeros_like(networks[group]), {"num_epochs": 2, "batch_size": 5}
                    losses = oracle.train(networks[group], fresh, subset, consensus, kl, **how)
                for loss in info.digest_loss[group]:
                    np.testing.assert_allclose(loss, losses, rtol=1e-4, atol=1e-6)
            for i in ids:
                clients[i].params = networks[group]
    for _, client_id, state in toys.clients(groups, states.clients):
        for leaf, value in clients[client_id].params.items():
            np.testing.assert_allclose(state.params[leaf], value, rtol=1e-4, atol=1e-5)
    for group, network in networks.items():
        for leaf, value in network.items():
            np.testing.assert_allclose(states.memory[group].params[leaf], value, rtol=1e-4, atol=1e-5)


def test_groups_of_one_client_are_local_only_to_the_bit():
    """Also if the weight is no power of two, with integers in the batch statistics, and for half precision."""
    groups = {
        "normed": fmd.ArchitectureGroup(toys.normed(), (3,), (7.0,)),
        "mlp": fmd.ArchitectureGroup(toys.tanh_mlp(), (4,), (0.3,)),
        "half": fmd.ArchitectureGroup(half(), (5,), (1e30,)),
    }
    federation = toys.federation(groups, algorithm=A.fedavg())
    private, how = toys.private(groups), {"num_rounds": 2, "test": fmd.labelled_dataset(*toys.examples(50, 8))}
    states = federation.init(jax.random.key(0), PUBLIC, private)
    alone, local = fmd.run_local_only(federation, jax.tree.map(jnp.copy, states), private, KEY, **how)
    together, history = fmd.run_federation(federation, states, PUBLIC, private, KEY, **how)
    chex.assert_trees_all_equal(together.clients, alone)
    assert [metrics.mean_accuracy for metrics in history] == [metrics.mean_accuracy for metrics in local]


@pytest.mark.parametrize("num_devices", [3])
def test_batch_statistics_are_averaged_and_integers_are_not(num_devices):
    """With chunks that are not full; on three devices clients of one group are stacked, the other's placed singly."""
    groups = {
        "normed": fmd.ArchitectureGroup(toys.normed(), (0, 1, 2, 3), (1.0, 2.0, 0.5, 1e-3)),
        "half": fmd.ArchitectureGroup(half(), (4, 5), (1e-30, 3e-30)),  # weights count within the group
    }
    mesh = None if num_devices is None else fmd.client_mesh(num_devices)
    federation = toys.federation(groups, algorithm=A.fedavg(), clients_per_chunk=3, mesh=mesh)
    states, private = start(federation)
    copies = federation.shard(jax.tree.map(jnp.copy, fmd.gather_clients(states.clients)))
    alone, _ = federation.revisit(copies, private, KEY)
    states, _ = federation.round(states, PUBLIC, private, KEY)
    for name, group in groups.items():
        averaged = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), alone[name][:2])
        expected = jax.tree.map(lambda leaf, group=group: mean(group.weights, list(leaf)), averaged)
        network = states.memory[name]
        if name == "normed":
            expected[1]["num_batches"] = 0.0
        chex.assert_trees_all_close(tuple(network[:2]), expected, rtol=1e-6, atol=1e-7)
        for k in range(group.num_clients):
            client, own = (jax.tree.map(lambda leaf, k=k: leaf[k], each[name]) for each in (states.clients, alone))
            in_own_dtype = jax.tree.map(lambda leaf, of: leaf.astype(of.dtype), network.params, client.params)
            chex.assert_trees_all_equal(client.params, in_own_dtype)
            chex.assert_trees_all_close(client[2:], own[2:], rtol=1e-6)
            if name == "normed":
                assert int(client.model_state["num_batches"]) == int(own.model_state["num_batches"]) > 0
                chex.assert_trees_all_equal(client.model_state["mean"], network.model_state["mean"])


def test_one_step_of_full_batches_is_the_pooled_step():
    """Of a linear network, with the numbers of examples as weights."""
    sizes, step = (4, 6, 9), fmd.TrainingConfig(batch_size=19, optimizer=optax.sgd(0.1))
    groups = {"linear": fmd.ArchitectureGroup(toys.linear(), (0, 1, 2), sizes)}
    settings = {"revisit_training": step, "private_training": step, "pooled_training": step}
    federation = toys.federation(groups, algorithm=A.fedavg(), **settings)
    states, private = start(federation, num_examples=sizes.__getitem__)
    inputs, labels = zip(*(toys.examples(i, sizes[i]) for i in range(3)), strict=True)
    pooled = fmd.labelled_dataset(np.concatenate(inputs), np.concatenate(labels))
    expected, _ = federation.train_pooled(states.clients, pooled, KEY)
    states, _ = federation.round(states, PUBLIC, private, KEY)
    chex.assert_trees_all_close(states.clients["linear"].params, expected["linear"].params, rtol=1e-5, atol=1e-6)


def test_clients_of_a_group_are_equal_until_they_see_private_data():
    federation = toys.federation(toys.groups(), algorithm=A.fedavg())
    private = toys.private(federation.groups)
    states = federation.init(jax.random.key(0), PUBLIC, private)
    pretrained, _ = federation.pretrain(jax.tree.map(jnp.copy, states), PUBLIC, jax.random.key(1))
    for leaf in jax.tree.leaves((states, pretrained)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    assert not np.array_equal(states["linear"].params["w"], pretrained["linear"].params["w"])


def test_optimizers_of_equal_clients_draw_their_own_noise():
    noisy = fmd.TrainingConfig(optimizer=optax.chain(optax.add_noise(1e-3, 0.5, 7), optax.sgd(0.1)))
    federation = toys.federation(toys.groups(), algorithm=A.fedavg(), digest_training=noisy, revisit_training=noisy)
    states = federation.new_states(jax.random.key(0), PUBLIC.inputs[:1])
    for state in states.values():
        np.testing.assert_array_equal(*(jax.tree.leaves(state.params)[0][k] for k in (0, 1)))
        for noise in (state.digest_opt_state[0], state.revisit_opt_state[0]):
            assert len(np.unique(noise.rng_key, axis=0)) == len(noise.rng_key)


def test_groups_with_one_architecture_train_apart():
    """Each as if it were alone, also on more devices than a group has clients."""
    linear = toys.linear()
    groups = {name: fmd.ArchitectureGroup(linear, ids) for name, ids in {"a": (0, 1), "b": (2, 3)}.items()}
    both, _ = run(toys.federation(groups, algorithm=A.fedavg(), mesh=fmd.client_mesh(3)))
    for name, group in groups.items():
        alone, _ = run(toys.federation({name: group}, algorithm=A.fedavg()))
        chex.assert_trees_all_close(both.clients[name], alone.clients[name], rtol=5e-5, atol=5e-6)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_reverted_client_is_left_out_and_gets_the_network(name):
    groups = {
        "a": fmd.ArchitectureGroup(faults.breakable(), (0, 1, 2)),
        "b": fmd.ArchitectureGroup(toys.linear(), (3,)),
    }
    federation = toys.federation(groups, algorithm=MEMBERS[name])
    states, private = start(federation)
    broken = jax.tree.map(jnp.copy, states)
    broken.clients.update(faults.switched(groups, {"a": broken.clients["a"]}, {1: faults.REVISIT}))
    absent = A.all_clients(groups, faults.participation(groups, dropped={1}))
    everybody = A.all_clients(groups, faults.participation(groups))
    expected, _ = federation.round(states, PUBLIC, private, KEY, absent)
    found, info = federation.round(broken, PUBLIC, private, KEY, everybody)
    chex.assert_trees_all_equal(found.memory, expected.memory)
    assert info.revisit_finite["a"].tolist() == info.scores_finite["a"].tolist() == [True, False, True]
    params = found.clients["a"].params
    chex.assert_trees_all_equal(*(jax.tree.map(lambda leaf, k=k: leaf[k], params) for k in (0, 1)))


@pytest.mark.parametrize("name", ["fedavg", "feddf"])
def test_the_only_collective_is_one_all_reduce(name):
    federation = toys.federation(toys.groups(), algorithm=MEMBERS[name], mesh=fmd.client_mesh(3))
    states, private = start(federation)
    lowered = federation.programs["round"].lower(states, PUBLIC, private, KEY, participants=None)
    assert toys.collectives(lowered.compile().as_text()) == {"all-reduce": 1}
    for round_ in range(2):
        states, _ = federation.round(states, PUBLIC, private, jax.random.fold_in(KEY, round_))
    assert federation.programs["round"]._cache_size() == 1  # the states of `start` are placed as those of a round


@pytest.mark.parametrize("name", MEMBERS)
def test_misuse_is_refused(name):
    groups = toys.groups()
    with pytest.raises(ValueError, match=f"{name} has no use for a network of the server"):
        toys.federation(groups, algorithm=MEMBERS[name], server=toys.linear())
    federation = toys.federation(groups, algorithm=MEMBERS[name], transforms=(lambda scores, key: scores,))
    states, private = start(federation)
    with pytest.raises(ValueError, match="transforms are for scores"):
        federation.round(states, PUBLIC, private, KEY)
    with pytest.raises(ValueError, match=r"call federation\.start before the first round"):
        federation.round(states.clients, PUBLIC, private, KEY)
