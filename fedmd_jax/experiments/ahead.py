"""Compiling a run's programs in the background, while the first of them run."""

import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax

from fedmd_jax.experiments.stopwatch import Stopwatch
from fedmd_jax.federation import Federation, vmap_federation


class Ahead:
    """A jitted function on its way to be compiled; calling it waits for that, and then for the result.

    XLA compiles a program on one core for seconds, and holds nothing while it does so.
    """

    def __init__(self, executor: Executor, watch: Stopwatch, phase: str, fn: Any):
        """Compiles nothing yet.

        Args:
          executor: whose threads compile.
          watch: the wait counts as `compile`, the run as `phase`.
          phase: of the stopwatch.
          fn: from `jax.jit`.
        """
        self._executor, self._watch, self._phase, self._fn = executor, watch, phase, fn
        self._compiled: dict[Any, Future] = {}

    def begin(self, *args: Any, **named: Any) -> None:
        """Compiles for these arguments, or arguments of these shapes, and waits for nothing."""
        if not jax.config.jax_disable_jit:
            self._compile(args, named)

    def __call__(self, *args: Any, **named: Any) -> Any:
        """The result, when it is there; shapes that nobody has begun with are compiled for."""
        with self._watch("compile"):
            compiled = self._fn if jax.config.jax_disable_jit else self._compile(args, named).result()
        with self._watch(self._phase):
            return jax.block_until_ready(compiled(*args, **named))

    def _compile(self, args: Any, named: Any) -> Future:
        types = jax.tree.map(jax.typeof, (args, named))
        known = (*jax.tree.leaves(types), jax.tree.structure(types))
        if known not in self._compiled:
            shapes = jax.tree.map(_with_devices, (args, named))
            self._compiled[known] = self._executor.submit(lambda: self._fn.lower(*shapes[0], **shapes[1]).compile())
        return self._compiled[known]


def _with_devices(leaf: Any) -> Any:
    """The type of an array, or of its shape, and where it is on a mesh."""
    sharding = getattr(leaf, "sharding", None)
    on_mesh = isinstance(sharding, jax.sharding.NamedSharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) if on_mesh else jax.typeof(leaf)


def _stacked_shapes(tree: Any, size: int) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), tree)


@contextmanager
def compiling(
    federation: Federation,
    watch: Stopwatch,
    *,
    needed: Collection[str],
    later: Collection[str] = (),
    pretrain_calls: Sequence[Collection[str]] | None = None,
    seeds_at_once: int = 1,
    **data: Any,
) -> Iterator[Federation]:
    """The same federation, its programs compiled in the order in which a run needs them, blocking and timed by phase.

    Args:
      federation: on one device, or on many.
      watch: is told the seconds.
      needed: names of the programs that the run will call; the others stay as they are.
      later: of these, which are compiled when they are called, and not before.
      pretrain_calls: for each call of `pretrain` that is to come the groups that it trains; None is one, of all.
      seeds_at_once: where it is more than one, the programs are those of `vmap_federation`, for so many.
      **data: `public`, `private`, `pooled` and `test`, as they will be given, or their shapes; `pretraining` where
        transfer learning is on other public examples, `validation` by the name of a program that stops early, and
        `participants` where not everybody takes part in all rounds.
    """
    key = jax.random.key(0)
    one_input = federation.put(jax.eval_shape(lambda inputs: inputs[:1], data["public"].inputs))
    states = federation.put(jax.eval_shape(federation.new_states, key, one_input))
    validation = {name: federation.put(examples) for name, examples in data.pop("validation", {}).items()}
    data = {name: federation.put(part) for name, part in data.items()}
    public, private, pooled, test = (data[name] for name in ("public", "private", "pooled", "test"))
    # Part of a `Spread` is no longer one: on a mesh everybody is one call.
    calls = [states] if pretrain_calls is None else [{name: states[name] for name in names} for names in pretrain_calls]
    programs = {
        "new_states": ("transfer", [(key, one_input)]),
        "pretrain": ("transfer", [(some, data.get("pretraining", public), key) for some in calls]),
        "personalize": ("transfer", [(states, private, key)]),
        "evaluate": ("evaluate", [(states, test)]),
        "round": ("rounds", [(states, public, private, key)]),
        "revisit": ("local", [(states, private, key)]),
        "pool": ("pooled", [(states, pooled, key)]),
    }
    attending = {"participants": data["participants"]} if "participants" in data else {}
    named = {"round": attending, "revisit": attending}
    if seeds_at_once > 1:
        federation = vmap_federation(federation)
    executor = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        ahead = {}
        for name, (phase, calls) in programs.items():
            if name in needed:
                ahead[name] = Ahead(executor, watch, phase, getattr(federation, name))
                for args in () if name in later else calls:
                    shapes = (*args, *([validation[name]] if name in validation else [])), named.get(name, {})
                    args, others = shapes if seeds_at_once == 1 else _stacked_shapes(shapes, seeds_at_once)
                    ahead[name].begin(*args, **others)
        yield dataclasses.replace(federation, **ahead)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nobody waits for what is being compiled
