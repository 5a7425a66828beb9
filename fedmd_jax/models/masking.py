"""Helpers of both adapters that keep padding rows out of batch statistics."""

import chex
import jax
import jax.numpy as jnp


def row_mask(mask: chex.Array, x: chex.Array) -> chex.Array:
    """[B] -> [B, 1, ..., 1], the rank of `x`; all True if no row is real, to keep flax from dividing by zero."""
    mask = mask | ~jnp.any(mask)
    return mask.reshape((-1,) + (1,) * (x.ndim - 1))


def keep_if_all_padding(mask, old_state, new_state):
    """`new_state`, but `old_state` if no row of the batch is real."""
    if mask is None:
        return new_state
    return jax.tree.map(lambda new, old: jnp.where(jnp.any(mask), new, old), new_state, old_state)
