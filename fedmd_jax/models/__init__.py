"""Networks and layers in Flax, and adapters from Flax modules to an `Architecture`."""

from fedmd_jax.models.cnn import CNN, TABLE_1, TABLE_2, PaperNetwork, paper_cnn, scale_width
from fedmd_jax.models.convolution import (
    avg_pool,
    blocked,
    choose_form,
    conv_general_dilated,
    native,
    patches,
    shifted,
)
from fedmd_jax.models.from_linen import architecture_from_linen
from fedmd_jax.models.from_nnx import architecture_from_nnx
from fedmd_jax.models.layers import BatchNorm, ConvBatchNorm, Dropout, GroupNorm, ReLUDropout
from fedmd_jax.models.mlp import MLP
from fedmd_jax.models.penalties import head_l2
from fedmd_jax.models.resnet import ResNet, resnet8, resnet20

__all__ = [
    "CNN",
    "MLP",
    "TABLE_1",
    "TABLE_2",
    "BatchNorm",
    "ConvBatchNorm",
    "Dropout",
    "GroupNorm",
    "PaperNetwork",
    "ReLUDropout",
    "ResNet",
    "architecture_from_linen",
    "architecture_from_nnx",
    "avg_pool",
    "blocked",
    "choose_form",
    "conv_general_dilated",
    "head_l2",
    "native",
    "paper_cnn",
    "patches",
    "resnet8",
    "resnet20",
    "scale_width",
    "shifted",
]
