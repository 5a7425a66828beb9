"""A client whose numbers go wrong harms nobody, and keeps its last good state."""

from collections.abc import Callable
from functools import reduce

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.types import ClientState

# (state, ...) -> (state, losses [E])
Train = Callable[..., tuple[ClientState, chex.Array]]


def unless_broken(
    train: Train, *, losses_count: bool = True
) -> Callable[..., tuple[ClientState, chex.Array, chex.Array]]:
    """Training of one client that leaves it as it was where it does not complete, or ends in what is not finite.

    Args:
      train: (state, ...) -> (state, losses [E]), such as a `digest` or a `revisit` of which all settings are given.
      losses_count: whether a loss that is not finite is a reason; not where early stopping leaves some out.

    Returns:
      A function (completed [], state, ...) -> (state, losses, finite []): `finite` says whether all was, be it kept or
      not. What `train` hands on as it came is neither looked at nor copied, and what was not finite before, such as a
      mask of infinities, need not be.

    >>> def divide(state, by):
    ...     return state._replace(params=state.params / by), jnp.zeros(1)
    >>> client = ClientState(jnp.array([6.0, 0.0]), {}, {}, {})
    >>> for completed, by in ((True, 2.0), (True, 0.0), (False, 2.0)):
    ...     state, _, finite = unless_broken(divide)(completed, client, by)
    ...     print(state.params.tolist(), bool(finite))
    [3.0, 0.0] True
    [6.0, 0.0] False
    [6.0, 0.0] True
    """

    def train_or_stay(completed, state, *arguments):
        new, losses = train(state, *arguments)
        pairs = list(zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True))
        moved = [_made_finite(leaf, before) for leaf, before in pairs if leaf is not before]
        finite = all_finite([moved, losses] if losses_count else moved)
        keep = finite & completed
        kept = [leaf if leaf is before else jnp.where(keep, leaf, before) for leaf, before in pairs]
        return jax.tree.unflatten(jax.tree.structure(state), kept), losses, finite

    return train_or_stay


def _made_finite(leaf, before):
    """The leaf, and zero where it was not finite before, either."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    return jnp.where(jnp.isfinite(before), leaf, jnp.zeros_like(leaf))


def all_finite(tree: chex.ArrayTree) -> chex.Array:
    """Whether no number of one client's tree is NaN or infinite, []; integers and keys always are fine.

    >>> bool(all_finite({"a": jnp.arange(3), "b": jnp.array([1.0, jnp.inf])}))
    False
    """
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in numbers], jnp.array(True))
