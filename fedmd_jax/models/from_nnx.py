"""From a `flax.nnx` module to an `Architecture`."""

import functools
import inspect
import itertools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fedmd_jax.models.calling import (
    FLAGS,
    Convention,
    Watch,
    batch_statistics,
    find_rule,
    sown_features,
    training_values,
    watched,
)
from fedmd_jax.types import Architecture, no_penalty

_RULES = (
    (nnx.Dropout, "deterministic", "rate"),
    (nnx.MultiHeadAttention, "deterministic", "dropout_rate"),
    (nnx.BatchNorm, "use_running_average", None),
)


def architecture_from_nnx(
    make: Callable[[nnx.Rngs], nnx.Module],
    *,
    train_argument: str | None = "auto",
    mask_argument: str | None = None,
    penalty: Callable = no_penalty,
) -> Architecture:
    """Converts a constructor of nnx modules to pure functions.

    The module is called as `module(inputs)` after `module.train()` or `module.eval()`, and after `nnx.view` where flax
    has it: its `nnx.Dropout` and `nnx.BatchNorm` need no argument. If its `__call__` has a training flag, it is set,
    too: `train`, `training`, `is_training`, `deterministic` or `use_running_average` (the last two are False in
    training), or one with a name of your own, `train_argument`. The same holds for flags of these names that are bool
    attributes of its modules. Whether the layers obey is verified while the module is traced.

    A last, smaller batch is padded. Rows of a batch must not influence each other, with these exceptions:
    `nnx.BatchNorm` on [B, ...] leaves padding rows out of its statistics, and so does a module that takes the row mask
    [B] itself, `mask_argument`. A `mask` that the module itself gives to a batch norm is left alone.

    `params` are the values of its `nnx.Param`s, the model state those of all other variables, both as plain nested
    dictionaries. Random streams are no part of the state: each call seeds them from its `key`. What the module sows is
    dropped, but for the features [B, D], or [B, ..., D] with axes that are averaged:
    `self.sow(nnx.Intermediate, "features", x)`. Arrays that are in no variable are constants: those of one module,
    shared by all clients.

    Args:
      make: rngs -> a module that returns raw scores [B, C]; always the same layers, whatever the random numbers. It is
        called as `make(rngs=...)` if it has an argument of this name, and as `make(...)` otherwise.
      train_argument: name of the training flag of its `__call__`, True in training unless it is `deterministic` or
        `use_running_average`; "not name" for one that is False in training. "auto" sets all known names that
        `__call__` has or hands on as `**kwargs`. None sets none.
      mask_argument: name of the argument of its `__call__` that takes the row mask, [B], False for padding rows; it is
        None in scoring.
      penalty: params -> scalar, added to the digest and to the revisit loss.

    Returns:
      The architecture.

    Raises:
      ValueError: if `make` is itself a module, or does not make one, or one without arguments of these names. `apply`
        raises it if a dropout or batch norm is active in scoring, or none is in training and no flag is known, and if
        padding rows would reach batch statistics: of a batch norm without the batch as its leading axis, of an unknown
        layer.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> from flax import nnx
      >>> network = fmd.architecture_from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
      >>> params, model_state = network.init(jax.random.key(0), jnp.zeros((1, 4)))
      >>> jax.tree.map(jnp.shape, params)
      {'bias': (3,), 'kernel': (4, 3)}
      >>> logits, model_state = network.apply(params, model_state, jnp.ones((5, 4)), train=False)
      >>> logits.shape, model_state
      ((5, 3), {})
    """
    # Constructed, not traced with `jax.eval_shape`: flax treats arrays made while tracing as static attributes.
    module = None if isinstance(make, nnx.Module) else _make(make, nnx.Rngs(0))
    if not isinstance(module, nnx.Module):
        raise ValueError(f"wanted a function rngs -> nnx.Module, got {make}")
    graphdef, _, streams, _, constants = _split(module)
    flags = {**FLAGS, **training_values(train_argument)}
    elsewhere = set().union(*(_switches(layer) for _, layer in _modules(module)))
    convention = Convention(type(module), train_argument, mask_argument, elsewhere)
    statistics = _statistics(module)

    def init(key, inputs):
        del inputs  # nnx modules know their input sizes
        _, params, _, model_state, _ = _split(_make(make, nnx.Rngs(key)))
        return params, model_state

    def run(params, model_state, inputs, args, kwargs, watch, key, *, features=False):
        module = nnx.merge(graphdef, params, _seed(streams, key, watch.train), model_state, constants)
        module = _switch(module, {name: value == watch.train for name, value in flags.items()}, watch.train)
        _watch_layers(module, watch)
        logits, sown = _call(module, inputs, *args, **kwargs)
        new_state = _keep_structure(_split(module)[3], model_state)
        if mask_argument is None:
            at = functools.partial(functools.reduce, operator.getitem)
            moved = {owner for path, owner in statistics.items() if at(path, new_state) is not at(path, model_state)}
            watch.check_statistics(convention.network, moved)
        return (logits, sown_features(sown, len(inputs), convention.network)) if features else logits, new_state

    with_features = watched(convention, functools.partial(run, features=True))
    of_batch = batch_statistics(convention, run)
    return Architecture(init, watched(convention, run), penalty, with_features, of_batch)


def _call(module, *args, **kwargs):
    """The result of a module, and what it has sown, as plain dictionaries."""
    if hasattr(nnx, "capture"):
        result, sown = nnx.capture(module, nnx.Intermediate)(*args, **kwargs)
    else:  # flax 0.11
        result, sown = module(*args, **kwargs), nnx.state(module, nnx.Intermediate)
    return result, nnx.to_pure_dict(sown)


def _make(make, rngs):
    function = make
    while isinstance(function, functools.partial):
        function = function.func
    # nnx's metaclass hides the signature of a class.
    signature = inspect.signature(function.__init__ if isinstance(function, type) else function)
    by_name = any(p.name == "rngs" or p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    return make(rngs=rngs) if by_name else make(rngs)


def _split(module):
    """Module -> (static part, params, random streams, model state, constants), the last four as plain dictionaries."""
    graphdef, *states = nnx.split(module, nnx.Param, nnx.RngState, nnx.Variable, ...)
    return graphdef, *map(nnx.to_pure_dict, states)


def _modules(module):
    return [(path, layer) for path, layer in nnx.iter_graph(module) if isinstance(layer, nnx.Module)]


def _seed(streams, key, train):
    """Fresh random streams of the shapes of `streams`: keys folded from `key`, counts at zero."""
    leaves, treedef = jax.tree.flatten(streams)
    if key is None and train and leaves:
        raise ValueError("the network draws random numbers in training: `apply(..., train=True)` needs a `key`")
    key = jax.random.key(0) if key is None else key  # never drawn from

    def fresh(position, leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.fold_in(key, position), leaf.shape)
        return jnp.zeros_like(leaf)

    return treedef.unflatten(itertools.starmap(fresh, enumerate(leaves)))


def _statistics(module):
    """Paths of batch statistics, and those of the modules that they belong to; not those of weights."""
    owners = dict(_modules(module))
    statistics = {}
    for path, leaf in nnx.iter_graph(module):
        if isinstance(leaf, nnx.BatchStat):
            owner = next(path[:n] for n in range(len(path), -1, -1) if path[:n] in owners)
            if not isinstance(owners[owner], getattr(nnx, "SpectralNorm", ())):
                statistics[path] = owner
    return statistics


def _keep_structure(new_state, old_state):
    """The variables of `new_state` that `old_state` has: a call may have sown new ones."""
    if isinstance(old_state, dict):
        return {name: _keep_structure(new_state[name], child) for name, child in old_state.items()}
    return new_state


def _switches(layer) -> set[str]:
    """Names of flags of a module that are set as attributes or by `nnx.view`."""
    view = getattr(layer, "set_view", None)
    of_view = () if view is None else inspect.signature(view).parameters
    return {*of_view, *(name for name, value in vars(layer).items() if isinstance(value, bool))}


def _switch(module, flags, train):
    """Sets the module to training or inference mode in all ways that nnx has."""
    for _, layer in _modules(module):
        vars(layer).update({name: value for name, value in flags.items() if isinstance(vars(layer).get(name), bool)})
    if hasattr(nnx, "view"):
        module = nnx.view(module, raise_if_not_found=False, **flags)
    mode = type(module).train if train else type(module).eval  # of the class: `self.train` may be a flag
    mode(module)
    return module


def _watch_layers(module: nnx.Module, watch: Watch):
    """Makes `watch` observe the calls of the layers of this module object, whose arguments it may change."""
    for path, layer in _modules(module):
        if find_rule(layer, _RULES):
            layer.__class__ = _watched_class(type(layer))
            # Past nnx, for which it is one more static attribute: new for each trace, so that `nnx.jit` traces again.
            object.__setattr__(layer, "_observe", functools.partial(watch.observe, path=path))
            watch.expect(layer, path)


def _hook(base):
    """A subclass of a layer of flax whose calls are observed."""

    def observed(layer, *args, **kwargs):
        call = inspect.signature(base.__call__).bind(layer, *args, **kwargs)
        layer._observe(layer, rule=find_rule(layer, _RULES), call=call)
        return base.__call__(*call.args, **call.kwargs)

    return type(base)(base.__name__, (base,), {"__call__": observed})


_HOOKS = {base: _hook(base) for base, *_ in _RULES}


@functools.cache
def _watched_class(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass whose calls are observed. It is cached, because nnx keeps every class it has registered."""
    base = next(base for base in _HOOKS if issubclass(kind, base))
    # The hook comes before `base`, but after a `__call__` of the subclass itself.
    return _HOOKS[base] if kind is base else type(base)(kind.__name__, (kind, _HOOKS[base]), {})
