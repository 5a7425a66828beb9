"""How both adapters call a network, and what they verify of it while it is traced."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

# Names of training flags, with their values in training.
FLAGS = {
    **dict.fromkeys(("train", "training", "is_training", "is_train", "enable_dropout"), True),
    **dict.fromkeys(("deterministic", "use_running_average", "inference", "is_eval", "eval_mode"), False),
}


def training_values(train_argument: str | None) -> dict[str, bool]:
    """The flags that `train_argument` names, with their values in training.

    >>> training_values("not frozen"), training_values("deterministic"), training_values(None)
    ({'frozen': False}, {'deterministic': False}, {})
    """
    if train_argument is None:
        return {}
    if train_argument == "auto":
        return FLAGS
    name = train_argument.removeprefix("not ") if isinstance(train_argument, str) else ""
    if not name.isidentifier():
        raise ValueError(f'train_argument must be "auto", None, "name" or "not name", got {train_argument!r}')
    return {name: name == train_argument and FLAGS.get(name, True)}


# Layers of a class that train in another way than they score: (class, its training flag, the rate that may be zero).
# Those without a rate are batch norms.
Rule = tuple[type, str, str | None]


def find_rule(layer: Any, rules: Sequence[Rule]) -> Rule | None:
    """The rule of a layer; None if the layer trains as it scores."""
    for kind, flag, rate in rules:
        if isinstance(layer, kind) and (rate is None or getattr(layer, rate) > 0):
            return kind, flag, rate
    return None


class Watch:
    """Observations from one trace of a network.

    Attributes:
      train: whether the network is traced as in training.
      mask: the row mask [B] of a training batch, or None.
      statistics_only: whether batch norms alone are traced as in training, without dropout.
      kept: weight of the old statistics after all calls of a batch norm, by its path.
      layers: names of layers that differ between training and scoring, with whether they were active.
      seen: paths of modules that were called, but for those whose statistics are of their weights.
      handled: paths of modules whose statistics padding rows cannot reach.
      batch_first: whether batch norms of this package are certain to get the batch as the leading axis.
      leading: whether a batch norm got a leading axis that is yet to be verified as the batch.
    """

    def __init__(self, train: bool, mask: chex.Array | None, *, statistics_only: bool = False):
        self.train, self.mask, self.statistics_only = train, mask if train else None, statistics_only
        self.kept: dict[tuple, float] = {}
        self._norms: dict[tuple, Any] = {}
        self.batch_first = self.leading = False
        self.layers: dict[str, bool] = {}
        self.seen: set[tuple] = set()
        self.handled: set[tuple] = set()

    def expect(self, layer: Any, path: tuple) -> str:
        """The name of a layer that differs between training and scoring; inactive until it is called."""
        name = f"{type(layer).__name__} {'/'.join(map(str, path))}".rstrip()
        self.layers.setdefault(name, False)
        return name

    def observe(self, layer: Any, path: tuple, rule: Rule, call: inspect.BoundArguments) -> None:
        """Records the call of a layer that differs between training and scoring, and changes its arguments.

        A batch norm that is active and gets no mask is given the row mask; a dropout is switched off if only statistics
        are wanted.

        Raises:
          ValueError: the layer is active in scoring, or the batch is not the leading axis of a masked batch norm.
        """
        _, flag, rate = rule
        given = call.arguments
        value = getattr(layer, flag, None) if given.get(flag) is None else given[flag]
        active = value is not None and bool(value) == FLAGS[flag]
        name = self.expect(layer, path)
        if active and not self.train:
            raise ValueError(
                f"{name} is active in scoring, with {flag}={value}: accept `train` in `__call__` and hand it on, or "
                'name the flag of your network with train_argument="..."'
            )
        self.layers[name] = self.layers[name] or active
        if rate is not None:
            if self.statistics_only and active:
                given[flag] = not FLAGS[flag]
            return
        if active:
            if self.statistics_only and self._norms.setdefault(path, layer) is not layer:
                raise ValueError(
                    f"{name} is traced more than once, as in nn.scan, so that it is not known how often it moves its "
                    "statistics, and new ones cannot be estimated: write the layers out"
                )
            self.kept[path] = self.kept.get(path, 1.0) * layer.momentum
        if "mask" not in call.signature.parameters:
            return
        self.handled.add(path)
        if active and self.mask is not None and given.get("mask") is None:
            given["mask"] = self._mask_for(given["x"], path, ours=flag == "train")

    def _mask_for(self, x, path, *, ours):
        if x.shape[:1] != self.mask.shape:
            raise ValueError(
                f"batch norm {'/'.join(map(str, path))!r} gets {x.shape} for a batch of {len(self.mask)} rows, so that "
                "padding rows would reach its statistics: the batch must be its leading axis, or the network must give "
                'it a `mask` of its own (mask_argument="..." of the adapter hands over the row mask)'
            )
        if ours:
            self.leading = self.leading or not self.batch_first
            return self.mask
        self.leading = True
        real = self.mask | ~jnp.any(self.mask)  # without a real row all of them, to keep flax from dividing by zero
        return real.reshape((-1,) + (1,) * (x.ndim - 1))

    def check_statistics(self, network: str, owners: Collection[tuple]) -> None:
        """A ValueError if padding rows can reach the statistics of one of `owners`, paths of modules."""
        unknown = sorted("/".join(map(str, path)) or network for path in set(owners) - self.handled)
        if self.mask is not None and unknown:
            raise ValueError(
                f"padding rows would reach the batch statistics of {', '.join(unknown)}, which is no batch norm of "
                'flax: use the row mask there and name the argument that takes it, mask_argument="..."'
            )


class Convention:
    """How a network is called: its training flags and its argument for the row mask, by position or by name.

    Args:
      network: its class.
      train_argument: as of the adapters.
      mask_argument: as of the adapters.
      elsewhere: names of flags that are set in another way than as arguments.

    Raises:
      ValueError: if `__call__` lacks an argument that was named.
    """

    def __init__(self, network: type, train_argument: str | None, mask_argument: str | None, elsewhere: set[str]):
        self.network, self._mask_argument = network.__name__, mask_argument
        _, *self._parameters = inspect.signature(network.__call__).parameters.values()
        names = {parameter.name for parameter in self._parameters}
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in self._parameters)
        values, self._auto = training_values(train_argument), train_argument == "auto"
        wanted = {*(() if self._auto else values), *(() if mask_argument is None else (mask_argument,))}
        missing = wanted - names - elsewhere
        if missing and not takes_any:
            raise ValueError(f"{self.network}.__call__ has no argument {sorted(missing)[0]!r}")
        self._flags = {name: value for name, value in values.items() if name in names or name in missing}
        # A network with flags of its own may leave its batch norms off on purpose.
        self._trusted = not self._auto or not names.isdisjoint(FLAGS)
        # The flags of a module that passes on `**kwargs` are not in its signature.
        self._must_search = self._auto and takes_any and not self._flags

    def call(self, attempt: Callable, train: bool, mask: chex.Array | None, others: Mapping[str, bool]) -> Any:
        """`attempt(args, kwargs)` with the arguments that follow the inputs; `others` are more of them by name."""
        named: dict[str, Any] = dict(others)
        if self._mask_argument is not None:
            named[self._mask_argument] = mask
        if self._must_search:
            self._flags, self._must_search = _search(attempt, train, named), False
        named = {name: value == train for name, value in self._flags.items()} | named
        try:
            return attempt(*self._in_order(named))
        except jax.errors.ConcretizationTypeError as error:
            failure = error
        try:
            return attempt((), named)  # under `nn.jit(..., static_argnames="train")` names count, not positions
        except Exception:
            failure.add_note(
                f"If this is about a training flag of {self.network}: nn.remat and nn.jit need it static, nn.remat "
                "also by position, such as __call__(self, x, train) and nn.remat(Net, static_argnums=(2,))."
            )
            raise failure from None

    def check_training(self, layers: dict[str, bool], call: Callable[[dict[str, bool]], Any]) -> None:
        """A ValueError if layers that differ in training were not switched on.

        Args:
          layers: their names, with whether they were active.
          call: calls the network with further arguments; the last of its results is the `Watch`.
        """
        if not self._auto:
            return
        inactive = [name for name, active in layers.items() if not active]
        if self._trusted:  # a batch norm may be frozen; a dropout that is never active has a flag of its own
            self._refuse([name for name in inactive if "BatchNorm" not in name])
        elif len(inactive) == len(layers):
            self._refuse(inactive)
            for parameter in self._parameters:  # a flag of another name may be what calls a dropout
                if isinstance(parameter.default, bool):
                    self._refuse(_active_layers(partial(call, {parameter.name: not parameter.default})))

    def _refuse(self, layers):
        if layers:
            raise ValueError(
                f"{self.network} trains as it scores, without {', '.join(layers)}: accept `train` in `__call__` "
                'and hand it on, or name its flag with train_argument="..." (train_argument=None if this is meant)'
            )

    def _in_order(self, named: dict) -> tuple[tuple, dict]:
        """By position if possible, since `nn.remat` and `nn.vmap` do not support keyword arguments."""
        by_position = [p for p in self._parameters[1:] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        while by_position and by_position[-1].name not in named:
            by_position.pop()
        args = [named.get(p.name, p.default) for p in by_position]
        if any(value is inspect.Parameter.empty for value in args):
            return (), named
        given = {p.name for p in by_position}
        return tuple(args), {name: value for name, value in named.items() if name not in given}


def _search(attempt, train, named):
    """The known flags accepted by a network that passes on `**kwargs`: tried one by one, without computing anything."""
    found: dict[str, bool] = {}
    for name, value in FLAGS.items():
        flags = {flag: known == train for flag, known in {**found, name: value}.items()}
        try:
            _trace(lambda flags=flags: attempt((), named | flags))
        except TypeError as error:
            if f"unexpected keyword argument '{name}'" not in str(error):
                raise
        else:
            found[name] = value
    return found


def watched(convention: Convention, run: Callable[..., tuple[chex.Array, chex.ArrayTree]]) -> Callable:
    """`Architecture.apply` of a network.

    Args:
      convention: how to call it.
      run: (params, model_state, inputs, args, kwargs, watch, key) -> (logits, new model state); tells `watch` what it
        sees and hands its mask on.
    """
    verified = set()  # shapes of inputs

    def apply(params, model_state, inputs, *, train, mask=None, key=None):
        def call(inputs, mask, others):
            def attempt(args, kwargs):
                watch = Watch(train, mask)
                return *run(params, model_state, inputs, args, kwargs, watch, key), watch

            return convention.call(attempt, train, mask, others)

        logits, new_state, watch = call(inputs, mask, {})
        if not train:
            return logits, model_state
        convention.check_training(watch.layers, partial(call, inputs, mask))
        if watch.leading and inputs.shape not in verified:
            _verify_leading_axis(call, inputs, mask)
            verified.add(inputs.shape)
        if mask is not None:  # a batch of padding moves no statistics
            new_state = jax.tree.map(lambda new, old: jnp.where(jnp.any(mask), new, old), new_state, model_state)
        return logits, new_state

    return apply


def batch_statistics(convention: Convention, run: Callable, prefix: tuple = ()) -> Callable:
    """`Architecture.statistics` of a network.

    A batch norm moves its statistics from old to new ones by `old + (1 - momentum) * (new - old)`. If the old ones are
    zero the result is `(1 - momentum) * new`.

    Args:
      convention: as of `watched`.
      run: as of `watched`.
      prefix: where in the model state the statistics of all modules are.
    """

    def statistics(params, model_state, inputs, *, mask=None):
        def call(model_state):
            def attempt(args, kwargs):
                watch = Watch(True, mask, statistics_only=True)
                key = jax.random.key(0)  # no layer draws from it
                return *run(params, model_state, inputs, args, kwargs, watch, key), watch

            _, moved, watch = convention.call(attempt, True, mask, {})
            return moved, watch

        # Statistics with a momentum of one never move. Other state, such as constants, keeps its value.
        _, watch = _trace(call, model_state)
        steps = {(*prefix, *path): 1.0 - kept for path, kept in watch.kept.items() if kept != 1.0}
        zeroed = model_state
        for path in steps:
            zeroed = _with_statistics(zeroed, path, jnp.zeros_like, model_state)
        moved, _ = call(zeroed)
        for path, step in steps.items():
            model_state = _with_statistics(model_state, path, lambda new, step=step: new / step, moved)
        return model_state

    return statistics


def _with_statistics(model_state, path, change, source):
    """A copy of nested dictionaries in which mean and variance at a path are `change` of those of `source`."""
    if path:
        rest = _with_statistics(model_state[path[0]], path[1:], change, source[path[0]])
        return {**model_state, path[0]: rest}
    return {**model_state, **{name: change(source[name]) for name in ("mean", "var")}}


def _is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def sown_features(sown: Mapping[str, Any], num_rows: int, network: str) -> chex.Array:
    """The features among what a network has sown, [num_rows, D]; axes between are averaged.

    Args:
      sown: nested mapping of what was sown, in tuples.
      num_rows: number of examples.
      network: its name, for the error message.

    Raises:
      ValueError: there is not exactly one value of the name "features", or it is of another shape or dtype.
    """
    leaves = jax.tree_util.tree_leaves_with_path(sown)
    found = [leaf for path, leaf in leaves if getattr(path[-2], "key", None) == "features"]
    if [leaf.shape[:1] for leaf in found] != [(num_rows,)] or found[0].ndim < 2 or not _is_float(found[0]):
        raise ValueError(
            f"{network} must sow its features once, floats [B, D] or [B, ..., D], such as the input of its last layer: "
            'self.sow("intermediates", "features", x) in linen, self.sow(nnx.Intermediate, "features", x) in nnx; got '
            f"{[f'{leaf.dtype} of shape {leaf.shape}' for leaf in found] or 'none'}"
        )
    features = found[0].astype(jnp.promote_types(found[0].dtype, jnp.float32))  # means of bfloat16 would be rounded
    return features if features.ndim == 2 else features.mean(axis=tuple(range(1, features.ndim - 1)))


def _active_layers(call):
    """The layers that are active in a call; none if it fails."""
    try:
        *_, watch = _trace(call)
    except Exception:
        return []
    return [name for name, active in watch.layers.items() if active]


def _verify_leading_axis(call, inputs, mask):
    """Traces the network with twice the rows, to detect axes that had the size of the batch by coincidence."""
    twice = [jax.ShapeDtypeStruct((2 * len(mask), *x.shape[1:]), x.dtype) for x in (inputs, mask)]
    try:
        _trace(call, *twice, {})
    except Exception as error:
        error.add_note(f"The network was traced with {2 * len(mask)} rows to see where its batch norms have the batch.")
        raise


def _trace(call, *arguments):
    """The result of a call without computing anything; arrays in it must not be used."""
    found = []
    jax.eval_shape(lambda *arguments: found.append(call(*arguments)), *arguments)
    return found[0]
