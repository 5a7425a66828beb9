import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from fedmd_jax.models import architecture_from_linen


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(3)(x)
        self.sow("losses", "activity", jnp.mean(x))
        self.sow("intermediates", "x", x)
        steps = self.variable("counters", "steps", jnp.zeros, ())
        if train:
            steps.value += 1
        return x + self.variable("constants", "shift", jnp.ones, (1, 3)).value


def test_every_collection_is_state_but_what_is_sown(key):
    architecture = architecture_from_linen(Sowing())
    params, model_state = architecture.init(key, jnp.ones((1, 2)))
    assert set(model_state) == {"counters", "constants"}
    _, model_state = architecture.apply(params, model_state, jnp.ones((4, 2)), train=True)
    _, model_state = architecture.apply(params, model_state, jnp.ones((4, 2)), train=True)
    assert model_state["counters"]["steps"] == 2


def test_masks_are_passed_on_and_a_mask_of_the_module_wins(key):
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x, *, train, mask=None):
            own = (jnp.arange(len(x)) == 0)[:, None] if train else None
            return nn.BatchNorm(use_running_average=not train, momentum=0.0)(x, mask=own) + (0 if mask is None else 10)

    architecture = architecture_from_linen(Own(), mask_argument="mask")
    x = jnp.array([[1.0], [2.0], [3.0]])
    params, model_state = architecture.init(key, x)
    mask = jnp.array([False, True, False])
    logits, model_state = architecture.apply(params, model_state, x, train=True, mask=mask)
    assert model_state["batch_stats"]["BatchNorm_0"]["mean"] == 1.0
    assert logits[0, 0] == 10.0


def test_other_random_streams_come_from_the_key_too(key):
    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return nn.Dense(2)(x) + (jax.random.normal(self.make_rng("noise"), (1, 1)) if train else 0)

    architecture = architecture_from_linen(Noise())
    params, model_state = architecture.init(key, jnp.ones((1, 2)))
    a, b = (
        architecture.apply(params, model_state, jnp.ones((1, 2)), train=True, key=k)[0] for k in jax.random.split(key)
    )
    assert (a != b).all()


def test_a_sequential_network_without_state_works(key):
    architecture = architecture_from_linen(nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)]))
    params, model_state = architecture.init(key, jnp.ones((1, 2)))
    logits, model_state = architecture.apply(params, model_state, jnp.ones((4, 2)), train=True, mask=jnp.ones(4, bool))
    assert logits.shape == (4, 2)
    assert model_state == {}


def test_penalty_is_carried():
    assert architecture_from_linen(nn.Dense(1), penalty=lambda params: params * 2).penalty(3) == 6


def test_the_mask_ends_with_the_call(key):
    """No interceptor is left behind, not even by a call that fails."""
    architecture = architecture_from_linen(nn.Dense(3))
    params, model_state = architecture.init(key, jnp.ones((1, 2)))
    with pytest.raises(Exception, match="shape"):
        architecture.apply(params, model_state, jnp.ones((4, 5)), train=True, mask=jnp.zeros(4, bool))
    norm = nn.BatchNorm(use_running_average=False)
    x = jnp.array([[1.0], [3.0]])
    variables = norm.init(key, x)
    chex.assert_trees_all_close(
        norm.apply(variables, x, mutable="batch_stats")[0], jnp.array([[-1.0], [1.0]]), atol=1e-4
    )


def test_mistakes():
    with pytest.raises(ValueError, match=r"wanted a flax\.linen module"):
        architecture_from_linen(nn.Dense)
