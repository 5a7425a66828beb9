"""The numbers of the authors' released Keras networks (shared/golden/README.md), inference and training mode."""

import pathlib
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmd_jax.client.losses import mae
from fedmd_jax.models import CNN, architecture_from_linen, head_l2

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "golden" / "reference_a.npz"))
FILTERS = {0: (6, 10), 1: (6, 10), 2: (4, 6, 8)}
ARCHITECTURES = {
    filters: architecture_from_linen(CNN(filters, num_classes=16, dropout=0.0), penalty=head_l2(1e-3))
    for filters in set(FILTERS.values())
}

# Before jaxlib 0.10, XLA adds the terms of a fused sum one after the other. With 2,704 values in a channel, the batch
# variance then has a relative error of 1.1e-5, as in a loop in NumPy; with later versions it has less than 1e-6.
LOGITS_ATOL = 2e-5 if jax.__version_info__ < (0, 10) else 1e-5


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
    params = weights(f"client{k}/init/", ("kernel", "bias", "scale"))
    model_state = {"batch_stats": weights(f"client{k}/init/", ("mean", "var"))}
    return k, ARCHITECTURES[FILTERS[k]], params, model_state


@partial(jax.jit, static_argnums=0)
def scores(architecture, params, model_state, images):
    return architecture.apply(params, model_state, images, train=False)[0]


@partial(jax.jit, static_argnums=0)
@partial(jax.value_and_grad, argnums=1, has_aux=True)
def digest_loss_to_ones(architecture, params, model_state, images):
    mask = jnp.ones(len(images), bool)
    logits, _ = architecture.apply(params, model_state, images, train=True, mask=mask)
    error = jnp.mean(mae(logits, jnp.ones_like(logits)))
    return error + architecture.penalty(params), (logits, error)


def test_scores(client):
    k, *model = client
    np.testing.assert_allclose(scores(*model, GOLDEN["x_public"][..., None]), GOLDEN["round1/scores"][k], atol=1e-5)


def test_training_mode_loss_and_gradients(client):
    k, *model = client
    (loss, (logits, error)), gradients = digest_loss_to_ones(*model, GOLDEN["x_public"][:16, ..., None])
    probe = f"client{k}/probe/"
    np.testing.assert_allclose(logits, GOLDEN[probe + "train_logits"], atol=LOGITS_ATOL)
    np.testing.assert_allclose(error, GOLDEN[probe + "mae_to_ones"], atol=1e-5)
    np.testing.assert_allclose(loss, GOLDEN[probe + "loss_to_ones"], atol=1e-5)
    expected = weights(probe + "grad/", ("kernel", "bias", "scale"))
    chex.assert_trees_all_close(gradients, expected, atol=1e-5, rtol=0)
