"""How both adapters call a network, and what they verify of it while it is traced."""

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import chex
import jax

from fedmd_jax.models.masking import keep_if_all_padding

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


class Watch:
    """Observations from one trace of a network.

    Attributes:
      train: whether the network is traced as in training.
      mask: the row mask [B] of a training batch, or None.
      layers: names of layers that differ between training and scoring, with whether they were active.
      seen: paths of modules that were called.
      handled: paths of modules whose statistics padding rows cannot reach.
      leading: whether a batch norm got a leading axis that is yet to be verified as the batch.
    """

    def __init__(self, train: bool, mask: chex.Array | None):
        self.train, self.mask = train, mask if train else None
        self.layers: dict[str, bool] = {}
        self.seen: set[tuple] = set()
        self.handled: set[tuple] = set()
        self.leading = False

    def expect(self, kind: str, path: tuple) -> str:
        """The name of a layer that differs between training and scoring; inactive until it is called."""
        name = f"{kind} {'/'.join(map(str, path))}".rstrip()
        self.layers.setdefault(name, False)
        return name

    def active(self, kind: str, path: tuple, flag: str, value: bool) -> bool:
        """Whether a layer that is called with this `value` of its `flag` is active; a ValueError if so in scoring."""
        name = self.expect(kind, path)
        active = bool(value) == FLAGS[flag]
        if active and not self.train:
            raise ValueError(
                f"{name} is active in scoring, with {flag}={value}: accept `train` in `__call__` and hand it on, or "
                'name the flag of your network with train_argument="..."'
            )
        self.layers[name] = self.layers[name] or active
        return active

    def rows(self, path: tuple, x: chex.Array, *, known: bool = False) -> chex.Array:
        """The row mask [B] for a batch norm of `x` [B, ...]; `known` if that axis is certain to be the batch."""
        if x.shape[:1] != self.mask.shape:
            raise ValueError(
                f"batch norm {'/'.join(map(str, path))!r} gets {x.shape} for a batch of {len(self.mask)} rows, so that "
                "padding rows would reach its statistics: the batch must be its leading axis, or the network must give "
                'it a `mask` of its own (mask_argument="..." of the adapter hands over the row mask)'
            )
        self.leading = self.leading or not known
        return self.mask

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
      network: the name of its class.
      method: its unbound `__call__`.
      train_argument: as of the adapters.
      mask_argument: as of the adapters.
      elsewhere: names of flags that are set in another way than as arguments.

    Raises:
      ValueError: if `__call__` lacks an argument that was named.
    """

    def __init__(
        self,
        network: str,
        method: Callable,
        train_argument: str | None,
        mask_argument: str | None,
        elsewhere: Collection[str] = (),
    ):
        self.network = network
        self._mask_argument = mask_argument
        _, *self._parameters = inspect.signature(method).parameters.values()
        names = {parameter.name for parameter in self._parameters}
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in self._parameters)
        values, auto = training_values(train_argument), train_argument == "auto"
        wanted = {*(() if auto else values), *(() if mask_argument is None else (mask_argument,))}
        missing = wanted - names - set(elsewhere)
        if missing and not takes_any:
            raise ValueError(f"{network}.__call__ has no argument {sorted(missing)[0]!r}")
        known = names if auto else {*names, *elsewhere}
        self._flags = {name: value for name, value in values.items() if name in names or name in missing}
        # Whether the network has flags of its own; if so, it may leave its dropout off on purpose.
        self._trusted = train_argument is None or any(name in known for name in values)
        self._auto = auto
        # Arguments that may be flags under names of their own.
        self.suspects = {
            p.name: p.default for p in self._parameters if auto and not self._trusted and isinstance(p.default, bool)
        }
        # The flags of a module that passes on `**kwargs` are not in its signature.
        self._searched = not (auto and takes_any and not self._flags)

    def call(
        self,
        attempt: Callable[[tuple, dict], Any],
        *,
        train: bool,
        mask: chex.Array | None = None,
        others: dict[str, bool] | None = None,
    ) -> Any:
        """`attempt(args, kwargs)` with the arguments that follow the inputs; `others` are more of them by name."""
        named = dict(others or {}) | ({} if self._mask_argument is None else {self._mask_argument: mask})
        if not self._searched:
            self._flags, self._searched = _search(attempt, train, named), True
        named |= {name: value == train for name, value in self._flags.items()}
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

    def check_training(self, watch: Watch) -> None:
        """A ValueError if layers that differ in training were not switched on."""
        inactive = [name for name, active in watch.layers.items() if not active]
        if self._trusted:  # a batch norm may be frozen; a dropout that is never active has a flag of its own
            inactive = [name for name in inactive if self._auto and "BatchNorm" not in name]
        elif len(inactive) < len(watch.layers):
            inactive = []
        if inactive:
            self.refuse_training(inactive)

    def refuse_training(self, layers: Collection[str]) -> None:
        """The ValueError of a network that trains without these layers."""
        raise ValueError(
            f"{self.network} trains as it scores, without {', '.join(layers)}: accept `train` in `__call__` "
            'and hand it on, or name its flag with train_argument="..." (train_argument=None if this is meant)'
        )

    def _in_order(self, named: dict) -> tuple[tuple, dict]:
        """By position if possible, since `nn.remat` and `nn.vmap` do not support keyword arguments."""
        args, rest = [], dict(named)
        by_position = [p for p in self._parameters[1:] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        for parameter in by_position:
            if not any(p.name in rest for p in by_position):
                break
            args.append(rest.pop(parameter.name, parameter.default))
        incomplete = any(value is inspect.Parameter.empty for value in args)
        return ((), named) if incomplete else (tuple(args), rest)


def _search(attempt: Callable[[tuple, dict], Any], train: bool, named: dict) -> dict[str, bool]:
    """The known flags accepted by a network that passes on `**kwargs`: tried one by one, without computing anything."""
    found = {}
    for name, value in FLAGS.items():
        flags = {flag: known == train for flag, known in {**found, name: value}.items()}
        try:
            jax.eval_shape(lambda flags=flags: _nothing(attempt((), named | flags)))
        except TypeError as error:
            if f"unexpected keyword argument '{name}'" not in str(error):
                raise
        else:
            found[name] = value
    return found


def _nothing(result):
    del result


def watched(convention: Convention, run: Callable[..., tuple[chex.Array, chex.ArrayTree]]) -> Callable:
    """`Architecture.apply` of a network.

    Args:
      convention: how to call it.
      run: (params, model_state, inputs, args, kwargs, watch, key) -> (logits, new model state); tells `watch` what it
        sees and hands its mask on.
    """
    verified = set()  # shapes of inputs

    def apply(params, model_state, inputs, *, train, mask=None, key=None):
        def call(inputs, mask, others=None):
            def attempt(args, kwargs):
                watch = Watch(train, mask)
                return *run(params, model_state, inputs, args, kwargs, watch, key), watch

            return convention.call(attempt, train=train, mask=mask, others=others)

        logits, new_state, watch = call(inputs, mask)
        if not train:
            return logits, model_state
        convention.check_training(watch)
        if not any(watch.layers.values()):
            _look_for_flags(convention, call, inputs, mask)
        if watch.leading:
            _verify_leading_axis(call, inputs, mask, verified)
        return logits, keep_if_all_padding(mask, model_state, new_state)

    return apply


def _look_for_flags(convention, call, inputs, mask):
    """Traces a network in which nothing differs in training with each of its other flags turned over."""
    while convention.suspects:
        name, default = convention.suspects.popitem()
        try:
            watch = _watch_of(partial(call, inputs, mask, {name: not default}))
        except Exception:  # whatever this flag does, it is not for training
            continue
        if layers := [layer for layer, active in watch.layers.items() if active]:
            convention.suspects[name] = default  # the next trace is refused, too
            convention.refuse_training(layers)


def _watch_of(call):
    """What a trace shows, without computing anything."""
    found = []
    jax.eval_shape(lambda: found.append(call()[2]))
    return found[0]


def _verify_leading_axis(call, inputs, mask, verified):
    """Traces the network with twice the rows, to detect axes that had the size of the batch by coincidence."""
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(inputs))
    if shapes in verified:
        return
    twice = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct((2 * len(mask), *x.shape[1:]), x.dtype))
    try:
        jax.eval_shape(lambda inputs, mask: _nothing(call(inputs, mask)), twice(inputs), twice(mask))
    except Exception as error:
        error.add_note(f"The network was traced with {2 * len(mask)} rows to see where its batch norms have the batch.")
        raise
    verified.add(shapes)
