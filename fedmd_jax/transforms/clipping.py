"""Bounds on what one client reports."""

from collections.abc import Callable

import chex
import jax.numpy as jnp

from fedmd_jax.checks import check_positive

# (scores [M, C], key) -> scores [M, C]: a client applies it to its scores before it sends them.
Transform = Callable[[chex.Array, chex.PRNGKey], chex.Array]


def clip_scores(scores: chex.Array, key: chex.PRNGKey | None = None, *, bound: float) -> chex.Array:
    """Clips every score to [-bound, bound]; non-finite scores stay non-finite, so that their client is excluded.

    A transform: `fedmd(..., transforms=(partial(clip_scores, bound=10.0),))`.

    Args:
      scores: [M, C].
      key: not used; every transform takes a key.
      bound: positive and finite. With n clients of equal weight, one client moves an entry of the consensus by at most
        2 * bound / n.

    Raises:
      ValueError: the bound is not positive and finite.

    References:
      Not in Li and Wang 2019. Norm bounding of contributions: Sun et al. 2019, "Can You Really Backdoor Federated
      Learning?", there of weight updates.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> fmd.transforms.clip_scores(jnp.array([[1.0, -9.0, jnp.inf]]), bound=2.0).tolist()
      [[1.0, -2.0, inf]]
    """
    del key
    check_positive("bound", bound)
    return jnp.where(jnp.isfinite(scores), jnp.clip(scores, -bound, bound), scores)
