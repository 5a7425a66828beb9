"""What every Architecture promises, whatever library or layers are behind it."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fedmd_jax.models import CNN, MLP, BatchNorm, ResNet, architecture_from_linen, architecture_from_nnx

BATCH, REAL = 6, 4
MASK = jnp.arange(BATCH) < REAL


class LinenNet(linen.Module):
    """Knows nothing of masks."""

    rate: float

    @linen.compact
    def __call__(self, x, train):
        x = linen.Conv(4, (3, 3), strides=2)(x)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = linen.relu(x).reshape(x.shape[0], -1)
        x = BatchNorm()(linen.Dense(6)(x), train=train)
        x = linen.Dropout(self.rate, deterministic=not train)(x)
        return linen.Dense(3)(x)


class NnxNet(nnx.Module):
    """Knows nothing of masks, nor of train."""

    def __init__(self, rate, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        layers = [nnx.Linear(4 * 4 * 4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)]
        self.layers = nnx.List(layers) if hasattr(nnx, "List") else layers  # flax 0.11
        self.offset = jnp.ones((1, 3))  # an array that is no Variable

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = self.dropout(x.reshape(x.shape[0], -1))
        for layer in self.layers:
            x = layer(x)
        return x + self.offset


class NnxPlain(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x, train):
        assert isinstance(train, bool)
        return self.linear(x.reshape(x.shape[0], -1))


# name -> dropout rate -> architecture; cached, so that tests share the compiled programs
STOCHASTIC = {
    "linen": cache(lambda rate: architecture_from_linen(LinenNet(rate))),
    "nnx": cache(lambda rate: architecture_from_nnx(lambda rngs: NnxNet(rate, rngs))),
    "cnn": cache(lambda rate: architecture_from_linen(CNN((2, 3), 3, rate))),
}
DETERMINISTIC = {
    "nnx-plain": cache(lambda rate: architecture_from_nnx(NnxPlain)),
    "mlp": cache(lambda rate: architecture_from_linen(MLP((4,), 3))),
    "resnet": cache(lambda rate: architecture_from_linen(ResNet(1, 3, filters=(2,)))),
}
MAKERS = STOCHASTIC | DETERMINISTIC


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, 8, 8, 1)), jnp.float32)


@partial(jax.jit, static_argnums=0)
def init(architecture, keys, images):
    """(params, model_state) of a client per key."""
    return jax.vmap(architecture.init, (0, None))(keys, images)


def init_one(architecture, key, images):
    return jax.tree.map(lambda leaf: leaf[0], init(architecture, jax.random.split(key, 2), images))


@partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(architecture, params, model_state, images, *, train, key=None):
    return architecture.apply(params, model_state, images, train=train, key=key)


@partial(jax.jit, static_argnums=0)
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
    params, model_state = init_one(architecture, key, images)
    padded = images.at[REAL:].set(1e4)
    gradients, state, logits = train_step(architecture, params, model_state, padded, MASK, key)
    expected = train_step(architecture, params, model_state, images[:REAL], None, key)
    chex.assert_trees_all_close((gradients, state, logits[:REAL]), expected, atol=1e-5, rtol=1e-5)


def test_a_batch_of_padding_changes_nothing(make, images, key):
    architecture = make(0.0)
    params, model_state = init_one(architecture, key, images)
    _, state, logits = train_step(architecture, params, model_state, images, jnp.zeros(BATCH, bool), key)
    chex.assert_trees_all_equal(state, model_state)
    assert jnp.isfinite(logits).all()


def test_inference_needs_no_key_and_keeps_the_state(make, images, key):
    architecture = make(0.5)
    params, model_state = init_one(architecture, key, images)
    logits, state = apply(architecture, params, model_state, images, train=False)
    assert logits.shape == (BATCH, 3)
    chex.assert_trees_all_equal(state, model_state)
    others, _ = apply(architecture, params, model_state, images.at[1:].set(7), train=False)
    chex.assert_trees_all_close(logits[0], others[0], atol=1e-6)  # rows are independent


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_client_trains_among_others_as_alone(name, images, key):
    """Training steps under vmap and scan equal a loop of steps of one client."""
    architecture = STOCHASTIC[name](0.0)
    keys = jax.random.split(key, (2, 3))
    clients = init(architecture, keys[:, 0], images)
    assert any((leaf[0] != leaf[1]).any() for leaf in jax.tree.leaves(clients))

    def step(client, key):
        gradients, model_state, _ = train_step(architecture, *client, images, MASK, key)
        return (jax.tree.map(lambda p, g: p - 1e-2 * g, client[0], gradients), model_state), None

    together, _ = jax.jit(jax.vmap(partial(jax.lax.scan, step)))(clients, keys)
    chex.assert_trees_all_equal_shapes_and_dtypes(together, clients)
    alone = jax.tree.map(lambda leaf: leaf[1], clients)
    for step_key in keys[1]:
        alone, _ = step(alone, step_key)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[1], together), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_dropout_depends_on_the_key_and_training_moves_the_state(name, images, key):
    architecture = STOCHASTIC[name](0.5)
    params, model_state = init_one(architecture, key, images)
    train = partial(apply, architecture, params, model_state, images, train=True)
    key_a, key_b = jax.random.split(key)
    logits, state = train(key=key_a)
    chex.assert_trees_all_equal(logits, train(key=key_a)[0])
    assert (logits != train(key=key_b)[0]).any()
    moved = jax.tree.map(lambda new, old: (new != old).any(), state, model_state)
    assert all(jax.tree.leaves(moved))
