"""Convolutions and pooling as matrix products and strided slices.

Under vmap over the weights of many clients a convolution becomes a grouped convolution, which is slow on CPUs and GPUs,
and inside `lax.scan` XLA:CPU runs every convolution without its fast path. Matrix products have neither problem: under
vmap they become batched products. `conv_general_dilated` replaces the function of the same name in `jax.lax`:

>>> from flax import linen as nn
>>> from fedmd_jax.models import conv_general_dilated
>>> layer = nn.Conv(8, (3, 3), conv_general_dilated=conv_general_dilated)
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pads = Sequence[tuple[int, int]]
# form(x [B, H, W, I], kernel [h, w, I, O], strides, pads, precision) -> [B, H', W', O]
Form = Callable[[chex.Array, chex.Array, Sequence[int], Pads, lax.PrecisionLike], chex.Array]


def native(x, kernel, strides, pads, precision=None):
    """`lax.conv_general_dilated`, for NHWC images and an HWIO kernel.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> images, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
      >>> y = fmd.models.native(images, kernel, (1, 1), ((0, 0), (0, 0)))
      >>> y.shape, float(y[0, 0, 0, 0])
      ((1, 2, 2, 5), 18.0)
    """
    return lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def patches(x, kernel, strides, pads, precision=None):
    """Convolution as one product: patches [B, H', W', h*w*I] times the kernel [h*w*I, O].

    Best for many input channels. It needs h*w times the memory of `x` (divided by the strides). It has a custom VJP and
    therefore no forward-mode derivative (`jax.jvp`), as `avg_pool`.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> images, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
      >>> y = fmd.models.patches(images, kernel, (1, 1), ((0, 0), (0, 0)))
      >>> y.shape, float(y[0, 0, 0, 0])
      ((1, 2, 2, 5), 18.0)
    """
    return _patches_forward(x, kernel, strides, pads, precision)[0]


def _patches_forward(x, kernel, strides, pads, precision):
    columns = image_columns(x, kernel.shape[:2], strides, pads)
    return jnp.matmul(columns, kernel.reshape(-1, kernel.shape[-1]), precision=precision), (x, kernel, columns)


def _patches_backward(strides, pads, precision, residuals, gradient):
    x, kernel, columns = residuals
    weights = kernel.reshape(-1, kernel.shape[-1])
    by_column = jnp.matmul(gradient, weights.T, precision=precision)  # [B, H', W', h*w*I]

    def shifted_back(number, down, right, height, width):
        channels = jax.lax.slice_in_dim(by_column, number * x.shape[-1], (number + 1) * x.shape[-1], axis=3)
        pads = ((down, height - down - channels.shape[1]), (right, width - right - channels.shape[2]))
        return jnp.pad(channels, ((0, 0), *pads, (0, 0)))

    by_x = _windows_transposed(shifted_back, x.shape, x.dtype, kernel.shape[:2], strides, pads)
    by_weights = _rows_product(columns, gradient, precision)
    return by_x.astype(x.dtype), by_weights.reshape(kernel.shape).astype(kernel.dtype)


patches.defvjp(_patches_forward, _patches_backward)


def _rows_product(a, b, precision):
    """`a^T b` over all axes but the last. The matrix with fewer columns is transposed, since this makes a copy."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    contract = (((0,), (0,)), ((), ()))
    if a.shape[1] <= b.shape[1]:
        return lax.dot_general(a, b, contract, precision=precision)
    # Without the barrier XLA merges the transposition into the product, which is then the slow one.
    return lax.optimization_barrier(lax.dot_general(b, a, contract, precision=precision)).T


def patches_in_parts(x, kernel, strides, pads, precision=None):
    """`patches`, on a CPU of a few images at a time if those of the whole batch are too large for the cache.

    `rows_per_part` says of how many. The gradient computes the patches again. As with `patches` there is no `jax.jvp`.

    Args:
      x: images, [B, H, W, I].
      kernel: [h, w, I, O].
      strides: steps along H and W.
      pads: ((low, high), (low, high)).
      precision: of the products.

    Returns:
      [B, H', W', O].

    Raises:
      ValueError: a kernel that is larger than the padded image.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> images, kernel = jnp.ones((64, 20, 20, 16)), jnp.ones((3, 3, 16, 5))  # in two parts on a CPU
      >>> y = fmd.models.patches_in_parts(images, kernel, (1, 1), ((0, 0), (0, 0)))
      >>> y.shape, float(y[0, 0, 0, 0])
      ((64, 18, 18, 5), 144.0)
    """

    def convolve_part(part, kernel, first):
        del first
        return patches(part, kernel, strides, pads, precision)

    return map_parts(convolve_part, x, kernel, rows_per_part(x.shape, kernel.shape, strides, pads))


def rows_per_part(x_shape: Sequence[int], kernel_shape: Sequence[int], strides: Sequence[int], pads: Pads) -> int:
    """How many images of a batch `patches_in_parts` computes at once.

    Args:
      x_shape: (B, H, W, I), without an axis of vmapped clients.
      kernel_shape: (h, w, I, O).
      strides: steps along H and W.
      pads: ((low, high), (low, high)).

    Returns:
      B if this is no CPU, or if the patches of the batch have fewer than 2**20 elements. Otherwise the largest divisor
      of B whose patches have at most 2**19, or 1. B again if the kernel has more elements than these patches: each part
      reads the kernel and adds to its gradient.

    >>> rows_per_part((8, 28, 28, 16), (3, 3, 16, 16), (1, 1), ((1, 1), (1, 1)))
    8
    """
    num_rows, height, width, _ = x_shape
    sizes = zip((height, width), kernel_shape[:2], strides, pads, strict=True)
    places = math.prod(_num_windows(n + sum(pad), window, stride) for n, window, stride, pad in sizes)
    size = places * math.prod(kernel_shape[:3])  # elements of the patches of an image
    if jax.default_backend() != "cpu" or num_rows * size < _LARGE:
        return num_rows
    part = max(n for n in range(1, num_rows + 1) if num_rows % n == 0 and (n == 1 or n * size <= _CACHED))
    return part if part * size >= math.prod(kernel_shape) else num_rows


# Elements of patches: most in a part, and fewest in a batch that is divided (benchmarks/NOTES.md has the gain).
_CACHED, _LARGE = 2**19, 2**20


def map_parts(
    fn: Callable[[chex.Array, chex.Array, chex.Array], chex.Array], x: chex.Array, kernel: chex.Array, part_size: int
) -> chex.Array:
    """Computes `fn` for one part of a batch after the other.

    In training each part is computed twice, since the gradient computes it again. This is still faster than the whole
    batch if the intermediate arrays of a part stay in the cache and those of the batch do not.

    Args:
      fn: (rows of x, kernel, number of the first row) -> [rows, ...]. It must treat each row by itself.
      x: [B, ...].
      kernel: of any shape; its gradient is summed over the parts in float32 at least.
      part_size: a divisor of B; B for the whole batch at once.

    Returns:
      `fn(x, kernel, 0)`.
    """
    if part_size == x.shape[0]:
        return fn(x, kernel, jnp.uint32(0))
    # A loop sums the gradient of an array in the dtype of this array.
    dtype = kernel.dtype
    wide = kernel.astype(jnp.promote_types(dtype, jnp.float32)) if jnp.issubdtype(dtype, jnp.inexact) else kernel
    parts = x.reshape(-1, part_size, *x.shape[1:])
    first = jnp.arange(0, x.shape[0], part_size, dtype=jnp.uint32)
    again = jax.checkpoint(fn, prevent_cse=False)  # the loop already separates the two computations
    y = lax.map(lambda part: again(part[0], wide.astype(dtype), part[1]), (parts, first))
    return y.reshape(x.shape[0], *y.shape[2:])


def image_columns(x: chex.Array, window: Sequence[int], strides: Sequence[int], pads: Pads) -> chex.Array:
    """The pixels of each window of a convolution, concatenated (im2col).

    Args:
      x: images, [B, H, W, I].
      window: height h and width w.
      strides: steps along H and W.
      pads: ((low, high), (low, high)).

    Returns:
      [B, H', W', h*w*I], in the order of a kernel [h, w, I, O] reshaped to [h*w*I, O].

    >>> image_columns(jnp.arange(4.0).reshape(1, 2, 2, 1), (2, 2), (1, 1), ((0, 0), (0, 0))).tolist()
    [[[[0.0, 1.0, 2.0, 3.0]]]]
    """
    return jnp.concatenate(list(_windows(x, window, strides, pads)), axis=-1)


def blocked(x, kernel, strides, pads, precision=None):
    """`patches` that compute several neighbouring outputs at once: fewer rows, more columns.

    Best for few input channels, whose matrix products are too narrow for a CPU (9 values times 8 filters). Four
    neighbouring outputs of a 3x3 kernel depend on 3x6 values; the combined kernel, [3, 6, 1, 4 * 8], contains four
    shifted copies of the small one, and zeros.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> images, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
      >>> y = fmd.models.blocked(images, kernel, (1, 1), ((0, 0), (0, 0)))
      >>> y.shape, float(y[0, 0, 0, 0])
      ((1, 2, 2, 5), 18.0)
    """
    kernels, strides = block_kernels(x.shape, kernel, strides, pads)
    blocks = patches(x, kernels, strides, pads, precision)  # [B, H', W' / n, n * O]
    return blocks.reshape(*blocks.shape[:2], -1, kernel.shape[-1])


def block_kernels(
    shape: Sequence[int], kernel: chex.Array, strides: Sequence[int], pads: Pads
) -> tuple[chex.Array, tuple[int, int]]:
    """The kernel and the strides that `blocked` passes to `patches`.

    Args:
      shape: shape of the images, [B, H, W, I].
      kernel: [h, w, I, O].
      strides: steps along H and W.
      pads: ((low, high), (low, high)).

    Returns:
      The kernel of n outputs side by side, [h, w + (n - 1) * stride, I, n * O], and its strides. n is the largest of 4,
      3, 2 and 1 that divides the width of the result.
    """
    height, width, num_channels, num_filters = kernel.shape
    num_outputs = max(1, _num_windows(shape[2] + sum(pads[1]), width, strides[1]))
    n = next(n for n in (4, 3, 2, 1) if num_outputs % n == 0)
    margin = (n - 1) * strides[1]
    kernels = [
        jnp.pad(kernel, ((0, 0), (place, margin - place), (0, 0), (0, 0))) for place in range(0, margin + 1, strides[1])
    ]
    stacked = jnp.stack(kernels, axis=3)  # [h, w + margin, I, n, O]
    return stacked.reshape(height, width + margin, num_channels, n * num_filters), (strides[0], strides[1] * n)


def shifted(x, kernel, strides, pads, precision=None):
    """Convolution as a sum over the kernel positions of products [B, H', W', I] times [I, O].

    Needs the least memory.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> images, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
      >>> y = fmd.models.shifted(images, kernel, (1, 1), ((0, 0), (0, 0)))
      >>> y.shape, float(y[0, 0, 0, 0])
      ((1, 2, 2, 5), 18.0)
    """
    weights = kernel.reshape(-1, *kernel.shape[2:])
    windows = _windows(x, kernel.shape[:2], strides, pads)
    return sum(jnp.matmul(window, weights[i], precision=precision) for i, window in enumerate(windows))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def native_or_patches(x, kernel, strides, pads, precision=None):
    """`native`, or `patches` if the kernel is vmapped: not a grouped convolution, but a batched product.

    Under vmap over the images alone it is one `native` convolution of all images. Without vmap the gradients are native
    convolutions; under vmap, also over the images alone, they are those of `patches`. It has a custom VJP and therefore
    no forward-mode derivative, as `patches`; unlike with `patches`, its gradient has no gradient.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> images, kernels = jnp.ones((1, 4, 4, 2)), jnp.ones((6, 3, 3, 2, 5))
      >>> convolve = lambda kernel: fmd.models.native_or_patches(images, kernel, (1, 1), ((0, 0), (0, 0)))
      >>> "convolution" in jax.jit(convolve).lower(kernels[0]).as_text()
      True
      >>> "convolution" in jax.jit(jax.vmap(convolve)).lower(kernels).as_text()
      False
    """

    def convolve(form, x, kernel):
        return form(x, kernel, strides, pads, precision)

    return _native_or_patches(convolve, x, kernel)


def _native_or_patches_forward(x, kernel, strides, pads, precision):
    return native_or_patches(x, kernel, strides, pads, precision), (x, kernel)


def _native_or_patches_backward(strides, pads, precision, residuals, gradient):
    def gradients(form, x, kernel, gradient):
        _, pull_back = jax.vjp(lambda x, kernel: form(x, kernel, strides, pads, precision), x, kernel)
        return pull_back(gradient)

    return _native_or_patches(gradients, *residuals, gradient)


native_or_patches.defvjp(_native_or_patches_forward, _native_or_patches_backward)


def _native_or_patches(compute, *arrays):
    """`compute(native, x, kernel, ...)`, in which vmap replaces `native` by `patches`."""
    unbatched = jax.custom_batching.custom_vmap(partial(compute, native))

    @unbatched.def_vmap
    def batched(size, is_batched, x, kernel, *gradient):
        if not is_batched[1] and not gradient:  # images of all clients, one kernel
            y = unbatched(x.reshape(-1, *x.shape[2:]), kernel)
            return y.reshape(size, -1, *y.shape[1:]), True
        axes = [0 if each else None for each in is_batched]
        results = jax.vmap(partial(compute, patches), axes, axis_size=size)(x, kernel, *gradient)
        return results, jax.tree.map(lambda _: True, results)

    return unbatched(*arrays)


def choose_form(x_shape: Sequence[int], kernel_shape: Sequence[int], *, platform: str | None = None) -> Form:
    """The fastest form of a convolution for vmapped clients in a scan. All automatic choices are made here.

    Args:
      x_shape: (B, H, W, I), without the client axis.
      kernel_shape: (h, w, I, O).
      platform: "cpu", "gpu" or "tpu"; None for the default backend.

    Returns:
      `native`, `patches_in_parts`, `blocked` or `native_or_patches`.

    Example:
      >>> import fedmd_jax as fmd
      >>> fmd.models.choose_form((64, 28, 28, 1), (3, 3, 1, 16), platform="cpu") is fmd.models.blocked
      True
      >>> fmd.models.choose_form((64, 28, 28, 1), (3, 3, 1, 16), platform="tpu") is fmd.models.native
      True
    """
    del x_shape
    # One CPU core, ms, `python benchmarks/conv_forms.py --clients 1`, all with 3x3 kernels and batches of 64:
    #                            forward, gradient of the kernel (with what it repeats of the forward), of the images
    #                               shifted           patches          blocked           native
    #   34x34x3 -> 16              25   7    3       12  10    2       4   4   2       7   88    9
    #   30x30x8 -> 16              10   8    2       16  16    2       9   8   2       4  232   16
    #   28x28x8 -> 16, stride 2   2.1 1.8  1.2      1.5 1.5   .6     1.5 1.6  .6     1.1   48    3
    # `shifted` is fast on one channel by itself, but in a network it is fused with other operations and slow.
    platform = platform or jax.default_backend()
    if platform == "tpu":  # has hardware for it, also for grouped ones
        return native
    if platform == "cpu":
        return blocked if kernel_shape[2] <= 8 else patches_in_parts
    # Patches need nine times the memory traffic of a 3x3 convolution; grouped convolutions, which vmap makes of native
    # ones, are slow backward (benchmarks/NOTES.md, one H200).
    return native_or_patches


def conv_general_dilated(
    lhs: chex.Array,
    rhs: chex.Array,
    window_strides: Sequence[int],
    padding: str | Pads,
    *,
    dimension_numbers=None,
    precision: lax.PrecisionLike = None,
    choose: Callable[..., Form] = choose_form,
    **others,
) -> chex.Array:
    """Drop-in replacement of `jax.lax.conv_general_dilated`, fast under vmap over clients and inside scan.

    All but plain 2-D convolutions (NHWC, HWIO, no dilation, no groups) are passed to `jax.lax` unchanged.

    Args:
      lhs: images, [B, H, W, I].
      rhs: kernel, [h, w, I, O].
      window_strides: steps along H and W.
      padding: "SAME", "VALID" or ((low, high), (low, high)).
      dimension_numbers: as in `jax.lax`.
      precision: of the products.
      choose: (x_shape, kernel_shape) -> one of the forms above, or your own. For one form always:
        `functools.partial(conv_general_dilated, choose=lambda *shapes: shifted)`.
      **others: further arguments of `jax.lax.conv_general_dilated`, such as dilations and numbers of groups.

    Returns:
      [B, H', W', O], as `jax.lax.conv_general_dilated` up to rounding.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> from flax import linen as nn
      >>> layer = nn.Conv(8, (3, 3), conv_general_dilated=fmd.models.conv_general_dilated)
      >>> images, kernel, axes = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)), ("NHWC", "HWIO", "NHWC")
      >>> y = fmd.models.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=axes)
      >>> y.shape, float(y[0, 0, 0, 0])  # 2 * 2 of the pixels under the kernel are not padding
      ((1, 4, 4, 5), 8.0)
    """
    plain = (
        lhs.ndim == 4
        and all(value is None or set(np.ravel(value).tolist()) <= {1} for value in others.values())
        and _is_nhwc(lhs.shape, rhs.shape, dimension_numbers)
    )
    if not plain:
        others = {"dimension_numbers": dimension_numbers, "precision": precision, **others}
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **others)
    pads = explicit_pads(lhs.shape, rhs.shape[:2], window_strides, padding)
    return choose(lhs.shape, rhs.shape)(lhs, rhs, tuple(window_strides), pads, precision)


def avg_pool(
    x: chex.Array, window: Sequence[int], strides: Sequence[int] = (1, 1), padding: str | Pads = "VALID"
) -> chex.Array:
    """Average pooling by strided slices; the mean is over real pixels only, padding is excluded (as in TensorFlow).

    `lax.reduce_window`, which `flax.linen.avg_pool` uses, is slow inside a scan on CPUs.

    Args:
      x: images, [B, H, W, C].
      window: height and width.
      strides: steps along H and W; 1 by default.
      padding: "SAME", "VALID" or ((low, high), (low, high)).

    Returns:
      Means, [B, H', W', C].

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> fmd.models.avg_pool(jnp.ones((1, 3, 3, 1)), (2, 2), padding="SAME").flatten().tolist()
      [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    x = x.astype(jnp.result_type(x, float))  # integers become floats
    return _avg_pool(x, tuple(window), tuple(strides), explicit_pads(x.shape, window, strides, padding))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _avg_pool(x, window, strides, pads):
    return sum(_windows(x, window, strides, pads)) * _inverse_counts(x, window, strides, pads)


def _avg_pool_forward(x, window, strides, pads):
    return _avg_pool(x, window, strides, pads), x


def _avg_pool_backward(window, strides, pads, x, gradient):
    gradient = gradient * _inverse_counts(x, window, strides, pads)
    margin = [(w - 1) // s for w, s in zip(window, strides, strict=True)]
    # Padded once, then sliced: XLA:CPU is slow at sums of arrays that are padded one by one.
    padded = jnp.pad(gradient, ((0, 0), *((m, m + w) for m, w in zip(margin, window, strict=True)), (0, 0)))

    def shifted_back(number, down, right, height, width):
        del number
        return padded[:, margin[0] - down :, margin[1] - right :][:, :height, :width]

    return (_windows_transposed(shifted_back, x.shape, x.dtype, window, strides, pads),)


_avg_pool.defvjp(_avg_pool_forward, _avg_pool_backward)


def _inverse_counts(x, window, strides, pads):
    """Reciprocal of the number of real pixels in each window, [1, H', W', 1]."""
    real = np.pad(np.ones(x.shape[1:3]), pads)
    windows = np.lib.stride_tricks.sliding_window_view(real, window)[:: strides[0], :: strides[1]]
    return jnp.asarray(1 / windows.sum(axis=(2, 3))[None, :, :, None], x.dtype)


def _windows(x, window, strides, pads):
    """Yields the pixels at each position of the window, [B, H', W', C], in row-major order."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0))) if np.any(pads) else x
    if any(n < w for n, w in zip(x.shape[1:3], window, strict=True)):
        raise ValueError(f"a window of {tuple(window)} does not fit into a padded image of {x.shape[1:3]}")
    height, width = map(_num_windows, x.shape[1:3], window, strides)
    for i, j in itertools.product(range(window[0]), range(window[1])):
        end = (i + (height - 1) * strides[0] + 1, j + (width - 1) * strides[1] + 1)
        # Indexing takes JAX ten times as long to trace.
        yield lax.slice(x, (0, i, j, 0), (x.shape[0], *end, x.shape[3]), (1, *strides, 1))


def _num_windows(size, window, stride):
    """Along one axis of a padded image."""
    return (size - window) // stride + 1


def _windows_transposed(shifted_back, shape, dtype, window, strides, pads):
    """The transpose of `_windows`: every pixel gets the sum of the gradients of the windows that contain it.

    Pixels a stride apart are at the same positions of their windows. The image is therefore assembled from
    `strides[0] * strides[1]` dense images instead of one sparse image per position.

    Args:
      shifted_back: (number of the position, down, right, height, width) -> the gradients of this position, shifted down
        and right in an otherwise zero image of that size, [B, height, width, C].
      shape: shape of the images, [B, H, W, C].
      dtype: dtype of the images.
      window: height and width.
      strides: steps along H and W.
      pads: padding of the images.

    Returns:
      [B, H, W, C].
    """
    padded = [size + low + high for size, (low, high) in zip(shape[1:3], pads, strict=True)]
    height, width = (-(-size // stride) for size, stride in zip(padded, strides, strict=True))

    def pixels(row, column):
        """The dense image of the pixels at a stride from `row` and `column`."""
        seen_by = itertools.product(range(row, window[0], strides[0]), range(column, window[1], strides[1]))
        sent_back = [
            shifted_back(i * window[1] + j, i // strides[0], j // strides[1], height, width) for i, j in seen_by
        ]
        return sum(sent_back) if sent_back else jnp.zeros((shape[0], height, width, shape[3]), dtype)

    rows = [jnp.stack([pixels(i, j) for j in range(strides[1])], axis=3) for i in range(strides[0])]
    image = jnp.stack(rows, axis=2).reshape(shape[0], height * strides[0], width * strides[1], shape[3])
    (top, _), (left, _) = pads
    return image[:, top : top + shape[1], left : left + shape[2]]


def explicit_pads(shape: Sequence[int], window: Sequence[int], strides: Sequence[int], padding: str | Pads) -> Pads:
    """The ((low, high), (low, high)) of H and W that a padding such as "SAME" means for images [B, H, W, I]."""
    if isinstance(padding, str):
        return tuple(lax.padtype_to_pads(shape[1:3], window, strides, padding))
    return tuple((int(low), int(high)) for low, high in padding)


def _is_nhwc(lhs_shape, rhs_shape, dimension_numbers):
    """Whether the axes are NHWC, HWIO and NHWC."""
    axes = lax.conv_dimension_numbers(lhs_shape, rhs_shape, dimension_numbers)
    return axes == lax.conv_dimension_numbers(lhs_shape, rhs_shape, ("NHWC", "HWIO", "NHWC"))
