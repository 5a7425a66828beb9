"""Guards against NaN and infinity: a client whose training is not finite is put back to its state before that phase."""

from collections.abc import Callable
from functools import reduce

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.types import ClientState, TrainingInfo

# (state, ...) -> (state, info)
Train = Callable[..., tuple[ClientState, TrainingInfo]]


def keep_if_finite(train: Train, *, losses_count: bool = True) -> Callable[..., tuple[ClientState, TrainingInfo]]:
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
    ...     state, info = keep_if_finite(divide)(completed, client, by)
    ...     print(state.params.tolist(), bool(info.finite))
    [3.0, 0.0] True
    [6.0, 0.0] False
    [6.0, 0.0] True
    """

    def train_or_revert(completed, state, *arguments):
        new, info = train(state, *arguments)
        if losses_count:
            info = info._replace(finite=info.finite & all_finite(info.loss))
        keep = info.finite & completed
        state = jax.tree.map(lambda leaf, old: leaf if leaf is old else jnp.where(keep, leaf, old), new, state)
        return state, info

    return train_or_revert


def zero_where_not_finite_before(leaf: chex.Array, before: chex.Array) -> chex.Array:
    """The leaf, with zero where it was already non-finite before, as in a mask of infinities.

    >>> zero_where_not_finite_before(jnp.array([jnp.inf, jnp.inf]), jnp.array([0.0, jnp.inf])).tolist()
    [inf, 0.0]
    """
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    return jnp.where(jnp.isfinite(before), leaf, jnp.zeros_like(leaf))


def all_finite(tree: chex.ArrayTree) -> chex.Array:
    """Whether all floating-point numbers of a tree are finite, []; integers and keys are ignored.

    >>> bool(all_finite({"a": jnp.arange(3), "b": jnp.array([1.0, jnp.inf])}))
    False
    """
    numbers = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in numbers], jnp.array(True))
