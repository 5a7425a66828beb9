"""A fully connected network."""

from collections.abc import Sequence
from typing import Any

import chex
from flax import linen as nn

from fedmd_jax.models.layers import ReLUDropout, check_positive, check_rate


class MLP(nn.Module):
    """Dense layers with ReLU and dropout, then the head. Inputs of any shape are flattened.

    Parameters are named dense1, dense2, ..., head. The input of the head is sown as "features".

    Attributes:
      hidden: number of units of each hidden layer; may be empty (multinomial logistic regression).
      num_classes: scores per example.
      dropout: probability to drop a hidden activation, in [0, 1).
      dtype: of activations and products, such as `jnp.bfloat16`; parameters and scores stay float32.
        None: that of inputs and parameters.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> network = fmd.models.MLP((8,), num_classes=3)
      >>> variables = network.init(jax.random.key(0), jnp.zeros((1, 2, 2)), train=False)
      >>> jax.tree.map(jnp.shape, variables["params"]["head"])
      {'bias': (3,), 'kernel': (8, 3)}
    """

    hidden: Sequence[int]
    num_classes: int
    dropout: float = 0.0
    dtype: Any = None

    def __post_init__(self):
        check_positive(hidden=self.hidden, num_classes=[self.num_classes])
        check_rate(self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: chex.Array, *, train: bool) -> chex.Array:
        """Scores [B, C] of examples [B, ...]."""
        x = x.reshape(x.shape[0], -1)
        for number, units in enumerate(self.hidden, start=1):
            x = nn.Dense(units, dtype=self.dtype, name=f"dense{number}")(x)
            x = ReLUDropout(self.dropout)(x, train=train)
        self.sow("intermediates", "features", x)
        return nn.Dense(self.num_classes, name="head")(x)
