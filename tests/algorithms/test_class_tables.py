"""Tables of class means."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import fedmd_jax as fmd
from fedmd_jax.algorithms.fd import mean_probabilities
from fedmd_jax.algorithms.fedproto import prototypes


def test_class_means_are_those_of_numpy_whatever_the_padding_holds():
    rng = np.random.default_rng(0)
    labels = np.array([2, 0, 2, 2, 0, 3, 1, 1])  # the last two rows are padding, so that class 1 has no example
    outputs = rng.normal(size=(8, 3)).astype(np.float32)
    outputs[6:] = [[np.nan], [np.inf]]
    private = fmd.PrivateDataset(jnp.zeros((8, 1)), jnp.array(labels), jnp.int32(6))
    means, counts = jax.jit(lambda outputs: fmd.algorithms.class_means(outputs, private, 4))(outputs)
    assert counts.tolist() == [2, 0, 3, 1]
    for c in range(4):
        of_class = outputs[:6].astype(np.float64)[labels[:6] == c]
        expected = of_class.mean(axis=0) if len(of_class) else np.zeros(3)
        np.testing.assert_allclose(means[c], expected, rtol=1e-6, atol=1e-7)


def test_half_precision_is_summed_in_float32():
    """In bfloat16 the sum of ones stops at 256."""
    private = fmd.labelled_dataset(np.zeros((1000, 1)), np.zeros(1000, int))
    means, counts = fmd.algorithms.class_means(jnp.ones((1000, 1), jnp.bfloat16), private, 1)
    assert means.dtype == counts.dtype == jnp.float32
    assert means.tolist() == [[1.0]]
    assert counts.tolist() == [1000.0]


class Normed(nn.Module):
    """A batch norm between two layers, and dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        self.sow("intermediates", "features", x)
        return nn.Dense(3)(x)


def test_what_is_sent_is_what_training_computes_without_dropout():
    """Outputs with the statistics of the private batch, without its padding, not with moving statistics."""
    rng = np.random.default_rng(1)
    inputs, labels = 5.0 + 3.0 * rng.normal(size=(9, 4)).astype(np.float32), np.array([0, 1, 2, 2, 1, 0, 2, 0, 0])
    private = fmd.PrivateDataset(jnp.asarray(inputs), jnp.asarray(labels), jnp.int32(7))
    network = fmd.architecture_from_linen(Normed())
    state = fmd.ClientState(*network.init(jax.random.key(0), private.inputs), (), ())
    hidden = inputs[:7] @ np.asarray(state.params["Dense_0"]["kernel"], np.float64)
    hidden = np.maximum((hidden - hidden.mean(axis=0)) / np.sqrt(hidden.var(axis=0) + 1e-5), 0.0)
    logits = hidden @ np.asarray(state.params["Dense_1"]["kernel"], np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    sent = {"fd": (mean_probabilities, probabilities), "fedproto": (partial(prototypes, size=6), hidden)}
    for report, expected in sent.values():
        rows = jax.jit(partial(report, network))(state, None, private).values
        for c in range(3):
            np.testing.assert_allclose(rows[c], expected[labels[:7] == c].mean(axis=0), rtol=2e-5, atol=2e-6)
