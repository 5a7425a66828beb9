"""The proximal term of FedProx; its rounds against NumPy loops are in `test_fedavg`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

import fedmd_jax as fmd
from fedmd_jax.algorithms.fedprox import revisit_near_start

A = fmd.algorithms


def run(algorithm):
    federation = toys.federation(toys.groups(), algorithm=algorithm)
    public, private = toys.public(), toys.private(federation.groups)
    states = federation.start(federation.init(jax.random.key(0), public, private), public, jax.random.key(1))
    for round_ in range(2):
        states, info = federation.round(states, public, private, jax.random.fold_in(jax.random.key(2), round_))
    return states, info


def test_no_proximal_term_is_fedavg_to_the_bit():
    chex.assert_trees_all_equal(run(A.fedprox(proximal=0)), run(A.fedavg()))


@pytest.mark.parametrize("proximal", [0.0, 0.5, 3.0])
def test_a_quadratic_ends_between_its_minimum_and_the_start(proximal):
    """a + (start - a) mu / (1 + mu)."""
    minimum, begin = np.array([1.0, -2.0, 0.5]), np.array([4.0, 0.0, 0.5])

    def apply(params, model_state, inputs, *, train, mask=None, key=None):
        return inputs[:, : toys.NUM_CLASSES], model_state  # the loss of the examples is constant

    network = fmd.Architecture(None, apply, lambda params: 0.5 * jnp.sum((params - minimum) ** 2))
    training = fmd.TrainingConfig(num_epochs=60, optimizer=optax.sgd(0.2))
    params = jnp.asarray(begin, jnp.float32)
    client = fmd.ClientState(params, {}, (), training.optimizer.init(params))
    private = fmd.labelled_dataset(*toys.examples(0, 4))
    how = {"training": training, "proximal": proximal}
    client, info = revisit_near_start(network, client, private, None, jax.random.key(0), **how)
    expected = minimum + (begin - minimum) * proximal / (1 + proximal)
    np.testing.assert_allclose(client.params, expected, rtol=1e-5, atol=1e-6)
    steps = np.diff(info.loss)  # the loss has the term, and gradient descent lowers it
    assert (steps <= 1e-6).all()


def test_a_stronger_term_keeps_clients_nearer_to_the_start():
    network, training = toys.tanh_mlp(), toys.sgd(3, 20)
    public, key = toys.public(), jax.random.key(0)
    client = fmd.init_client(network, key, public.inputs, digest=training, revisit=training)
    private = fmd.labelled_dataset(*toys.examples(0, 8))

    def distance(proximal):
        how = {"training": training, "proximal": proximal}
        moved, _ = revisit_near_start(network, client, private, None, key, **how)
        return sum(float(jnp.sum((moved.params[name] - start) ** 2)) for name, start in client.params.items())

    distances = [distance(proximal) for proximal in (0.0, 0.1, 1.0, 5.0)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.5 * distances[0]


@pytest.mark.parametrize("proximal", [-0.1, float("nan"), float("inf"), "0.1"])
def test_impossible_factors_are_refused(proximal):
    with pytest.raises(ValueError, match="proximal must be finite and not negative"):
        A.fedprox(proximal=proximal)
