"""Per-example losses. They reduce the class axis only.

The mean over a batch is taken in `client.training`, where the padding rows are known.
"""

import chex
import jax
import jax.numpy as jnp
import optax

from fedmd_jax.checks import check_numbers, check_positive


def at_least_float32(values: chex.Array) -> chex.Array:
    """The values in float32, or as they are if they are more precise, for sums of values of lower precision.

    Args:
      values: floats of any shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from fedmd_jax.client.losses import at_least_float32
      >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def mae(logits: chex.Array, targets: chex.Array) -> chex.Array:
    """Mean absolute error between the scores of each example: the digest loss of the released FedMD code.

    Args:
      logits: student scores, [..., C].
      targets: consensus scores, [..., C].

    Returns:
      Error per example, [...], averaged over classes; zero for equal scores.

    Raises:
      ValueError: scores and targets are not floats, or differ in shape.

    References:
      Li and Wang, FedMD, 2019 (arXiv 1910.03581); the paper leaves the distance open, the authors' code uses this one.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> fmd.mae(jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[1.0, 4.0], [0.0, 0.0]])).tolist()
      [1.0, 0.0]
    """
    _check_scores(logits, targets)
    return jnp.mean(jnp.abs(logits - targets), axis=-1)


def mse(logits: chex.Array, targets: chex.Array) -> chex.Array:
    """Mean squared error between the scores of each example.

    Args:
      logits: student scores, [..., C].
      targets: consensus scores, [..., C].

    Returns:
      Error per example, [...], averaged over classes; zero for equal scores.

    Raises:
      ValueError: scores and targets are not floats, or differ in shape.

    References:
      Ba and Caruana, Do Deep Nets Really Need to be Deep?, 2014, section 2.2: regression of the teacher's logits.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> fmd.mse(jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[1.0, 4.0], [0.0, 0.0]])).tolist()
      [2.0, 0.0]
    """
    _check_scores(logits, targets)
    return jnp.mean(jnp.square(logits - targets), axis=-1)


def kl(logits: chex.Array, targets: chex.Array, *, temperature: float = 1.0) -> chex.Array:
    """KL(targets || logits) of each example, in nats.

    Args:
      logits: student scores, [..., C], unnormalised.
      targets: consensus scores, [..., C], unnormalised.
      temperature: divides both; the result is multiplied by its square, which keeps the scale of the gradient.

    Returns:
      Divergence per example, [...]; zero if the scores differ by a constant.

    Raises:
      ValueError: scores and targets are not floats, or differ in shape; the temperature is not from 1e-6 to 1e6.

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> fmd.kl(jnp.array([0.0, 1.0]), jnp.array([5.0, 6.0])).tolist()
      0.0
    """
    _check_scores(logits, targets)
    if not isinstance(temperature, jax.core.Tracer):
        check_positive("temperature", temperature)
        if not 1e-6 <= temperature <= 1e6:  # beyond, its square may be 0 or infinite in float32
            raise ValueError(f"temperature must be from 1e-6 to 1e6, got {temperature!r:.80}")
        temperature = float(temperature) if isinstance(temperature, int) else temperature
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

    Raises:
      ValueError: scores are not floats, labels are not integers, or their shapes do not match.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> round(float(fmd.cross_entropy(jnp.zeros(4), jnp.array(2))), 4)
      1.3863
    """
    check_numbers("scores", logits, kind=jnp.floating)
    check_numbers("labels", labels, kind=jnp.integer)
    if logits.shape[:-1] != labels.shape or 0 in logits.shape[-1:] or not logits.shape:
        raise ValueError(f"scores [..., C] and labels [...] are wanted, got shapes {logits.shape} and {labels.shape}")
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def kl_of_probabilities(logits: chex.Array, targets: chex.Array) -> chex.Array:
    """KL(targets || softmax(logits)) of each example, in nats, for targets that are probabilities.

    Its gradient is that of the cross entropy with such targets; it is zero if both agree.

    Args:
      logits: student scores, [..., C], unnormalised.
      targets: probabilities, [..., C].

    Returns:
      Loss per example, [...].

    Raises:
      ValueError: scores and targets are not floats, or differ in shape.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> fmd.client.kl_of_probabilities(jnp.zeros(2), jnp.array([0.5, 0.5])).tolist()
      0.0
      >>> round(float(fmd.client.kl_of_probabilities(jnp.zeros(2), jnp.array([1.0, 0.0]))), 4)
      0.6931
    """
    _check_scores(logits, targets)
    return optax.losses.kl_divergence(jax.nn.log_softmax(logits), targets)


def _check_scores(logits, targets):
    """Requires floats: a negative difference of unsigned integers would wrap around."""
    check_numbers("scores", logits, kind=jnp.floating)
    check_numbers("targets", targets, kind=jnp.floating)
    if logits.shape != targets.shape or not logits.shape or logits.shape[-1] == 0:
        raise ValueError(
            f"scores and targets must have one shape [..., C], got shapes {logits.shape} and {targets.shape}"
        )
