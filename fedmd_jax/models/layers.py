"""Layers with the conventions of the reference implementation (Keras) that are fast on every backend."""

import math
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from fedmd_jax.models.convolution import block_kernels, conv_general_dilated, explicit_pads, image_columns


class BatchNorm(nn.Module):
    """Batch normalization as in Keras that ignores padding rows.

    Normalizes by the biased variance of the batch and updates the running variance with the unbiased one, n/(n-1) times
    the biased one with n the number of real values of a channel. (Keras does so for images, [B, H, W, C]; PyTorch
    always.) Statistics are computed in float32.

    Variables: `params` `scale` and `bias`, `batch_stats` `mean` and `var`, all [C].

    Attributes:
      momentum: weight of the old running statistics in an update, in [0, 1).
      epsilon: added to the variance.

    References:
      Ioffe and Szegedy, Batch Normalization, 2015; Keras' `BatchNormalization` for the constants.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> layer = fmd.models.BatchNorm()
      >>> x = jnp.array([[1.0], [3.0], [100.0]])  # the last row is padding
      >>> mask = jnp.array([True, True, False])
      >>> variables = layer.init(jax.random.key(0), x, train=False)
      >>> y, new = layer.apply(variables, x, train=True, mask=mask, mutable="batch_stats")
      >>> y[:2, 0].round(2).tolist(), round(float(new["batch_stats"]["mean"][0]), 4)
      ([-1.0, 1.0], 0.02)
    """

    momentum: float = 0.99
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: chex.Array, *, train: bool, mask: chex.Array | None = None) -> chex.Array:
        """Normalises every channel.

        Args:
          x: activations, [B, ..., C].
          train: whether to use batch statistics and update the running ones; otherwise the running ones are used.
          mask: [B], bool; False for padding rows, which do not affect the statistics.

        Returns:
          Normalized activations, [B, ..., C]. Without a real row they are finite, and the statistics do not change.
        """
        statistics = (lambda mean: _statistics(x, mask, mean)) if train else None
        return _normalise(x, *self._normalisation(x.shape[-1], statistics))

    def _normalisation(self, num_channels, statistics):
        """The `mean`, `factor` and `bias`, [C] each, of `(x - mean) * factor + bias`.

        In training they are those of the batch, `statistics(moving_mean) -> mean, biased variance, count`, with which
        the running ones are updated; `statistics` is None otherwise.
        """
        shape = (num_channels,)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        moving_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        moving_var = self.variable("batch_stats", "var", jnp.ones, shape)
        mean, var = moving_mean.value, moving_var.value
        if statistics is not None:
            mean, var, count = statistics(mean)
            if not self.is_initializing():
                step = jnp.where(count > 0, 1.0 - self.momentum, 0.0)
                unbiased_var = var * (count / jnp.maximum(count - 1.0, 1.0))
                moving_mean.value += step * (mean - moving_mean.value)
                moving_var.value += step * (unbiased_var - moving_var.value)
        return mean, jax.lax.rsqrt(var + self.epsilon) * scale, bias


class FoldedBatchNorm(BatchNorm):
    """Folds the batch normalization of a convolution into its kernel and its bias.

    In inference the statistics are the moving ones, known before the convolution. In training they are the mean and the
    variance of the convolution's output. If a window has few values, as in an image, these follow from the mean m and
    the covariance S of the windows, since the convolution is linear: mean W'm, variance diag(W'SW). The statistics then
    need no pass over the activations, neither forward nor backward. In the first layer of a small CNN the activations
    are the largest arrays of a step.

    Variables and attributes are those of `BatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> layer, x = fmd.models.FoldedBatchNorm(epsilon=0.0), jnp.ones((2, 4, 4, 1))
      >>> kernel, bias = jnp.ones((3, 3, 1, 5)), jnp.full(5, 2.0)
      >>> how = {"strides": (1, 1), "padding": "VALID", "train": False}
      >>> variables = layer.init(jax.random.key(0), x, kernel, bias, **how)
      >>> folded_kernel, folded_bias = layer.apply(variables, x, kernel, bias, **how)
      >>> folded_kernel.shape, folded_bias.tolist()  # at the start nothing is normalised
      ((3, 3, 1, 5), [2.0, 2.0, 2.0, 2.0, 2.0])
    """

    @nn.compact
    def __call__(
        self,
        x: chex.Array,
        kernel: chex.Array,
        bias: chex.Array,
        *,
        strides: Sequence[int],
        padding: str,
        train: bool,
        mask: chex.Array | None = None,
    ) -> tuple[chex.Array, chex.Array]:
        """The kernel [h, w, I, O] and the bias [O] of the convolution that is normalised.

        Args:
          x: images, [B, H, W, I].
          kernel: [h, w, I, O].
          bias: bias of the convolution, [O]. In training it affects the running mean only.
          strides: steps along H and W.
          padding: "SAME" or "VALID".
          train: as in `BatchNorm`.
          mask: as in `BatchNorm`.
        """
        return self._folded(x, kernel, bias, strides, padding, train, mask)

    def _folded(self, x, kernel, bias, strides, padding, train, mask):
        def statistics(_):
            return _add_to_mean(bias, _statistics_of_windows(x, kernel, mask, strides, padding))

        mean, factor, offset = self._normalisation(kernel.shape[-1], statistics if train else None)
        return kernel * _row(factor, kernel), (bias - mean) * factor + offset


class ConvBatchNorm(FoldedBatchNorm):
    """A convolution and its batch normalization, folded into the kernel (see `FoldedBatchNorm`) if that is cheaper.

    Variables and attributes are those of `BatchNorm`.

    Attributes:
      dtype: of the convolution and the result; None: that of inputs and parameters. All else is in float32.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> layer, x = fmd.models.ConvBatchNorm(), jnp.ones((2, 4, 4, 1))
      >>> kernel, bias = jnp.ones((3, 3, 1, 5)), jnp.zeros(5)
      >>> how = {"strides": (1, 1), "padding": "VALID", "conv": fmd.models.conv_general_dilated, "train": False}
      >>> variables = layer.init(jax.random.key(0), x, kernel, bias, **how)
      >>> layer.apply(variables, x, kernel, bias, **how).shape
      (2, 2, 2, 5)
    """

    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: chex.Array,
        kernel: chex.Array,
        bias: chex.Array,
        *,
        strides: Sequence[int],
        padding: str,
        conv: Callable[..., chex.Array],
        train: bool,
        mask: chex.Array | None = None,
    ) -> chex.Array:
        """Convolves, and normalises every channel.

        Args:
          x: images, [B, H, W, I]; this and the other arguments but `conv` are those of `FoldedBatchNorm`.
          kernel: [h, w, I, O].
          bias: [O].
          strides: of the convolution.
          padding: of the convolution.
          conv: as `jax.lax.conv_general_dilated`.
          train: whether batch statistics are used.
          mask: [B], bool.

        Returns:
          [B, H', W', O].
        """
        # As `nn.Conv` does; integer images become floats.
        x = jnp.asarray(x, nn.dtypes.canonicalize_dtype(x, kernel, bias, dtype=self.dtype))

        if not train or windows_are_cheap(kernel.shape[2], conv):
            kernel, bias = self._folded(x, kernel, bias, strides, padding, train, mask)
            return convolve(x, kernel, bias, strides=strides, padding=padding, conv=conv)
        y = convolve(x, kernel, strides=strides, padding=padding, conv=conv)
        mean, factor, offset = self._normalisation(
            kernel.shape[-1], lambda moving_mean: _add_to_mean(bias, _statistics(y, mask, moving_mean - bias))
        )
        return _normalise(y, mean - bias, factor, offset)


def convolve(
    x: chex.Array,
    kernel: chex.Array,
    bias: chex.Array | None = None,
    *,
    strides: Sequence[int],
    padding: str,
    conv: Callable[..., chex.Array] = conv_general_dilated,
) -> chex.Array:
    """The convolution of images [B, H, W, I] and a kernel [h, w, I, O] in the dtype of the images; the bias is [O]."""
    y = conv(x, kernel.astype(x.dtype), strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y if bias is None else (y + _row(bias, y)).astype(x.dtype)


def windows_are_cheap(num_channels: int, conv: Callable[..., chex.Array]) -> bool:
    """Whether statistics of a convolution are computed from its windows, rather than from its output.

    Args:
      num_channels: of the images; with more than four a covariance costs more than it saves.
      conv: the convolution; one that is not `conv_general_dilated` may be no plain convolution.
    """
    return num_channels <= 4 and conv is conv_general_dilated and jax.default_backend() != "tpu"


def _add_to_mean(bias, statistics):
    mean, var, count = statistics
    return mean + bias, var, count


def _statistics(x, mask, shift):
    """Mean [C], biased variance [C] and the count [] of the real values of a channel.

    One pass over `x`, E[d^2] - E[d]^2 with d = x - `shift`. The shift by the running mean reduces cancellation at no
    cost. Forward and backward on [64, 28, 28, 8], four clients vmapped in a scan, two CPU cores: 14 ms; mean first and
    then squared deviations 22, a hand-written backward pass 22 to 26, a shift by a value of `x` itself 26.
    """
    axes = tuple(range(x.ndim - 1))
    size = math.prod(x.shape[1:-1])
    shift = jax.lax.stop_gradient(shift)  # nothing depends on it
    deviation = x.astype(jnp.float32) - _row(shift, x)
    if mask is None:
        count = jnp.float32(x.shape[0] * size)
    else:
        chex.assert_shape(mask, x.shape[:1])
        count = jnp.sum(mask, dtype=jnp.float32) * size
        # `where` instead of a product keeps non-finite padding rows out of the values and the gradients.
        deviation = jnp.where(mask.reshape((-1,) + (1,) * (x.ndim - 1)), deviation, 0.0)
    divisor = jnp.maximum(count, 1.0)
    mean = jnp.sum(deviation, axes) / divisor
    mean_square = jnp.sum(deviation * deviation, axes) / divisor
    return shift + mean, jnp.maximum(mean_square - mean * mean, 0.0), count


def _statistics_of_windows(x, kernel, mask, strides, padding):
    """`_statistics` of a convolution of x [B, H, W, I], from the covariance of its windows, in blocks as `blocked`."""
    pads = explicit_pads(x.shape, kernel.shape[:2], strides, padding)
    kernels, strides = block_kernels(x.shape, kernel, strides, pads)
    columns = image_columns(x, kernels.shape[:2], strides, pads)
    weights = kernels.reshape(columns.shape[-1], -1)
    rows = columns.astype(jnp.float32).reshape(-1, columns.shape[-1])
    count, real = jnp.float32(len(rows)), lambda values: values
    if mask is not None:
        chex.assert_shape(mask, x.shape[:1])
        of_row = jnp.repeat(mask, len(rows) // len(x))[:, None]
        count, real = jnp.sum(of_row, dtype=jnp.float32), lambda values: jnp.where(of_row, values, 0.0)
    divisor = jnp.maximum(count, 1.0)
    mean = jnp.sum(real(rows), axis=0) / divisor
    deviation = real(rows - mean[None])
    # Highest precision: `diag(W'SW)` is a small difference of large numbers for similar pixels, and GPUs round
    # products.
    dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    covariance = dot(deviation.T, deviation) / divisor
    means = dot(mean[None], weights).reshape(-1, kernel.shape[-1])  # of each place in a block
    variances = jnp.sum(weights * dot(covariance, weights), axis=0).reshape(means.shape)
    mean = jnp.mean(means, axis=0)
    var = jnp.mean(variances + jnp.square(means - mean[None]), axis=0)
    return mean, jnp.maximum(var, 0.0), count * means.shape[0]


def _normalise(x, mean, factor, bias):
    """In float32, returned in the type of `x`."""
    return ((x - _row(mean, x)) * _row(factor, x) + _row(bias, x)).astype(x.dtype)


def _row(channels: chex.Array, x: chex.Array) -> chex.Array:
    """[C] -> [1, ..., 1, C], the rank of `x`."""
    return channels.reshape((1,) * (x.ndim - 1) + channels.shape)


class GroupNorm(nn.Module):
    """`flax.linen.GroupNorm` with the call of `BatchNorm`: no row sees another, so it does not need `train`.

    Attributes:
      num_groups: number of channel groups; reduced to its greatest common divisor with the number of channels.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> layer, x = fmd.models.GroupNorm(num_groups=2), jnp.array([[0.0, 2.0, 10.0, 30.0]])
      >>> variables = layer.init(jax.random.key(0), x, train=False)
      >>> layer.apply(variables, x, train=True).round(2).tolist()  # each pair of channels by itself
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    num_groups: int = 8

    @nn.compact
    def __call__(self, x: chex.Array, *, train: bool) -> chex.Array:
        """Normalises [B, ..., C] within each row."""
        del train
        return nn.GroupNorm(num_groups=math.gcd(self.num_groups, x.shape[-1]))(x).astype(x.dtype)


class Dropout(nn.Module):
    """Element-wise dropout with cheap random bits.

    On a CPU the threefry bits of `flax.linen.Dropout` cost as much as a convolution. Here the position of an element is
    hashed with the key: a dozen integer operations that are fused into their consumers and recomputed in the backward
    pass.

    Attributes:
      rate: probability to drop an element, in [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> layer, x = fmd.models.Dropout(0.5), jnp.ones((2, 4))
      >>> y = layer.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
      >>> set(y.flatten().tolist()) <= {0.0, 2.0}
      True
      >>> bool((layer.apply({}, x, train=False) == x).all())
      True
    """

    rate: float

    def __post_init__(self):
        check_rate(self.rate)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: chex.Array, *, train: bool) -> chex.Array:
        """Drops elements of `x` (any shape) with the stream "dropout" when `train`; returns `x` otherwise."""
        if not train or self.rate == 0:
            return x
        kept = keep_mask(jax.random.key_data(self.make_rng("dropout")), x.shape, self.rate)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros_like(x))


class ReLUDropout(Dropout):
    """ReLU and dropout in one pass forward and one backward.

    The backward pass needs only the output: the gradient is nonzero where the output is positive.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> layer, x = fmd.models.ReLUDropout(0.5), jnp.array([[-1.0, 2.0]])
      >>> layer.apply({}, x, train=False).tolist()
      [[0.0, 2.0]]
      >>> y = layer.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
      >>> set(y.flatten().tolist()) <= {0.0, 4.0}
      True
    """

    @nn.compact
    def __call__(self, x: chex.Array, *, train: bool) -> chex.Array:
        """As `Dropout()(nn.relu(x), train=train)`."""
        return _as_function(self, train)(x)


class ReLUDropoutOfParts(Dropout):
    """`ReLUDropout` as a pure function, which also computes it for a part of an array.

    It returns a function, which `capture_intermediates=True` of flax cannot return from `jax.jit`: pass a filter.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> layer, rngs = fmd.models.layers.ReLUDropoutOfParts(0.5), {"dropout": jax.random.key(0)}
      >>> relu_dropout = layer.apply({}, train=True, rngs=rngs)
      >>> x = jnp.ones((2, 4))
      >>> bool((relu_dropout(x)[1:] == relu_dropout(x[1:], start=4)).all())
      True
    """

    @nn.compact
    def __call__(self, *, train: bool) -> Callable[..., chex.Array]:
        """`(x, start=0)` -> the shape of x; `start` is the position of the first element of x in the whole array."""
        return _as_function(self, train)


def _as_function(layer, train):
    if not train or layer.rate == 0:
        return lambda x, start=0: nn.relu(x)
    words, rate = jax.random.key_data(layer.make_rng("dropout")), float(layer.rate)
    return lambda x, start=0: _relu_dropout(x, words, jnp.uint32(start), rate)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _relu_dropout(x, words, start, rate):
    def drop(x, position):
        kept = keep_mask(words, x.shape, rate, start=start + position)
        return jnp.where(kept, nn.relu(x) / (1 - rate), jnp.zeros_like(x))

    return write_out(drop, x)


def _relu_dropout_forward(x, words, start, rate):
    y = _relu_dropout(x, words, start, rate)
    return y, y


def _relu_dropout_backward(rate, y, gradient):
    return jnp.where(y > 0, gradient / (1 - rate), jnp.zeros_like(y)), None, None


_relu_dropout.defvjp(_relu_dropout_forward, _relu_dropout_backward)


def write_out(fn: Callable[[chex.Array, chex.Array], chex.Array], x: chex.Array) -> chex.Array:
    """Computes an element-wise `fn` of a large array once and materializes it.

    XLA:CPU fuses an element-wise function into each of its consumers and computes it again there: ten times for an
    activation that is pooled and then cut into the nine patches of a 3x3 convolution (`jax.lax.optimization_barrier` is
    removed before fusion). The carry of a loop has to be materialized, hence this loop of two iterations.

    Args:
      fn: (part of x, position of its first element) -> the same shape.
      x: any shape.

    Returns:
      `fn(x, 0)`.
    """
    if jax.default_backend() != "cpu" or x.size < _LARGE or x.shape[0] % 2:
        return fn(x, jnp.uint32(0))
    half = x.shape[0] // 2

    def turn(number, x):
        part = jax.lax.dynamic_slice_in_dim(x, number * half, half)
        start = number.astype(jnp.uint32) * jnp.uint32(x.size // 2)
        return jax.lax.dynamic_update_slice_in_dim(x, fn(part, start), number * half, axis=0)

    return jax.lax.fori_loop(0, 2, turn, x)


_LARGE = 2**16  # elements; smaller arrays stay in the cache, where recomputation is cheap


def keep_mask(words: chex.Array, shape: Sequence[int], rate: float, *, start: chex.Array | int = 0) -> chex.Array:
    """The elements that dropout keeps: each with probability 1 - rate (to 2**-32), independently.

    The position of an element and the words of the key are hashed with the finalizer of MurmurHash3, one word after the
    other. The statistical quality suffices for dropout; keys must be random themselves, as those of `jax.random` are.

    Args:
      words: words of the key, uint32, any shape, from `jax.random.key_data`.
      shape: shape of the result.
      rate: probability to drop an element, in [0, 1).
      start: position of the first element, if the result is a part of a larger array.

    Returns:
      Boolean, [*shape].

    References:
      Appleby, MurmurHash3, 2011.
    """
    # `lax` instead of `jnp`, which takes ten times as long to trace: a federation has hundreds of these operations.
    hashed = jax.lax.full(shape, start, jnp.uint32)
    for axis, _ in enumerate(shape):
        stride = jax.lax.full(shape, math.prod(shape[axis + 1 :]) % 2**32, jnp.uint32)
        hashed = jax.lax.add(hashed, jax.lax.mul(jax.lax.broadcasted_iota(jnp.uint32, shape, axis), stride))
    for word in words.reshape(-1):
        hashed = _mix(jax.lax.bitwise_xor(hashed, jax.lax.full(shape, word, jnp.uint32)))
    return jax.lax.lt(hashed, jax.lax.full(shape, min(round((1 - rate) * 2**32), 2**32 - 1), jnp.uint32))


def _mix(words):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None)):
        shifted = jax.lax.shift_right_logical(words, jax.lax.full(words.shape, shift, jnp.uint32))
        words = jax.lax.bitwise_xor(words, shifted)
        if factor is not None:
            words = jax.lax.mul(words, jax.lax.full(words.shape, factor, jnp.uint32))
    return words


def check_positive(**counts):
    """Raises ValueError if a list of counts has an entry that is not a positive integer."""
    for name, values in counts.items():
        if not all(isinstance(n, numbers.Integral) and n > 0 for n in values):
            raise ValueError(f"{name} must be positive integers, got {tuple(values)}")


def check_rate(dropout):
    """Raises ValueError if a dropout rate is not in [0, 1)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
