import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import linen as nn

from fedmd_jax.models import CNN, TABLE_1, TABLE_2, architecture_from_linen, cnn, paper_cnn, scale_width

# All weights including batch statistics, 28x28x1 and 32x32x3, 16 classes: Keras' count of the authors' networks.
TABLE_1_SIZES = [
    (990_208, 1_221_888),
    (1_484_416, 1_830_784),
    (1_978_624, 2_439_680),
    (1_286_912, 1_520_896),
    (2_570_240, 3_033_600),
    (367_360, 368_512),
    (284_096, 285_248),
    (581_568, 583_872),
    (234_496, 236_800),
    (317_760, 320_064),
]
MNIST, CIFAR = (1, 28, 28, 1), (1, 32, 32, 3)


def shapes(network, image):
    """Shapes of (params, model_state) and of the logits, without computing anything."""
    architecture = architecture_from_linen(network)
    inputs = jax.ShapeDtypeStruct(image, jnp.float32)
    variables = jax.eval_shape(architecture.init, jax.random.key(0), inputs)
    logits, _ = jax.eval_shape(lambda v, x: architecture.apply(*v, x, train=False), variables, inputs)
    return variables, logits.shape


def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("network", "sizes"), list(zip(TABLE_1, TABLE_1_SIZES, strict=True)))
def test_sizes_of_table_1(network, sizes):
    assert tuple(size(shapes(paper_cnn(network), image)[0]) for image in (MNIST, CIFAR)) == sizes


@pytest.mark.parametrize("network", TABLE_2)
@pytest.mark.parametrize("image", [MNIST, CIFAR])
def test_table_2_takes_both_images(network, image):
    assert shapes(paper_cnn(network, 10), image)[1] == (1, 10)


def test_dropout_rates_of_the_tables():
    assert [network.dropout for network in TABLE_1] == [0.2, 0.2, 0.2, 0.3, 0.4, 0.2, 0.2, 0.2, 0.3, 0.3]
    assert [network.dropout for network in TABLE_2] == [0.2, 0.2, 0.2, 0.3, 0.4, 0.2, 0.2, 0.2, 0.3, 0.2]
    assert paper_cnn(TABLE_1[4]).dropout == 0.4


def test_names():
    (params, model_state), _ = shapes(CNN((2, 3, 4), 5), MNIST)
    assert set(params) == {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "head"}
    assert set(params["conv2"]) == {"kernel", "bias"}
    assert params["conv2"]["kernel"].shape == (2, 2, 2, 3)
    assert set(params["bn1"]) == {"scale", "bias"}
    assert set(params["head"]) == {"kernel"}
    assert set(model_state["batch_stats"]["bn3"]) == {"mean", "var"}


def test_initial_weights():
    """Glorot-uniform kernels: within +-sqrt(6 / (fan_in + fan_out)), and close to that bound; biases are zero."""
    network = CNN((16, 32), 10)
    params = jax.jit(network.init, static_argnames="train")(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)[
        "params"
    ]
    for layer, fan in (("conv1", 9 * (3 + 16)), ("conv2", 9 * (16 + 32)), ("head", 9 * 32 + 10)):
        bound = math.sqrt(6 / fan)
        assert 0.95 * bound < jnp.abs(params[layer]["kernel"]).max() <= bound
    assert not params["conv1"]["bias"].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CNN((4,), 10), "2, 3 or 4 convolutions"),
        (lambda: CNN((4, -8), 10), r"filters must be positive integers, got \(4, -8\)"),
        (lambda: CNN((4, 8.5), 10), "filters must be positive integers"),
        (lambda: CNN((4, 8), 0), "num_classes must be positive"),
        (lambda: CNN((4, 8), 10, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: scale_width((4,), 0.0), "width must be positive"),
        (lambda: shapes(CNN((4, 8, 8), 10), (1, 11, 28, 1)), r"at least 12x12, got \(1, 11, 28, 1\)"),
        (lambda: shapes(CNN((4, 8), 10), (1, 28, 28)), r"images \[B, H, W, channels\]"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("filters", "smallest"), [((2, 2), 3), ((2, 2, 2), 12), ((2, 2, 2, 2), 12)])
def test_smallest_image(filters, smallest):
    (params, _), _ = shapes(CNN(filters, 3), (1, smallest, smallest, 1))
    assert params["head"]["kernel"].shape[0] > 0


def test_scale_width_never_reaches_zero():
    assert scale_width((128, 64), 0.001) == (1, 1)


@pytest.mark.parametrize("filters", [(2, 3), (2, 3, 4)])
def test_a_batch_in_parts_gives_the_same(filters, monkeypatch):
    """Loss, gradients and batch statistics in float64, with dropout and padding rows."""
    with toys.float64():
        rng = np.random.default_rng(0)
        architecture = architecture_from_linen(CNN(filters, 5, dropout=0.3))
        images = jnp.asarray(rng.normal(size=(16, 13, 12, 1)))
        params, model_state = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) ** 2),
            jax.eval_shape(architecture.init, jax.random.key(0), images),
        )
        mask = jnp.arange(16) < 13

        def loss(params, images):
            logits, new = architecture.apply(params, model_state, images, train=True, mask=mask, key=jax.random.key(1))
            return jnp.sum(jnp.sin(logits[:13])), new

        def value_and_gradients(params, images):
            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, images)

        whole = jax.jit(value_and_gradients)(params, images)
        monkeypatch.setattr(cnn, "rows_per_part", lambda *shapes: 4)
        in_parts = jax.jit(lambda *arguments: value_and_gradients(*arguments))
        assert "while" in in_parts.lower(params, images).as_text()
        chex.assert_trees_all_close(in_parts(params, images), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("height", [3, 4, 5, 28])
@pytest.mark.parametrize("width", [3, 6, 7, 28])
def test_the_pooling_leaves_out_only_what_is_not_seen(height, width):
    """Against pooling with padding: the second convolution sees the last row of an image with an odd number of rows."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, height, width, 2)), jnp.float32)
    layers = cnn._TOPOLOGIES[2]
    pooled = cnn._pooling(layers[0], layers[1:])(x)
    padded = nn.avg_pool(x, (2, 2), (1, 1), "SAME", count_include_pad=False)
    second = partial(nn.avg_pool, window_shape=(3, 3), strides=(2, 2))  # any function of the same windows
    np.testing.assert_allclose(second(pooled), second(padded), rtol=1e-6, atol=1e-6)
    both_even = height % 2 == width % 2 == 0
    assert pooled.shape[1:3] == ((height - 1, width - 1) if both_even else (height, width))
