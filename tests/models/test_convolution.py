from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from fedmd_jax.models import avg_pool, blocked, choose_form, conv_general_dilated, native, patches, shifted

AXES = ("NHWC", "HWIO", "NHWC")
SHAPES = [  # image, kernel, strides, padding
    ((7, 6), (3, 3), (1, 1), "SAME"),
    ((8, 7), (3, 3), (2, 2), "VALID"),
    ((8, 7), (2, 2), (2, 2), "SAME"),
    ((6, 7), (1, 1), (2, 2), "VALID"),
    ((5, 6), (2, 3), (1, 2), ((1, 0), (0, 2))),
    ((4, 8), (3, 3), (1, 1), "SAME"),  # four outputs at once
    ((4, 9), (2, 3), (2, 2), ((0, 0), (1, 1))),  # and two apart
    ((3, 6), (1, 3), (1, 1), ((0, 0), (1, 0))),  # five: a prime number
]


def normal(*shape):
    """Not `jax.random`: XLA:CPU takes seconds to compile its loops over small shapes."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("size", "kernel_size", "strides", "padding"), SHAPES)
def test_equals_lax(size, kernel_size, strides, padding):
    """Values and both gradients, with the weights of three clients vmapped over shared images."""
    x = normal(2, *size, 3)
    kernels = normal(3, *kernel_size, 3, 4)

    def values_and_gradients(conv, kernel, x):
        def loss(kernel, x):
            y = conv(x, kernel, strides, padding, dimension_numbers=AXES)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, (0, 1), has_aux=True)(kernel, x)

    ours = (partial(conv_general_dilated, choose=lambda *_, form=form: form) for form in (patches, blocked, shifted))
    convs = [lax.conv_general_dilated, *ours]
    run = jax.jit(lambda *args: [jax.vmap(partial(values_and_gradients, conv), (0, None))(*args) for conv in convs])
    want, *results = run(kernels, x)
    for got in results:
        chex.assert_trees_all_close(got, want, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"rhs_dilation": (2, 2), "dimension_numbers": AXES},
        {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1)), "dimension_numbers": AXES},
        {"feature_group_count": 2, "dimension_numbers": AXES},
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
        {},
    ],
)
def test_all_else_goes_to_lax(settings):
    settings = {"padding": "SAME"} | settings
    kernel_inputs = 4 // settings.get("feature_group_count", 1)
    axes = settings.get("dimension_numbers", ("NCHW",))[0]
    x = jnp.ones((2, 6, 6, 4) if axes == "NHWC" else (2, 4, 6, 6))
    kernel = jnp.ones((3, 3, kernel_inputs, 2) if axes == "NHWC" else (2, kernel_inputs, 3, 3))
    ours = partial(conv_general_dilated, window_strides=(1, 1), choose=None, **settings)
    theirs = partial(lax.conv_general_dilated, window_strides=(1, 1), **settings)
    assert str(jax.make_jaxpr(ours)(x, kernel)) == str(jax.make_jaxpr(theirs)(x, kernel))


def test_other_ranks_go_to_lax(key):
    x = normal(2, 6, 4)
    layer = nn.Conv(3, (3,), conv_general_dilated=conv_general_dilated)
    assert jax.eval_shape(layer.init_with_output, key, x)[0].shape == (2, 6, 3)


def test_a_kernel_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match=r"window of \(3, 3\) does not fit into a padded image of \(2, 2\)"):
        conv_general_dilated(jnp.ones((1, 2, 2, 1)), jnp.ones((3, 3, 1, 1)), (2, 2), "VALID", dimension_numbers=AXES)


def test_choose_form():
    few, many = ((64, 28, 28, 1), (3, 3, 1, 32)), ((64, 28, 28, 32), (3, 3, 32, 64))
    assert choose_form(*few, platform="cpu") is blocked
    assert choose_form(*many, platform="cpu") is patches
    assert choose_form(*many, platform="gpu") is patches
    assert choose_form(*many, platform="tpu") is native


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((2, 2), (1, 1), "SAME"),
        ((2, 2), (2, 2), "VALID"),
        ((2, 2), (2, 1), ((1, 0), (0, 1))),
        ((3, 2), (2, 3), "SAME"),
        ((1, 2), (3, 2), "VALID"),
    ],
)
def test_avg_pool_equals_flax(window, strides, padding):
    """Values, and the gradients of something that is not symmetric."""
    x = normal(2, 6, 7, 3)
    ours = partial(avg_pool, window=window, strides=strides, padding=padding)

    def theirs(x):
        return nn.avg_pool(x, window, strides, padding, count_include_pad=False)

    def value_and_gradient(pool, x):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(pool(x)) * jnp.cos(jnp.arange(3.0))[None, None, None]))(x)

    got, want = jax.jit(lambda x: [(pool(x), *value_and_gradient(pool, x)) for pool in (ours, theirs)])(x)
    chex.assert_trees_all_close(got, want, atol=1e-5)
