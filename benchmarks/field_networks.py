"""The networks of the libraries that `field.py` compares with, in Flax, layer by layer.

Initial weights have the distributions of the originals, which decide how fast plain SGD learns.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from fedmd_jax.models import BatchNorm, Dropout, conv_general_dilated

_norm = functools.partial(BatchNorm, momentum=0.9, epsilon=1e-5)  # PyTorch's defaults


def torch_uniform(fan_in: int) -> Callable:
    """PyTorch's distribution of kernels and biases: uniform within 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)

    return init


def haiku_normal(fan_in: int) -> Callable:
    """Haiku's distribution of kernels: a truncated normal of scale 1 / sqrt(fan_in)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.truncated_normal(key, -2, 2, (math.prod(shape),), dtype).reshape(shape) * fan_in**-0.5

    return init


def kaiming_normal(fan_out: int) -> Callable:
    """The distribution of kernels in torchvision's ResNets: a normal of variance 2 / fan_out."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape) * (2 / fan_out) ** 0.5

    return init


def max_pool(x: chex.Array, window: int, stride: int, padding: int = 0) -> chex.Array:
    """Max pooling by strided slices; `lax.reduce_window` is slow inside a scan on CPUs."""
    x = jnp.pad(x, ((0, 0), *2 * ((padding, padding),), (0, 0)), constant_values=-jnp.inf)
    height, width = ((size - window) // stride * stride + 1 for size in x.shape[1:3])
    places = itertools.product(range(window), repeat=2)
    return functools.reduce(jnp.maximum, (x[:, i : i + height : stride, j : j + width : stride] for i, j in places))


def torch_conv(x: chex.Array, filters: int, size: int) -> chex.Array:
    """`nn.Conv2d` of PyTorch without padding."""
    init = torch_uniform(size * size * x.shape[-1])
    how = {"padding": "VALID", "conv_general_dilated": conv_general_dilated}
    return nn.Conv(filters, (size, size), kernel_init=init, bias_init=init, **how)(x)


def torch_dense(x: chex.Array, features: int) -> chex.Array:
    """`nn.Linear` of PyTorch."""
    init = torch_uniform(x.shape[-1])
    return nn.Dense(features, kernel_init=init, bias_init=init)(x)


class CNN(nn.Module):
    """`CNN` and `FedAvgCNN` of HtFLlib: one or two 5x5 convolutions with max pooling, and dense layers."""

    num_convolutions: int
    hidden: Sequence[int]
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        """Scores [B, C] of images."""
        for filters in (32, 64)[: self.num_convolutions]:
            x = max_pool(nn.relu(torch_conv(x, filters, 5)), 2, 2)
        x = x.reshape(len(x), -1)
        for features in self.hidden:
            x = nn.relu(torch_dense(x, features))
        self.sow("intermediates", "features", x)
        return torch_dense(x, self.num_classes)


class ResNet18(nn.Module):
    """torchvision's `resnet18`: shortcuts are projections, the first convolution is 7x7, followed by max pooling."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: chex.Array, *, train: bool) -> chex.Array:
        """Scores [B, C] of images."""
        x = nn.relu(self._conv_norm(x, 64, 7, 2, train))
        x = max_pool(x, 3, 2, padding=1)
        for filters, block in itertools.product((64, 128, 256, 512), range(2)):
            stride = 2 if filters > 64 and block == 0 else 1
            y = nn.relu(self._conv_norm(x, filters, 3, stride, train))
            y = self._conv_norm(y, filters, 3, 1, train)
            shortcut = self._conv_norm(x, filters, 1, stride, train) if stride > 1 else x
            x = nn.relu(y + shortcut)
        self.sow("intermediates", "features", x)
        return torch_dense(jnp.mean(x, axis=(1, 2)), self.num_classes)

    def _conv_norm(self, x, filters, size, stride, train):
        x = nn.Conv(
            filters,
            (size, size),
            (stride, stride),
            padding=2 * ((size // 2, size // 2),),
            use_bias=False,
            kernel_init=kaiming_normal(size * size * filters),
            conv_general_dilated=conv_general_dilated,
        )(x)
        return _norm()(x, train=train)


class EmnistCNN(nn.Module):
    """The convolutional network of FedJAX for EMNIST, with two dropouts."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: chex.Array, *, train: bool) -> chex.Array:
        """Scores [B, C] of images."""
        for filters in (32, 64):
            init = haiku_normal(9 * x.shape[-1])
            how = {"padding": "VALID", "conv_general_dilated": conv_general_dilated}
            x = nn.relu(nn.Conv(filters, (3, 3), kernel_init=init, **how)(x))
        x = Dropout(0.25)(max_pool(x, 2, 2), train=train)
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(128, kernel_init=haiku_normal(x.shape[-1]))(x))
        x = Dropout(0.5)(x, train=train)
        return nn.Dense(self.num_classes, kernel_init=haiku_normal(128))(x)


class LeNet5(nn.Module):
    """`LeNet5` of FL-bench, with batch norm."""

    num_classes: int

    @nn.compact
    def __call__(self, x: chex.Array, *, train: bool) -> chex.Array:
        """Scores [B, C] of images."""
        for filters in (6, 16):
            x = _norm()(torch_conv(x, filters, 5), train=train)
            x = max_pool(nn.relu(x), 2, 2)
        x = x.reshape(len(x), -1)
        for features in (120, 84):
            x = nn.relu(torch_dense(x, features))
        return torch_dense(x, self.num_classes)


# Client i has network i modulo the number of networks.
FAMILIES = {
    "htfllib published": (CNN(2, (512,)), ResNet18()),
    "htfllib small": tuple(CNN(n, hidden) for n in (1, 2) for hidden in ((512,), (256, 512))),
    "fedjax": (EmnistCNN(),),
    "fl-bench": (LeNet5(62),),
}
