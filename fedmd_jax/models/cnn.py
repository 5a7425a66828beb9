"""The convolutional networks of the FedMD paper."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
from flax import linen as nn

from fedmd_jax.models.convolution import (
    avg_pool,
    conv_general_dilated,
    explicit_pads,
    map_parts,
    rows_per_part,
)
from fedmd_jax.models.initializers import glorot_uniform
from fedmd_jax.models.layers import (
    ConvBatchNorm,
    FoldedBatchNorm,
    ReLUDropoutOfParts,
    check_positive,
    check_rate,
    convolve,
    windows_are_cheap,
)


class PaperNetwork(NamedTuple):
    """A row of the paper's tables of networks.

    Example:
      >>> import fedmd_jax as fmd
      >>> fmd.models.TABLE_1[0]
      PaperNetwork(filters=(128, 256), dropout=0.2)
    """

    filters: tuple[int, ...]  #: of each convolution
    dropout: float  #: probability to drop an activation, in [0, 1)


# The supplement's Table 1: MNIST and FEMNIST; the released code uses these ten on CIFAR, too.
TABLE_1 = (
    PaperNetwork((128, 256), 0.2),
    PaperNetwork((128, 384), 0.2),
    PaperNetwork((128, 512), 0.2),
    PaperNetwork((256, 256), 0.3),
    PaperNetwork((256, 512), 0.4),
    PaperNetwork((64, 128, 256), 0.2),
    PaperNetwork((64, 128, 192), 0.2),
    PaperNetwork((128, 192, 256), 0.2),
    PaperNetwork((128, 128, 128), 0.3),
    PaperNetwork((128, 128, 192), 0.3),
)

# The supplement's Table 2: CIFAR10 and CIFAR100; not in the released code.
TABLE_2 = (
    PaperNetwork((128, 256), 0.2),
    PaperNetwork((128, 128, 192), 0.2),
    PaperNetwork((64, 64, 64), 0.2),
    PaperNetwork((128, 64, 64), 0.3),
    PaperNetwork((64, 64, 128), 0.4),
    PaperNetwork((64, 128, 256), 0.2),
    PaperNetwork((64, 128, 192), 0.2),
    PaperNetwork((128, 192, 256), 0.2),
    PaperNetwork((128, 128, 128), 0.3),
    PaperNetwork((64, 64, 64, 64), 0.2),
)


class _Layer(NamedTuple):
    """A convolution with batch norm, ReLU and dropout, and the strides and the padding of a pooling that follows."""

    size: int
    strides: tuple[int, int]
    padding: str
    pool: tuple[tuple[int, int], str] | None = None


# By number of convolutions. Two and three are as in the released code. Four is OUR choice, since the paper lists such a
# network (Table 2, model 9) without describing it: the network of three with one more convolution that keeps the 3x3
# map.
_FIRST, _LAST = _Layer(3, (1, 1), "SAME", pool=((1, 1), "SAME")), _Layer(3, (2, 2), "VALID")
_THREE = (_FIRST, _Layer(2, (2, 2), "VALID", pool=((2, 2), "VALID")), _LAST)
_TOPOLOGIES = {2: (_FIRST, _LAST), 3: _THREE, 4: (*_THREE, _Layer(3, (1, 1), "SAME"))}


class CNN(nn.Module):
    """The network of the paper with two, three or four convolutions. Returns logits.

    Parameters are named conv1, bn1, conv2, bn2, ..., head. Convolutions have biases, the head has none; kernels start
    Glorot-uniform. The head sees the last feature map flattened, [H * W * filters]. The map is sown as "features".

    Attributes:
      filters: number of filters of each of the two, three or four convolutions.
      num_classes: scores per image.
      dropout: probability to drop an activation after each convolution, in [0, 1).
      conv_general_dilated: the convolution, as `jax.lax.conv_general_dilated`.
      dtype: of activations and products, such as `jnp.bfloat16`; parameters, batch statistics and scores stay float32.
        None: that of inputs and parameters.

    References:
      Li and Wang, FedMD, 2019, supplement, Tables 1 and 2; layer order and strides are those of the authors' code.

    Example:
      >>> from functools import partial
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> network = fmd.models.CNN((4, 8), num_classes=16)
      >>> shapes = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
      >>> shapes["params"]["head"]["kernel"].shape  # 13 * 13 * 8
      (1352, 16)
    """

    filters: Sequence[int]
    num_classes: int
    dropout: float = 0.2
    conv_general_dilated: Callable[..., chex.Array] = conv_general_dilated
    dtype: Any = None

    def __post_init__(self):
        if len(self.filters) not in _TOPOLOGIES:
            raise ValueError(f"filters must be of 2, 3 or 4 convolutions, got {tuple(self.filters)}")
        check_positive(filters=self.filters, num_classes=[self.num_classes])
        check_rate(self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: chex.Array, *, train: bool) -> chex.Array:
        """Scores of images.

        Args:
          x: images, [B, H, W, channels].
          train: whether dropout (stream "dropout") is active, and batch norm uses batch statistics and updates the
            running ones.

        Returns:
          Logits, [B, C].
        """
        smallest = 3 if len(self.filters) == 2 else 12
        if x.ndim != 4 or min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"a CNN of {len(self.filters)} convolutions wants images [B, H, W, channels] of at least "
                f"{smallest}x{smallest}, got {x.shape}"
            )
        x = x.astype(self.dtype or jnp.promote_types(x.dtype, jnp.float32))
        layers, conv, num_channels = _TOPOLOGIES[len(self.filters)], self.conv_general_dilated, x.shape[-1]
        for number, (layer, num_filters) in enumerate(zip(layers, self.filters, strict=True), start=1):
            shape = (layer.size, layer.size, num_channels, num_filters)
            kernel, bias = _ConvParameters(shape, name=f"conv{number}")()
            how = {"strides": layer.strides, "padding": layer.padding}
            drop = ReLUDropoutOfParts(self.dropout, name=f"ReLUDropout_{number - 1}")(train=train)
            pool = _pooling(layer, layers[number:])
            if number == 1 and train and windows_are_cheap(num_channels, conv):
                # The first block is computed together with the second convolution, in parts of the batch.
                kernel, bias = FoldedBatchNorm(name="bn1")(x, kernel, bias, **how, train=train)
                conv = partial(_convolve_block, partial(_block, kernel, bias, how, drop, pool))
            else:
                x = ConvBatchNorm(dtype=self.dtype, name=f"bn{number}")(x, kernel, bias, **how, conv=conv, train=train)
                x, conv = pool(drop(x)), self.conv_general_dilated
            num_channels = num_filters
        self.sow("intermediates", "features", x)
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes, use_bias=False, kernel_init=glorot_uniform, name="head")(x)


def _pooling(layer, following):
    """The pooling after a layer, as a function.

    A pooling with stride 1 and "SAME" adds one row and one column. A convolution whose strides end before them gives
    the same without them, and the pooling is faster without padding.
    """
    if layer.pool is None:
        return lambda x: x
    strides, padding = layer.pool

    def pool(x):
        steps = zip(x.shape[1:3], following[0].strides, strict=True)
        ends_before = all((size - following[0].size) % stride > 0 for size, stride in steps)
        unseen = strides == (1, 1) and following[0].padding == "VALID" and ends_before
        return avg_pool(x, (2, 2), strides, "VALID" if unseen else padding)

    return pool


def _block(kernel, bias, how, drop, pool, rows, first):
    """Convolution, ReLU, dropout and pooling of some rows of the batch; `first` is the number of the first."""
    y = convolve(rows, kernel, bias, **how)
    return pool(drop(y, first * jnp.uint32(math.prod(y.shape[1:]))))


def _convolve_block(block, x, kernel, strides, padding, **others):
    """The convolution of `block(x, 0)`, on a CPU in parts of the batch, whose arrays stay in the cache."""

    def part(rows, kernel, first):
        return conv_general_dilated(block(rows, first), kernel, strides, padding, **others)

    # The block keeps the size of the images, but for a row and a column.
    shape, pads = (*x.shape[:3], kernel.shape[2]), explicit_pads(x.shape, kernel.shape[:2], strides, padding)
    return map_parts(part, x, kernel, rows_per_part(shape, kernel.shape, strides, pads))


class _ConvParameters(nn.Module):
    """The kernel [h, w, I, O] and the bias [O] of a convolution that another module computes."""

    shape: Sequence[int]

    @nn.compact
    def __call__(self):
        kernel = self.param("kernel", glorot_uniform, self.shape)
        return kernel, self.param("bias", nn.initializers.zeros, (self.shape[-1],))


def scale_width(filters: Sequence[int], width: float) -> tuple[int, ...]:
    """Multiplies numbers of filters by `width`, rounded, at least 1.

    Example:
      >>> import fedmd_jax as fmd
      >>> fmd.models.scale_width((128, 256), 0.25)
      (32, 64)
    """
    if width <= 0:
        raise ValueError(f"width must be positive, got {width}")
    return tuple(max(1, round(n * width)) for n in filters)


def paper_cnn(network: PaperNetwork, num_classes: int = 16, *, width: float = 1.0) -> CNN:
    """The CNN of a row of the paper's tables.

    Args:
      network: such as `TABLE_1[0]`.
      num_classes: 16 in the paper: ten public classes and six private ones share a head.
      width: multiplies the number of filters.

    Example:
      >>> import fedmd_jax as fmd
      >>> fmd.models.paper_cnn(fmd.models.TABLE_1[5], width=0.125).filters
      (8, 16, 32)
    """
    return CNN(scale_width(network.filters, width), num_classes, network.dropout)
