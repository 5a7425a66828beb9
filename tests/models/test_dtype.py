"""Networks that compute in bfloat16: what stays float32, and how far the results are from those of float32."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedmd_jax as fmd
from fedmd_jax.models import CNN, MLP, GroupNorm, ResNet, architecture_from_linen

NETWORKS = {
    "two convolutions": CNN((4, 6), 5),
    "three convolutions": CNN((4, 6, 8), 5),
    "dense": MLP((16,), 5, dropout=0.2),
    "residual": ResNet(1, 5, filters=(4, 6)),
    "residual, group norm": ResNet(1, 5, filters=(4, 6), norm=GroupNorm),
}
ROWS = 32


@pytest.fixture(scope="module", params=NETWORKS)
def results(request):
    """Of both types: variables, and scores, training logits, model state and gradients from those of float32."""
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(ROWS, 12, 12, 1)).astype(np.float32), rng.integers(0, 5, ROWS)
    variables, computed = [], []
    for dtype in (jnp.float32, jnp.bfloat16):
        network = architecture_from_linen(NETWORKS[request.param].clone(dtype=dtype))
        variables.append(network.init(jax.random.key(0), inputs))

        def loss(params, state, network=network):
            mask, key = jnp.arange(ROWS) < ROWS - 3, jax.random.key(1)
            logits, state = network.apply(params, state, inputs, train=True, mask=mask, key=key)
            return jnp.mean(fmd.cross_entropy(logits, labels)), (logits, state)

        def run(params, state, network=network, loss=loss):
            scores, _ = network.apply(params, state, inputs, train=False)
            gradients, (logits, state) = jax.grad(loss, has_aux=True)(params, state)
            return {"scores": scores, "logits": logits, "state": state, "gradients": gradients}

        lowered = jax.jit(run).lower(*variables[0])
        assert ("bf16" in lowered.as_text()) is (dtype == jnp.bfloat16)
        computed.append(lowered.compile()(*variables[0]))
    return variables, computed


def distance(got, want):
    """Of all leaves together, relative to the length of `want`."""
    got, want = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_variables_are_the_same(results):
    """So that a checkpoint of one is one of the other."""
    (exact, rounded), _ = results
    chex.assert_trees_all_equal(exact, rounded, strict=True)


def test_scores_statistics_and_gradients_are_float32_and_close(results):
    _, (exact, rounded) = results
    chex.assert_trees_all_equal_shapes_and_dtypes(exact, rounded)
    chex.assert_tree_all_finite(rounded)
    for name, tolerance in (("scores", 2e-2), ("logits", 2e-2), ("state", 1e-2), ("gradients", 1e-1)):
        if jax.tree.leaves(exact[name]):
            assert 0 < distance(rounded[name], exact[name]) < tolerance
