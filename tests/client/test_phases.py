from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

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
    num_rows=st.integers(1, 40),
    missing=st.integers(0, 12),
    batch_size=st.integers(1, 50),
    num_epochs=st.integers(1, 3),
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


@given(num_examples=st.integers(1, 9), num_rows=st.integers(9, 13))
@settings(max_examples=6, deadline=None)
def test_padding_changes_nothing_neither_loss_nor_statistics_nor_optimizer(num_examples, num_rows):
    """A client among longer ones ends where it would alone: batches of padding alone do not even add momentum."""
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


def test_digest_and_revisit_have_a_memory_each(key):
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


def test_transfer_learning_is_public_then_private_and_forgets_the_public_optimizer(key):
    architecture, public, private = toys.linear(), toys.public(), dataset(3, 6)
    start = client(architecture, key)
    state, info = fmd.transfer_learn(
        architecture, start, public, private, key, public_training=TRAINING, private_training=TRAINING
    )
    key_public, key_private = jax.random.split(key)
    half, public_info = fmd.pretrain(architecture, start, public, key_public, training=TRAINING)
    chex.assert_trees_all_equal(half.revisit_opt_state, start.revisit_opt_state)
    whole, private_info = fmd.revisit(architecture, half, private, key_private, training=TRAINING)
    chex.assert_trees_all_equal((state, info), (whole, fmd.TransferInfo(public_info, private_info)))


def test_numpy_arrays_will_do(key):
    architecture = toys.linear()
    state = client(architecture, key)
    inputs, labels = toys.examples(3, 6)
    consensus = np.asarray(fmd.score(architecture, state, inputs))
    state, _ = fmd.digest(architecture, state, inputs, consensus, key, training=TRAINING)
    state, _ = fmd.pretrain(architecture, state, fmd.PublicDataset(inputs, labels), key, training=TRAINING)
    state, _ = fmd.revisit(architecture, state, fmd.PrivateDataset(inputs, labels, 6), key, training=TRAINING)
    assert fmd.evaluate(architecture, state, fmd.PrivateDataset(inputs, labels, 6)).accuracy >= 0


def test_without_public_labels_there_is_no_transfer_learning(key):
    with pytest.raises(ValueError, match="needs the labels of the public dataset"):
        fmd.pretrain(
            toys.linear(), client(toys.linear(), key), toys.public()._replace(labels=None), key, training=TRAINING
        )


def test_a_whole_digest_is_differentiable(key):
    """By the consensus, say, as learned consensus weights need it."""
    architecture, public = toys.linear(), toys.public(9)
    start = client(architecture, key)

    def after(consensus):
        training = toys.sgd(4, 1, shuffle=False)
        state, _ = fmd.digest(architecture, start, public.inputs, consensus, key, training=training, distance=fmd.kl)
        return jnp.sum(state.params["w"] ** 2)

    consensus = fmd.score(architecture, start, public.inputs) + 1.0 * jnp.arange(toys.NUM_CLASSES)[None]
    gradient = jax.grad(after)(consensus)
    assert jnp.isfinite(gradient).all()
    direction = jnp.sign(gradient)
    step = 1e-2
    numeric = (after(consensus + step * direction) - after(consensus - step * direction)) / (2 * step)
    np.testing.assert_allclose(numeric, jnp.sum(gradient * direction), rtol=5e-2)


@pytest.mark.parametrize("setting", [{"num_epochs": 0}, {"batch_size": 0}, {"batch_size": -3}, {"batch_size": 2.5}])
def test_a_training_that_cannot_run_is_refused(setting):
    with pytest.raises(ValueError, match=r"must be an integer of at least 1, got"):
        fmd.TrainingConfig(**setting)


@pytest.mark.parametrize("batch_size", [3, toys.NUM_CLASSES, 7])
@pytest.mark.parametrize(
    ("name", "distance", "shape"),
    [
        ("mean of all", lambda logits, targets: jnp.mean(jnp.abs(logits - targets)), r"\(\)"),
        ("per class", optax.squared_error, rf"\(\d+, {toys.NUM_CLASSES}\)"),
        (
            "wrong axis",
            lambda logits, targets: jnp.mean(jnp.abs(logits - targets), axis=0),
            rf"\({toys.NUM_CLASSES},\)",
        ),
        (
            "kept axis",
            lambda logits, targets: jnp.mean(jnp.abs(logits - targets), axis=1, keepdims=True),
            r"\(\d+, 1\)",
        ),
        ("two", lambda logits, targets: (fmd.mae(logits, targets),) * 2, "None"),
    ],
)
def test_a_distance_of_another_shape_than_one_number_per_example_is_refused(name, distance, shape, batch_size):
    """Also where a batch has as many rows as there are classes."""
    architecture, inputs, key = toys.linear(), toys.public(10).inputs, jax.random.key(0)
    start, consensus = client(architecture, key), jnp.ones((10, toys.NUM_CLASSES))
    with pytest.raises(ValueError, match=rf"must give one number per example, shape \[B\], got {shape} for logits"):
        fmd.digest(architecture, start, inputs, consensus, key, training=toys.sgd(batch_size, 1), distance=distance)


def test_a_distance_of_the_callers_own_is_averaged_over_real_rows(key):
    """20 rows in batches of 16, without a step: the loss is the mean over all of them."""
    architecture, inputs = toys.linear(), toys.public(20).inputs
    training = fmd.TrainingConfig(batch_size=16, optimizer=optax.sgd(0.0))
    start, consensus = client(architecture, key, training), jnp.ones((20, toys.NUM_CLASSES))
    own = lambda logits, targets: optax.squared_error(logits, targets).sum(axis=-1)  # noqa: E731
    _, info = fmd.digest(architecture, start, inputs, consensus, key, training=training, distance=own)
    logits = np.asarray(inputs, np.float64) @ np.asarray(start.params["w"]) + np.asarray(start.params["b"])
    np.testing.assert_allclose(info.loss[0], ((logits - 1) ** 2).sum(-1).mean(), rtol=1e-5)


@pytest.mark.parametrize("count", [int, np.int32, jnp.int32])
def test_any_integer_may_count_the_examples_of_padded_rows(key, count):
    """Batches of padding alone do not move the client, whatever the count is: with Adam, which moves by its memory."""
    architecture, training = toys.linear(), fmd.TrainingConfig(num_epochs=2, batch_size=8)
    start, alone = client(architecture, key, training), dataset(3, 13)
    expected, expected_info = fmd.revisit(architecture, start, alone, key, training=training)
    private = padded(alone, 40, 1.0)._replace(num_examples=count(13))
    actual, info = fmd.revisit(architecture, start, private, key, training=training)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(info, expected_info, rtol=1e-5)


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
