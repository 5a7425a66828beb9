from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import linen as nn
from hypothesis import example, given, settings, strategies as st
from jax import lax
from jax.sharding import PartitionSpec

import fedmd_jax as fmd
from fedmd_jax.models import (
    avg_pool,
    blocked,
    choose_form,
    conv_general_dilated,
    convolution,
    native,
    native_or_patches,
    patches,
    patches_in_parts,
    shifted,
)

AXES = ("NHWC", "HWIO", "NHWC")


def parts_of_one(x, kernel, strides, pads, precision=None):
    """`patches_in_parts` as for large images: one by one."""
    with mock.patch.object(convolution, "rows_per_part", return_value=1):
        return patches_in_parts(x, kernel, strides, pads, precision)


FORMS = (patches, patches_in_parts, parts_of_one, blocked, shifted, native, native_or_patches)


class Windows(NamedTuple):
    """The spatial sizes of a convolution or a pooling."""

    size: tuple[int, int]
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: Any


@st.composite
def windows(draw, largest):
    """Windows up to `largest` that fit, each with a real pixel, and images that end anywhere between two steps."""
    window, strides, more = (
        draw(st.tuples(st.integers(low, high), st.integers(low, high))) for low, high in ((1, largest), (1, 3), (0, 6))
    )
    pads = (draw(st.tuples(*[st.integers(0, length - 1)] * 2)) for length in window)
    padding = draw(st.sampled_from(["SAME", "VALID", tuple(pads)]))
    return Windows(tuple(map(sum, zip(window, more, strict=True))), window, strides, padding)


def normal(*shape, dtype=np.float32):
    """Not `jax.random`: XLA:CPU takes seconds to compile its loops over small shapes."""
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


MAPPED = st.sampled_from([(0, 0), (0, None), (None, 0), (None, None)])


@given(windows(3), st.integers(1, 9), st.integers(1, 4), MAPPED)
@example(Windows((4, 8), (3, 3), (1, 1), "SAME"), 3, 4, (None, 0))  # blocks of four outputs
@example(Windows((4, 9), (2, 3), (2, 2), ((0, 0), (1, 1))), 3, 4, (None, 0))  # the same, two apart
@example(Windows((3, 6), (1, 3), (1, 1), ((0, 0), (1, 0))), 3, 4, (None, 0))  # five outputs: a prime number
# The compiler of jaxlib 0.7.2 aborts for some shapes, so they are the same in every run.
@settings(max_examples=12, deadline=None, derandomize=True)
def test_equals_lax(shape, num_channels, num_filters, axes):
    """Values and both gradients in float64, with images and kernels of three clients, or shared ones."""
    clients = [() if axis is None else (3,) for axis in axes]
    x = normal(*clients[0], 2, *shape.size, num_channels, dtype=np.float64)
    kernel = normal(*clients[1], *shape.window, num_channels, num_filters, dtype=np.float64)

    def values_and_gradients(conv, x, kernel):
        def loss(x, kernel):
            y = conv(x, kernel, shape.strides, shape.padding, dimension_numbers=AXES)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, (0, 1), has_aux=True)(x, kernel)

    ours = (partial(conv_general_dilated, choose=lambda *_, form=form: form) for form in FORMS)
    mapped = [
        jax.vmap(partial(values_and_gradients, conv), axes, axis_size=3) for conv in (lax.conv_general_dilated, *ours)
    ]
    with toys.float64():
        want, *results = jax.jit(lambda *args: [run(*args) for run in mapped])(x, kernel)
        for got in results:
            chex.assert_trees_all_close(got, want, rtol=0, atol=1e-10)


STRIDES, PADS = (2, 1), ((1, 0), (0, 1))


def convolve(form, x, kernel):
    return form(x, kernel, STRIDES, PADS, None)


def loss(form, x, kernel):
    return jnp.sum(jnp.sin(convolve(form, x, kernel)))


def gradients(form, x, kernel):
    return jax.grad(partial(loss, form), (0, 1))(x, kernel)


def train(form, x, kernel):
    """Steps of gradient descent on both in a scan."""

    def step(both, _):
        return jax.tree.map(lambda a, by_a: a - 0.1 * by_a, both, gradients(form, *both)), None

    return lax.scan(step, (x, kernel), None, length=2)[0]


def with_remat(form, x, kernel):
    return jax.grad(jax.checkpoint(partial(loss, form)), (0, 1))(x, kernel)


def on_mesh(fn, x, kernel):
    """`fn` on the shares of the devices, whose leading axis is that of the clients."""
    clients = PartitionSpec("clients")
    mesh = fmd.client_mesh(len(kernel))
    return jax.shard_map(fn, mesh=mesh, in_specs=clients, out_specs=clients, check_vma=False)(x, kernel)


def alone(fn, *share):
    """`fn` of a group of one, which is not vmapped."""
    return jax.tree.map(lambda leaf: leaf[None], fn(*(leaf[0] for leaf in share)))


# Functions of a form, images [K, B, H, W, I] and kernels [K, h, w, I, O], or of those of the first client.
NATIVE = {
    "jit": lambda form, x, kernel: convolve(form, x[0], kernel[0]),
    "grad": lambda form, x, kernel: gradients(form, x[0], kernel[0]),
    "grad in a scan": lambda form, x, kernel: train(form, x[0], kernel[0]),
    "remat": lambda form, x, kernel: with_remat(form, x[0], kernel[0]),
    "vmap over images": lambda form, x, kernel: jax.vmap(partial(convolve, form), (0, None))(x, kernel[0]),
    "map over clients": lambda form, x, kernel: lax.map(lambda both: train(form, *both), (x, kernel)),
    "a group of one on a mesh": lambda form, x, kernel: on_mesh(partial(alone, partial(train, form)), x, kernel),
}
PATCHES = {
    "vmap": lambda form, x, kernel: jax.vmap(partial(convolve, form))(x, kernel),
    "vmap over kernels": lambda form, x, kernel: jax.vmap(partial(convolve, form), (None, 0))(x[0], kernel),
    "vmap of grad in a scan": lambda form, x, kernel: jax.vmap(partial(train, form))(x, kernel),
    "vmap of remat": lambda form, x, kernel: jax.vmap(partial(with_remat, form))(x, kernel),
    "vmap of vmap": lambda form, x, kernel: jax.vmap(jax.vmap(partial(train, form)))(x[None], kernel[None]),
    "vmap over kernels of vmap over images": lambda form, x, kernel: jax.vmap(
        jax.vmap(partial(convolve, form), (0, None)), (None, 0)
    )(x, kernel),
    "vmap on a mesh": lambda form, x, kernel: on_mesh(jax.vmap(partial(train, form)), x, kernel),
}


@pytest.mark.parametrize("name", NATIVE | PATCHES)
def test_a_vmapped_kernel_is_a_product_and_another_a_convolution(name):
    """The operations in the program before compilation, and its results."""
    program, operation = (NATIVE[name], "convolution") if name in NATIVE else (PATCHES[name], "dot_general")
    arrays = normal(2, 3, 5, 4, 2), normal(2, 3, 2, 2, 3)
    lowered = jax.jit(partial(program, native_or_patches)).lower(*arrays)
    found = {each for each in ("convolution", "dot_general") if f"stablehlo.{each}" in lowered.as_text()}
    assert found == {operation}
    # In jax 0.7.2 convolutions on a mesh have no gradients under vmap. `shifted` is checked above.
    want = jax.jit(partial(program, shifted if name == "vmap on a mesh" else native))(*arrays)
    chex.assert_trees_all_close(lowered.compile()(*arrays), want, atol=1e-4)


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
    assert choose_form(*many, platform="cpu") is patches_in_parts
    assert choose_form(*few, platform="gpu") is choose_form(*many, platform="gpu") is native_or_patches
    assert choose_form(*many, platform="tpu") is native


ON_CPU = jax.default_backend() == "cpu"


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "strides", "pads", "rows"),
    [
        ((256, 28, 28, 32), (3, 3, 32, 64), (2, 2), ((0, 0), (0, 0)), 8),  # 13 * 13 * 288 elements each
        ((32, 28, 28, 16), (3, 3, 16, 16), (1, 1), ((1, 1), (1, 1)), 4),  # 28 * 28 * 144
        ((257, 28, 28, 32), (3, 3, 32, 64), (2, 2), ((0, 0), (0, 0)), 1),  # a prime number
        ((4, 128, 128, 32), (3, 3, 32, 64), (1, 1), ((1, 1), (1, 1)), 1),  # larger than a part
        ((9, 28, 28, 16), (3, 3, 16, 16), (1, 1), ((1, 1), (1, 1)), 9),  # just below 2**20
        ((64, 4, 4, 256), (3, 3, 256, 256), (1, 1), ((1, 1), (1, 1)), 64),  # a large kernel
    ],
)
def test_rows_per_part(x_shape, kernel_shape, strides, pads, rows):
    assert convolution.rows_per_part(x_shape, kernel_shape, strides, pads) == (rows if ON_CPU else x_shape[0])


@pytest.mark.skipif(not ON_CPU, reason="elsewhere a batch is not divided")
def test_a_large_batch_is_computed_in_parts():
    x, kernel = jax.ShapeDtypeStruct((64, 18, 18, 32), np.float32), jax.ShapeDtypeStruct((3, 3, 32, 4), np.float32)
    program = jax.make_jaxpr(partial(patches_in_parts, strides=(1, 1), pads=((0, 0), (0, 0))))(x, kernel)
    loops = [equation.params["length"] for equation in program.eqns if equation.primitive.name == "scan"]
    assert loops == [16]  # of 4 images with 16 * 16 * 288 elements each


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_parts_are_summed_exactly(dtype):
    """The gradient of a bfloat16 kernel over 512 images of ones; the values of integers that float32 does not have."""
    x, kernel = jnp.ones((512, 1, 1, 1), dtype), jnp.full((1, 1, 1, 1), 2**24 + 1).astype(dtype)
    convolve = partial(parts_of_one, x, strides=(1, 1), pads=((0, 0), (0, 0)))
    if dtype == jnp.int32:
        assert convolve(kernel)[0].item() == 2**24 + 1
    else:
        assert jax.grad(lambda kernel: jnp.sum(convolve(kernel)).astype(jnp.float32))(kernel).item() == 512


@given(windows(3), st.integers(1, 3))
@example(Windows((6, 7), (2, 2), (1, 1), "SAME"), 3)
@example(Windows((6, 7), (1, 2), (3, 2), "VALID"), 3)  # some pixels are in no window
@settings(max_examples=12, deadline=None)
def test_avg_pool_equals_lax(shape, num_channels):
    """Values, and the gradients of something that is not symmetric, in float64."""
    x = normal(2, *shape.size, num_channels, dtype=np.float64)
    ours = partial(avg_pool, window=shape.window, strides=shape.strides, padding=shape.padding)

    def theirs(x):
        window, strides = (1, *shape.window, 1), (1, *shape.strides, 1)
        padding = shape.padding if isinstance(shape.padding, str) else ((0, 0), *shape.padding, (0, 0))
        sums, counts = (
            lax.reduce_window(each, np.float64(0), lax.add, window, strides, padding) for each in (x, jnp.ones_like(x))
        )
        return sums / counts

    def values_and_gradients(pool, x):
        def loss(x):
            y = pool(x)
            return jnp.sum(jnp.sin(y * (1.0 + jnp.arange(num_channels))[None, None, None])), y

        return jax.grad(loss, has_aux=True)(x)

    with toys.float64():
        got, want = jax.jit(lambda x: [values_and_gradients(pool, x) for pool in (ours, theirs)])(x)
        chex.assert_trees_all_close(got, want, rtol=0, atol=1e-12)


def test_avg_pool_of_integers_is_a_float():
    pooled = avg_pool(jnp.arange(4).reshape(1, 2, 2, 1), (2, 2))
    assert (pooled.item(), pooled.dtype) == (1.5, jnp.float32)
