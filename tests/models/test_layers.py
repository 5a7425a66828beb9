from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmd_jax.models import (
    BatchNorm,
    ConvBatchNorm,
    Dropout,
    GroupNorm,
    ReLUDropout,
    conv_general_dilated,
    layers,
    native,
)
from fedmd_jax.models.layers import keep_mask, write_out


def normal(*shape, seed=0):
    """Not `jax.random`: XLA:CPU takes seconds to compile its loops over small shapes."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


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


@pytest.mark.parametrize("rate", [0.001, 0.2, 0.9, 0.999])
def test_dropout_rate_and_mean(rate):
    """Also of rates close to zero and to one, which are not rounded to nothing or all."""
    x = jnp.ones((400, 500))
    y = Dropout(rate).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert abs(float(jnp.mean(y == 0)) - rate) < 5 * np.sqrt(rate * (1 - rate) / x.size)
    assert abs(float(jnp.mean(y)) - 1) < 5 * np.sqrt(rate / (1 - rate) / x.size)
    assert 0 < jnp.mean(y == 0) < 1


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


def test_dropout_off():
    x = jnp.ones((2, 3))
    assert Dropout(0.5).apply({}, x, train=False) is x
    assert Dropout(0.0).apply({}, x, train=True) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0])
@pytest.mark.parametrize("layer", [Dropout, ReLUDropout])
def test_dropout_refuses(layer, rate):
    with pytest.raises(ValueError, match="got"):
        layer(rate)


@pytest.mark.parametrize("train", [False, True])
def test_relu_dropout_is_dropout_of_a_relu(train):
    x = normal(6, 5)
    rngs = {"dropout": jax.random.key(0)}

    def both(x):
        return Dropout(0.3, name="same").apply({}, jax.nn.relu(x), train=train, rngs=rngs)

    def one(x):
        return ReLUDropout(0.3, name="same").apply({}, x, train=train, rngs=rngs)

    for got, want in zip(jax.vjp(one, x), jax.vjp(both, x), strict=True):
        got, want = (f(jnp.ones_like(x))[0] if callable(f) else f for f in (got, want))
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_large_arrays_are_written_out_with_the_same_numbers(monkeypatch):
    x, words = normal(6, 5, 3), jnp.array([1, 2], jnp.uint32)
    fn = lambda x, start: jnp.where(keep_mask(words, x.shape, 0.5, start=start), x, 0.0)  # noqa: E731
    want = fn(x, 0)
    monkeypatch.setattr(layers, "_LARGE", 1)
    assert "scan" in str(jax.make_jaxpr(lambda x: write_out(fn, x))(x))
    np.testing.assert_array_equal(jax.jit(lambda x: write_out(fn, x))(x), want)
    stacked = jnp.stack([x, 2 * x])
    np.testing.assert_array_equal(jax.vmap(lambda x: write_out(fn, x))(stacked), jnp.stack([want, 2 * want]))
    odd = x[:5]
    np.testing.assert_array_equal(write_out(fn, odd), fn(odd, 0))


def keys(num_keys):
    return jax.random.key_data(jax.random.split(jax.random.key(0), num_keys))


def test_keep_masks_are_fair_and_independent():
    """Of elements, of their neighbours in every direction, of keys, and of keys that differ in one bit."""
    shape, deviations = (200, 30, 20), 5
    drawn = jax.vmap(lambda words: keep_mask(words, shape, 0.5))(keys(2))
    one_bit = keep_mask(keys(2)[0] ^ jnp.array([0, 1], jnp.uint32), shape, 0.5)
    signs = 2.0 * np.asarray(drawn[0]) - 1
    others = [np.roll(signs, 1, axis) for axis in range(3)] + [2.0 * np.asarray(m) - 1 for m in (drawn[1], one_bit)]
    bound = deviations / np.sqrt(signs.size)
    assert abs(signs.mean()) < bound
    for axis in range(3):
        assert abs(signs.mean(axis)).max() < deviations / np.sqrt(shape[axis])
    for other in others:
        assert abs((signs * other).mean()) < bound


def test_keep_mask_of_a_part_is_part_of_the_mask():
    words = keys(1)[0]
    np.testing.assert_array_equal(keep_mask(words, (3, 4, 5), 0.3, start=2 * 20), keep_mask(words, (5, 4, 5), 0.3)[2:])


class TestConvBatchNorm:
    """Against a convolution and a `BatchNorm` one after the other."""

    @staticmethod
    def folded(variables, x, kernel, bias, **how):
        layer = ConvBatchNorm()
        how = {"strides": (2, 1), "padding": "SAME", "conv": conv_general_dilated, **how}
        if not how["train"]:
            return layer.apply(variables, x, kernel, bias, **how), variables["batch_stats"]
        y, new = layer.apply(variables, x, kernel, bias, **how, mutable="batch_stats")
        return y, new["batch_stats"]

    @staticmethod
    def plain(variables, x, kernel, bias, *, train, mask):
        x = jax.lax.conv_general_dilated(x, kernel, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = x + bias.reshape(1, 1, 1, -1)
        if not train:
            return BatchNorm().apply(variables, x, train=False), variables["batch_stats"]
        y, new = BatchNorm().apply(variables, x, train=True, mask=mask, mutable="batch_stats")
        return y, new["batch_stats"]

    @pytest.mark.parametrize("train", [False, True])
    @pytest.mark.parametrize("num_channels", [5, 1, 3], ids=["from its outputs", "from its windows", "in color"])
    @pytest.mark.parametrize("num_real", [None, 3, 0])
    def test_agrees(self, train, num_channels, num_real):
        num_filters = 4
        x, kernel, upstream = (
            normal(5, 6, 4, num_channels),
            normal(3, 3, num_channels, num_filters, seed=1),
            normal(5, 3, 4, num_filters, seed=2),
        )
        mask = None if num_real is None else jnp.arange(5) < num_real
        if mask is not None:
            upstream = upstream * mask.reshape(-1, 1, 1, 1)
        bias, scale, offset, mean = (normal(num_filters, seed=seed) for seed in (3, 4, 5, 6))
        params = {"scale": scale, "bias": offset}
        stats = {"mean": mean, "var": 1 + mean**2}

        def run(fn, kernel, params, bias):
            y, new = fn({"params": params, "batch_stats": stats}, x, kernel, bias, train=train, mask=mask)
            return jnp.sum(y * upstream), (y * (1 if mask is None else mask.reshape(-1, 1, 1, 1)), new)

        found = [
            jax.value_and_grad(partial(run, fn), argnums=(0, 1, 2), has_aux=True)(kernel, params, bias)
            for fn in (self.folded, self.plain)
        ]
        jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4), *found)

    def test_any_convolution_will_do(self):
        x, kernel, zeros, ones = normal(5, 6, 4, 1), normal(3, 3, 1, 12, seed=1), jnp.zeros(12), jnp.ones(12)
        variables = {"params": {"scale": ones, "bias": zeros}, "batch_stats": {"mean": zeros, "var": ones}}
        want, _ = self.folded(variables, x, kernel, zeros, train=True)
        got, _ = self.folded(
            variables, x, kernel, zeros, train=True, conv=partial(conv_general_dilated, choose=lambda *_: native)
        )
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("train", [False, True])
    @pytest.mark.parametrize("num_filters", [3, 12])
    @pytest.mark.parametrize("conv", [conv_general_dilated, jax.lax.conv_general_dilated])
    def test_takes_half_precision_and_integers(self, train, num_filters, conv):
        x, kernel = 4 * normal(5, 6, 4, 1), normal(3, 3, 1, num_filters, seed=1)
        zeros, ones = jnp.zeros(num_filters), jnp.ones(num_filters)
        variables = {"params": {"scale": ones, "bias": zeros}, "batch_stats": {"mean": zeros, "var": ones}}
        for dtype in (jnp.bfloat16, jnp.float16, jnp.int32):
            want = self.folded(variables, x.astype(dtype).astype(jnp.float32), kernel, zeros, train=train)
            got = self.folded(variables, x.astype(dtype), kernel, zeros, train=train, conv=conv)
            jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4), got, want)
