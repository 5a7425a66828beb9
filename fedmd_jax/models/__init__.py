"""Networks and layers in Flax, and adapters from Flax modules to an `Architecture`.

For FedProto and FedTGP a network sows its features, such as the input of its last layer or its last feature map:
`self.sow("intermediates", "features", x)` in linen, `self.sow(nnx.Intermediate, "features", x)` in nnx. The networks of
this package do. What is sown costs nothing in other algorithms.
"""

from fedmd_jax.models.cnn import (
    CNN as CNN,
    TABLE_1 as TABLE_1,
    TABLE_2 as TABLE_2,
    PaperNetwork as PaperNetwork,
    paper_cnn as paper_cnn,
    scale_width as scale_width,
)
from fedmd_jax.models.convolution import (
    avg_pool as avg_pool,
    blocked as blocked,
    choose_form as choose_form,
    conv_general_dilated as conv_general_dilated,
    native as native,
    native_or_patches as native_or_patches,
    patches as patches,
    patches_in_parts as patches_in_parts,
    shifted as shifted,
)
from fedmd_jax.models.from_linen import architecture_from_linen as architecture_from_linen
from fedmd_jax.models.from_nnx import architecture_from_nnx as architecture_from_nnx
from fedmd_jax.models.layers import (
    BatchNorm as BatchNorm,
    ConvBatchNorm as ConvBatchNorm,
    Dropout as Dropout,
    FoldedBatchNorm as FoldedBatchNorm,
    GroupNorm as GroupNorm,
    ReLUDropout as ReLUDropout,
)
from fedmd_jax.models.mlp import MLP as MLP
from fedmd_jax.models.penalties import head_l2 as head_l2
from fedmd_jax.models.resnet import ResNet as ResNet, resnet8 as resnet8, resnet20 as resnet20
