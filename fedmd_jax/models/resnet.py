"""Residual networks for small images."""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax.numpy as jnp
from flax import linen as nn

from fedmd_jax.models.cnn import scale_width
from fedmd_jax.models.convolution import conv_general_dilated
from fedmd_jax.models.initializers import he_normal
from fedmd_jax.models.layers import BatchNorm, check_positive

# norm(name=...) makes a module that is called as module(x, train=train)
Norm = Callable[..., nn.Module]


class ResNet(nn.Module):
    """The residual network of the CIFAR experiments. Returns logits.

    A 3x3 stem is followed by stages of residual blocks of two 3x3 convolutions; each stage but the first halves the
    image. Shortcuts have no parameters: they skip pixels and pad channels with zeros (option A of the paper). The mean
    over the image and the head come last. The last feature map is sown as "features".

    Attributes:
      num_blocks: number of residual blocks per stage.
      num_classes: number of scores per image.
      filters: number of filters of each stage, not decreasing.
      norm: makes the normalisation, `BatchNorm`, `GroupNorm` or your own: `norm(name=...)` is a module that is called
        as `module(x, train=train)`.
      conv_general_dilated: the convolution, as `jax.lax.conv_general_dilated`.
      dtype: of activations and products, such as `jnp.bfloat16`; parameters, batch statistics and scores stay float32.
        None: that of inputs and parameters.

    References:
      He et al., Deep Residual Learning for Image Recognition, 2015, section 4.2.

    Example:
      >>> from functools import partial
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> network = fmd.models.ResNet(1, num_classes=10, filters=(4, 8), norm=fmd.models.GroupNorm)
      >>> shapes = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> list(shapes), shapes["params"]["head"]["kernel"].shape
      (['params'], (8, 10))
    """

    num_blocks: int
    num_classes: int
    filters: Sequence[int] = (16, 32, 64)
    norm: Norm = BatchNorm
    conv_general_dilated: Callable[..., chex.Array] = conv_general_dilated
    dtype: Any = None

    def __post_init__(self):
        check_positive(num_blocks=[self.num_blocks], filters=self.filters, num_classes=[self.num_classes])
        if not self.filters or list(self.filters) != sorted(self.filters):
            raise ValueError(f"filters must be of one stage or more, and not decrease, got {tuple(self.filters)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: chex.Array, *, train: bool) -> chex.Array:
        """Scores [B, C] of images [B, H, W, channels]."""
        if x.ndim != 4:
            raise ValueError(f"a ResNet wants images [B, H, W, channels], got {x.shape}")
        x = nn.relu(self._conv_norm("stem", x, self.filters[0], 1, train))
        for stage, filters in enumerate(self.filters, start=1):
            for block in range(1, self.num_blocks + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                x = self._block(f"stage{stage}_block{block}", x, filters, stride, train)
        self.sow("intermediates", "features", x)
        return nn.Dense(self.num_classes, name="head")(jnp.mean(x, axis=(1, 2)))

    def _block(self, name, x, filters, stride, train):
        y = nn.relu(self._conv_norm(f"{name}_1", x, filters, stride, train))
        y = self._conv_norm(f"{name}_2", y, filters, 1, train)
        shortcut = x[:, ::stride, ::stride, :]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, filters - x.shape[-1])))
        return nn.relu(y + shortcut)

    def _conv_norm(self, name, x, filters, stride, train):
        x = nn.Conv(
            filters,
            (3, 3),
            (stride, stride),
            use_bias=False,
            kernel_init=he_normal,
            conv_general_dilated=self.conv_general_dilated,
            dtype=self.dtype,
            name=f"{name}_conv",
        )(x)
        return self.norm(name=f"{name}_norm")(x, train=train)


def resnet8(num_classes: int, *, width: float = 1.0, norm: Norm = BatchNorm) -> ResNet:
    """Three stages of one block: 8 layers with weights; `width` multiplies the 16, 32 and 64 filters.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.models.resnet8(10, width=0.5)
      >>> network.num_blocks, network.filters
      (1, (8, 16, 32))
    """
    return ResNet(1, num_classes, scale_width((16, 32, 64), width), norm)


def resnet20(num_classes: int, *, width: float = 1.0, norm: Norm = BatchNorm) -> ResNet:
    """Three stages of three blocks: 20 layers with weights; `width` multiplies the 16, 32 and 64 filters.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.models.resnet20(10, norm=fmd.models.GroupNorm)
      >>> network.num_blocks, network.filters
      (3, (16, 32, 64))
    """
    return ResNet(3, num_classes, scale_width((16, 32, 64), width), norm)
