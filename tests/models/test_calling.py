"""How the adapters call the networks that users bring: training flags, row masks, and what is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fedmd_jax.models import BatchNorm, Dropout, ReLUDropout, architecture_from_linen, architecture_from_nnx

pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
MASK = jnp.array([True, True, False, False])
INVERSE = ("deterministic", "use_running_average")
NAMES = ("train", "training", "is_training", *INVERSE)


def adapt(network, **settings):
    """The architecture of a class of networks or of a linen module."""
    if isinstance(network, type) and issubclass(network, nnx.Module):
        return architecture_from_nnx(network, **settings)
    return architecture_from_linen(network() if isinstance(network, type) else network, **settings)


def scores(architecture, variables, x=X):
    return architecture.apply(*variables, x, train=False)[0]


def trained(architecture, variables, key, x=X, **how):
    return architecture.apply(*variables, x, train=True, key=key, **how)[0]


def assert_trains_with_dropout(architecture, variables, key):
    a, b = (trained(architecture, variables, k) for k in jax.random.split(key))
    assert (a != b).any()


def assert_obeys(architecture, key):
    """A network of dropout and `head` scores without dropout, by NumPy in float64, and trains with it."""
    variables = architecture.init(key, X)
    kernel, bias = (np.asarray(variables[0]["head"][name], np.float64) for name in ("kernel", "bias"))
    np.testing.assert_allclose(scores(architecture, variables), np.asarray(X, np.float64) @ kernel + bias, atol=1e-6)
    assert_trains_with_dropout(architecture, variables, key)


class LinenBody(linen.Module):
    @linen.compact
    def body(self, x, train):
        return linen.Dense(3, name="head")(linen.Dropout(0.5, deterministic=not train)(x))


class NnxBody(nnx.Module):
    """Hands its flag on at call time, whatever `train()` and `eval()` say."""

    def __init__(self, rngs):
        self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def body(self, x, train):
        return self.head(self.dropout(x, deterministic=not train))


def flagged(body, flag, name):
    """A network with a flag such as `*, train=False` of this name."""
    scope = {}
    inverse = "not " if name in INVERSE else ""
    exec(f"def call(self, x, {flag}): assert isinstance({name}, bool); return self.body(x, {inverse}{name})", scope)
    return type(body)("Net", (body,), {"__call__": scope["call"]})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("body", [LinenBody, NnxBody])
@pytest.mark.parametrize("flag", ["{}={}", "*, {}={}", "{}"], ids=["default", "keyword", "required"])
def test_flags_of_every_usual_name(body, name, flag, key):
    assert_obeys(adapt(flagged(body, flag.format(name, name in INVERSE), name)), key)  # scoring unless told otherwise


def test_a_wrong_default_of_an_nnx_call_is_overruled(key):
    """It wins over `module.eval()`."""
    for name in NAMES:
        assert_obeys(adapt(flagged(NnxBody, f"{name}={name not in INVERSE}", name)), key)


def test_several_flags_are_set_in_agreement(key):
    class Both(LinenBody):
        def __call__(self, x, *, training=False, deterministic=True):
            assert training is not deterministic
            return self.body(x, training)

    assert_obeys(adapt(Both), key)


@pytest.mark.parametrize("body", [LinenBody, NnxBody])
def test_flags_of_the_users_own_name(body, key):
    class Learning(body):
        def __call__(self, x, **flag):
            return self.body(x, flag["learning"])

    class Frozen(body):
        def __call__(self, x, frozen):
            return self.body(x, not frozen)

    assert_obeys(adapt(Learning, train_argument="learning"), key)
    assert_obeys(adapt(Frozen, train_argument="not frozen"), key)


def test_a_name_that_call_does_not_have_is_refused():
    for settings in ({"train_argument": "frozen"}, {"train_argument": "not frozen"}, {"mask_argument": "frozen"}):
        for network in (Plain, NnxPlain):
            with pytest.raises(ValueError, match="has no argument 'frozen'"):
                adapt(network, **settings)
    for name in ("not ", "a b", 3):
        with pytest.raises(ValueError, match="train_argument must be"):
            adapt(Plain, train_argument=name)


# Networks inside others.


class Plain(linen.Module):
    """Dropout and batch norm, by `train`."""

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.0, use_bias=False)(x)
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not train)(x))


class HandsOn(linen.Module):
    @linen.compact
    def __call__(self, *args, **kwargs):
        return Plain()(*args, **kwargs)


class HandsPositionsOn(linen.Module):
    @linen.compact
    def __call__(self, x, *args):
        return Plain()(x, *args)


class AFlagFurtherOn(linen.Module):
    @linen.compact
    def __call__(self, x, scale=None, train=False):
        return Plain()(x, train)


class NnxPlain(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(5, momentum=0.0, rngs=rngs)
        self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, train=False):
        x = self.norm(x, use_running_average=not train)
        return self.head(self.dropout(x, deterministic=not train))


class NnxRemat(NnxPlain):
    __call__ = nnx.remat(static_argnums=(2,))(NnxPlain.__call__)


class NnxJit(NnxPlain):
    __call__ = nnx.jit(static_argnames="train")(NnxPlain.__call__)


class NnxModes(NnxPlain):
    @nnx.jit
    def __call__(self, x):
        return self.head(self.dropout(self.norm(x)))


class NnxHandsOn(nnx.Module):
    def __init__(self, rngs):
        self.inner = NnxPlain(rngs)

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


WRAPPED = {
    "remat": linen.remat(Plain, static_argnums=(2,)),
    "remat, third": linen.remat(AFlagFurtherOn, static_argnums=(3,)),
    "jit": linen.jit(Plain, static_argnums=(2,)),
    "jit by name": linen.jit(Plain, static_argnames=("train",)),
    "jit of remat": linen.jit(linen.remat(Plain, static_argnums=(2,)), static_argnums=(2,)),
    "*args, **kwargs": HandsOn,
    "Sequential": linen.Sequential([Plain(), linen.relu]),
    **{network.__name__: network for network in (NnxRemat, NnxJit, NnxModes, NnxHandsOn)},
}


def batch_mean(state):
    (mean,) = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if path[-1].key == "mean"]
    return mean


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_modules(name, key):
    """Scores as the bare module's, dropout in training, and statistics of the real rows, of each mask its own."""
    architecture = adapt(WRAPPED[name])
    variables = architecture.init(key, X)
    assert_trains_with_dropout(architecture, variables, key)
    np.testing.assert_array_equal(scores(architecture, variables), scores(architecture, variables))
    train = jax.jit(lambda mask, x: architecture.apply(*variables, x, train=True, key=key, mask=mask)[1])
    for mask in (MASK, ~MASK, MASK.at[1].set(False)):
        np.testing.assert_allclose(batch_mean(train(mask, X)), np.mean(X[mask], axis=0), rtol=1e-5)
    _, state = architecture.apply(*variables, X, train=True, key=key, mask=MASK)  # traced once more
    np.testing.assert_allclose(batch_mean(state), np.mean(X[MASK], axis=0), rtol=1e-5)


def test_a_module_that_hands_positions_on_takes_no_flag_and_is_refused(key):
    architecture = adapt(HandsPositionsOn)
    with pytest.raises(ValueError, match=r"trains as it scores, without .*BatchNorm .*accept `train`.*train_argument"):
        trained(architecture, architecture.init(key, X), key)


def test_a_flag_that_is_traced_is_explained(key):
    with pytest.raises(jax.errors.TracerBoolConversionError, match="static_argnums"):
        adapt(linen.remat(Plain)).init(key, X)


class Attribute(NnxBody):
    """The flag is an attribute."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.training = False

    def __call__(self, x):
        return self.body(x, self.training)


class View(Attribute):
    """The flag is set by `nnx.view`."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.training = "no"

    def set_view(self, training=None):
        self.mode = training

    def __call__(self, x):
        return self.body(x, self.mode)


class OwnView(View):
    def set_view(self, frozen=None):
        self.mode = not frozen


class OwnTrain(Attribute):
    """The flag is set by the module's own `train()` and `eval()`; `train` the attribute does not hide them."""

    def train(self, **attributes):
        super().train(**attributes)
        self.mode = True

    def eval(self, **attributes):
        super().eval(**attributes)
        self.mode = False

    def __call__(self, x):
        return self.body(x, self.mode)


@pytest.mark.parametrize(
    ("network", "settings"), [(Attribute, {}), (OwnTrain, {}), (View, {}), (OwnView, {"train_argument": "not frozen"})]
)
def test_the_ways_of_nnx_to_set_a_mode(network, settings, key):
    if issubclass(network, View) and not hasattr(nnx, "view"):
        pytest.skip("this flax has no nnx.view")
    assert_obeys(adapt(network, **settings), key)


def test_the_rngs_of_an_nnx_network_are_given_by_name(key):
    class Keyword(nnx.Module):
        def __init__(self, width=3, *, rngs):
            self.head = nnx.Linear(5, width, rngs=rngs)

        def __call__(self, x):
            return self.head(x)

    for make, width in (
        (Keyword, 3),
        (functools.partial(Keyword, 7), 7),
        (lambda *, rngs: Keyword(4, rngs=rngs), 4),
        (lambda r, /: Keyword(2, rngs=r), 2),
    ):
        architecture = architecture_from_nnx(make)
        assert scores(architecture, architecture.init(key, X)).shape == (4, width)


# What would train without dropout, or score with it.

LINEN_LAYERS = {
    "dropout": lambda x, on: linen.Dropout(0.5)(x, deterministic=not on),
    "norm": lambda x, on: linen.BatchNorm(use_running_average=not on)(x),
    "attention": lambda x, on: linen.MultiHeadDotProductAttention(1, dropout_rate=0.5, deterministic=not on)(
        x[:, None]
    )[:, 0],
    "self attention": lambda x, on: linen.SelfAttention(1, dropout_rate=0.5)(x[:, None], deterministic=not on)[:, 0],
    "Dropout": lambda x, on: Dropout(0.5)(x, train=on),
    "ReLUDropout": lambda x, on: ReLUDropout(0.5)(x, train=on),
    "our norm": lambda x, on: BatchNorm()(x, train=on),
}
NNX_LAYERS = {
    "nnx dropout": (lambda r: nnx.Dropout(0.5, rngs=r), lambda layer, x, on: layer(x, deterministic=not on)),
    "nnx norm": (lambda r: nnx.BatchNorm(5, rngs=r), lambda layer, x, on: layer(x, use_running_average=not on)),
    "nnx attention": (
        lambda r: nnx.MultiHeadAttention(1, 5, dropout_rate=0.5, decode=False, rngs=r),
        lambda layer, x, on: layer(x[:, None], deterministic=not on)[:, 0],
    ),
    "nnx uncalled": (lambda r: nnx.Dropout(0.5, rngs=r), lambda layer, x, on: layer(x) if on else x),
}


def phase_network(layer, default):
    """A network with a flag `phase`, which nothing here knows."""

    class Phase(linen.Module):
        @linen.compact
        def __call__(self, x, phase=default):
            return linen.Dense(3)(LINEN_LAYERS[layer](x, phase))

    class NnxPhase(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.head = NNX_LAYERS[layer][0](rngs), nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x, phase=default):
            return self.head(NNX_LAYERS[layer][1](self.layer, x, phase))

    return Phase if layer in LINEN_LAYERS else NnxPhase


@pytest.mark.parametrize("layer", [*LINEN_LAYERS, *NNX_LAYERS])
def test_a_network_that_trains_as_it_scores_is_refused(layer, key):
    """Unless this is meant, or the flag is named."""
    network = phase_network(layer, default=False)
    architecture = adapt(network)
    variables = architecture.init(key, X)
    expected = scores(architecture, variables)
    with pytest.raises(ValueError, match=r'Phase trains as it scores, without .*train_argument="\.\.\."') as caught:
        trained(architecture, variables, key)
    assert "\n" not in caught.value.args[0]
    meant = trained(adapt(network, train_argument=None), variables, key)
    np.testing.assert_allclose(meant, expected, rtol=1e-6)
    assert (trained(adapt(network, train_argument="phase"), variables, key) != meant).any()


@pytest.mark.parametrize("layer", [*LINEN_LAYERS, "nnx dropout", "nnx norm", "nnx attention"])
@pytest.mark.parametrize("train_argument", ["auto", None, "not phase"])
def test_a_network_that_scores_with_dropout_is_refused(layer, train_argument, key):
    """Also if its flag is named with the wrong sense."""
    architecture = adapt(phase_network(layer, default=True), train_argument=train_argument)
    with pytest.raises(ValueError, match=r"is active in scoring, with .*accept `train`") as caught:
        scores(architecture, architecture.init(key, X))
    assert "\n" not in caught.value.args[0]


def test_layers_that_never_drop_are_no_dropout(key):
    class Zero(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.SelfAttention(1)(linen.Dropout(0.0, deterministic=True)(x)[:, None])[:, 0]
            return linen.Dense(3)(x)

    architecture = adapt(Zero)
    assert trained(architecture, architecture.init(key, X), key).shape == (4, 3)


def test_streams_and_mutable_collections_as_flags(key):
    """A module may ask flax whether it trains; `init` has streams and may write, but does not train."""

    class Asks(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=not self.is_mutable_collection("batch_stats"))(x)
            return linen.Dense(3)(linen.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x))

    architecture = adapt(Asks)
    variables = architecture.init(key, X)
    scores(architecture, variables)
    assert_trains_with_dropout(architecture, variables, key)


class SkipsDropout(linen.Module):
    """Does not call its dropout unless it trains."""

    @linen.compact
    def body(self, x, train):
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=False)(x) if train else x)


class SkipsUnknown(SkipsDropout):
    def __call__(self, x, noisy=False):
        return self.body(x, noisy)


class SkipsKnown(SkipsDropout):
    def __call__(self, x, is_train=False):
        return self.body(x, is_train)


class FieldFlag(SkipsDropout):
    training: bool = False

    def __call__(self, x):
        return self.body(x, self.training)


class TwoFlags(linen.Module):
    @linen.compact
    def __call__(self, x, train=False, noise=False):
        x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not noise)(x))


class HarmlessFlag(linen.Module):
    @linen.compact
    def __call__(self, x, bias=True):
        return linen.Dense(3)(x) + (1.0 if bias else 0.0)


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        (SkipsKnown(), {}),
        (FieldFlag(), {}),
        (FieldFlag(training=True), {}),
        (SkipsUnknown(), {"train_argument": "noisy"}),
    ],
    ids=str,
)
def test_a_dropout_that_is_only_called_in_training_is_called(network, settings, key):
    architecture = adapt(network, **settings)
    variables = architecture.init(key, X)
    assert_trains_with_dropout(architecture, variables, key)
    np.testing.assert_array_equal(scores(architecture, variables), scores(architecture, variables))


@pytest.mark.parametrize("network", [SkipsUnknown, TwoFlags])
def test_a_dropout_that_an_unknown_flag_turns_off_is_refused(network, key):
    architecture = adapt(network)
    variables = architecture.init(key, X)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"trains as it scores, without Dropout"):
            trained(architecture, variables, key)


def test_an_argument_that_is_no_training_flag_is_left_alone(key):
    architecture = adapt(HarmlessFlag)
    variables = architecture.init(key, X)
    np.testing.assert_array_equal(trained(architecture, variables, key), scores(architecture, variables))


# The row mask.


class LinenTransformer(linen.Module):
    @linen.compact
    def __call__(self, x, mask=None):
        mask = None if mask is None else mask[None, None, None]
        return linen.Dense(3)(linen.MultiHeadDotProductAttention(2, qkv_features=4)(x, mask=mask).mean(1))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 6, 4, decode=False, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x, mask=None):
        return self.head(self.attention(x, mask=None if mask is None else mask[None, None, None]).mean(1))


@pytest.mark.parametrize("network", [LinenTransformer, NnxTransformer])
def test_an_attention_mask_is_no_row_mask(network, key):
    """With as many tokens as rows, the row mask would pass for one."""
    architecture = adapt(network)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4, 6)), jnp.float32)
    variables = architecture.init(key, x)
    got = trained(architecture, variables, key, x, mask=MASK)
    alone = jnp.concatenate([trained(architecture, variables, key, row[None]) for row in x])
    np.testing.assert_allclose(got, alone, atol=1e-6)


class LinenTimeMajor(linen.Module):
    ours: bool = False

    @linen.compact
    def __call__(self, x, train):
        x = x.swapaxes(0, 1)  # [T, B, C]
        x = BatchNorm()(x, train=train) if self.ours else linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dense(3)(x.mean(0))


class NnxTimeMajor(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.head = nnx.BatchNorm(6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x.swapaxes(0, 1)).mean(0))


@pytest.mark.parametrize("network", [LinenTimeMajor(), LinenTimeMajor(ours=True), NnxTimeMajor])
def test_a_batch_norm_with_time_in_front_is_refused_whatever_its_length(network, key):
    architecture = adapt(network)
    for num_steps in (4, 7):
        x = jnp.ones((4, num_steps, 6))
        variables = architecture.init(key, x)
        with pytest.raises(ValueError, match=r"the batch must be its leading axis"):
            trained(architecture, variables, key, x, mask=MASK)
        trained(architecture, variables, key, x)  # without padding there is nothing to mask


class LinenFlat(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        return linen.BatchNorm(use_running_average=not train, name="norm")(x.reshape(-1, 1)).reshape(x.shape)


class NnxFlat(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(1, rngs=rngs)

    def __call__(self, x):
        return self.norm(x.reshape(-1, 1)).reshape(x.shape)


@pytest.mark.parametrize("network", [LinenFlat, NnxFlat])
def test_batch_norm_of_something_else_than_the_batch_is_refused(network, key):
    architecture = adapt(network)
    variables = architecture.init(key, X)
    trained(architecture, variables, key)
    with pytest.raises(ValueError, match=r"batch norm .norm. gets \(20, 1\) for a batch of 4 rows"):
        trained(architecture, variables, key, mask=MASK)


def test_the_leading_axis_is_verified_once_for_a_shape(key):
    calls = []

    class Counting(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            calls.append(x.shape)
            return Plain()(x, train)

    architecture = adapt(Counting)
    variables = architecture.init(key, X)
    calls.clear()
    for _ in range(2):
        trained(architecture, variables, key, mask=MASK)
        trained(architecture, variables, key, X[:2], mask=MASK[:2])
    assert calls == [(4, 5), (8, 5), (2, 5), (4, 5), (4, 5), (2, 5)]


class OwnNorm(linen.Module):
    """Keeps a running mean of all rows, or of the real ones."""

    @linen.compact
    def __call__(self, x, train=False, rows=None):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        if train:
            mean.value = jnp.mean(x, 0, where=None if rows is None else rows[:, None])
        return x - mean.value[None]


class OwnNormNet(linen.Module):
    @linen.compact
    def __call__(self, x, train=False, rows=None):
        return linen.Dense(3)(linen.BatchNorm(use_running_average=not train)(OwnNorm(name="own")(x, train, rows)))


class NnxOwnNorm(nnx.Module):
    def __init__(self, rngs):
        self.mean = nnx.BatchStat(jnp.zeros(5))
        self.norm, self.head = nnx.BatchNorm(5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.training = False

    def __call__(self, x, rows=None):
        if self.training:
            self.mean[...] = jnp.mean(x, 0, where=None if rows is None else rows[:, None])
        return self.head(self.norm(x - self.mean[...][None]))


@pytest.mark.parametrize(("network", "name"), [(OwnNormNet, "own"), (OwnNorm, "OwnNorm"), (NnxOwnNorm, "NnxOwnNorm")])
def test_own_batch_statistics_need_the_row_mask(network, name, key):
    architecture = adapt(network)
    variables = architecture.init(key, X)
    trained(architecture, variables, key)
    with pytest.raises(ValueError, match=rf"would reach the batch statistics of {name}, .*mask_argument"):
        trained(architecture, variables, key, mask=MASK)
    _, state = adapt(network, mask_argument="rows").apply(*variables, X, train=True, key=key, mask=MASK)
    means = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if path[-1].key == "mean"]
    assert any(np.allclose(mean, np.mean(X[MASK], axis=0), rtol=1e-5) for mean in means)


class Spectral(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        return linen.WeightNorm(linen.Dense(3))(linen.SpectralNorm(linen.Dense(4))(x, update_stats=train))


class NnxSpectral(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.SpectralNorm(nnx.Linear(5, 3, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.head(x)


@pytest.mark.parametrize("network", [Spectral, *([NnxSpectral] if hasattr(nnx, "SpectralNorm") else [])])
def test_statistics_of_weights_are_no_statistics_of_rows(network, key):
    architecture = adapt(network)
    variables = architecture.init(key, X)
    _, state = architecture.apply(*variables, X, train=True, key=key, mask=MASK)
    chex.assert_trees_all_equal_shapes(state, variables[1])


class Norm(linen.BatchNorm):
    def __call__(self, x, train):
        return super().__call__(x, use_running_average=not train)


class NnxNorm(nnx.BatchNorm):
    def __init__(self, rngs):
        super().__init__(5, momentum=0.0, rngs=rngs)

    def __call__(self, x):
        return super().__call__(x)


@pytest.mark.parametrize("network", [Norm(momentum=0.0), NnxNorm])
def test_a_subclass_of_batch_norm_may_have_a_call_of_its_own(network, key):
    architecture = adapt(network)
    variables = architecture.init(key, X)
    _, state = architecture.apply(*variables, X, train=True, key=key, mask=MASK)
    np.testing.assert_allclose(batch_mean(state), np.mean(X[MASK], axis=0), rtol=1e-5)
