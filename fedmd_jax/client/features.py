"""Networks that give their features beside their scores."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.types import Architecture


def with_features(architecture: Architecture, size: int) -> Architecture:
    """The same network with outputs [B, C + size]: the logits, and its features brought to a common size.

    They cost no second pass, and `score` and `fit` take it as it is: a loss splits its outputs.

    Args:
      architecture: a network with `Architecture.features`.
      size: number of features, see `pool_features`.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((8,), num_classes=3))
      >>> params, model_state = network.init(jax.random.key(0), jnp.zeros((1, 4)))
      >>> outputs, _ = fmd.client.with_features(network, 4).apply(params, model_state, jnp.ones((5, 4)), train=False)
      >>> outputs.shape
      (5, 7)
    """

    def apply(params, model_state, inputs, **how):
        (logits, features), model_state = architecture.features(params, model_state, inputs, **how)
        return jnp.concatenate([logits, pool_features(features, size)], axis=1), model_state

    return architecture._replace(apply=apply)


def pool_features(features: chex.Array, size: int) -> chex.Array:
    """Means of neighbouring features: adaptive average pooling, as PyTorch's; the features themselves if of this size.

    Args:
      features: [B, D].
      size: number of means; the i-th is over features floor(i D / size) to ceil((i + 1) D / size).

    Returns:
      [B, size].

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> fmd.client.pool_features(jnp.array([[1.0, 2.0, 3.0, 4.0, 5.0]]), 2).tolist()
      [[2.0, 4.0]]
    """
    width = features.shape[1]
    if width == size:
        return features
    first, end = np.arange(size) * width // size, -(np.arange(1, size + 1) * width // -size)
    inside = (np.arange(width)[:, None] >= first) & (np.arange(width)[:, None] < end)
    means = jnp.asarray(inside / (end - first), features.dtype)
    return jnp.matmul(features, means, precision=jax.lax.Precision.HIGHEST)
