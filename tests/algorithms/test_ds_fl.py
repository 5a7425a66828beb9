"""DS-FL and SCARLET, which sharpen the mean of probabilities."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from hypothesis import given, settings, strategies as st

import fedmd_jax as fmd
from fedmd_jax.algorithms.ds_fl import reduce_entropy
from fedmd_jax.algorithms.scarlet import raise_to_power

PROBABILITIES = np.random.default_rng(0).dirichlet(np.full(10, 0.3), size=50).astype(np.float32)


def with_top(top, num_classes):
    """A row with this top class; the other classes share the rest."""
    return jnp.full(num_classes, (1 - top) / (num_classes - 1)).at[0].set(top)


def test_the_plain_mean_is_fedmd_with_probabilities_as_scores():
    """To the bit: `fedmd_round` of softmaxed scores, with the same distance."""
    groups, public = toys.groups(linear=(1.0, 2.0, 0.5)), toys.public()
    private = toys.private(groups)
    softmax = toys.federation(
        groups,
        algorithm=fmd.algorithms.fedmd(distance=fmd.client.kl_of_probabilities),
        transforms=[lambda scores, key: jax.nn.softmax(scores)],
    )
    mean = toys.federation(groups, algorithm=fmd.algorithms.ds_fl(temperature=None))
    results = [
        federation.round(federation.init(jax.random.key(0), public, private), public, private, jax.random.key(1))
        for federation in (softmax, mean)
    ]
    assert results[0][1].consensus_size > 0
    assert results[1][1].consensus_size is None  # only of logits
    chex.assert_trees_all_equal(*((states, info._replace(consensus_size=None)) for states, info in results))


# Published nowhere: computed in float64 from the definition.
@pytest.mark.parametrize(
    ("top", "num_classes", "temperature", "expected"),
    [
        (1.0, 10, 1.0, 0.2320),  # almost uniform: a temperature of 1 is not the plain mean
        (1.0, 10, 0.1, 0.9996),
        (0.9, 10, 0.1, 0.9988),
        (0.6, 10, 0.1, 0.966),
        (0.4, 10, 0.1, 0.757),
        (0.2, 10, 0.1, 0.252),
        (0.4, 100, 0.1, 0.342),  # flatter than before
    ],
)
def test_era_of_a_row_with_one_clear_class(top, num_classes, temperature, expected):
    sharpened = reduce_entropy(with_top(top, num_classes), temperature=temperature)
    exponentials = np.exp(np.asarray(with_top(top, num_classes), float) / temperature)
    np.testing.assert_allclose(sharpened, exponentials / exponentials.sum(), rtol=1e-5)
    np.testing.assert_allclose(sharpened[0], expected, atol=5e-4)


def test_era_keeps_ties():
    sharpened = reduce_entropy(jnp.zeros(10).at[:2].set(0.5), temperature=0.1)
    np.testing.assert_allclose(sharpened[:2], 0.487, atol=5e-4)


SHARPENERS = {
    "era": partial(reduce_entropy, temperature=0.1),
    "mean": partial(reduce_entropy, temperature=None),
    "power": partial(raise_to_power, power=2.0),
}


@pytest.mark.parametrize("sharpen", SHARPENERS.values(), ids=SHARPENERS)
def test_the_order_of_the_classes_is_kept(sharpen):
    sharpened = np.asarray(sharpen(PROBABILITIES))
    np.testing.assert_array_equal(sharpened.argmax(axis=1), PROBABILITIES.argmax(axis=1))
    in_order = np.take_along_axis(sharpened, PROBABILITIES.argsort(axis=1), axis=1)
    assert (np.diff(in_order, axis=1) >= 0).all()
    np.testing.assert_allclose(sharpened.sum(axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    "sharpen", [partial(reduce_entropy, temperature=1e-6), partial(raise_to_power, power=1e6)], ids=["era", "power"]
)
def test_the_limit_of_sharpening_is_one_hot(sharpen):
    np.testing.assert_allclose(sharpen(PROBABILITIES), np.eye(10)[PROBABILITIES.argmax(axis=1)], atol=1e-6)


@given(st.floats(0.1, 5.0))
@settings(max_examples=20)
def test_the_power_against_its_definition(power):
    expected = PROBABILITIES.astype(float) ** power
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(raise_to_power(PROBABILITIES, power=power), expected, rtol=1e-4, atol=1e-7)


def test_power_one_is_the_plain_mean():
    np.testing.assert_allclose(raise_to_power(PROBABILITIES, power=1.0), PROBABILITIES, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("sharpen", [SHARPENERS["mean"], partial(raise_to_power, power=1.0)], ids=["mean", "power one"])
def test_a_network_that_agrees_with_the_mean_feels_no_gradient(sharpen):
    logits = 3.0 * jnp.log(PROBABILITIES)
    targets = sharpen(jax.nn.softmax(logits))
    gradient = jax.grad(lambda scores: fmd.client.kl_of_probabilities(scores, targets).sum())(logits)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_a_power_above_one_never_lowers_the_top_class():
    """Unlike ERA, see above."""
    top = raise_to_power(PROBABILITIES, power=2.0).max(axis=1)
    assert (top >= PROBABILITIES.max(axis=1) * (1 - 1e-6)).all()


def test_the_power_of_probabilities_whose_power_underflows():
    """The naive power of the first row is 0 / 0."""
    rows = jnp.array([[3e-30, 1e-30], [1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(raise_to_power(rows, power=2.0), [[0.9, 0.1], [1.0, 0.0], [0.5, 0.5]], rtol=1e-5)


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"power": -1.0}])
def test_settings_that_are_not_positive_are_refused(setting):
    member = fmd.algorithms.scarlet if "power" in setting else fmd.algorithms.ds_fl
    with pytest.raises(ValueError, match=r"^(temperature|power) must be positive and finite, got .*$"):
        member(**setting)
