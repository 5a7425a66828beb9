"""How the adapters call the networks that users bring: training flags, row masks, and what is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fedmd_jax.models import BatchNorm, Dropout, ReLUDropout, architecture_from_linen, architecture_from_nnx

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
MASK = jnp.array([True, True, False, False])
INVERSE = ("deterministic", "use_running_average")
NAMES = ("train", "training", "is_training", *INVERSE)


def linen_net(name, *, keyword_only=False, default=False, layer=linen.Dropout):
    """A dropout network whose flag has this name."""
    source = f"""
class Net(linen.Module):
    @linen.compact
    def __call__(self, x, {"*, " if keyword_only else ""}{name}{"=" + str(default) if default is not None else ""}):
        assert isinstance({name}, bool)
        return linen.Dense(3)(layer(0.5, deterministic={"" if name in INVERSE else "not "}{name})(x))
"""
    scope = {"linen": linen, "layer": layer, "__name__": __name__}
    exec(source, scope)
    return scope["Net"]


def nnx_net(name, default=False):
    """A dropout network that hands its flag on at call time, whatever `train()` and `eval()` say."""
    source = f"""
class Net(nnx.Module):
    def __init__(self, rngs):
        self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, {name}={default}):
        return self.head(self.dropout(x, deterministic={"" if name in INVERSE else "not "}{name}))
"""
    scope = {"nnx": nnx, "__name__": __name__}
    exec(source, scope)
    return scope["Net"]


class Plain(linen.Module):
    """Dropout and batch norm, by `train`."""

    rate: float = 0.5

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.0, use_bias=False)(x)
        return linen.Dense(3)(linen.Dropout(self.rate, deterministic=not train)(x))


class HandsOn(linen.Module):
    @linen.compact
    def __call__(self, *args, **kwargs):
        return Plain()(*args, **kwargs)


class HandsKeywordsOn(linen.Module):
    @linen.compact
    def __call__(self, x, **kwargs):
        return Plain()(x, **kwargs)


class HandsPositionsOn(linen.Module):
    @linen.compact
    def __call__(self, x, *args):
        return Plain()(x, *args)


class AFlagFurtherOn(linen.Module):
    @linen.compact
    def __call__(self, x, scale=None, train=False):
        return Plain()(x, train)


WRAPPED = {
    "remat": lambda: linen.remat(Plain, static_argnums=(2,))(),
    "remat, third": lambda: linen.remat(AFlagFurtherOn, static_argnums=(3,))(),
    "jit": lambda: linen.jit(Plain, static_argnums=(2,))(),
    "jit by name": lambda: linen.jit(Plain, static_argnames=("train",))(),
    "jit of remat": lambda: linen.jit(linen.remat(Plain, static_argnums=(2,)), static_argnums=(2,))(),
    "*args, **kwargs": HandsOn,
    "**kwargs": HandsKeywordsOn,
    "Sequential": lambda: linen.Sequential([Plain(), linen.relu]),
}


def linear(head, x=X):
    """NumPy's dense layer, in float64."""
    return np.asarray(x, np.float64) @ np.asarray(head["kernel"], np.float64) + np.asarray(head["bias"])


def scores(architecture, variables, x=X, **how):
    return architecture.apply(*variables, x, train=False, **how)[0]


def trained(architecture, variables, key, x=X, **how):
    return architecture.apply(*variables, x, train=True, key=key, **how)[0]


def assert_trains_with_dropout(architecture, variables, key, x=X):
    a, b = (trained(architecture, variables, k, x) for k in jax.random.split(key))
    assert (a != b).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", [{}, {"keyword_only": True}, {"default": None}], ids=["default", "keyword", "required"])
def test_linen_flags_of_every_usual_name(name, how, key):
    if "default" not in how:
        how["default"] = name in INVERSE  # as most networks have it: scoring unless told otherwise
    module = linen_net(name, **how)()
    architecture = architecture_from_linen(module)
    variables = architecture.init(key, X)
    head = variables[0]["Dense_0"]
    np.testing.assert_allclose(scores(architecture, variables), linear(head), atol=1e-6)
    assert_trains_with_dropout(architecture, variables, key)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("default", [False, True])
def test_nnx_flags_of_every_usual_name(name, default, key):
    """Also if the default of the call is the wrong one: it wins over `module.eval()`."""
    architecture = architecture_from_nnx(nnx_net(name, default))
    variables = architecture.init(key, X)
    head = variables[0]["head"]
    np.testing.assert_allclose(scores(architecture, variables), linear(head), atol=1e-6)
    assert_trains_with_dropout(architecture, variables, key)


def test_several_flags_are_set_in_agreement(key):
    class Both(linen.Module):
        @linen.compact
        def __call__(self, x, *, training=False, deterministic=True):
            assert training is not deterministic
            return linen.Dense(3)(linen.Dropout(0.5, deterministic=deterministic)(x))

    architecture = architecture_from_linen(Both())
    assert_trains_with_dropout(architecture, architecture.init(key, X), key)


@pytest.mark.parametrize(("name", "told"), [("learning", "learning"), ("frozen", "not frozen")])
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_flags_of_the_users_own_name(library, name, told, key):
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x, **flag):
            return linen.Dense(3)(linen.Dropout(0.5, deterministic=flag[name] == (name == "frozen"))(x))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x, **flag):
            return self.head(self.dropout(x, deterministic=flag[name] == (name == "frozen")))

    make = {"linen": lambda: architecture_from_linen(Linen(), train_argument=told)}
    make["nnx"] = lambda: architecture_from_nnx(Nnx, train_argument=told)
    architecture = make[library]()
    variables = architecture.init(key, X)
    (head,) = variables[0].values()
    np.testing.assert_allclose(scores(architecture, variables), linear(head), atol=1e-6)
    assert_trains_with_dropout(architecture, variables, key)


def test_a_name_that_call_does_not_have_is_refused():
    for settings in ({"train_argument": "frozen"}, {"train_argument": "not frozen"}, {"mask_argument": "frozen"}):
        with pytest.raises(ValueError, match="has no argument 'frozen'"):
            architecture_from_linen(Plain(), **settings)
        with pytest.raises(ValueError, match="has no argument 'frozen'"):
            architecture_from_nnx(nnx_net("train"), **settings)
    for name in ("not ", "a b", 3):
        with pytest.raises(ValueError, match="train_argument must be"):
            architecture_from_linen(Plain(), train_argument=name)


def batch_statistics(state):
    (mean,) = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if path[-1].key == "mean"]
    return mean


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_modules(name, key):
    """Scores as the bare module's, dropout in training, and statistics of the real rows, of each mask its own."""
    architecture = architecture_from_linen(WRAPPED[name]())
    variables = architecture.init(key, X)
    assert_trains_with_dropout(architecture, variables, key)
    np.testing.assert_array_equal(scores(architecture, variables), scores(architecture, variables))
    train = jax.jit(lambda mask, x: architecture.apply(*variables, x, train=True, key=key, mask=mask)[1])
    for mask in (MASK, ~MASK, MASK.at[1].set(False)):
        np.testing.assert_allclose(batch_statistics(train(mask, X)), np.mean(X[mask], axis=0), rtol=1e-5)
    _, state = architecture.apply(*variables, X, train=True, key=key, mask=MASK)  # traced once more
    np.testing.assert_allclose(batch_statistics(state), np.mean(X[MASK], axis=0), rtol=1e-5)


def test_a_module_that_hands_positions_on_takes_no_flag_and_is_refused(key):
    architecture = architecture_from_linen(HandsPositionsOn())
    variables = architecture.init(key, X)
    with pytest.raises(ValueError, match=r"HandsPositionsOn trains as it scores, without BatchNorm .*accept `train`"):
        trained(architecture, variables, key)


def test_a_flag_that_is_traced_is_explained(key):
    with pytest.raises(jax.errors.TracerBoolConversionError, match="static_argnums"):
        architecture_from_linen(linen.remat(Plain)()).init(key, X)


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


@pytest.mark.parametrize("network", [NnxRemat, NnxJit, NnxModes, NnxHandsOn])
def test_wrapped_nnx_modules(network, key):
    architecture = architecture_from_nnx(network)
    variables = architecture.init(key, X)
    assert_trains_with_dropout(architecture, variables, key)
    np.testing.assert_array_equal(scores(architecture, variables), scores(architecture, variables))
    train = jax.jit(lambda mask, x: architecture.apply(*variables, x, train=True, key=key, mask=mask)[1])
    for mask in (MASK, ~MASK, MASK.at[1].set(False)):
        np.testing.assert_allclose(batch_statistics(train(mask, X)), np.mean(X[mask], axis=0), rtol=1e-5)


class Attribute(nnx.Module):
    """The flag is an attribute."""

    def __init__(self, rngs):
        self.training = False
        self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(x, deterministic=not self.training))


class View(Attribute):
    """The flag is set by `nnx.view`."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.training = "no"

    def set_view(self, training=None):
        self.mode = training

    def __call__(self, x):
        return self.head(self.dropout(x, deterministic=not self.mode))


class OwnView(View):
    def set_view(self, frozen=None):
        self.mode = not frozen


class OwnTrain(Attribute):
    """The flag is set by the module's own `train()` and `eval()`; `train` the attribute does not hide them."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.mode = "eval"

    def train(self, **attributes):
        super().train(**attributes)
        self.mode = "train"

    def eval(self, **attributes):
        super().eval(**attributes)
        self.mode = "eval"

    def __call__(self, x):
        return self.head(self.dropout(x, deterministic=self.mode == "eval"))


@pytest.mark.parametrize(
    ("network", "settings"), [(Attribute, {}), (OwnTrain, {}), (View, {}), (OwnView, {"train_argument": "not frozen"})]
)
def test_the_ways_of_nnx_to_set_a_mode(network, settings, key):
    if issubclass(network, View) and not hasattr(nnx, "view"):
        pytest.skip("this flax has no nnx.view")
    architecture = architecture_from_nnx(network, **settings)
    variables = architecture.init(key, X)
    head = variables[0]["head"]
    np.testing.assert_allclose(scores(architecture, variables), linear(head), atol=1e-6)
    assert_trains_with_dropout(architecture, variables, key)


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


class Phase(linen.Module):
    """A flag that nothing here knows."""

    layer: str

    @linen.compact
    def __call__(self, x, phase=False):
        if self.layer == "norm":
            return linen.Dense(3)(linen.BatchNorm(use_running_average=not phase)(x))
        if self.layer == "our norm":
            return linen.Dense(3)(BatchNorm()(x, train=phase))
        if self.layer == "attention":
            y = linen.MultiHeadDotProductAttention(1, dropout_rate=0.5, deterministic=not phase)(x[:, None])
            return linen.Dense(3)(y[:, 0])
        if self.layer == "self attention":
            return linen.Dense(3)(linen.SelfAttention(1, dropout_rate=0.5)(x[:, None], deterministic=not phase)[:, 0])
        if self.layer in ("Dropout", "ReLUDropout"):
            return linen.Dense(3)({"Dropout": Dropout, "ReLUDropout": ReLUDropout}[self.layer](0.5)(x, train=phase))
        return linen.Dense(3)(linen.Dropout(0.5)(x, deterministic=not phase))


pytestmark = pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
LAYERS = ("dropout", "norm", "attention", "self attention", "Dropout", "ReLUDropout", "our norm")


@pytest.mark.parametrize("layer", LAYERS)
def test_a_network_that_trains_as_it_scores_is_refused(layer, key):
    """Unless this is meant, or the flag is named."""
    architecture = architecture_from_linen(Phase(layer))
    variables = architecture.init(key, X)
    scores(architecture, variables)
    with pytest.raises(ValueError, match=r'Phase trains as it scores, without .*train_argument="\.\.\."') as caught:
        trained(architecture, variables, key)
    assert "\n" not in caught.value.args[0]
    meant = trained(architecture_from_linen(Phase(layer), train_argument=None), variables, key)
    np.testing.assert_array_equal(meant, scores(architecture, variables))
    named = architecture_from_linen(Phase(layer), train_argument="phase")
    assert (trained(named, variables, key) != meant).any()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("train_argument", ["auto", None, "not phase"])
def test_a_network_that_scores_with_dropout_is_refused(layer, train_argument, key):
    """Also if its flag is named with the wrong sense."""

    class Always(Phase):
        @linen.compact
        def __call__(self, x, phase=True):
            return Phase(self.layer)(x, phase)

    params, state = architecture_from_linen(Phase(layer)).init(key, X)
    architecture = architecture_from_linen(Always(layer), train_argument=train_argument)
    with pytest.raises(ValueError, match=r"is active in scoring, with .*accept `train`") as caught:
        scores(architecture, ({"Phase_0": params}, {name: {"Phase_0": tree} for name, tree in state.items()}))
    assert "\n" not in caught.value.args[0]


def test_layers_that_never_drop_are_no_dropout(key):
    class Zero(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.SelfAttention(1)(linen.Dropout(0.0, deterministic=True)(x)[:, None])[:, 0]
            return linen.Dense(3)(x)

    architecture = architecture_from_linen(Zero())
    assert trained(architecture, architecture.init(key, X), key).shape == (4, 3)


def test_streams_and_mutable_collections_as_flags(key):
    """A module may ask flax whether it trains; `init` has streams and may write, but does not train."""

    class Asks(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=not self.is_mutable_collection("batch_stats"))(x)
            return linen.Dense(3)(linen.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x))

    architecture = architecture_from_linen(Asks())
    variables = architecture.init(key, X)
    scores(architecture, variables)
    assert_trains_with_dropout(architecture, variables, key)


class NnxPhase(nnx.Module):
    def __init__(self, layer, rngs):
        self.norm = nnx.BatchNorm(5, rngs=rngs) if layer == "norm" else None
        self.dropout = nnx.Dropout(0.5, rngs=rngs) if layer in ("dropout", "uncalled") else None
        self.attention = (
            nnx.MultiHeadAttention(1, 5, dropout_rate=0.5, decode=False, rngs=rngs) if layer == "attention" else None
        )
        self.layer, self.head = layer, nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, phase=False):
        if self.layer == "norm":
            x = self.norm(x, use_running_average=not phase)
        if self.layer == "attention":
            x = self.attention(x[:, None], deterministic=not phase)[:, 0]
        if self.layer == "dropout":
            x = self.dropout(x, deterministic=not phase)
        if self.layer == "uncalled" and phase:
            x = self.dropout(x)
        return self.head(x)


class NnxAlways(NnxPhase):
    def __call__(self, x, phase=True):
        return super().__call__(x, phase)


@pytest.mark.parametrize("layer", ["dropout", "norm", "attention", "uncalled"])
def test_an_nnx_network_that_trains_as_it_scores_is_refused(layer, key):
    make = lambda rngs: NnxPhase(layer, rngs)  # noqa: E731
    architecture = architecture_from_nnx(make)
    variables = architecture.init(key, X)
    with pytest.raises(ValueError, match=r'NnxPhase trains as it scores, without .*train_argument="\.\.\."'):
        trained(architecture, variables, key)
    meant = trained(architecture_from_nnx(make, train_argument=None), variables, key)
    np.testing.assert_allclose(meant, scores(architecture, variables), rtol=1e-6)
    named = architecture_from_nnx(make, train_argument="phase")
    assert (trained(named, variables, key) != meant).any()


@pytest.mark.parametrize("layer", ["dropout", "norm", "attention"])
@pytest.mark.parametrize("train_argument", ["auto", None, "not phase"])
def test_an_nnx_network_that_scores_with_dropout_is_refused(layer, train_argument, key):
    architecture = architecture_from_nnx(lambda rngs: NnxAlways(layer, rngs), train_argument=train_argument)
    with pytest.raises(ValueError, match="is active in scoring, with"):
        scores(architecture, architecture.init(key, X))


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


@pytest.mark.parametrize(
    "make", [lambda: architecture_from_linen(LinenTransformer()), lambda: architecture_from_nnx(NnxTransformer)]
)
def test_an_attention_mask_is_no_row_mask(make, key):
    """With as many tokens as rows, the row mask would pass for one."""
    architecture = make()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4, 6)), jnp.float32)
    variables = architecture.init(key, x)
    got = trained(architecture, variables, key, x, mask=MASK)
    alone = jnp.concatenate([trained(architecture, variables, key, row[None]) for row in x])
    np.testing.assert_allclose(got, alone, atol=1e-6)


class LinenTimeMajor(linen.Module):
    norm: str = "flax"

    @linen.compact
    def __call__(self, x, train):
        x = x.swapaxes(0, 1)  # [T, B, C]
        norm = linen.BatchNorm(use_running_average=not train) if self.norm == "flax" else BatchNorm()
        x = norm(x) if self.norm == "flax" else norm(x, train=train)
        return linen.Dense(3)(x.mean(0))


class NnxTimeMajor(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.head = nnx.BatchNorm(6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x.swapaxes(0, 1)).mean(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: architecture_from_linen(LinenTimeMajor()),
        lambda: architecture_from_linen(LinenTimeMajor("ours")),
        lambda: architecture_from_nnx(NnxTimeMajor),
    ],
)
def test_a_batch_norm_with_time_in_front_is_refused_whatever_its_length(make, key):
    architecture = make()
    for num_steps in (4, 7):
        x = jnp.ones((4, num_steps, 6))
        variables = architecture.init(key, x)
        with pytest.raises(ValueError, match=r"the batch must be its leading axis"):
            trained(architecture, variables, key, x, mask=MASK)
        trained(architecture, variables, key, x)  # without padding there is nothing to mask


def test_the_leading_axis_is_verified_once_for_a_shape(key):
    calls = []

    class Counting(Plain):
        @linen.compact
        def __call__(self, x, train):
            calls.append(x.shape)
            return Plain()(x, train)

    architecture = architecture_from_linen(Counting())
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
    nested: bool = True

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


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda **settings: architecture_from_linen(OwnNormNet(), **settings), "own"),
        (lambda **settings: architecture_from_linen(OwnNorm(), **settings), "OwnNorm"),
        (lambda **settings: architecture_from_nnx(NnxOwnNorm, **settings), "NnxOwnNorm"),
    ],
)
def test_own_batch_statistics_need_the_row_mask(make, name, key):
    architecture = make()
    variables = architecture.init(key, X)
    trained(architecture, variables, key)
    with pytest.raises(ValueError, match=rf"would reach the batch statistics of {name}, .*mask_argument"):
        trained(architecture, variables, key, mask=MASK)
    architecture = make(mask_argument="rows")
    _, state = architecture.apply(*variables, X, train=True, key=key, mask=MASK)
    means = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if path[-1].key == "mean"]
    assert any(np.allclose(mean, np.mean(X[MASK], axis=0), rtol=1e-5) for mean in means)


def test_statistics_of_weights_are_no_statistics_of_rows(key):
    class Spectral(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            return linen.WeightNorm(linen.Dense(3))(linen.SpectralNorm(linen.Dense(4))(x, update_stats=train))

    class NnxSpectral(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.SpectralNorm(nnx.Linear(5, 3, rngs=rngs), rngs=rngs)

        def __call__(self, x):
            return self.head(x)

    architectures = [architecture_from_linen(Spectral())]
    if hasattr(nnx, "SpectralNorm"):
        architectures.append(architecture_from_nnx(NnxSpectral))
    for architecture in architectures:
        variables = architecture.init(key, X)
        _, state = architecture.apply(*variables, X, train=True, key=key, mask=MASK)
        chex.assert_trees_all_equal_shapes(state, variables[1])


def test_a_subclass_of_batch_norm_may_have_a_call_of_its_own(key):
    class Norm(linen.BatchNorm):
        def __call__(self, x, train):
            return super().__call__(x, use_running_average=not train)

    class NnxNorm(nnx.BatchNorm):
        def __call__(self, x):
            return super().__call__(x)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            return Norm(momentum=0.0)(x, train)

    class NnxNet(nnx.Module):
        def __init__(self, rngs):
            self.norm = NnxNorm(5, momentum=0.0, rngs=rngs)

        def __call__(self, x):
            return self.norm(x)

    for architecture in (architecture_from_linen(Net()), architecture_from_nnx(NnxNet)):
        variables = architecture.init(key, X)
        _, state = architecture.apply(*variables, X, train=True, key=key, mask=MASK)
        np.testing.assert_allclose(batch_statistics(state), np.mean(X[MASK], axis=0), rtol=1e-5)


class SkipsUnknown(linen.Module):
    """Does not call its dropout if an unknown flag is off."""

    @linen.compact
    def __call__(self, x, noisy=False):
        x = linen.Dense(8)(x)
        if noisy:
            x = linen.Dropout(0.5, deterministic=False)(x)
        return linen.Dense(3)(x)


class SkipsKnown(linen.Module):
    @linen.compact
    def __call__(self, x, is_train=False):
        x = linen.Dense(8)(x)
        if is_train:
            x = linen.Dropout(0.5, deterministic=False)(x)
        return linen.Dense(3)(x)


class FieldFlag(linen.Module):
    training: bool = False

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(8)(x)
        if self.training:
            x = linen.Dropout(0.5, deterministic=False)(x)
        return linen.Dense(3)(x)


class TwoFlags(linen.Module):
    @linen.compact
    def __call__(self, x, train=False, noise=False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not noise)(x))


class HarmlessFlag(linen.Module):
    @linen.compact
    def __call__(self, x, bias=True):
        return linen.Dense(3)(x) + (1.0 if bias else 0.0)


def trained_logits(module, seed, **settings):
    architecture = architecture_from_linen(module, **settings)
    params, model_state = architecture.init(jax.random.key(0), jnp.ones((2, 5)))
    return architecture.apply(params, model_state, jnp.ones((4, 5)), train=True, key=jax.random.key(seed))[0]


@pytest.mark.parametrize("module", [SkipsKnown(), FieldFlag(), FieldFlag(training=True)], ids=str)
def test_a_dropout_that_is_only_called_in_training_is_called(module):
    assert (trained_logits(module, 1) != trained_logits(module, 2)).any()
    architecture = architecture_from_linen(module)
    params, model_state = architecture.init(jax.random.key(0), jnp.ones((2, 5)))
    scores = [architecture.apply(params, model_state, jnp.ones((4, 5)), train=False)[0] for _ in range(2)]
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize("module", [SkipsUnknown(), TwoFlags()], ids=str)
def test_a_dropout_that_an_unknown_flag_turns_off_is_refused(module):
    for seed in (1, 2):
        with pytest.raises(ValueError, match=r"trains as it scores, without Dropout"):
            trained_logits(module, seed)


def test_an_unknown_flag_may_be_named_and_another_argument_is_left_alone():
    noisy = [trained_logits(SkipsUnknown(), seed, train_argument="noisy") for seed in (1, 2)]
    assert (noisy[0] != noisy[1]).any()
    np.testing.assert_array_equal(*(trained_logits(HarmlessFlag(), seed) for seed in (1, 2)))
