"""A client whose numbers go wrong harms nobody, and keeps its last good state."""

from collections.abc import Callable
from functools import reduce

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.types import ClientState, TrainingInfo

# (state, ...) -> (state, info)
Train = Callable[..., tuple[ClientState, TrainingInfo]]


def unless_broken(train: Train, *, losses_count: bool = True) -> Callable[..., tuple[ClientState, TrainingInfo]]:
    """Training of one client that is reverted if it does not complete, or ends in NaN or infinity.

    Args:
      train: (state, ...) -> (state, info), such as a `digest` or a `revisit` of which all settings are given.
      losses_count: whether a non-finite loss of an epoch is a reason to revert as well.

    Returns:
      A function (completed [], state, ...) -> (state, info). `info.finite` tells whether the training was finite, also
      if it did not complete. Leaves of the state that `train` returns unchanged are not copied.

    >>> def divide(state, by):
    ...     params = state.params / by
    ...     return state._replace(params=params), TrainingInfo(jnp.zeros(1), jnp.int32(1), all_finite(params))
    >>> client = ClientState(jnp.array([6.0, 0.0]), {}, {}, {})
    >>> for completed, by in ((True, 2.0), (True, 0.0), (False, 2.0)):
    ...     state, info = unless_broken(divide)(completed, client, by)
    ...     print(state.params.tolist(), bool(info.finite))
    [3.0, 0.0] True
    [6.0, 0.0] False
    [6.0, 0.0] True
    """

    def train_or_stay(completed, state, *arguments):
        new, info = train(state, *arguments)
        if losses_count:
            info = info._replace(finite=info.finite & all_finite(info.loss))
        keep = info.finite & completed
        state = jax.tree.map(lambda leaf, old: leaf if leaf is old else jnp.where(keep, leaf, old), new, state)
        return state, info

    return train_or_stay


def zero_where_not_finite_before(leaf: chex.Array, before: chex.Array) -> chex.Array:
    """The leaf, and zero where it was not finite before: a mask of infinities is no fault of the training.

    >>> zero_where_not_finite_before(jnp.array([jnp.inf, jnp.inf]), jnp.array([0.0, jnp.inf])).tolist()
    [inf, 0.0]
    """
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
