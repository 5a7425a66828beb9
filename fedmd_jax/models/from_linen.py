"""From a `flax.linen` module to an `Architecture`."""

import inspect
import itertools
from collections.abc import Callable
from functools import partial

import jax
from flax import linen as nn

from fedmd_jax.models.calling import (
    Convention,
    Watch,
    batch_statistics,
    find_rule,
    sown_features,
    training_values,
    watched,
)
from fedmd_jax.models.cnn import CNN
from fedmd_jax.models.layers import BatchNorm, Dropout
from fedmd_jax.models.resnet import ResNet
from fedmd_jax.types import Architecture, no_penalty

_RULES = (
    (nn.Dropout, "deterministic", "rate"),
    (nn.MultiHeadDotProductAttention, "deterministic", "dropout_rate"),
    (nn.BatchNorm, "use_running_average", None),
    (Dropout, "train", "rate"),
    (BatchNorm, "train", None),
)
_traces = itertools.count()


def architecture_from_linen(
    module: nn.Module,
    *,
    train_argument: str | None = "auto",
    mask_argument: str | None = None,
    penalty: Callable = no_penalty,
) -> Architecture:
    """Converts a linen module to pure functions.

    The module is called as `module(inputs, train=...)`. The flag may also be called `training`, `is_training`,
    `deterministic` or `use_running_average` (the last two are False in training), or have a name of your own,
    `train_argument`. It switches dropout and batch norm, as usual: `nn.BatchNorm(use_running_average=not train)`,
    `nn.Dropout(rate, deterministic=not train)`. Whether it does so is verified while the module is traced.

    A last, smaller batch is padded. Rows of a batch must not influence each other, with these exceptions: batch norms
    of flax and of this package on [B, ...] leave padding rows out of their statistics, and so does a module that takes
    the row mask [B] itself, `mask_argument`. A `mask` that the module itself gives to a batch norm is left alone.

    All variable collections except `params` form the model state; sown collections are dropped, but for the features
    [B, D], or [B, ..., D] with axes that are averaged: `self.sow("intermediates", "features", x)`. Random streams
    (`dropout` and others) are derived from `key` and exist in training only.

    Args:
      module: an unbound linen module that returns raw scores [B, C].
      train_argument: name of the training flag of its `__call__`, True in training unless it is `deterministic` or
        `use_running_average`; "not name" for one that is False in training. "auto" sets all known names that
        `__call__` has or hands on as `**kwargs`. None sets none: the module is called in the same
        way in training and in scoring.
      mask_argument: name of the argument of its `__call__` that takes the row mask, [B], False for padding rows; it is
        None in scoring.
      penalty: params -> scalar, added to the digest and to the revisit loss.

    Returns:
      The architecture.

    Raises:
      ValueError: if `module` is no linen module, or has no argument of these names. `apply` raises it if a dropout or
        batch norm is active in scoring, or none is in training and no flag is known, and if padding rows would reach
        batch statistics: of a batch norm without the batch as its leading axis, of an unknown layer.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((8,), num_classes=3))
      >>> params, model_state = network.init(jax.random.key(0), jnp.zeros((1, 4)))
      >>> logits, model_state = network.apply(params, model_state, jnp.ones((5, 4)), train=False)
      >>> logits.shape, model_state
      ((5, 3), {})
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"wanted a flax.linen module, got {module}")
    # Flags that are fields of the module, as in `Net(training=True)`.
    values = training_values(train_argument)
    fields = {name: value for name, value in values.items() if isinstance(getattr(module, name, None), bool)}
    convention = Convention(type(module), train_argument, mask_argument, set(fields))

    def init(key, inputs):
        variables = dict(convention.call(lambda a, kw: module.init(_streams(key), inputs, *a, **kw), False, None, {}))
        params = variables.pop("params", {})
        return params, {name: tree for name, tree in variables.items() if not _is_sown(tree)}

    def run(params, model_state, inputs, args, kwargs, watch, key, *, features=False):
        # `nn.jit` keeps what it traced, with the mask of that trace: a new name among the mutable collections makes it
        # trace again.
        mutable = [f"trace {next(_traces)}", *(model_state if watch.train else ())]
        mutable += ["intermediates"] if features else []
        rngs = _streams(key) if watch.train and key is not None else None
        variables = {"params": params, **model_state}
        switched = module.clone(**{name: value == watch.train for name, value in fields.items()}) if fields else module
        watch.batch_first = isinstance(module, CNN | ResNet)
        with nn.intercept_methods(_interceptor(watch)):
            logits, new_state = switched.apply(variables, inputs, *args, **kwargs, rngs=rngs, mutable=mutable)
        if mask_argument is None:
            watch.check_statistics(convention.network, watch.seen & _owners(model_state.get("batch_stats", {})))
        if features:
            logits = logits, sown_features(new_state.pop("intermediates", {}), len(inputs), convention.network)
        return logits, {**model_state, **new_state}

    with_features = watched(convention, partial(run, features=True))
    statistics = batch_statistics(convention, run, ("batch_stats",))
    return Architecture(init, watched(convention, run), penalty, with_features, statistics)


def _streams(key):
    """Linen uses the stream "params" for every stream without a key."""
    key_params, key_dropout = jax.random.split(key)
    return {"params": key_params, "dropout": key_dropout}


def _is_sown(collection) -> bool:
    """`Module.sow` appends to tuples, which grow with every call; no other variable of flax is a tuple."""
    return any(isinstance(leaf, tuple) for leaf in jax.tree.leaves(collection, is_leaf=lambda x: isinstance(x, tuple)))


def _owners(collection):
    """Paths of the modules that have variables in a collection."""
    return {tuple(key.key for key in path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(collection)}


def _interceptor(watch: Watch):
    """An interceptor that reports calls to `watch`, which may change their arguments."""

    def intercept(call, args, kwargs, context):
        layer = context.module
        if not isinstance(layer, nn.SpectralNorm):  # its statistics are those of its weights
            watch.seen.add(layer.path)
        rule = find_rule(layer, _RULES) if context.method_name == "__call__" else None
        if rule is None:
            return call(*args, **kwargs)
        given = inspect.signature(context.orig_method).bind(*args, **kwargs)  # of a base class, if a subclass calls it
        watch.observe(layer, layer.path, rule, given)
        if watch.statistics_only and isinstance(layer, nn.Dropout):  # its flag may be set in its constructor
            return given.arguments["inputs"]
        _, flag, rate = rule
        is_fixed = rate is not None and getattr(layer, flag, None) is not None
        if watch.statistics_only and is_fixed and given.arguments.get(flag) is not None:
            raise ValueError(
                f"the {flag} of {type(layer).__name__} {'/'.join(layer.path)!r} is set in its constructor, so that it "
                "cannot be switched off to estimate batch statistics: hand it over in the call"
            )
        return call(*given.args, **given.kwargs)

    return intercept
