import jax
import jax.numpy as jnp
import pytest

from fedmd_jax.experiments.networks import architecture_from_name

NUM_CLASSES = 7


def shapes(name, image=(12, 12, 1), **options):
    architecture = architecture_from_name(name, NUM_CLASSES, **options)
    params, _ = jax.eval_shape(architecture.init, jax.random.key(0), jnp.zeros((1, *image)))
    return jax.tree.map(jnp.shape, params), architecture


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("2conv:n1=4,n2=6", "conv2", (3, 3, 4, 6)),
        ("3conv:n1=4,n2=6,n3=8", "conv3", (3, 3, 6, 8)),
        ("4conv:n3=8,n4=5,n1=4,n2=6,dropout=0.3", "conv4", (3, 3, 8, 5)),
        ("mlp:n1=9,n2=5", "dense2", (9, 5)),
        ("mlp", "head", (144, NUM_CLASSES)),
        ("mlp:dropout=0.5", "head", (144, NUM_CLASSES)),
        ("resnet8", "head", (64, NUM_CLASSES)),
        ("resnet20:width=0.25,norm=group", "head", (16, NUM_CLASSES)),
    ],
)
def test_a_name_gives_the_network(name, layer, shape):
    params, _ = shapes(name)
    assert params[layer]["kernel"] == shape


def test_the_head_is_penalised():
    _, architecture = shapes("mlp", head_penalty=0.5)
    params, _ = architecture.init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))
    expected = 0.5 * jnp.sum(params["head"]["kernel"] ** 2)
    assert architecture.penalty(params) == pytest.approx(float(expected))


def test_dropout_instead_of_the_names_own():
    inputs = jnp.ones((2, 12, 12, 1))
    _, architecture = shapes("mlp:n1=4,dropout=0.9", dropout=0.0)
    params, model_state = architecture.init(jax.random.key(0), inputs)
    one, other = (
        architecture.apply(params, model_state, inputs, train=True, mask=jnp.ones(2, bool), key=jax.random.key(seed))[0]
        for seed in (1, 2)
    )
    assert (one == other).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("5conv:n1=1", "the kind must be one of 2conv, 3conv, 4conv, mlp, resnet8, resnet20, got '5conv'"),
        ("", "the kind must be one of .*, got ''"),
        ("2conv", r"its settings must be n1, n2, \[dropout\], got none"),
        ("2conv:n1=4,n2=6,n3=8", r"its settings must be n1, n2, \[dropout\], got n1, n2, n3"),
        ("mlp:n2=8", r"its settings must be n1, \[dropout\], got n2"),
        ("resnet8:dropout=0.2", r"its settings must be \[width\], \[norm\], got dropout"),
        ("mlp:n1", "settings are written setting=value, each once, got 'n1'"),
        ("mlp:n1=8,", "settings are written setting=value, each once, got ''"),
        ("mlp:n1=8,n1=9", "settings are written setting=value, each once, got 'n1=9'"),
        ("mlp:n1=x", "n1 must be an integer, got 'x'"),
        ("mlp:n1=8.5", "n1 must be an integer, got '8.5'"),
        ("mlp:n1=0", "hidden must be positive integers, got .*"),
        ("mlp:dropout=1", r"dropout must be in \[0, 1\), got 1.0"),
        ("mlp:dropout=x", "dropout must be a number, got 'x'"),
        ("resnet8:width=inf", "width must be at most 1000000, got 'inf'"),
        ("resnet8:width=0", "width must be positive, got 0.0"),
        ("resnet8:norm=layer", "norm must be one of batch, group, got 'layer'"),
    ],
)
def test_a_name_that_is_none(name, message):
    with pytest.raises(ValueError, match=f"^network '{name}': {message}$"):
        architecture_from_name(name, NUM_CLASSES)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        ("2conv:n1=8,n2=12", "2conv:n1=4,n2=6"),
        ("mlp:n1=8", "mlp:n1=4"),
        ("resnet8:width=0.5", "resnet8:width=0.25"),
    ],
)
def test_the_width_multiplies_filters_and_hidden_units(wide, narrow):
    assert shapes(wide, width=0.5)[0] == shapes(narrow)[0]
