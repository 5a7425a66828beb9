"""Networks with features beside their scores."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

from fedmd_jax.client import pool_features, with_features
from fedmd_jax.models import CNN, MLP, ResNet, architecture_from_linen, architecture_from_nnx

IMAGES = jax.random.normal(jax.random.key(1), (4, 12, 12, 1))


class Small(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 5, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.conv(x)).mean(axis=(1, 2))
        self.sow(nnx.Intermediate, "features", x)
        return self.head(self.dropout(x))


class Wrapped(nn.Module):
    """Its network is a module of it, called `features` as in torchvision, and sows something else, too."""

    @nn.compact
    def __call__(self, x, *, train):
        self.sow("intermediates", "image", x)
        return MLP((5,), 3, 0.5, name="features")(x, train=train)


NETWORKS = {
    "cnn": (architecture_from_linen(CNN((4, 5), 3)), "head", 5),
    "mlp": (architecture_from_linen(MLP((8, 5), 3)), "head", 5),
    "logistic": (architecture_from_linen(MLP((), 3)), "head", 144),
    "resnet": (architecture_from_linen(ResNet(1, 3, filters=(4, 5))), "head", 5),
    "linen": (architecture_from_linen(Wrapped()), ("features", "head"), 5),
    "nnx": (architecture_from_nnx(Small), "head", 5),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    return NETWORKS[request.param]


def test_features_come_beside_the_same_scores(network, key):
    architecture, _, size = network
    params, model_state = architecture.init(key, IMAGES)
    for how in ({"train": False}, {"train": True, "mask": jnp.array([True, True, True, False]), "key": key}):
        scores, expected_state = architecture.apply(params, model_state, IMAGES, **how)
        (logits, features), state = architecture.features(params, model_state, IMAGES, **how)
        assert features.shape == (4, size)
        jax.tree.map(np.testing.assert_array_equal, (logits, state), (scores, expected_state))


@pytest.mark.parametrize("name", ["mlp", "resnet", "linen", "nnx"])
def test_features_are_the_input_of_the_head(name, key):
    architecture, head, _ = NETWORKS[name]
    params, model_state = architecture.init(key, IMAGES)
    (logits, features), _ = architecture.features(params, model_state, IMAGES, train=False)
    for part in [head] if isinstance(head, str) else head:
        params = params[part]
    np.testing.assert_allclose(features @ params["kernel"] + params["bias"][None], logits, atol=1e-5)


def test_features_cost_no_second_pass(network, key):
    """As many products of matrices, forward and backward."""
    architecture, _, size = network
    params, model_state = architecture.init(key, IMAGES)

    def products(architecture):
        def loss(params):
            return architecture.apply(params, model_state, IMAGES, train=True, key=key)[0].sum()

        return len(re.findall("dot_general|conv_general_dilated", str(jax.make_jaxpr(jax.grad(loss))(params))))

    assert products(with_features(architecture, size)) == products(architecture) > 0


class Silent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(len(x), -1))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for _ in range(2):
            self.sow("intermediates", "features", x)
        return nn.Dense(3)(x)


class OfTheBatch(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        self.sow("intermediates", "features", x.mean(axis=0))
        return nn.Dense(3)(x)


@pytest.mark.parametrize("module", [Silent(), Twice(), OfTheBatch()])
def test_networks_that_do_not_sow_their_features_once_are_refused(module, key):
    architecture = architecture_from_linen(module)
    params, _ = architecture.init(key, IMAGES)
    with pytest.raises(ValueError, match=f"{type(module).__name__} must sow its features once"):
        architecture.features(params, {}, IMAGES, train=False)


@pytest.mark.parametrize(("width", "size"), [(5, 2), (7, 3), (8, 4), (3, 7), (4, 4), (6, 1)])
def test_pooling_is_that_of_pytorch(width, size):
    features = np.random.default_rng(0).normal(size=(3, width)).astype(np.float32)
    bins = [(i * width // size, -(-(i + 1) * width // size)) for i in range(size)]
    expected = np.stack([features[:, first:end].mean(axis=1) for first, end in bins], axis=1)
    pooled = pool_features(jnp.asarray(features), size)
    np.testing.assert_allclose(pooled, expected, atol=1e-6)
    if width == size:
        np.testing.assert_array_equal(pooled, features)
