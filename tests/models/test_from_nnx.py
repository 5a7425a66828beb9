import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fedmd_jax.models import architecture_from_nnx


class Net(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(2, momentum=0.0, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(x))


X = jnp.array([[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]])
MASK = jnp.array([True, True, False])


def test_params_and_state_are_plain_dictionaries(key):
    params, model_state = architecture_from_nnx(Net).init(key, X)
    assert jax.tree.map(jnp.shape, params) == {"norm": {"bias": (2,), "scale": (2,)}}
    assert jax.tree.map(jnp.shape, model_state) == {"norm": {"mean": (2,), "var": (2,)}}


def test_training_needs_a_key_where_it_draws(key):
    architecture = architecture_from_nnx(Net)
    params, model_state = architecture.init(key, X)
    with pytest.raises(ValueError, match="needs a `key`"):
        architecture.apply(params, model_state, X, train=True)


MODES = pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="flax 0.11 has graph mode alone")


@MODES
@pytest.mark.parametrize("graph", [True, False])
def test_graph_mode_and_tree_mode(graph, key):
    """nnx will leave graph mode; nothing here may depend on it."""
    with nnx.set_graph_mode(graph):
        architecture = architecture_from_nnx(Net)
        params, model_state = architecture.init(key, X)
        _, model_state = architecture.apply(params, model_state, X, train=True, mask=MASK, key=key)
    chex.assert_trees_all_close(model_state["norm"]["mean"], jnp.array([2.0, 4.0]))


def test_a_subclass_is_masked_and_a_mask_of_the_module_wins(key):
    class Norm(nnx.BatchNorm):
        def __call__(self, x, **kwargs):
            return super().__call__(x, **kwargs)

    class Own(nnx.Module):
        def __init__(self, rngs):
            self.theirs, self.ours = (Norm(2, momentum=0.0, rngs=rngs) for _ in range(2))

        def __call__(self, x, mask=None):
            own = (jnp.arange(len(x)) == 0)[:, None]
            return self.theirs(x) + self.ours(x, mask=own) + (0 if mask is None else 1)

    architecture = architecture_from_nnx(Own, mask_argument="mask")
    params, model_state = architecture.init(key, X)
    _, model_state = architecture.apply(params, model_state, X, train=True, mask=MASK)
    chex.assert_trees_all_close(model_state["theirs"]["mean"], jnp.array([2.0, 4.0]))
    chex.assert_trees_all_close(model_state["ours"]["mean"], jnp.array([1.0, 2.0]))


def test_no_class_is_patched(key):
    """A module that is used between two calls sees the batch-norm that flax made."""
    before = nnx.BatchNorm.__call__
    architecture = architecture_from_nnx(Net)
    params, model_state = architecture.init(key, X)
    architecture.apply(params, model_state, X, train=True, mask=MASK, key=key)
    assert nnx.BatchNorm.__call__ is before


@MODES
def test_shared_layers_share_their_parameters(key):
    """In graph mode; flax refuses them in tree mode."""

    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(2, 2, rngs=rngs)
            self.second = self.first

        def __call__(self, x):
            return self.second(self.first(x))

    with nnx.set_graph_mode(True):
        architecture = architecture_from_nnx(Tied)
        params, model_state = architecture.init(key, X)
        assert set(params) == {"first"}
        assert architecture.apply(params, model_state, X, train=True)[0].shape == (3, 2)


def test_arrays_in_no_variable_are_constants(key):
    """Also where `init` is traced."""

    class Offset(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)
            self.offset = jnp.full((1, 2), 5.0)

        def __call__(self, x):
            return 0 * self.linear(x) + self.offset

    architecture = architecture_from_nnx(Offset)
    for init in (architecture.init, jax.jit(architecture.init)):
        params, model_state = init(key, X)
        assert set(params) == {"linear"}
        assert model_state == {}
        assert (architecture.apply(params, model_state, X, train=True)[0] == 5).all()


def test_mistakes():
    with pytest.raises(ValueError, match=r"wanted a function rngs -> nnx\.Module"):
        architecture_from_nnx(Net(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"wanted a function rngs -> nnx\.Module"):
        architecture_from_nnx(lambda rngs: 3)
