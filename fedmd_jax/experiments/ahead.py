"""Compiling a run's programs in the background, while the first of them run."""

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax

from fedmd_jax.experiments.stopwatch import Stopwatch
from fedmd_jax.federation import Federation


class Ahead:
    """A jitted function on its way to be compiled; calling it waits for that, and then for the result.

    XLA compiles a program on one core for seconds, and holds nothing while it does so.
    """

    def __init__(self, executor: Executor, watch: Stopwatch, phase: str, fn: Any, *args: Any):
        """Begins to compile.

        Args:
          executor: whose threads compile.
          watch: the wait counts as `compile`, the run as `phase`.
          phase: of the stopwatch.
          fn: from `jax.jit`.
          *args: arrays, or their shapes, as they will be given.
        """
        shapes = jax.tree.map(jax.typeof, args)
        self._compiled = executor.submit(lambda: fn.lower(*shapes).compile())
        self._watch, self._phase = watch, phase

    def __call__(self, *args: Any) -> Any:
        """The result, when it is there."""
        with self._watch("compile"):
            compiled = self._compiled.result()
        with self._watch(self._phase):
            return jax.block_until_ready(compiled(*args))


@contextmanager
def compiling(federation: Federation, watch: Stopwatch, **data: Any) -> Iterator[Federation]:
    """The same federation, its programs compiled in the order in which a run needs them, blocking and timed by phase.

    Args:
      federation: on one device.
      watch: is told the seconds.
      **data: `public`, `private`, `pooled` and `test`, as they will be given.
    """
    key = jax.random.key(0)
    public, private, pooled, test = (data[name] for name in ("public", "private", "pooled", "test"))
    states = jax.eval_shape(federation.new_states, key, public.inputs[:1])
    executor = ThreadPoolExecutor(max_workers=os.cpu_count())
    ahead = partial(Ahead, executor, watch)
    try:
        yield dataclasses.replace(
            federation,
            new_states=ahead("transfer", federation.new_states, key, public.inputs[:1]),
            pretrain=ahead("transfer", federation.pretrain, states, public, key),
            personalize=ahead("transfer", federation.personalize, states, private, key),
            evaluate=ahead("evaluate", federation.evaluate, states, test),
            round=ahead("rounds", federation.round, states, public, private, key),
            pool=ahead("pooled", federation.pool, states, pooled, key),
        )
    finally:
        executor.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nobody waits for what is being compiled
