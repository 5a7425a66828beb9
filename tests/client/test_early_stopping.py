from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings, strategies as st

import fedmd_jax as fmd
from fedmd_jax.client.early_stopping import initial_patience, update_patience
from fedmd_jax.client.training import Learner

NUM_EPOCHS = 7


def keras(accuracies, patience, min_delta):
    """The number of epochs after which `keras.callbacks.EarlyStopping` stops, by its documentation."""
    best, num_waited = -np.inf, 0
    for epoch, accuracy in enumerate(accuracies):
        num_waited += 1
        if np.float32(accuracy) - np.float32(min_delta) > best:
            best, num_waited = np.float32(accuracy), 0
            continue
        if num_waited >= patience and epoch > 0:
            return epoch + 1
    return len(accuracies)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=NUM_EPOCHS, max_size=NUM_EPOCHS),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.05, 0.12]),
)
def test_it_stops_as_keras_stops(hits, patience, min_delta):
    stopping = fmd.EarlyStopping(patience=patience, min_delta=min_delta)
    accuracies = [np.float32(hit / 20) for hit in hits]
    state, num_run = initial_patience(), 0
    while num_run < NUM_EPOCHS and not state.stopped:
        state, num_run = update_patience(stopping, state, accuracies[num_run]), num_run + 1
    assert num_run == keras(accuracies, patience, min_delta)


def training(num_epochs, **changes):
    return fmd.TrainingConfig(
        num_epochs=num_epochs, batch_size=4, optimizer=toys.sgd(4).optimizer, shuffle=False, **changes
    )


def fit(seed, num_epochs, stopping=None, validation=None):
    return fit_examples(num_epochs, stopping, *map(jnp.asarray, toys.examples(seed, 10)), validation)


@partial(jax.jit, static_argnums=(0, 1))
def fit_examples(num_epochs, stopping, inputs, labels, validation):
    architecture, how = toys.linear(), training(num_epochs, early_stopping=stopping)
    params, state = architecture.init(jax.random.key(0), inputs)
    learner = Learner(params, state, how.optimizer.init(params))
    arguments = (learner, inputs, labels, 10, jax.random.key(0))
    return fmd.client.fit(architecture, fmd.cross_entropy, *arguments, training=how, validation=validation)


VALIDATION = fmd.labelled_dataset(*toys.examples(200, 30))


def epochs_by_hand(seed, stopping):
    """Trains for one epoch, two, three, ... and asks Keras when to stop."""
    accuracies = []
    for num_epochs in range(1, NUM_EPOCHS + 1):
        learner, _ = fit(seed, num_epochs)
        accuracies.append(fmd.evaluate(toys.linear(), learner, VALIDATION).accuracy)
    return keras(accuracies, stopping.patience, stopping.min_delta)


def test_training_that_stops_is_training_with_fewer_epochs():
    """The last parameters are kept, not the best, and so is the optimizer's memory."""
    stopping = fmd.EarlyStopping(patience=2, min_delta=0.01)
    found = set()
    for seed in range(3):
        num_epochs = epochs_by_hand(seed, stopping)
        found.add(num_epochs)
        (learner, info), (expected, expected_info) = fit(seed, NUM_EPOCHS, stopping, VALIDATION), fit(seed, num_epochs)
        chex.assert_trees_all_close(learner, expected, rtol=1e-6, atol=1e-7)
        assert info.num_epochs == expected_info.num_epochs == num_epochs
        np.testing.assert_allclose(info.loss[:num_epochs], expected_info.loss, rtol=1e-5)
        assert not info.loss[num_epochs:].any()
    assert len(found) > 1
    assert min(found) < NUM_EPOCHS


def test_more_epochs_change_no_bit_of_a_client_that_has_stopped():
    """Two clients in one program; the first has stopped long before the second."""

    def both(num_epochs):
        data = [toys.examples(seed, 10) for seed in (0, 1)]
        inputs, labels = (jnp.stack([jnp.asarray(each[part]) for each in data]) for part in (0, 1))
        # The first client never improves on its validation labels; the second learns its own examples.
        validation = fmd.PrivateDataset(inputs, labels.at[0].set(99), jnp.full(2, 10))
        one = partial(fit_examples, num_epochs, fmd.EarlyStopping(patience=3))
        return jax.vmap(one)(inputs, labels, validation)

    (short, some), (long, more) = both(4), both(10)
    first, same = (jax.tree.map(lambda leaf: leaf[0], learner) for learner in (short, long))
    chex.assert_trees_all_equal(first, same)
    assert some.num_epochs[0] == more.num_epochs[0] == 4
    assert more.num_epochs[1] > 4


def test_invalid_settings_are_refused():
    with pytest.raises(ValueError, match="patience must be an integer of at least 1, got 0"):
        fmd.EarlyStopping(patience=0)
    with pytest.raises(ValueError, match="min_delta must be finite and not negative, got -1"):
        fmd.EarlyStopping(patience=1, min_delta=-1)
    with pytest.raises(ValueError, match="early stopping needs validation data, got none"):
        fit(0, 2, fmd.EarlyStopping(patience=1))
    with pytest.raises(ValueError, match="not for digest and revisit"):
        fmd.fedmd(toys.groups(), revisit_training=training(2, early_stopping=fmd.EarlyStopping(patience=1)))


GROUPS = {"linear": fmd.ArchitectureGroup(toys.linear(), range(5))}
PUBLIC, PRIVATE, KEY = toys.public(), toys.private(GROUPS), jax.random.key(3)
OWN_VALIDATION = fmd.stack_private(GROUPS, {i: toys.examples(300 + i, 5 + i) for i in range(5)})


def stopping_federation(**changes):
    """Both halves of transfer learning stop early, at different epochs for different clients."""
    how = {"num_epochs": 8, "batch_size": 8, "optimizer": toys.sgd(8).optimizer}
    halves = {
        "public_training": fmd.TrainingConfig(early_stopping=fmd.EarlyStopping(patience=1, min_delta=0.02), **how),
        "private_training": fmd.TrainingConfig(early_stopping=fmd.EarlyStopping(patience=2), **how),
    }
    return toys.federation(GROUPS, **{**halves, **changes}), {**halves, **changes}


def test_both_halves_of_transfer_learning_use_their_own_validation_data():
    """In a federation, for a client alone, and in a population; a client that has stopped does not change any more."""
    federation, halves = stopping_federation()
    start = federation.init(jax.random.key(0), PUBLIC, PRIVATE)
    one_client = jax.jit(partial(fmd.transfer_learn, GROUPS["linear"].architecture, **halves))
    alone = {
        i: one_client(state, PUBLIC, mine, KEY, VALIDATION, held, client_id=i)
        for _, i, state, mine, held in toys.clients(GROUPS, start, PRIVATE, OWN_VALIDATION)
    }
    num_epochs = [[int(half.num_epochs) for half in info] for _, info in alone.values()]
    assert all(len(set(epochs)) > 1 for epochs in zip(*num_epochs, strict=True))

    population = fmd.simulation.init_population(federation, jax.random.key(0), PUBLIC, PRIVATE, cohort_size=2)
    data = PUBLIC, KEY, VALIDATION, OWN_VALIDATION
    population, of_cohorts = fmd.simulation.transfer_learn_population(federation, population, *data, cohort_size=2)
    together, infos = federation.transfer_learn(start, PUBLIC, PRIVATE, KEY, VALIDATION, OWN_VALIDATION)
    for states, (public, private) in ((together, infos), (population.states, of_cohorts)):
        for _, i, state, *info in toys.clients(GROUPS, states, public, private):
            chex.assert_trees_all_close((state, fmd.TransferInfo(*info)), alone[i], rtol=2e-5, atol=2e-6)


def test_transfer_learning_of_one_client_is_its_halves():
    """The optimizer of the public half is forgotten."""
    architecture, private, held = toys.linear(), *(fmd.labelled_dataset(*toys.examples(seed, 10)) for seed in (3, 4))
    first, second = (training(5, early_stopping=fmd.EarlyStopping(patience=patience)) for patience in (1, 2))
    start = fmd.init_client(architecture, KEY, PUBLIC.inputs[:1], digest=first, revisit=second)
    found = fmd.transfer_learn(
        architecture, start, PUBLIC, private, KEY, VALIDATION, held, public_training=first, private_training=second
    )
    key_public, key_private = jax.random.split(KEY)
    half, some = fmd.pretrain(architecture, start, PUBLIC, key_public, VALIDATION, training=first)
    chex.assert_trees_all_equal(half.revisit_opt_state, start.revisit_opt_state)
    whole, more = fmd.revisit(architecture, half, private, key_private, held, training=second)
    chex.assert_trees_all_equal(found, (whole, fmd.TransferInfo(some, more)))


@pytest.mark.parametrize(
    ("public_validation", "private_validation", "changes", "message"),
    [
        (None, VALIDATION, {}, "public_training: early stopping needs validation data, got none"),
        (VALIDATION, None, {}, "private_training: early stopping needs validation data, got none"),
        (VALIDATION, VALIDATION, {"public_training": toys.sgd(8)}, "public_training: validation data is for early st"),
        (VALIDATION, VALIDATION, {"private_training": toys.sgd(8)}, "private_training: validation data is for early"),
    ],
)
def test_validation_data_and_early_stopping_need_each_other(public_validation, private_validation, changes, message):
    federation, halves = stopping_federation(**changes)
    states, validation = federation.init(KEY, PUBLIC, PRIVATE), (public_validation, private_validation)
    with pytest.raises(ValueError, match=message):
        federation.transfer_learn(states, PUBLIC, PRIVATE, KEY, *validation)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(states))
    one, mine = (toys.by_client(GROUPS, tree)[0] for tree in (states, PRIVATE))
    with pytest.raises(ValueError, match=message):
        fmd.transfer_learn(GROUPS["linear"].architecture, one, PUBLIC, mine, KEY, *validation, **halves)


def test_unused_validation_data_is_refused_in_every_phase():
    federation = toys.federation(GROUPS)
    states = federation.init(KEY, PUBLIC, PRIVATE)
    for phase, data in (("pretrain", PUBLIC), ("train_private", PRIVATE), ("train_pooled", VALIDATION)):
        with pytest.raises(ValueError, match="validation data is for early stopping, but this training has none"):
            getattr(federation, phase)(states, data, KEY, VALIDATION)
