"""The reference's optimizer; any other comes from optax."""

import chex
import jax
import jax.numpy as jnp
import optax


def adam(
    learning_rate: float = 1e-3, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-7
) -> optax.GradientTransformation:
    """Adam as Keras has it, with which the released code trains: `eps` is added before the bias correction.

    optax adds it after (the "epsilon hat" of the paper's section 2 is here). The two differ where gradients are as
    small as `eps`, in the first steps most of all: by 1.6e-3 in a revisit loss of the reference's first round.

    Args:
      learning_rate: step size.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squared gradients.
      eps: keeps the denominator from zero.

    Returns:
      An optax optimizer; its state is that of `optax.scale_by_adam`.

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, 2014, end of section 2.

    >>> optimizer = adam(0.1)
    >>> params = jnp.array([1.0])
    >>> updates, _ = optimizer.update(jnp.array([3.0]), optimizer.init(params), params)
    >>> round(float(updates[0]), 4)
    -0.1
    """

    def init(params: chex.ArrayTree) -> optax.ScaleByAdamState:
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)  # two buffers, to be donated
        return optax.ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=mu, nu=nu)

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        # `lax.pow` takes an integer exponent, also if dtypes are not promoted; 1.0, since a rate may be an integer.
        step = learning_rate * jnp.sqrt(1 - jax.lax.pow(1.0 * b2, count)) / (1 - jax.lax.pow(1.0 * b1, count))
        updates = jax.tree.map(lambda m, v: -step * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
