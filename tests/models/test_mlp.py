import jax
import jax.numpy as jnp
import pytest

from fedmd_jax.models import MLP


def test_no_hidden_layer_is_logistic_regression(key):
    variables = MLP((), 3).init(key, jnp.zeros((1, 4, 4)), train=False)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"head": {"bias": (3,), "kernel": (16, 3)}}}


@pytest.mark.parametrize("settings", [{"hidden": (0,)}, {"num_classes": -1}, {"dropout": 1.5}])
def test_mistakes(settings):
    with pytest.raises(ValueError, match="got"):
        MLP(**{"hidden": (4,), "num_classes": 3} | settings)
