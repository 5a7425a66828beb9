import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedmd_jax as fmd


def run(optimizer, gradients):
    params = jnp.zeros(gradients.shape[1:])

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), params

    return jax.lax.scan(step, (params, optimizer.init(params)), gradients)


def test_it_is_optax_with_an_epsilon_that_shrinks_to_its_own():
    scales = 10.0 ** np.arange(-9, 2)  # gradients below, at and above epsilon
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(30, 11)) * scales, jnp.float32)
    corrected = optax.inject_hyperparams(optax.adam)(
        learning_rate=1e-3, eps=lambda count: 1e-7 / jnp.sqrt(1 - 0.999 ** (count + 1.0))
    )
    (params, _), path = run(fmd.adam(1e-3), gradients)
    (expected, _), expected_path = run(corrected, gradients)
    chex.assert_trees_all_close((params, path), (expected, expected_path), rtol=1e-4, atol=1e-9)


def test_where_gradients_are_large_it_is_optax():
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(30, 5)), jnp.float32)
    (params, state), _ = run(fmd.adam(0.01), gradients)
    (expected, (expected_state, _)), _ = run(optax.adam(0.01, eps=1e-7), gradients)
    np.testing.assert_allclose(params, expected, rtol=1e-4)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-5)


def test_its_state_can_be_donated_as_it_is():
    state = fmd.adam().init({"w": jnp.ones(3)})
    jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)(state)
