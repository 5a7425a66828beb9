from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from fedmd_jax.models import avg_pool, choose_form, conv_general_dilated, native, patches, shifted

AXES = ("NHWC", "HWIO", "NHWC")
SHAPES = [  # image, kernel, strides, padding
    ((7, 7), (3, 3), (1, 1), "SAME"),
    ((8, 8), (3, 3), (2, 2), "VALID"),
    ((7, 8), (3, 3), (2, 2), "SAME"),
    ((7, 7), (2, 2), (2, 2), "VALID"),
    ((8, 7), (2, 2), (1, 1), "SAME"),
    ((6, 6), (1, 1), (2, 2), "SAME"),
    ((6, 7), (2, 3), (1, 2), ((1, 0), (0, 2))),
]


@pytest.mark.parametrize("form", [patches, shifted], ids=lambda form: form.__name__)
@pytest.mark.parametrize(("size", "kernel_size", "strides", "padding"), SHAPES)
def test_equals_lax(form, size, kernel_size, strides, padding, key):
    """Values and both gradients, with the weights of three clients vmapped over shared images."""
    key_x, key_kernel = jax.random.split(key)
    x = jax.random.normal(key_x, (2, *size, 3))
    kernels = jax.random.normal(key_kernel, (3, *kernel_size, 3, 4))

    def values_and_gradients(conv):
        def loss(kernel, x):
            y = conv(x, kernel, strides, padding, dimension_numbers=AXES)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.vmap(jax.grad(loss, (0, 1), has_aux=True), (0, None)))(kernels, x)

    ours = partial(conv_general_dilated, choose=lambda *shapes: form)
    (got, got_y), (want, want_y) = values_and_gradients(ours), values_and_gradients(lax.conv_general_dilated)
    assert got_y.shape == want_y.shape
    for a, b in zip((got_y, *got), (want_y, *want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"rhs_dilation": (2, 2), "dimension_numbers": AXES},
        {"lhs_dilation": (2, 2), "dimension_numbers": AXES},
        {"feature_group_count": 2, "dimension_numbers": AXES},
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
        {},
    ],
)
def test_all_else_goes_to_lax(settings, key):
    kernel_inputs = 4 // settings.get("feature_group_count", 1)
    axes = settings.get("dimension_numbers", ("NCHW",))[0]
    x = jax.random.normal(key, (2, 6, 6, 4) if axes == "NHWC" else (2, 4, 6, 6))
    kernel = jax.random.normal(key, (3, 3, kernel_inputs, 2) if axes == "NHWC" else (2, kernel_inputs, 3, 3))
    got = conv_general_dilated(x, kernel, (1, 1), "SAME", choose=None, **settings)
    want = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **settings)
    np.testing.assert_array_equal(got, want)


def test_other_ranks_go_to_lax(key):
    x = jax.random.normal(key, (2, 6, 4))
    layer = nn.Conv(3, (3,), conv_general_dilated=conv_general_dilated)
    assert layer.init_with_output(key, x)[0].shape == (2, 6, 3)


def test_an_image_smaller_than_the_kernel_gives_an_empty_result():
    x, kernel = jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1))
    for form in (native, patches, shifted):
        y = conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=AXES, choose=lambda *_, f=form: f)
        assert y.shape == (1, 0, 0, 1)


def test_choose_form():
    few, many = ((64, 28, 28, 1), (3, 3, 1, 32)), ((64, 28, 28, 32), (3, 3, 32, 64))
    assert choose_form(*few, platform="cpu") is shifted
    assert choose_form(*many, platform="cpu") is patches
    assert choose_form(*many, platform="gpu") is patches
    assert choose_form(*many, platform="tpu") is native


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 0), (0, 1))])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("size", [(6, 7), (7, 6)])
def test_avg_pool_equals_flax(size, strides, padding, key):
    x = jax.random.normal(key, (2, *size, 3))
    got = avg_pool(x, (2, 2), strides, padding)
    want = nn.avg_pool(x, (2, 2), strides, padding, count_include_pad=False)
    np.testing.assert_allclose(got, want, atol=1e-6)
