"""KT-pFL: the matrix of coefficients against another solver, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import fedmd_jax as fmd
from fedmd_jax.algorithms.kt_pfl import send_mixtures, solve_mixture, tempered_kl

NUM_CLIENTS, NUM_ROWS, NUM_CLASSES = 5, 12, 4
VALUES = np.random.default_rng(0).dirichlet(np.full(NUM_CLASSES, 0.5), size=(NUM_CLIENTS, NUM_ROWS)).astype(np.float32)
SHARES = np.array([0.3, 0.1, 0.2, 0.15, 0.25], np.float32)


def gram(values):
    return np.einsum("kmc,lmc->kl", values, values) / values[0].size


def targets_of(values, weights, *, pull):
    weights = jnp.asarray(weights, jnp.float32)
    rows = jnp.broadcast_to(weights[:, None], values.shape[:2])
    values = jnp.where(rows[..., None] > 0, values, 0.0)  # as the frame gathers them
    return np.asarray(send_mixtures(fmd.algorithms.Report(values, rows), None, (), None, pull=pull)[0])


def least_squares(values, shares, pull):
    """Every row by NumPy's solver, in float64, from the definition of the objective."""
    flat, ridge = values.reshape(len(values), -1).astype(float), np.sqrt(pull / len(values))
    scale = 1 / np.sqrt(flat.shape[1])
    system = np.concatenate([scale * flat.T, ridge * np.eye(len(values))])
    return np.stack(
        [np.linalg.lstsq(system, np.concatenate([scale * own, ridge * shares]), rcond=None)[0] for own in flat]
    )


@given(st.floats(1e-3, 1e3), st.integers(0, 1000))
@settings(max_examples=20)
def test_the_matrix_against_another_solver(pull, seed):
    values = np.random.default_rng(seed).dirichlet(np.full(NUM_CLASSES, 0.5), size=(NUM_CLIENTS, NUM_ROWS))
    solved = solve_mixture(jnp.asarray(gram(values), jnp.float32), SHARES, pull=pull)
    np.testing.assert_allclose(solved, least_squares(values, SHARES, pull), atol=2e-6)


def test_no_row_can_be_improved():
    """The gradient of the objective, by automatic differentiation, is zero."""

    def objective(row, own):
        mixture = jnp.einsum("l,lmc->mc", row, VALUES)
        return jnp.mean((VALUES[own] - mixture) ** 2) + 0.7 * jnp.mean((row - SHARES) ** 2)

    solved = solve_mixture(gram(VALUES), SHARES, pull=0.7)
    for own in range(NUM_CLIENTS):
        np.testing.assert_allclose(jax.grad(objective)(solved[own], own), 0.0, atol=1e-6)


def test_a_strong_pull_gives_the_weighted_mean():
    mean = np.einsum("k,kmc->mc", SHARES, VALUES)
    for target in targets_of(VALUES, 8 * SHARES, pull=1e6):
        np.testing.assert_allclose(target, mean, rtol=1e-5)


def test_without_pull_clients_keep_their_own_probabilities_and_learn_nothing():
    targets = targets_of(VALUES, SHARES, pull=1e-6)
    np.testing.assert_allclose(targets, VALUES, atol=1e-3)
    logits = 10.0 * jnp.log(VALUES)
    gradient = jax.grad(lambda z: tempered_kl(z, VALUES, temperature=10.0).sum())(logits)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)


def test_the_digest_has_hintons_gradient():
    """T times the difference of the probabilities at T: for large T that of the logits, divided by the classes."""
    logits = jnp.asarray(np.random.default_rng(1).normal(size=NUM_CLASSES), jnp.float32)
    target = VALUES[0, 0]
    gradient = jax.grad(lambda z: tempered_kl(z, target, temperature=10.0))(logits)
    np.testing.assert_allclose(gradient, 10.0 * (jax.nn.softmax(logits / 10.0) - target), rtol=1e-4, atol=1e-5)


def test_permuted_clients_get_permuted_targets():
    order = np.array([3, 0, 4, 2, 1])
    permuted = targets_of(VALUES[order], SHARES[order], pull=0.01)
    np.testing.assert_allclose(permuted, targets_of(VALUES, SHARES, pull=0.01)[order], rtol=1e-4, atol=1e-6)


def test_two_pairs_of_equal_clients_give_a_matrix_of_blocks():
    values = VALUES[np.array([0, 0, 1, 1])]
    solved = np.asarray(solve_mixture(gram(values), np.full(4, 0.25, np.float32), pull=0.01))
    np.testing.assert_allclose(solved[0], solved[1], atol=1e-5)
    np.testing.assert_allclose(solved[2], solved[3], atol=1e-5)
    np.testing.assert_allclose(solved[:, 0], solved[:, 1], atol=1e-5)
    np.testing.assert_allclose(solved[:, 2], solved[:, 3], atol=1e-5)
    assert solved[0, 2] < 0.1 < 0.4 < solved[0, 1]


def test_an_absent_client_is_in_no_mixture_and_gets_the_mean():
    weights = SHARES.copy()
    weights[2] = 0.0
    others = np.array([0, 1, 3, 4])
    targets = targets_of(VALUES, weights, pull=0.05)
    alone = targets_of(VALUES[others], SHARES[others], pull=0.05)
    np.testing.assert_allclose(targets[others], alone, rtol=1e-5, atol=1e-6)
    mean = np.einsum("k,kmc->mc", SHARES[others] / SHARES[others].sum(), VALUES[others])
    np.testing.assert_allclose(targets[2], mean, rtol=1e-5)


def test_targets_are_distributions_even_if_coefficients_are_negative():
    # The third client is between the first two, and the first is what the others leave out.
    values = np.array([[[0.8, 0.2]], [[0.1, 0.9]], [[0.0, 1.0]]], np.float32)
    weights = np.full(3, 1 / 3, np.float32)
    assert np.asarray(solve_mixture(gram(values), weights, pull=1e-3)).min() < 0
    targets = targets_of(values, weights, pull=1e-3)
    assert targets.min() >= 0
    np.testing.assert_allclose(targets.sum(axis=-1), 1.0, rtol=1e-5)


def test_a_round_without_reports_stays_finite():
    assert np.isfinite(targets_of(VALUES, np.zeros(NUM_CLIENTS), pull=0.7)).all()


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"pull": 0.0}])
def test_settings_that_are_not_positive_are_refused(setting):
    with pytest.raises(ValueError, match=r"^(temperature|pull) must be positive and finite, got 0.0$"):
        fmd.algorithms.kt_pfl(**setting)
