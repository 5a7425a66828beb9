"""Penalties on parameters, for `Architecture.penalty`."""

from collections.abc import Callable

import chex
import jax.numpy as jnp


def head_l2(scale: float = 1e-3) -> Callable[[chex.ArrayTree], chex.Array]:
    """L2 penalty on the kernel of the layer named "head", as in Keras: `scale * sum(kernel**2)`, without a factor 1/2.

    Args:
      scale: 1e-3 in the released FedMD code, in the digest and in the revisit loss.

    Returns:
      params -> scalar, for `architecture_from_linen(..., penalty=head_l2())`.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> fmd.models.head_l2(0.5)({"head": {"kernel": jnp.array([[1.0, 2.0]])}}).tolist()
      2.5
    """
    if scale < 0:
        raise ValueError(f"scale must not be negative, got {scale}")

    def penalty(params):
        return scale * jnp.sum(jnp.square(params["head"]["kernel"]))

    return penalty
