from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmd_jax.models import BatchNorm, Dropout, GroupNorm
from fedmd_jax.models.layers import random_bits


def normal(*shape):
    """Not `jax.random`: XLA:CPU takes seconds to compile its loops over small shapes."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@partial(jax.jit, static_argnames=("momentum", "epsilon"))
def batch_norm(x, mask=None, **settings):
    layer = BatchNorm(**settings)
    variables = layer.init(jax.random.key(0), x, train=False)
    y, new = layer.apply(variables, x, train=True, mask=mask, mutable="batch_stats")
    return y, new["batch_stats"]


def oracle(x, momentum=0.99, epsilon=1e-3):
    """Keras, slowly and in float64."""
    x = np.asarray(x, np.float64)
    values = x.reshape(-1, x.shape[-1])
    mean, var = values.mean(0), values.var(0)
    y = (x - mean) / np.sqrt(var + epsilon)
    return y, {"mean": (1 - momentum) * mean, "var": momentum + (1 - momentum) * values.var(0, ddof=1)}


@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 4, 3)])
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5, "epsilon": 0.1}])
def test_batch_norm_equals_keras(shape, settings):
    x = 2 + 3 * normal(*shape)
    for got, want in zip(batch_norm(x, **settings), oracle(x, **settings), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, want)


def test_batch_norm_with_garbage_in_the_padding():
    x = normal(6, 4, 4, 3)
    mask = jnp.array([True, False, True, True, False, True])
    expected = oracle(x[mask])
    for garbage in (1e30, jnp.inf, jnp.nan):
        y, stats = batch_norm(jnp.where(mask[:, None, None, None], x, garbage), mask)
        np.testing.assert_allclose(y[mask], expected[0], atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stats, expected[1])


@pytest.mark.parametrize("rows", [0, 1])
def test_batch_norm_of_very_few_rows_is_finite(rows):
    """No real row: nothing moves. One value per channel: no division by n - 1 = 0, as in TensorFlow."""
    x = normal(3, 2)

    def loss(x):
        y, stats = batch_norm(x, jnp.arange(3) < rows)
        return jnp.sum(y * y), (y, stats)

    gradients, (y, stats) = jax.grad(loss, has_aux=True)(x)
    assert jnp.isfinite(gradients).all()
    assert jnp.isfinite(y).all()
    if rows == 0:
        np.testing.assert_array_equal(stats["mean"], 0)
        np.testing.assert_array_equal(stats["var"], 1)
    else:
        np.testing.assert_allclose(stats["mean"], 0.01 * x[0], rtol=1e-5)
        np.testing.assert_allclose(stats["var"], 0.99)


def test_batch_norm_gradient():
    """Against the textbook formula in float64."""
    x, upstream = jnp.split(normal(100, 3), 2)
    got = jax.grad(lambda x: jnp.sum(upstream * batch_norm(x)[0]))(x)
    y, g = oracle(x)[0], np.asarray(upstream, np.float64)
    inverse = 1 / np.sqrt(np.asarray(x, np.float64).var(0) + 1e-3)
    want = inverse * (g - g.mean(0) - y * (g * y).mean(0))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_batch_norm_keeps_its_precision_far_from_zero(key):
    """With a moving mean near the data (after training) a mean of 1,000 deviations is no loss of precision."""
    x = 1000 + normal(200, 1)
    layer = BatchNorm()
    variables = layer.init(key, x, train=False)
    variables["batch_stats"]["mean"] = jnp.array([999.0])
    y, _ = layer.apply(variables, x, train=True, mutable="batch_stats")
    np.testing.assert_allclose(y, oracle(x)[0], atol=1e-4)


def test_batch_norm_statistics_are_float32_and_outputs_keep_their_type():
    y, stats = batch_norm(normal(4, 3).astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert stats["mean"].dtype == stats["var"].dtype == jnp.float32


def test_batch_norm_initialisation_moves_nothing(key):
    variables = BatchNorm().init(key, 5 + jnp.ones((4, 3)), train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)


def test_group_norm_takes_any_number_of_channels(key):
    for channels in (1, 6, 16):
        x = jax.ShapeDtypeStruct((2, 3, 3, channels), jnp.float32)
        y, _ = jax.eval_shape(partial(GroupNorm().init_with_output, train=True), key, x)
        assert y.shape == x.shape


@pytest.mark.parametrize(("rate", "num_bits"), [(0.2, 8), (0.9, 16)])
def test_dropout_rate_and_mean(rate, num_bits):
    x = jnp.ones((400, 500))
    y = Dropout(rate, num_bits=num_bits).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    dropped = float(jnp.mean(y == 0))
    tolerance = 0.5 / 2**num_bits + 5 * np.sqrt(rate * (1 - rate) / x.size)
    assert abs(dropped - rate) < tolerance
    assert abs(float(jnp.mean(y)) - 1) < 5 * np.sqrt(rate / (1 - rate) / x.size)
    kept = jnp.unique(y)
    assert len(kept) == 2  # zero, and the exact reciprocal of the quantised keep probability
    np.testing.assert_allclose(1 / kept[1], round((1 - rate) * 2**num_bits) / 2**num_bits, rtol=1e-6)


def test_dropout_is_element_wise_and_depends_on_the_key():
    x = jnp.ones((2, 5, 5, 3))
    a, b = (Dropout(0.5).apply({}, x, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1))
    assert (a != b).any()
    assert len(jnp.unique(a.reshape(-1, 3), axis=0)) > 2  # channels of a pixel differ, pixels of a channel differ
    assert (a[0] != a[1]).any()


def test_dropout_gradient_is_its_mask():
    x = jnp.linspace(1, 2, 30)
    drop = lambda x: Dropout(0.5).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})  # noqa: E731
    gradient = jax.grad(lambda x: jnp.sum(drop(x)))(x)
    np.testing.assert_allclose(gradient * x, drop(x), rtol=1e-6)


@pytest.mark.parametrize("rate", [0.001, 0.999])
def test_a_rate_above_zero_is_never_rounded_to_nothing_or_all(rate):
    x = jnp.ones((400, 500))
    y = Dropout(rate).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert 0 < jnp.mean(y == 0) < 1


def test_dropout_off():
    x = jnp.ones((2, 3))
    assert Dropout(0.5).apply({}, x, train=False) is x
    assert Dropout(0.0).apply({}, x, train=True) is x


@pytest.mark.parametrize("settings", [{"rate": -0.1}, {"rate": 1.0}, {"rate": 0.1, "num_bits": 32}])
def test_dropout_refuses(settings):
    with pytest.raises(ValueError, match="got"):
        Dropout(**settings)


@pytest.mark.parametrize(("num_bits", "dtype"), [(8, jnp.uint8), (16, jnp.uint16)])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7)])
def test_random_bits(num_bits, dtype, shape, key):
    bits = random_bits(key, shape, num_bits)
    assert bits.shape == shape
    assert bits.dtype == dtype


def test_random_bits_are_uniform(key):
    counts = np.bincount(random_bits(key, (256 * 400,), 8), minlength=256)
    assert abs(counts - 400).max() < 6 * 20  # six standard deviations
