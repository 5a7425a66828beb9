"""From a `flax.nnx` module to an `Architecture`."""

import contextlib
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fedmd_jax.models.calling import Convention, Watch, training_values, watched
from fedmd_jax.models.masking import row_mask
from fedmd_jax.types import Architecture, no_penalty


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
    dropped. Arrays that are in no variable are constants: those of one module, shared by all clients.

    Args:
      make: rngs -> a module that returns raw scores [B, C]; always the same layers, whatever the random numbers. It is
        called as `make(rngs=...)` if it has an argument of this name, and as `make(...)` otherwise.
      train_argument: name of the training flag of its `__call__`, True in training unless it is `deterministic` or
        `use_running_average`; "not name" for one that is False in training. "auto" sets all known names that
        `__call__` has, None sets none.
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

    >>> architecture = architecture_from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    >>> params, model_state = architecture.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (3,), 'kernel': (4, 3)}
    >>> logits, model_state = architecture.apply(params, model_state, jnp.ones((5, 4)), train=False)
    >>> logits.shape, model_state
    ((5, 3), {})
    """
    # Constructed, not traced with `jax.eval_shape`: flax treats arrays made while tracing as static attributes.
    module = None if isinstance(make, nnx.Module) else _make(make, nnx.Rngs(0))
    if not isinstance(module, nnx.Module):
        raise ValueError(f"wanted a function rngs -> nnx.Module, got {make}")
    graphdef, _, streams, _, constants = _split(module)
    flags = {**training_values("auto"), **training_values(train_argument)}
    elsewhere = [name for name in flags if any(_takes(layer, name) for _, layer in _modules(module))]
    convention = Convention(type(module).__name__, type(module).__call__, train_argument, mask_argument, elsewhere)
    statistics = _statistics(module)

    def init(key, inputs):
        del inputs  # nnx modules know their input sizes
        _, params, _, model_state, _ = _split(_make(make, nnx.Rngs(key)))
        return params, model_state

    def run(params, model_state, inputs, args, kwargs, watch, key):
        module = nnx.merge(graphdef, params, _seed(streams, key, watch.train), model_state, constants)
        module = _switch(module, {name: value == watch.train for name, value in flags.items()}, watch.train)
        with _watched_layers(module, watch):
            logits = module(inputs, *args, **kwargs)
        if not watch.train:
            return logits, model_state
        new_state = _keep_structure(_split(module)[3], model_state)
        if mask_argument is None:
            moved = [path for path in statistics if _at(path, new_state) is not _at(path, model_state)]
            watch.check_statistics(convention.network, {statistics[path] for path in moved})
        return logits, new_state

    return Architecture(init, watched(convention, run), penalty)


def _make(make, rngs):
    function = make
    while isinstance(function, functools.partial):
        function = function.func
    # nnx's metaclass hides the signature of a class.
    parameters = inspect.signature(function.__init__ if isinstance(function, type) else function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    by_name = (
        takes_any if "rngs" not in parameters else parameters["rngs"].kind is not inspect.Parameter.POSITIONAL_ONLY
    )
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
    if key is None:
        if train and leaves:
            raise ValueError("the network draws random numbers in training: `apply(..., train=True)` needs a `key`")
        key = jax.random.key(0)  # never drawn from
    seeds = []
    for position, leaf in enumerate(leaves):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            seeds.append(jax.random.split(jax.random.fold_in(key, position), leaf.shape))
        else:
            seeds.append(jnp.zeros_like(leaf))
    return treedef.unflatten(seeds)


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


def _at(path, tree):
    return functools.reduce(lambda tree, name: tree[name], path, tree)


def _is_switch(layer, name) -> bool:
    return isinstance(vars(layer).get(name), bool)


def _takes(layer, name) -> bool:
    """Whether a flag of a module is set as an attribute or by `nnx.view`."""
    view = getattr(layer, "set_view", None)
    return _is_switch(layer, name) or (view is not None and name in inspect.signature(view).parameters)


def _switch(module, flags, train):
    """Sets the module to training or inference mode in all ways that nnx has."""
    for name, value in flags.items():
        switches = lambda _, layer, name=name: isinstance(layer, nnx.Module) and _is_switch(layer, name)  # noqa: E731
        module.set_attributes(switches, raise_if_not_found=False, **{name: value})
    if hasattr(nnx, "view"):
        module = nnx.view(module, raise_if_not_found=False, **flags)
    mode = type(module).train if train else type(module).eval  # of the class: `self.train` may be a flag
    mode(module)
    return module


@contextlib.contextmanager
def _watched_layers(module: nnx.Module, watch: Watch):
    """A context in which `watch` observes the layers of this module object and passes its mask to their batch norms."""
    layers = [(path, layer, type(layer)) for path, layer in _modules(module) if isinstance(layer, tuple(_HOOKS))]
    for path, layer, kind in layers:
        layer.__class__ = _watched_class(kind)
        # Past nnx, for which it is one more static attribute: new for each trace, so that `nnx.jit` traces again.
        object.__setattr__(layer, "_place", _Place(watch, kind.__name__, path))
        if layer.can_be_active():
            watch.expect(kind.__name__, path)
    try:
        yield
    finally:
        for _, layer, kind in layers:
            layer.__class__ = kind
            object.__delattr__(layer, "_place")


class _Place:
    """The path of a layer, and its `Watch`."""

    def __init__(self, watch: Watch, kind: str, path: tuple):
        self.watch, self.kind, self.path = watch, kind, path

    def active(self, method, flag, layer, *args, **kwargs):
        """Records a call of `method` of `layer`: whether the layer is active, and its arguments by name."""
        given = inspect.signature(method).bind(layer, *args, **kwargs).arguments
        value = getattr(layer, flag) if given.get(flag) is None else given[flag]
        return value is not None and self.watch.active(self.kind, self.path, flag, value), given


class _Dropout(nnx.Dropout):
    def can_be_active(self):
        return self.rate > 0

    def __call__(self, *args, **kwargs):
        if self.can_be_active():
            self._place.active(nnx.Dropout.__call__, "deterministic", self, *args, **kwargs)
        return super().__call__(*args, **kwargs)


class _Attention(nnx.MultiHeadAttention):
    def can_be_active(self):
        return self.dropout_rate > 0

    def __call__(self, *args, **kwargs):
        if self.can_be_active():
            self._place.active(nnx.MultiHeadAttention.__call__, "deterministic", self, *args, **kwargs)
        return super().__call__(*args, **kwargs)


class _BatchNorm(nnx.BatchNorm):
    def can_be_active(self):
        return True

    def __call__(self, *args, **kwargs):
        active, given = self._place.active(nnx.BatchNorm.__call__, "use_running_average", self, *args, **kwargs)
        watch, path = self._place.watch, self._place.path
        watch.handled.add(path)
        if active and watch.mask is not None and given.get("mask") is None:
            kwargs["mask"] = row_mask(watch.rows(path, given["x"]), given["x"])
        return super().__call__(*args, **kwargs)


_HOOKS = {nnx.Dropout: _Dropout, nnx.MultiHeadAttention: _Attention, nnx.BatchNorm: _BatchNorm}


@functools.cache
def _watched_class(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass whose calls are observed. It is cached, because nnx keeps every class it has registered."""
    if kind in _HOOKS:
        return _HOOKS[kind]
    hook = next(hook for base, hook in _HOOKS.items() if issubclass(kind, base))
    return type(hook)(f"Watched{kind.__name__}", (kind, hook), {})
