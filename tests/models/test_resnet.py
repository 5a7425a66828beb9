import math

import jax
import jax.numpy as jnp
import pytest

from fedmd_jax.models import GroupNorm, ResNet, resnet8, resnet20


def shapes(network, image):
    def init_and_apply(key, x):
        variables = network.init(key, x, train=False)
        return variables, network.apply(variables, x, train=False)

    variables, logits = jax.eval_shape(init_and_apply, jax.random.key(0), jax.ShapeDtypeStruct(image, jnp.float32))
    return variables, logits.shape


def test_resnet20_has_the_size_of_the_paper():
    """0.27M in He et al., Table 6: 20 layers with 16, 32 and 64 filters and parameter-free shortcuts."""
    variables, logits = shapes(resnet20(10), (1, 32, 32, 3))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])) == 269_722
    assert logits == (1, 10)
    kernels = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"]) if "kernel" in str(path)]
    assert len(kernels) == 20


@pytest.mark.parametrize("make", [resnet8, resnet20])
@pytest.mark.parametrize("norm", [None, GroupNorm])
@pytest.mark.parametrize("image", [(2, 28, 28, 1), (2, 32, 32, 3)])
def test_images_widths_and_norms(make, norm, image):
    network = make(16, width=0.25, **({} if norm is None else {"norm": norm}))
    variables, logits = shapes(network, image)
    assert logits == (2, 16)
    assert ("batch_stats" in variables) == (norm is None)
    assert variables["params"]["head"]["kernel"].shape == (16, 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(0, 10), "num_blocks must be positive"),
        (lambda: ResNet(1, 10, filters=(8, 4)), r"not decrease, got \(8, 4\)"),
        (lambda: ResNet(1, 10, filters=()), "one stage or more"),
        (lambda: shapes(resnet8(10), (1, 28, 28)), r"images \[B, H, W, channels\]"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
