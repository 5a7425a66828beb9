from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

import fedmd_jax as fmd
from fedmd_jax.client.early_stopping import initial_patience, update_patience
from fedmd_jax.client.training import Learner

NUM_EPOCHS = 7


def keras(accuracies, patience, min_delta):
    """After how many epochs `keras.callbacks.EarlyStopping` stops, as its documentation has it."""
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
def test_it_stops_where_keras_stops(hits, patience, min_delta):
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


def test_training_that_stops_is_training_of_so_many_epochs():
    """The last weights are kept, not the best, and the optimizer's memory with them."""
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


def test_a_client_that_has_stopped_is_left_alone_by_the_epochs_of_the_others():
    groups = toys.groups()
    public, key = toys.public(), jax.random.key(3)
    stopping = fmd.EarlyStopping(patience=1, min_delta=0.02)
    how = fmd.TrainingConfig(num_epochs=10, batch_size=8, optimizer=toys.sgd(8).optimizer, early_stopping=stopping)
    federation = toys.federation(groups, public_training=how)
    states = federation.init(jax.random.key(0), public, toys.private(groups))
    start = jax.tree.map(jnp.copy, states)
    states, infos = federation.pretrain(states, public, key, VALIDATION)
    num_epochs = set()
    for name, group in groups.items():
        for k, client_id in enumerate(group.client_ids):
            one = jax.tree.map(lambda leaf, k=k: leaf[k], start[name])
            own_key = jax.random.fold_in(key, client_id)
            one, info = fmd.pretrain(group.architecture, one, public, own_key, VALIDATION, training=how)
            num_epochs.add(int(info.num_epochs))
            assert infos[name].num_epochs[k] == info.num_epochs
            chex.assert_trees_all_close(
                jax.tree.map(lambda leaf, k=k: leaf[k], states[name]), one, rtol=2e-5, atol=2e-6
            )
    assert len(num_epochs) > 1  # some have waited for others


def test_more_epochs_change_no_bit_of_a_client_that_has_stopped():
    """Two clients in one program; the first has stopped long before the second."""

    def both(num_epochs):
        data = [toys.examples(seed, 10) for seed in (0, 1)]
        inputs, labels = (jnp.stack([jnp.asarray(each[part]) for each in data]) for part in (0, 1))
        # Nothing is right for the first, who waits in vain; the second learns its own examples.
        validation = fmd.PrivateDataset(inputs, labels.at[0].set(99), jnp.full(2, 10))
        one = partial(fit_examples, num_epochs, fmd.EarlyStopping(patience=3))
        return jax.vmap(one)(inputs, labels, validation)

    (short, some), (long, more) = both(4), both(10)
    first, same = (jax.tree.map(lambda leaf: leaf[0], learner) for learner in (short, long))
    chex.assert_trees_all_equal(first, same)
    assert some.num_epochs[0] == more.num_epochs[0] == 4
    assert more.num_epochs[1] > 4


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="patience must be an integer of at least 1, got 0"):
        fmd.EarlyStopping(patience=0)
    with pytest.raises(ValueError, match="min_delta must be finite and not negative, got -1"):
        fmd.EarlyStopping(patience=1, min_delta=-1)
    with pytest.raises(ValueError, match="early stopping needs validation data, got none"):
        fit(0, 2, fmd.EarlyStopping(patience=1))
    with pytest.raises(ValueError, match="not for digest and revisit"):
        fmd.fedmd(toys.groups(), revisit_training=training(2, early_stopping=fmd.EarlyStopping(patience=1)))


def stopping_federation(groups, **changes):
    """Both halves of transfer learning stop early, clients at different epochs."""
    how = {"num_epochs": 8, "batch_size": 8, "optimizer": toys.sgd(8).optimizer}
    halves = {
        "public_training": fmd.TrainingConfig(early_stopping=fmd.EarlyStopping(patience=1, min_delta=0.02), **how),
        "private_training": fmd.TrainingConfig(early_stopping=fmd.EarlyStopping(patience=2), **how),
    }
    return toys.federation(groups, **{**halves, **changes})


def own_validation(groups):
    """Each client has its own, of its own size."""
    ids = [client_id for group in groups.values() for client_id in group.client_ids]
    return fmd.stack_private(groups, {i: toys.examples(300 + i, 5 + i) for i in ids})


def test_both_halves_of_transfer_learning_look_at_their_own_validation_data():
    """Of the federation, of one client alone, and of a population by cohorts."""
    group = fmd.ArchitectureGroup(toys.linear(), range(5))
    groups, public, key = {"linear": group}, toys.public(), jax.random.key(3)
    private, own = toys.private(groups), own_validation(groups)
    federation = stopping_federation(groups)
    start = federation.init(jax.random.key(0), public, private)
    first = jax.jit(partial(fmd.pretrain, group.architecture, training=federation.public_training))
    second = jax.jit(partial(fmd.revisit, group.architecture, training=federation.private_training))
    alone, num_epochs = [], set()
    for k in range(5):
        state, mine, held = (jax.tree.map(lambda leaf, k=k: leaf[k], tree["linear"]) for tree in (start, private, own))
        key_first, key_second = (jax.random.fold_in(half, k) for half in jax.random.split(key))
        state, some = first(state, public, key_first, VALIDATION)
        state, more = second(state, mine, key_second, held)
        alone.append(state)
        num_epochs.add((int(some.num_epochs), int(more.num_epochs)))
    assert all(len(set(epochs)) > 1 for epochs in zip(*num_epochs, strict=True))

    population = fmd.simulation.init_population(federation, jax.random.key(0), public, private, cohort_size=2)
    population, _ = fmd.simulation.transfer_learn_population(
        federation, population, public, key, VALIDATION, own, cohort_size=2
    )
    together, _ = federation.transfer_learn(start, public, private, key, VALIDATION, own)
    for states in (together, population.states):
        for k, expected in enumerate(alone):
            one = jax.tree.map(lambda leaf, k=k: leaf[k], states["linear"])
            chex.assert_trees_all_close(one, expected, rtol=2e-5, atol=2e-6)


def test_transfer_learning_of_one_client_is_its_halves():
    architecture, public, key = toys.linear(), toys.public(), jax.random.key(3)
    private, held = (fmd.labelled_dataset(*toys.examples(seed, 10)) for seed in (3, 4))
    first, second = (training(5, early_stopping=fmd.EarlyStopping(patience=patience)) for patience in (1, 2))
    start = fmd.init_client(architecture, key, public.inputs[:1], digest=first, revisit=second)
    found = fmd.transfer_learn(
        architecture, start, public, private, key, VALIDATION, held, public_training=first, private_training=second
    )
    key_public, key_private = jax.random.split(key)
    state, some = fmd.pretrain(architecture, start, public, key_public, VALIDATION, training=first)
    state, more = fmd.revisit(architecture, state, private, key_private, held, training=second)
    chex.assert_trees_all_equal(found, (state, fmd.TransferInfo(some, more)))


@pytest.mark.parametrize(
    ("public_validation", "private_validation", "changes", "message"),
    [
        (False, True, {}, "public_training: early stopping needs validation data, got none"),
        (True, False, {}, "private_training: early stopping needs validation data, got none"),
        (True, True, {"public_training": toys.sgd(8)}, "public_training: validation data is for early stop.*"),
        (True, True, {"private_training": toys.sgd(8)}, "private_training: validation data is for early stop.*"),
    ],
)
def test_validation_data_and_early_stopping_need_each_other(public_validation, private_validation, changes, message):
    groups, public, key = toys.groups(), toys.public(), jax.random.key(3)
    federation, private = stopping_federation(groups, **changes), toys.private(groups)
    states = federation.init(key, public, private)
    validation = [VALIDATION if given else None for given in (public_validation, private_validation)]
    with pytest.raises(ValueError, match=message):
        federation.transfer_learn(states, public, private, key, *validation)
    jax.block_until_ready(federation.evaluate(states, VALIDATION))  # they are still there
    name, halves = "linear", {"public_training": federation.public_training}
    halves["private_training"] = federation.private_training
    one, mine = (jax.tree.map(lambda leaf: leaf[0], tree[name]) for tree in (states, private))
    with pytest.raises(ValueError, match=message):
        fmd.transfer_learn(groups[name].architecture, one, public, mine, key, *validation, **halves)


def test_unused_validation_data_is_refused_in_every_phase():
    groups, public, key = toys.groups(), toys.public(), jax.random.key(3)
    federation, private = toys.federation(groups), toys.private(groups)
    states = federation.init(key, public, private)
    for phase, data in (("pretrain", public), ("train_private", private), ("train_pooled", VALIDATION)):
        with pytest.raises(ValueError, match="validation data is for early stopping, but this training has none"):
            getattr(federation, phase)(states, data, key, VALIDATION)
