"""The numbers of the authors' released Keras networks (shared/golden/README.md), inference and training mode."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmd_jax.losses import mae
from fedmd_jax.models import CNN, architecture_from_linen, head_l2

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "golden" / "reference_a.npz"))
FILTERS = {0: (6, 10), 1: (6, 10), 2: (4, 6, 8)}


def weights(prefix, names):
    """The nested dictionary of `prefix/layer/name` for those names."""
    tree = {}
    for path, value in GOLDEN.items():
        layer, _, name = path.removeprefix(prefix).partition("/")
        if path.startswith(prefix) and name in names:
            tree.setdefault(layer, {})[name] = jnp.asarray(value)
    return tree


@pytest.fixture(params=FILTERS)
def client(request):
    k = request.param
    network = CNN(FILTERS[k], num_classes=16, dropout=0.0)
    params = weights(f"client{k}/init/", ("kernel", "bias", "scale"))
    model_state = {"batch_stats": weights(f"client{k}/init/", ("mean", "var"))}
    return k, architecture_from_linen(network, penalty=head_l2(1e-3)), params, model_state


def test_scores(client):
    k, architecture, params, model_state = client
    apply = jax.jit(partial(architecture.apply, train=False))
    logits, _ = apply(params, model_state, GOLDEN["x_public"][..., None])
    np.testing.assert_allclose(logits, GOLDEN["round1/scores"][k], atol=1e-5)


def test_training_mode_loss_and_gradients(client):
    k, architecture, params, model_state = client
    images = jnp.asarray(GOLDEN["x_public"][:16, ..., None])

    def loss(params):
        mask = jnp.ones(16, bool)
        logits, _ = architecture.apply(params, model_state, images, train=True, mask=mask, key=jax.random.key(0))
        error = jnp.mean(mae(logits, jnp.ones_like(logits)))
        return error + architecture.penalty(params), (logits, error)

    (total, (logits, error)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, GOLDEN[f"client{k}/probe/train_logits"], atol=1e-5)
    np.testing.assert_allclose(error, GOLDEN[f"client{k}/probe/mae_to_ones"], atol=1e-5)
    np.testing.assert_allclose(total, GOLDEN[f"client{k}/probe/loss_to_ones"], atol=1e-5)
    expected = weights(f"client{k}/probe/grad/", ("kernel", "bias", "scale"))
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5), gradients, expected)
