"""Convolutions and pooling as matrix products and strided slices.

A convolution that is vmapped over the weights of many clients becomes a grouped convolution, slow on CPUs and GPUs,
and inside `lax.scan` XLA:CPU runs any convolution without its fast path. A matrix product suffers from neither: under
vmap it becomes a batched one. `conv_general_dilated` takes the place of the function of the same name in `jax.lax`:

>>> from flax import linen as nn
>>> layer = nn.Conv(8, (3, 3), conv_general_dilated=conv_general_dilated)
"""

import itertools
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pads = Sequence[tuple[int, int]]
# form(x [B, H, W, I], kernel [h, w, I, O], strides, pads, precision) -> [B, H', W', O]
Form = Callable[[chex.Array, chex.Array, Sequence[int], Pads, lax.PrecisionLike], chex.Array]


def native(x, kernel, strides, pads, precision=None):
    """`lax.conv_general_dilated`, for NHWC images and an HWIO kernel."""
    return lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )


def patches(x, kernel, strides, pads, precision=None):
    """Convolution as one product: patches [B, H', W', h*w*I] times the kernel [h*w*I, O].

    Best for many input channels; needs h*w times the memory of `x` (divided by the strides).
    """
    columns = jnp.concatenate(list(_windows(x, kernel.shape[:2], strides, pads)), axis=-1)
    return jnp.matmul(columns, kernel.reshape(-1, kernel.shape[-1]), precision=precision)


def shifted(x, kernel, strides, pads, precision=None):
    """Convolution as a sum over the kernel positions of products [B, H', W', I] times [I, O].

    Best for few input channels, where the product is a mere scaling, and where memory is short.
    """
    weights = kernel.reshape(-1, *kernel.shape[2:])
    windows = _windows(x, kernel.shape[:2], strides, pads)
    return sum(jnp.matmul(window, weights[i], precision=precision) for i, window in enumerate(windows))


def choose_form(x_shape: Sequence[int], kernel_shape: Sequence[int], *, platform: str | None = None) -> Form:
    """The fastest form of a convolution for vmapped clients in a scan: the one place where this is decided.

    Args:
      x_shape: (B, H, W, I), without the client axis.
      kernel_shape: (h, w, I, O).
      platform: "cpu", "gpu" or "tpu"; None for the default backend.

    Returns:
      `native`, `patches` or `shifted`.
    """
    del x_shape
    # Two CPU cores, four clients vmapped in a scan, ms a step, forward and backward:
    #                                    shifted  patches  native
    #   28x28x1  -> 8,   3x3, batch 64         7        6      55   (forward only: shifted 1.2, patches 2.3)
    #   28x28x1  -> 32,  3x3, batch 256      128      175           (forward only: shifted 21, patches 51)
    #   32x32x3  -> 16,  3x3, batch 64       239       22
    #   28x28x8  -> 16,  3x3 / 2, batch 64    48       35     284
    #   16x16x32 -> 32,  3x3, batch 64       186      103
    #   28x28x64 -> 128, 3x3 / 2, batch 16            175    5502
    #   28x28x64 -> 128, 3x3 / 2, batch 64   622      400
    # No better than patches: an `optimization_barrier`, sums over kernel rows, a hand-written backward pass.
    platform = platform or jax.default_backend()
    if platform == "tpu":  # has hardware for it, also for grouped ones
        return native
    if platform == "cpu" and kernel_shape[2] == 1:
        return shifted
    return patches


def conv_general_dilated(
    lhs: chex.Array,
    rhs: chex.Array,
    window_strides: Sequence[int],
    padding: str | Pads,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type=None,
    *,
    choose: Callable[..., Form] = choose_form,
) -> chex.Array:
    """Drop-in replacement of `jax.lax.conv_general_dilated`, fast under vmap over clients and inside scan.

    What is not a plain 2-D convolution (NHWC, HWIO, no dilation, no groups) goes to `jax.lax` unchanged.

    Args:
      lhs: images, [B, H, W, I].
      rhs: kernel, [h, w, I, O].
      window_strides: steps along H and W.
      padding: "SAME", "VALID" or ((low, high), (low, high)).
      lhs_dilation: as in `jax.lax`.
      rhs_dilation: as in `jax.lax`.
      dimension_numbers: as in `jax.lax`.
      feature_group_count: as in `jax.lax`.
      batch_group_count: as in `jax.lax`.
      precision: of the products.
      preferred_element_type: as in `jax.lax`.
      choose: (x_shape, kernel_shape) -> `native`, `patches`, `shifted` or a form of your own. For one form always:
        `functools.partial(conv_general_dilated, choose=lambda *shapes: shifted)`.

    Returns:
      [B, H', W', O], as `jax.lax.conv_general_dilated` up to rounding.
    """
    plain = (
        lhs.ndim == 4
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and feature_group_count == batch_group_count == 1
        and preferred_element_type is None
        and _is_nhwc(lhs.shape, rhs.shape, dimension_numbers)
    )
    if not plain:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
    pads = _pads(lhs.shape, rhs.shape[:2], window_strides, padding)
    return choose(lhs.shape, rhs.shape)(lhs, rhs, window_strides, pads, precision)


def avg_pool(
    x: chex.Array, window: Sequence[int], strides: Sequence[int] | None = None, padding: str | Pads = "VALID"
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

    >>> avg_pool(jnp.ones((1, 3, 3, 1)), (2, 2), padding="SAME").flatten().tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    strides = (1, 1) if strides is None else strides
    pads = _pads(x.shape, window, strides, padding)
    total = sum(_windows(x, window, strides, pads))
    ones = np.ones((1, *x.shape[1:3], 1), np.float32)
    counts = sum(_windows(ones, window, strides, pads, pad=np.pad))
    return total * jnp.asarray(1 / counts, x.dtype)


def _windows(x, window, strides, pads, *, pad=jnp.pad):
    """Yields what each position of the window sees, [B, H', W', C], in row-major order."""
    x = pad(x, ((0, 0), *pads, (0, 0))) if np.any(pads) else x
    if any(n < w for n, w in zip(x.shape[1:3], window, strict=True)):
        raise ValueError(f"a window of {tuple(window)} does not fit into a padded image of {x.shape[1:3]}")
    height, width = ((n - w) // s + 1 for n, w, s in zip(x.shape[1:3], window, strides, strict=True))
    for i, j in itertools.product(range(window[0]), range(window[1])):
        rows = slice(i, i + (height - 1) * strides[0] + 1, strides[0])
        columns = slice(j, j + (width - 1) * strides[1] + 1, strides[1])
        yield x[:, rows, columns, :]


def _pads(shape, window, strides, padding):
    """Explicit ((low, high), (low, high)) of H and W."""
    if isinstance(padding, str):
        return tuple(lax.padtype_to_pads(shape[1:3], window, strides, padding))
    return tuple(padding)


def _is_nhwc(lhs_shape, rhs_shape, dimension_numbers):
    """Whether the axes are NHWC, HWIO and NHWC."""
    axes = lax.conv_dimension_numbers(lhs_shape, rhs_shape, dimension_numbers)
    return axes == lax.conv_dimension_numbers(lhs_shape, rhs_shape, ("NHWC", "HWIO", "NHWC"))
