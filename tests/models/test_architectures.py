"""What every Architecture promises, whatever library or layers are behind it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fedmd_jax.models import CNN, MLP, BatchNorm, GroupNorm, ResNet, architecture_from_linen, architecture_from_nnx

BATCH, REAL = 6, 4


class LinenNet(linen.Module):
    """Knows nothing of masks."""

    rate: float
    momentum: float = 0.9

    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(4, (3, 3), strides=2)(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)
        x = linen.relu(x).reshape(x.shape[0], -1)
        x = BatchNorm()(linen.Dense(6)(x), train=train)
        x = linen.Dropout(self.rate, deterministic=not train)(x)
        return linen.Dense(3)(x)


class LinenPlain(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(x.reshape(x.shape[0], -1))


class NnxNet(nnx.Module):
    """Knows nothing of masks, nor of train."""

    def __init__(self, rate, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6 * 6 * 4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)])
        self.offset = jnp.ones((1, 3))  # an array that is no Variable

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = self.dropout(x.reshape(x.shape[0], -1))
        for layer in self.layers:
            x = layer(x)
        return x + self.offset


class NnxPlain(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(144, 3, rngs=rngs)

    def __call__(self, x, train, mask=None):
        assert isinstance(train, bool)
        return self.linear(x.reshape(x.shape[0], -1))


# name -> dropout rate -> architecture
STOCHASTIC = {
    "linen": lambda rate: architecture_from_linen(LinenNet(rate)),
    "nnx": lambda rate: architecture_from_nnx(lambda rngs: NnxNet(rate, rngs)),
    "cnn": lambda rate: architecture_from_linen(CNN((2, 3, 4), 3, rate)),
}
DETERMINISTIC = {
    "linen-plain": lambda rate: architecture_from_linen(LinenPlain()),
    "nnx-plain": lambda rate: architecture_from_nnx(NnxPlain),
    "mlp": lambda rate: architecture_from_linen(MLP((4,), 3)),
    "resnet-batch": lambda rate: architecture_from_linen(ResNet(1, 3, filters=(2, 4))),
    "resnet-group": lambda rate: architecture_from_linen(ResNet(1, 3, filters=(2, 4), norm=GroupNorm)),
}
MAKERS = STOCHASTIC | DETERMINISTIC


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(1), (BATCH, 12, 12, 1))


def train_step(architecture, params, model_state, images, mask, key):
    """Gradients, new state and logits of a mean over the real rows."""

    def loss(params):
        logits, state = architecture.apply(params, model_state, images, train=True, mask=mask, key=key)
        weights = jnp.ones(len(images)) if mask is None else mask.astype(jnp.float32)
        return jnp.sum(weights[:, None] * jnp.square(logits - 1)) / jnp.sum(weights), (state, logits)

    gradients, (state, logits) = jax.grad(loss, has_aux=True)(params)
    return gradients, state, logits


def test_masked_equals_sliced(make, images, key):
    """Padding rows, full of garbage, change neither statistics nor logits nor gradients of the real rows."""
    architecture = make(0.0)
    params, model_state = jax.jit(architecture.init)(key, images)
    step = jax.jit(train_step, static_argnums=0)
    padded = images.at[REAL:].set(1e4)
    mask = jnp.arange(BATCH) < REAL
    gradients, state, logits = step(architecture, params, model_state, padded, mask, key)
    expected = step(architecture, params, model_state, images[:REAL], None, key)
    chex.assert_trees_all_close((gradients, state, logits[:REAL]), expected, atol=1e-5, rtol=1e-5)


def test_a_batch_of_padding_changes_nothing(make, images, key):
    architecture = make(0.0)
    params, model_state = jax.jit(architecture.init)(key, images)
    step = jax.jit(train_step, static_argnums=0)
    _, state, logits = step(architecture, params, model_state, images, jnp.zeros(BATCH, bool), key)
    chex.assert_trees_all_equal(state, model_state)
    assert jnp.isfinite(logits).all()


def test_inference_needs_no_key_and_keeps_the_state(make, images, key):
    architecture = make(0.5)
    params, model_state = jax.jit(architecture.init)(key, images)
    apply = jax.jit(lambda images: architecture.apply(params, model_state, images, train=False))
    logits, state = apply(images)
    assert logits.shape == (BATCH, 3)
    chex.assert_trees_all_equal(state, model_state)
    np.testing.assert_allclose(logits[:2], apply(images[:2])[0], atol=1e-5)  # rows are independent


def test_clients_are_vmapped_and_steps_are_scanned(make, images, key):
    """init and training steps under vmap and scan; a client trains as it does alone."""
    architecture = make(0.5)
    params, model_state = jax.jit(jax.vmap(architecture.init, (0, None)))(jax.random.split(key, 2), images)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves((params, model_state)))
    assert any((leaf[0] != leaf[1]).any() for leaf in jax.tree.leaves(params))

    def train(params, model_state, keys):
        def step(carry, key):
            params, model_state = carry
            mask = jnp.arange(BATCH) < REAL
            gradients, model_state, _ = train_step(architecture, params, model_state, images, mask, key)
            return (jax.tree.map(lambda p, g: p - 1e-2 * g, params, gradients), model_state), None

        return jax.lax.scan(step, (params, model_state), keys)[0]

    keys = jax.random.split(key, (2, 3))
    together = jax.jit(jax.vmap(train))(params, model_state, keys)
    chex.assert_trees_all_equal_shapes_and_dtypes(together, (params, model_state))
    second = jax.tree.map(lambda leaf: leaf[1], (params, model_state, keys))
    chex.assert_trees_all_close(jax.jit(train)(*second), jax.tree.map(lambda leaf: leaf[1], together), atol=1e-4)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_dropout_depends_on_the_key(name, images, key):
    architecture = STOCHASTIC[name](0.5)
    params, model_state = jax.jit(architecture.init)(key, images)
    apply = jax.jit(lambda key: architecture.apply(params, model_state, images, train=True, key=key)[0])
    key_a, key_b = jax.random.split(key)
    chex.assert_trees_all_equal(apply(key_a), apply(key_a))
    assert (apply(key_a) != apply(key_b)).any()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_training_moves_the_state(name, images, key):
    architecture = STOCHASTIC[name](0.5)
    params, model_state = jax.jit(architecture.init)(key, images)
    _, state, _ = jax.jit(train_step, static_argnums=0)(architecture, params, model_state, images, None, key)
    moved = jax.tree.map(lambda new, old: (new != old).any(), state, model_state)
    assert sum(jax.tree.leaves(moved)) >= 2
