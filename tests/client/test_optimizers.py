import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

import fedmd_jax as fmd


def run(optimizer, gradients):
    params = jnp.zeros(gradients.shape[1:])

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), params

    return jax.lax.scan(step, (params, optimizer.init(params)), gradients)


def test_it_is_optax_with_an_epsilon_that_shrinks_to_that_of_keras():
    scales = 10.0 ** np.arange(-9, 2)  # gradients below, at and above epsilon
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(30, 11)) * scales, jnp.float32)
    corrected = optax.inject_hyperparams(optax.adam)(
        learning_rate=1e-3, eps=lambda count: 1e-7 / jnp.sqrt(1 - 0.999 ** (count + 1.0))
    )
    (params, _), path = run(fmd.adam(1e-3), gradients)
    (expected, _), expected_path = run(corrected, gradients)
    chex.assert_trees_all_close((params, path), (expected, expected_path), rtol=1e-4, atol=1e-9)


def test_for_large_gradients_it_is_optax():
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(30, 5)), jnp.float32)
    (params, state), _ = run(fmd.adam(0.01), gradients)
    (expected, (expected_state, _)), _ = run(optax.adam(0.01, eps=1e-7), gradients)
    np.testing.assert_allclose(params, expected, rtol=1e-4)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-5)


def test_its_state_can_be_donated_as_it_is():
    state = fmd.adam().init({"w": jnp.ones(3)})
    jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)(state)


def phases(private, revisit, pooled=None, mesh=None):
    """A federation of linear clients whose phases have these optimizers: one epoch of one batch each."""
    how = {"public": revisit, "private": private, "pooled": pooled or revisit, "digest": revisit, "revisit": revisit}
    trainings = {f"{name}_training": fmd.TrainingConfig(batch_size=64, optimizer=each) for name, each in how.items()}
    return fmd.fedmd(GROUPS, subset_size=12, mesh=mesh, **trainings)


def batch_loss(inputs, labels):
    """The loss of a linear network on one batch, as a function of its parameters."""

    def loss(params):
        logits = inputs @ params["w"] + params["b"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss


def one_step(optimizer, params, inputs, labels):
    """Gradient descent from fresh memory."""
    updates, _ = optimizer.update(jax.grad(batch_loss(inputs, labels))(params), optimizer.init(params), params)
    return optax.apply_updates(params, updates)


GROUPS = {"linear": fmd.ArchitectureGroup(toys.linear(), (0, 1, 2))}
PUBLIC, PRIVATE = toys.public(), toys.private(GROUPS)


def injected(learning_rate):
    return optax.inject_hyperparams(optax.sgd)(learning_rate)


def by_label(rates):
    def label(params):
        return {name: name for name in params}

    return optax.multi_transform({name: injected(rate) for name, rate in rates.items()}, label)


@pytest.mark.parametrize(
    ("private", "revisit"),
    [
        (injected(optax.linear_schedule(0.1, 0.05, 3)), injected(optax.linear_schedule(0.001, 0.0, 3))),
        (optax.chain(optax.clip(10.0), injected(0.1)), optax.chain(optax.clip(1e-3), injected(0.001))),
        (by_label({"w": 0.1, "b": 0.2}), by_label({"w": 0.001, "b": 0.0})),
        (fmd.adam(0.1), fmd.adam(0.001)),
    ],
)
def test_each_phase_trains_with_its_own_hyperparameters(private, revisit):
    """Private training, the pooled bound and the revisits after them share one memory."""
    federation, key = phases(private, revisit, pooled=private), jax.random.key(0)
    states = federation.init(key, PUBLIC, PRIVATE)
    start = jax.tree.map(jnp.copy, states)
    pooled, _ = federation.train_pooled(start, fmd.labelled_dataset(*toys.examples(3, 10)), key)
    states, _ = federation.train_private(states, PRIVATE, key)
    middle = jax.tree.map(jnp.copy, states)
    states, _ = federation.revisit(states, PRIVATE, key)
    for _, k, mine, *trees in toys.clients(GROUPS, PRIVATE, start, middle, pooled, states):
        first, halfway, bound, last = (state.params for state in trees)
        expected = one_step(private, first, mine.inputs[: 7 + k], mine.labels[: 7 + k])
        chex.assert_trees_all_close(halfway, expected, rtol=1e-5, atol=1e-6)
        expected = one_step(private, first, *map(jnp.asarray, toys.examples(3, 10)))
        chex.assert_trees_all_close(bound, expected, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(last, halfway, rtol=0, atol=0.01)


def test_the_step_count_of_a_schedule_continues_from_private_training_into_the_revisits():
    scheduled, key = optax.adam(optax.constant_schedule(0.1)), jax.random.key(0)
    federation = phases(scheduled, scheduled)
    states = federation.init(key, PUBLIC, PRIVATE)
    states, _ = federation.train_private(states, PRIVATE, key)
    states, _ = federation.revisit(states, PRIVATE, key)
    assert states["linear"].revisit_opt_state[1].count.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("private", "revisit", "message"),
    [
        (optax.sgd(0.1), optax.adam(0.1), "must be of the same kind, got different ones"),
        (optax.lookahead(optax.sgd(0.1), 5, 0.5), optax.sgd(0.1), "same kind, got different ones"),
        (optax.contrib.schedule_free_sgd(0.1), optax.contrib.schedule_free_sgd(0.1), "keeps a copy of the parameters"),
        # States of one structure, in which numbers have another meaning.
        (optax.yogi(0.1), optax.adam(0.1), r"must remember the same of a gradient, got .* in \[0\].mu\['b'\]"),
        (optax.rmsprop(0.1, momentum=0.9), optax.rmsprop(0.001, momentum=0.9), "remember the same of a gradient"),
        (optax.adam(0.1), optax.adamax(0.1), "remember the same of a gradient"),
        (optax.inject_hyperparams(optax.adam)(0.1, b1=0.5), optax.inject_hyperparams(optax.adam)(0.1), "remember the"),
    ],
)
def test_memory_that_means_another_thing_is_refused(private, revisit, message):
    with pytest.raises(ValueError, match=message):
        phases(private, revisit).check(PUBLIC, PRIVATE)


def test_an_optimizer_with_parameters_of_its_own_type_is_refused():
    optimizer = optax.lookahead(optax.sgd(0.1), 5, 0.5)
    training = fmd.TrainingConfig(optimizer=optimizer)
    with pytest.raises(ValueError, match="lookahead trains two copies of the parameters"):
        fmd.init_client(toys.linear(), jax.random.key(0), PUBLIC.inputs, digest=training, revisit=training)


@pytest.mark.parametrize("key", [7, jax.random.key(7), jax.random.key(7, impl="rbg")])
def test_every_client_has_its_own_noise(key):
    """Noise moves clients with equal parameters and data apart, in every phase."""
    optimizer = optax.chain(optax.add_noise(1.0, 0.0, key=key), optax.sgd(0.1))
    federation = phases(optimizer, optimizer)
    private = {"linear": jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 3), PRIVATE["linear"])}
    start = federation.new_states(jax.random.key(0), PUBLIC.inputs[:1])["linear"]
    same = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 3), start.params)

    def moved(phase, *data):
        states = {"linear": jax.tree.map(jnp.copy, start._replace(params=same))}
        return getattr(federation, phase)(states, *data, jax.random.key(1))[0]["linear"]

    for state in (moved("pretrain", PUBLIC), moved("train_private", private), moved("round", PUBLIC, private)):
        for leaf in jax.tree.leaves(state.params):
            assert (leaf[0] != leaf[1]).any()
            assert (leaf[1] != leaf[2]).any()


def test_keys_of_another_kind_are_refused_by_a_population():
    noisy = optax.chain(optax.add_noise(1.0, 0.0, key=jax.random.key(7, impl="rbg")), optax.sgd(0.1))
    with pytest.raises(
        ValueError, match="random keys in the optimizer states of a population must be of JAX's default"
    ):
        fmd.simulation.init_population(phases(noisy, noisy), jax.random.key(0), PUBLIC, PRIVATE, cohort_size=2)


def test_noise_depends_on_the_client_id_and_not_on_mesh_or_cohort():
    optimizer, key = optax.chain(optax.add_noise(1.0, 0.0, key=7), optax.sgd(0.1)), jax.random.key(0)
    federation, on_mesh = phases(optimizer, optimizer), phases(optimizer, optimizer, mesh=fmd.client_mesh(4))
    expected, sharded = (
        jax.device_get(dict(each.transfer_learn(each.init(key, PUBLIC, PRIVATE), PUBLIC, PRIVATE, key)[0]))
        for each in (federation, on_mesh)
    )
    population = fmd.simulation.init_population(federation, key, PUBLIC, PRIVATE, cohort_size=2)
    population, _ = fmd.simulation.transfer_learn_population(federation, population, PUBLIC, key, cohort_size=2)
    for other in (sharded, population.states):
        chex.assert_trees_all_close(dict(other), expected, rtol=1e-5, atol=1e-6)
    keys = expected["linear"].revisit_opt_state[0].rng_key
    assert (keys[0] != keys[1]).any()


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.polyak_sgd(1.0),
        optax.lbfgs(),
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
    ],
)
def test_optimizers_are_given_the_loss(optimizer):
    """Of three full batches, as by hand."""
    architecture, key = toys.linear(), jax.random.key(0)
    inputs, labels = map(jnp.asarray, toys.examples(3, 10))
    training = fmd.TrainingConfig(num_epochs=3, batch_size=10, optimizer=optimizer, shuffle=False)
    start = fmd.init_client(architecture, key, inputs, digest=training, revisit=training)
    found, _ = fmd.revisit(architecture, start, fmd.PrivateDataset(inputs, labels, 10), key, training=training)

    loss = batch_loss(inputs, labels)
    params, state = start.params, optimizer.init(start.params)
    for _ in range(3):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(found.params, params, rtol=1e-4, atol=1e-5)


def test_updates_of_another_shape_are_refused():
    summing = optax.stateless(lambda updates, _: jax.tree.map(jnp.sum, updates))
    training = fmd.TrainingConfig(optimizer=summing)
    architecture, key = toys.linear(), jax.random.key(0)
    start = fmd.init_client(architecture, key, PUBLIC.inputs, digest=training, revisit=training)
    with pytest.raises(ValueError, match="must return updates of the shapes of the parameters"):
        fmd.pretrain(architecture, start, PUBLIC, key, training=training)
