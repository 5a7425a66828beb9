"""Penalties on parameters, for `Architecture.penalty`."""

from collections.abc import Callable

import chex
import jax.numpy as jnp


def head_l2(scale: float = 1e-3) -> Callable[[chex.ArrayTree], chex.Array]:
    """L2 on the kernel of the layer named "head", as Keras has it: `scale * sum(kernel**2)`, without a half.

    Args:
      scale: 1e-3 in the released FedMD code, in the digest and in the revisit loss.

    Returns:
      params -> scalar, to be given to `architecture_from_linen(..., penalty=head_l2())`.

    >>> head_l2(0.5)({"head": {"kernel": jnp.array([[1.0, 2.0]])}}).tolist()
    2.5
    """
    if scale < 0:
        raise ValueError(f"scale must not be negative, got {scale}")

    def penalty(params):
        return scale * jnp.sum(jnp.square(params["head"]["kernel"]))

    return penalty
