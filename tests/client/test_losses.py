from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from fedmd_jax import cross_entropy, kl, mae, mse

RNG = np.random.default_rng(0)
LOGITS, TARGETS = jnp.asarray(RNG.normal(size=(2, 6, 5)), jnp.float32)


@pytest.mark.parametrize("distance", [mae, mse, kl, partial(kl, temperature=3.0)])
def test_zero_where_the_two_agree_and_positive_elsewhere(distance):
    np.testing.assert_allclose(distance(TARGETS, TARGETS), 0.0, atol=1e-6)
    assert (distance(LOGITS, TARGETS) > 0.01).all()


@pytest.mark.parametrize("loss", [mae, mse, kl, lambda x, y: cross_entropy(x, jnp.argmax(y, -1))])
def test_any_leading_axes_and_vmap_agree(loss):
    whole = loss(LOGITS.reshape(2, 3, 5), TARGETS.reshape(2, 3, 5))
    assert whole.shape == (2, 3)
    np.testing.assert_allclose(whole.reshape(6), jax.vmap(loss)(LOGITS, TARGETS), rtol=1e-6)


def test_mse_against_its_definition():
    expected = ((np.asarray(LOGITS, np.float64) - np.asarray(TARGETS)) ** 2).mean(-1)
    np.testing.assert_allclose(mse(LOGITS, TARGETS), expected, rtol=1e-5)
    np.testing.assert_allclose(mse(TARGETS + 3.0, TARGETS), 9.0, rtol=1e-5)


@given(st.floats(0.1, 20.0))
def test_kl_against_its_definition(temperature):
    p, q = (np.exp(np.asarray(z, np.float64) / temperature) for z in (TARGETS, LOGITS))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    expected = temperature**2 * (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(kl(LOGITS, TARGETS, temperature=temperature), expected, rtol=1e-4, atol=1e-4)


def test_kl_keeps_its_gradient_as_the_temperature_grows():
    """Hinton et al.: at a high temperature it becomes half the squared distance of centred logits."""
    difference = (LOGITS - LOGITS.mean(-1, keepdims=True)) - (TARGETS - TARGETS.mean(-1, keepdims=True))
    gradient = jax.grad(lambda z: kl(z, TARGETS, temperature=100.0).sum())(LOGITS)
    np.testing.assert_allclose(gradient, difference / 5, atol=2e-2)


def test_mae_is_the_mean_over_classes():
    np.testing.assert_allclose(mae(LOGITS, TARGETS), np.abs(LOGITS - TARGETS).mean(-1), rtol=1e-6)


def test_losses_survive_enormous_logits():
    huge = 1e30 * LOGITS
    for loss in (mae(huge, TARGETS), kl(huge, huge), cross_entropy(huge, jnp.argmax(LOGITS, -1))):
        assert jnp.isfinite(loss).all()


def test_a_shape_that_does_not_fit_is_refused_at_trace_time():
    with pytest.raises(ValueError, match=r"^scores and targets must have one shape \[..., C\], got shapes .*$"):
        mae(LOGITS, TARGETS[:3])
    with pytest.raises(ValueError, match=r"^labels must be an array of integer numbers, got float32 of shape .*$"):
        cross_entropy(LOGITS, TARGETS)
