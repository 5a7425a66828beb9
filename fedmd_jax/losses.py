"""Losses of ONE example, or of any batch of them: they reduce the class axis and no other.

The mean over a batch is taken in `local.py`, where it is known which rows are padding.
"""

import chex
import jax
import jax.numpy as jnp
import optax


def mae(logits: chex.Array, targets: chex.Array) -> chex.Array:
    """Mean absolute error between the scores of each example: the digest loss of the released FedMD code.

    Args:
      logits: student scores, [..., C].
      targets: consensus scores, [..., C].

    Returns:
      Error per example, [...], averaged over classes; zero where the two agree.

    References:
      Li and Wang, FedMD, 2019 (arXiv 1910.03581); the paper leaves the distance open, the authors' code uses this one.

    >>> mae(jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[1.0, 4.0], [0.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    chex.assert_equal_shape([logits, targets])
    return jnp.mean(jnp.abs(logits - targets), axis=-1)


def mse(logits: chex.Array, targets: chex.Array) -> chex.Array:
    """Mean squared error between the scores of each example.

    Args:
      logits: student scores, [..., C].
      targets: consensus scores, [..., C].

    Returns:
      Error per example, [...], averaged over classes; zero where the two agree.

    References:
      Ba and Caruana, Do Deep Nets Really Need to be Deep?, 2014, section 2.2: regression of the teacher's logits.

    >>> mse(jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[1.0, 4.0], [0.0, 0.0]])).tolist()
    [2.0, 0.0]
    """
    chex.assert_equal_shape([logits, targets])
    return jnp.mean(jnp.square(logits - targets), axis=-1)


def kl(logits: chex.Array, targets: chex.Array, *, temperature: float = 1.0) -> chex.Array:
    """KL(targets || logits) of each example, in nats.

    Args:
      logits: student scores, [..., C], unnormalised.
      targets: consensus scores, [..., C], unnormalised.
      temperature: divides both; the result is multiplied by its square, which keeps the size of the gradient.

    Returns:
      Divergence per example, [...]; zero where the two agree up to a constant.

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.

    >>> kl(jnp.array([0.0, 1.0]), jnp.array([5.0, 6.0])).tolist()
    0.0
    """
    chex.assert_equal_shape([logits, targets])
    log_student = jax.nn.log_softmax(logits / temperature)
    log_teacher = jax.nn.log_softmax(targets / temperature)
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)


def cross_entropy(logits: chex.Array, labels: chex.Array) -> chex.Array:
    """Cross entropy of each example with its integer label, in nats: the revisit loss.

    Args:
      logits: scores, [..., C], unnormalised.
      labels: class indices, [...], integers in [0, C).

    Returns:
      Loss per example, [...].

    >>> round(float(cross_entropy(jnp.zeros(4), jnp.array(2))), 4)
    1.3863
    """
    chex.assert_rank(logits, labels.ndim + 1)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
