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
from fedmd_jax.local import Learner
from fedmd_jax.stopping import full_patience, wait

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
    state, num_run = full_patience(), 0
    while num_run < NUM_EPOCHS and not state.stopped:
        state, num_run = wait(stopping, state, accuracies[num_run]), num_run + 1
    assert num_run == keras(accuracies, patience, min_delta)


def training(num_epochs, **changes):
    return fmd.Training(num_epochs=num_epochs, batch_size=4, optimizer=toys.sgd(4).optimizer, shuffle=False, **changes)


def fit(seed, num_epochs, stopping=None, validation=None):
    return fit_examples(num_epochs, stopping, *map(jnp.asarray, toys.examples(seed, 10)), validation)


@partial(jax.jit, static_argnums=(0, 1))
def fit_examples(num_epochs, stopping, inputs, labels, validation):
    architecture, how = toys.linear(), training(num_epochs, early_stopping=stopping)
    params, state = architecture.init(jax.random.key(0), inputs)
    learner = Learner(params, state, how.optimizer.init(params))
    arguments = (learner, inputs, labels, 10, jax.random.key(0))
    return fmd.fit(architecture, fmd.cross_entropy, *arguments, training=how, validation=validation)


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
        (learner, loss), (expected, expected_loss) = fit(seed, NUM_EPOCHS, stopping, VALIDATION), fit(seed, num_epochs)
        chex.assert_trees_all_close(learner, expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(loss[:num_epochs], expected_loss, rtol=1e-5)
        assert jnp.isnan(loss[num_epochs:]).all()
    assert len(found) > 1
    assert min(found) < NUM_EPOCHS


def test_a_client_that_has_stopped_is_left_alone_by_the_epochs_of_the_others():
    groups = toys.groups()
    public, key = toys.public(), jax.random.key(3)
    stopping = fmd.EarlyStopping(patience=1, min_delta=0.02)
    how = fmd.Training(num_epochs=10, batch_size=8, optimizer=toys.sgd(8).optimizer, early_stopping=stopping)
    federation = toys.federation(groups, public_training=how)
    states = federation.init(jax.random.key(0), public, toys.private(groups))
    start = jax.tree.map(jnp.copy, states)
    states, losses = federation.pretrain(states, public, key, VALIDATION)
    num_epochs = set()
    for name, group in groups.items():
        for k, client_id in enumerate(group.client_ids):
            one = jax.tree.map(lambda leaf, k=k: leaf[k], start[name])
            own_key = jax.random.fold_in(key, client_id)
            one, loss = fmd.pretrain(group.architecture, one, public, own_key, VALIDATION, training=how)
            num_epochs.add(int(jnp.isfinite(loss).sum()))
            np.testing.assert_array_equal(jnp.isfinite(losses[name][k]), jnp.isfinite(loss))
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

    (short, loss), (long, more) = both(4), both(10)
    first, same = (jax.tree.map(lambda leaf: leaf[0], learner) for learner in (short, long))
    chex.assert_trees_all_equal(first, same)
    assert jnp.isfinite(loss[0]).sum() == jnp.isfinite(more[0]).sum() == 4
    assert jnp.isfinite(more[1]).sum() > 4


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="patience must be an integer of at least 1, got 0"):
        fmd.EarlyStopping(patience=0)
    with pytest.raises(ValueError, match="min_delta must be finite and not negative, got -1"):
        fmd.EarlyStopping(patience=1, min_delta=-1)
    with pytest.raises(ValueError, match="early stopping needs validation data, got none"):
        fit(0, 2, fmd.EarlyStopping(patience=1))
    with pytest.raises(ValueError, match="not of digest and revisit"):
        fmd.fedmd(toys.groups(), revisit_training=training(2, early_stopping=fmd.EarlyStopping(patience=1)))
