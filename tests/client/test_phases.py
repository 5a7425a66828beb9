from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from hypothesis import given, settings, strategies as st

import fedmd_jax as fmd
from fedmd_jax.client.training import draw_batches

TRAINING = toys.sgd(4, 2)


def client(architecture, key, training=TRAINING):
    return fmd.init_client(architecture, key, jnp.zeros((1, toys.NUM_FEATURES)), digest=training, revisit=training)


def dataset(seed, num_examples):
    return fmd.labelled_dataset(*toys.examples(seed, num_examples))


def padded(private, num_rows, junk):
    extra = num_rows - private.inputs.shape[0]
    return private._replace(
        inputs=jnp.pad(private.inputs, ((0, extra), (0, 0)), constant_values=junk),
        labels=jnp.pad(private.labels, (0, extra)),
    )


@given(
    num_rows=st.sampled_from([1, 12, 17]),  # few shapes, since each is compiled
    missing=st.integers(0, 12),
    batch_size=st.sampled_from([1, 4, 50]),
    num_epochs=st.sampled_from([1, 3]),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=20, deadline=None)
def test_every_epoch_sees_every_real_row_once_and_no_padding(num_rows, missing, batch_size, num_epochs, shuffle, seed):
    num_examples = max(num_rows - missing, 0)
    training = fmd.TrainingConfig(num_epochs=num_epochs, batch_size=batch_size, shuffle=shuffle)
    indices, mask, keys = draw_batches(jax.random.key(seed), num_rows, num_examples, training=training)
    assert indices.shape == (num_epochs, *mask.shape)
    assert len(np.unique(jax.random.key_data(keys).reshape(-1, 2), axis=0)) == indices.shape[0] * indices.shape[1]
    for epoch in np.asarray(indices):
        seen = epoch[np.asarray(mask)]
        assert sorted(seen) == list(range(num_examples))
        if not shuffle:
            assert list(seen) == list(range(num_examples))


def test_epochs_are_different_permutations(key):
    indices, _, _ = draw_batches(key, 40, 40, training=fmd.TrainingConfig(num_epochs=3, batch_size=40))
    assert len({tuple(epoch) for epoch in np.asarray(indices).reshape(3, 40).tolist()}) == 3


@pytest.mark.parametrize(("num_examples", "num_rows"), [(1, 9), (4, 13), (9, 10)])
def test_padding_changes_nothing_neither_loss_nor_statistics_nor_optimizer(num_examples, num_rows):
    """A client among longer ones ends as it would alone: batches of padding alone do not even add momentum."""
    architecture, key = toys.normed(), jax.random.key(1)
    training = toys.sgd(4, 2, shuffle=False)
    alone = dataset(3, num_examples)
    start = client(architecture, key, training)
    expected, expected_info = fmd.revisit(architecture, start, alone, key, training=training)
    actual, info = fmd.revisit(architecture, start, padded(alone, num_rows, 1e6), key, training=training)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(info, expected_info, rtol=1e-5)
    num_batches = 2 * -(-num_examples // 4)
    assert int(actual.model_state["num_batches"]) == num_batches


def test_a_client_without_examples_does_not_change(key):
    architecture = toys.normed()
    start = client(architecture, key)
    private = dataset(3, 6)._replace(num_examples=jnp.int32(0))
    state, info = fmd.revisit(architecture, start, private, key, training=TRAINING)
    chex.assert_trees_all_equal(state, start)
    assert info.loss.tolist() == [0.0, 0.0]


def test_digest_and_revisit_have_separate_memories(key):
    architecture = toys.linear()
    start = client(architecture, key)
    public = toys.public(9)
    consensus = jnp.ones((9, toys.NUM_CLASSES))
    digested, _ = fmd.digest(architecture, start, public.inputs, consensus, key, training=TRAINING)
    chex.assert_trees_all_equal(digested.revisit_opt_state, start.revisit_opt_state)
    assert optax.tree.norm(digested.digest_opt_state) > 0
    revisited, _ = fmd.revisit(architecture, digested, dataset(3, 6), key, training=TRAINING)
    chex.assert_trees_all_equal(revisited.digest_opt_state, digested.digest_opt_state)
    assert optax.tree.norm(revisited.revisit_opt_state) > 0


def test_digest_approaches_the_consensus(key):
    architecture, public = toys.tanh_mlp(), toys.public(40)
    teacher, student = client(architecture, key), client(architecture, jax.random.key(9))
    consensus = fmd.score(architecture, teacher, public.inputs)
    training = toys.sgd(8, 30)
    for distance in (fmd.mae, partial(fmd.kl, temperature=2.0)):
        digest = jax.jit(partial(fmd.digest, architecture, training=training, distance=distance))
        _, info = digest(student, public.inputs, consensus, key)
        assert info.loss[-1] < 0.6 * info.loss[0]


def test_scores_do_not_depend_on_the_scoring_batch(key):
    architecture, inputs = toys.normed(), toys.public(23).inputs
    state = client(architecture, key)
    whole = fmd.score(architecture, state, inputs)
    for batch_size in (1, 5, 22, 23, 24):
        np.testing.assert_allclose(
            fmd.score(architecture, state, inputs, batch_size=batch_size), whole, rtol=1e-5, atol=1e-6
        )


def test_training_noise_comes_from_the_key_and_scoring_has_none(key):
    architecture = toys.normed(noise=0.5)
    start, training = client(architecture, key), toys.sgd(4, 1, shuffle=False)
    one, same, other = (
        fmd.revisit(architecture, start, dataset(3, 6), k, training=training)[0].params["w"]
        for k in (key, key, jax.random.key(5))
    )
    assert (one == same).all()
    assert (one != other).any()


def test_numpy_arrays_are_accepted(key):
    architecture = toys.linear()
    state = client(architecture, key)
    inputs, labels = toys.examples(3, 6)
    consensus = np.asarray(fmd.score(architecture, state, inputs))
    state, _ = fmd.digest(architecture, state, inputs, consensus, key, training=TRAINING)
    state, _ = fmd.pretrain(architecture, state, fmd.PublicDataset(inputs, labels), key, training=TRAINING)
    state, _ = fmd.revisit(architecture, state, fmd.PrivateDataset(inputs, labels, 6), key, training=TRAINING)
    assert fmd.evaluate(architecture, state, fmd.PrivateDataset(inputs, labels, 6)).accuracy >= 0


def test_without_public_labels_there_is_no_transfer_learning(key):
    start, unlabelled = client(toys.linear(), key), toys.public()._replace(labels=None)
    with pytest.raises(ValueError, match="needs the labels of the public dataset"):
        fmd.pretrain(toys.linear(), start, unlabelled, key, training=TRAINING)


@pytest.mark.parametrize("setting", [{"num_epochs": 0}, {"batch_size": 0}, {"batch_size": -3}, {"batch_size": 2.5}])
def test_invalid_settings_are_refused(setting):
    with pytest.raises(ValueError, match=r"must be an integer of at least 1, got"):
        fmd.TrainingConfig(**setting)


def absolute(logits, targets):
    return jnp.abs(logits - targets)


@pytest.mark.parametrize(
    ("distance", "shape"),
    [
        (lambda *pair: jnp.mean(absolute(*pair)), r"\(\)"),
        (absolute, rf"\(\d+, {toys.NUM_CLASSES}\)"),
        (lambda *pair: jnp.mean(absolute(*pair), axis=0), rf"\({toys.NUM_CLASSES},\)"),
        (lambda *pair: jnp.mean(absolute(*pair), axis=1, keepdims=True), r"\(\d+, 1\)"),
        (lambda *pair: (fmd.mae(*pair),) * 2, "None"),
    ],
    ids=["mean of all", "per class", "wrong axis", "kept axis", "two"],
)
def test_a_distance_of_another_shape_than_one_number_per_example_is_refused(distance, shape):
    """Also if a batch has as many rows as there are classes."""
    architecture, inputs, key = toys.linear(), toys.public(10).inputs, jax.random.key(0)
    start, consensus = client(architecture, key), jnp.ones((10, toys.NUM_CLASSES))
    for batch_size in (3, toys.NUM_CLASSES, 7):
        how = {"training": toys.sgd(batch_size, 1), "distance": distance}
        with pytest.raises(ValueError, match=rf"must give one number per example, shape \[B\], got {shape} for logits"):
            fmd.digest(architecture, start, inputs, consensus, key, **how)


def test_a_distance_of_the_callers_own_is_averaged_over_real_rows(key):
    """20 rows in batches of 16, without a step: the loss is the mean over all of them."""
    architecture, inputs = toys.linear(), toys.public(20).inputs
    training = fmd.TrainingConfig(batch_size=16, optimizer=optax.sgd(0.0))
    start, consensus = client(architecture, key, training), jnp.ones((20, toys.NUM_CLASSES))
    own = lambda logits, targets: optax.squared_error(logits, targets).sum(axis=-1)  # noqa: E731
    _, info = fmd.digest(architecture, start, inputs, consensus, key, training=training, distance=own)
    logits = np.asarray(inputs, np.float64) @ np.asarray(start.params["w"]) + np.asarray(start.params["b"])
    np.testing.assert_allclose(info.loss[0], ((logits - 1) ** 2).sum(-1).mean(), rtol=1e-5)


def test_any_integer_may_count_the_examples_of_padded_rows(key):
    """Batches of padding alone do not move the client, whatever the count is: with Adam, which moves by its memory."""
    architecture, training = toys.linear(), fmd.TrainingConfig(num_epochs=2, batch_size=8)
    start, alone = client(architecture, key, training), dataset(3, 13)
    expected = fmd.revisit(architecture, start, alone, key, training=training)
    for count in (int, np.int32, jnp.int32):
        private = padded(alone, 40, 1.0)._replace(num_examples=count(13))
        actual = fmd.revisit(architecture, start, private, key, training=training)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change", [lambda x: (x, x), lambda x: {"logits": x}, lambda x: x[:1], lambda x: x.mean(0), lambda x: x.astype(int)]
)
def test_a_network_that_gives_something_else_than_logits_is_refused_by_every_function(key, change):
    def apply(*arguments, **settings):
        logits, model_state = toys.linear().apply(*arguments, **settings)
        return change(logits), model_state

    architecture, start = toys.linear()._replace(apply=apply), client(toys.linear(), key)
    inputs, consensus = toys.public(9).inputs, jnp.ones((9, toys.NUM_CLASSES))
    for call in (
        lambda: fmd.score(architecture, start, inputs),
        lambda: fmd.digest(architecture, start, inputs, consensus, key, training=TRAINING),
        lambda: fmd.revisit(architecture, start, dataset(3, 9), key, training=TRAINING),
    ):
        with pytest.raises(ValueError, match=r"must give logits \[B, C\] alone"):
            call()


@pytest.mark.parametrize("penalty", [lambda params: jnp.ones(2), lambda params: {"l2": 0.0}])
def test_a_penalty_that_is_no_number_is_refused(key, penalty):
    architecture = toys.linear()._replace(penalty=penalty)
    with pytest.raises(ValueError, match="the penalty of an architecture must be one number"):
        fmd.revisit(architecture, client(toys.linear(), key), dataset(3, 9), key, training=TRAINING)
