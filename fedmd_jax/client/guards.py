"""Guards against NaN and infinity.

What happens to a client with NaN or infinity in a round: if its scores are non-finite, the aggregator excludes them,
so that the consensus is that of the other clients; the client still receives the consensus, digests it and revisits
its private data like all others. If its digest or its revisit ends in NaN or infinity, in the state or (in a round)
in the loss of an epoch, `keep_if_finite` reverts the client to its state from before that phase, optimizer memory
included; the next phase, and the next round, start from there. So a client with one bad phase is back in the
consensus of the next round. A client whose stored parameters are NaN is excluded and reverted in every round if the
NaN reaches its scores and losses; entries that were non-finite before a phase, such as a mask of infinities, are
ignored. The results of the other clients are bitwise those of a round without it. The `RoundInfo` and the status in
the metrics say for each round which of the three was non-finite: scores, digest or revisit. In the phases before the
rounds only the state is checked, and the `TrainingInfo` says whether it was finite.
"""

import collections
from collections.abc import Callable
from functools import reduce

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.types import ClientState, TrainingInfo

Train = Callable[..., tuple[ClientState, TrainingInfo]]


def keep_if_finite(train: Train, *, losses_count: bool = True) -> Train:
    """Training of one client that is reverted if it does not complete, or ends in NaN or infinity.

    Args:
      train: (architecture, state, ...) -> (state, info), such as a `digest` or a `revisit` with its settings.
      losses_count: whether a non-finite loss of an epoch is a reason to revert as well.

    Returns:
      A function (architecture, completed [], state, ...) -> (state, info). `info.finite` tells whether the training was
      finite, also if it did not complete. Leaves of the state that `train` returns unchanged are not copied.

    >>> def divide(architecture, state, by):
    ...     params = state.params / by
    ...     return state._replace(params=params), TrainingInfo(jnp.zeros(1), jnp.int32(1), all_finite(params))
    >>> client = ClientState(jnp.array([6.0, 0.0]), {}, {}, {})
    >>> for completed, by in ((True, 2.0), (True, 0.0), (False, 2.0)):
    ...     state, info = keep_if_finite(divide)(None, completed, client, by)
    ...     print(state.params.tolist(), bool(info.finite))
    [3.0, 0.0] True
    [6.0, 0.0] False
    [6.0, 0.0] True
    """

    def train_or_revert(architecture, completed, state, *arguments):
        new, info = train(architecture, state, *arguments)
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
    by_shape = collections.defaultdict(list)  # one reduction for each shape: it is quicker to compile
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            by_shape[leaf.shape].append(jnp.isfinite(leaf))
    return reduce(
        jnp.logical_and, [jnp.all(reduce(jnp.logical_and, each)) for each in by_shape.values()], jnp.array(True)
    )
