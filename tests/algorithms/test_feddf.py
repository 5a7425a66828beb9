"""The server of FedDF; its rounds against NumPy loops are in `test_fedavg`."""

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
PUBLIC, KEY = toys.public(), jax.random.key(3)
GROUPS = toys.groups(linear=(1.0, 2.0, 0.5), mlp=(1.0, 1.5))
DIGESTS_FAIL = dict.fromkeys((0, 1), faults.DIGEST)


def run(groups, algorithm, num_rounds=2, *, faulty=(), **settings):
    federation = toys.federation(groups, algorithm=algorithm, **settings)
    private = toys.private(groups)
    states = federation.init(jax.random.key(0), PUBLIC, private)
    broken = {name: clients for name, clients in states.items() if name in faulty}
    states = federation.start({**states, **faults.switched(groups, broken, DIGESTS_FAIL)}, PUBLIC, KEY)
    for round_ in range(num_rounds):
        states, info = federation.round(states, PUBLIC, private, jax.random.fold_in(KEY, round_))
    return states, info


def test_students_that_do_not_move_are_fedavg_to_the_bit():
    frozen = fmd.TrainingConfig(batch_size=5, optimizer=optax.sgd(0.0))
    (fused, info), (plain, _) = (run(GROUPS, each, digest_training=frozen) for each in (A.feddf(), A.fedavg()))
    chex.assert_trees_all_equal(fused, plain)
    assert all((loss > 0).all() for loss in info.digest_loss.values())


def test_equal_clients_with_equal_data_leave_nothing_to_fuse():
    """The mean then has the mean logits: no loss, and no gradient."""
    groups = {"linear": fmd.ArchitectureGroup(toys.linear(), (0, 1, 2), (1.0, 2.0, 0.5))}
    federation = toys.federation(groups, algorithm=A.feddf(), shuffle=False)
    private = fmd.stack_private(groups, {i: toys.examples(0, 7) for i in range(3)})
    states = federation.init(jax.random.key(0), PUBLIC, private)
    alone, _ = federation.revisit(jax.tree.map(jnp.copy, states), private, KEY)
    states, info = federation.round(federation.start(states, PUBLIC, KEY), PUBLIC, private, KEY)
    chex.assert_trees_all_close(states.clients["linear"].params, alone["linear"].params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info.digest_loss["linear"], 0.0, atol=1e-6)


def test_the_teacher_is_the_geometric_mean_of_the_clients():
    """The softmax of mean logits; the gradient of the mean loss to each client is that to the arithmetic mean."""
    rng = np.random.default_rng(0)
    logits, weights, student = rng.normal(size=(3, 6, 4)), np.array([0.5, 0.2, 0.3]), rng.normal(size=(6, 4))
    probabilities = np.stack([oracle.softmax(each) for each in logits])
    geometric = np.prod(probabilities ** weights[:, None, None], axis=0)
    geometric /= geometric.sum(axis=1, keepdims=True)
    mean_logits = np.einsum("k,kmc->mc", weights, logits)
    np.testing.assert_allclose(jax.nn.softmax(mean_logits), geometric, rtol=1e-5)

    def gradient(loss):
        return jax.grad(lambda logits: loss(logits).sum())(jnp.asarray(student, jnp.float32))

    def mean_of_losses(logits):
        return sum(w * fmd.client.kl_of_probabilities(logits, p) for w, p in zip(weights, probabilities, strict=True))

    arithmetic = np.einsum("k,kmc->mc", weights, probabilities)
    to_mean = gradient(lambda logits: fmd.client.kl_of_probabilities(logits, arithmetic))
    np.testing.assert_allclose(gradient(mean_of_losses), to_mean, rtol=1e-4, atol=1e-6)
    to_teacher = gradient(lambda logits: fmd.kl(logits, jnp.asarray(mean_logits, jnp.float32)))
    np.testing.assert_allclose(to_teacher, oracle.softmax(student) - geometric, rtol=1e-4, atol=1e-6)


def test_a_student_that_fails_is_not_taken():
    """Its group has the mean, as in FedAvg; the other group learns."""
    groups = {
        "fails": fmd.ArchitectureGroup(faults.breakable(), (0, 1)),
        "learns": fmd.ArchitectureGroup(toys.tanh_mlp(), (2, 3)),
    }
    (fused, info), (plain, _) = (run(groups, each, 1, faulty=("fails",)) for each in (A.feddf(), A.fedavg()))
    chex.assert_trees_all_close(fused.memory["fails"], plain.memory["fails"], rtol=1e-6)
    assert not info.digest_finite["fails"].any()
    assert info.digest_finite["learns"].all()
    assert not np.allclose(fused.memory["learns"].params["u"], plain.memory["learns"].params["u"], rtol=1e-3)


def test_integers_of_a_student_are_those_of_a_new_network_and_batch_statistics_move():
    """A table of constants in the model state, which the network needs to be right."""
    sound = toys.normed()

    def init(key, inputs):
        params, model_state = sound.init(key, inputs)
        return params, {"inner": model_state, "order": jnp.arange(inputs.shape[-1])[::-1]}

    def apply(params, model_state, inputs, **how):
        logits, inner = sound.apply(params, model_state["inner"], inputs[:, model_state["order"]], **how)
        return logits, {"inner": inner, "order": model_state["order"]}

    table = fmd.Architecture(init, apply)
    groups = {"table": fmd.ArchitectureGroup(table, (0, 1))}
    frozen = fmd.TrainingConfig(num_epochs=8, batch_size=23, optimizer=optax.sgd(0.0))
    settings = {"digest_training": frozen, "subset_size": 23}
    (fused, _), (plain, _) = (run(groups, each, 1, **settings) for each in (A.feddf(), A.fedavg()))
    chex.assert_trees_all_equal(fused.memory["table"].params, plain.memory["table"].params)
    moved, before = (each.memory["table"].model_state["inner"]["mean"] for each in (fused, plain))
    public_mean = np.asarray(PUBLIC.inputs)[:, ::-1].mean(axis=0)
    np.testing.assert_allclose(moved, 0.9**8 * before + (1 - 0.9**8) * public_mean, rtol=1e-4, atol=1e-5)
    clients = fused.clients["table"].model_state
    assert clients["order"].tolist() == 2 * [[4, 3, 2, 1, 0]]
    chex.assert_trees_all_equal(
        clients["inner"]["num_batches"], plain.clients["table"].model_state["inner"]["num_batches"]
    )


def test_several_seeds_at_once_are_one_after_the_other():
    """With FedDF, of which FedAvg is a part."""
    federation = toys.federation(GROUPS, algorithm=A.feddf())
    private, several = toys.private(GROUPS), fmd.vmap_federation(federation)
    keys = jax.random.split(KEY, 2)

    def train(federation, public, private, inputs, key, fold):
        states = federation.new_states(key, inputs)
        states = federation.start(states, public, key)
        for round_ in range(2):
            states, _ = federation.round(states, public, private, fold(key, round_))
        return states

    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (PUBLIC, private, PUBLIC.inputs[:1]))
    together = train(several, *twice, keys, jax.vmap(jax.random.fold_in, (0, None)))
    for seed, key in enumerate(keys):
        alone = train(federation, PUBLIC, private, PUBLIC.inputs[:1], key, jax.random.fold_in)
        of_seed = jax.tree.map(lambda leaf, seed=seed: leaf[seed], together)
        chex.assert_trees_all_close(of_seed, alone, rtol=5e-5, atol=5e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_impossible_temperatures_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        A.feddf(temperature=temperature)
