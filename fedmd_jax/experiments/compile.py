"""Compilation of a run's programs in the background, and the time that each phase takes."""

import contextlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from fedmd_jax.simulation.federation import Federation

# Each program of a federation counts as this phase.
_PHASES = {
    "new_states": "transfer",
    "pretrain": "transfer",
    "train_private": "transfer",
    "new_server": "transfer",
    "train_pooled": "pooled",
    "revisit": "local",
    "round": "rounds",
    "evaluate": "evaluate",
    "confusion": "evaluate",
    "evaluate_server": "evaluate",
    "estimate_statistics": "evaluate",
}


class Programs:
    """The programs of federations that differ in their data only, compiled in threads for these shapes, and timed.

    XLA compiles a program on one core for seconds, without holding Python's lock.
    """

    def __init__(self):
        """Compiles nothing yet."""
        self._compiled, self._executor = {}, ThreadPoolExecutor(max_workers=os.cpu_count())

    def restart(self, federation: Federation) -> None:
        """Takes the programs that are not compiled yet from this federation, and sets all clocks to zero."""
        self._federation = federation
        self._start, self._seconds = time.perf_counter(), dict.fromkeys(("compile", *_PHASES.values()), 0.0)

    def seconds(self) -> dict[str, float]:
        """Seconds since the last `restart` by phase; `compile` is the time that calls have waited for the compiler."""
        return {**self._seconds, "total": time.perf_counter() - self._start}

    def begin(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Starts to compile a program for arguments of these shapes, unless that was done before.

        Args:
          name: of the program.
          *args: arrays or shapes.
          **kwargs: more of them.
        """
        if not jax.config.jax_disable_jit:
            self._compile(name, args, kwargs)

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a program, compiled for these arguments, and waits for its result."""
        if jax.config.jax_disable_jit:
            compiled = self._federation.programs[name]
        else:
            with self._timed("compile"):
                compiled = self._compile(name, args, kwargs).result()
        with self._timed(_PHASES[name]):
            return jax.block_until_ready(compiled(*args, **kwargs))

    def close(self) -> None:
        """Compiles nothing more, and waits for nothing."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _compile(self, name: str, args: Any, kwargs: Any) -> Future:
        types = jax.tree.map(jax.typeof, (args, kwargs))
        key = (name, *jax.tree.leaves(types), jax.tree.structure(types))
        if key not in self._compiled:
            shapes, named = jax.tree.map(_shape, (args, kwargs))
            fn = self._federation.programs[name]
            self._compiled[key] = self._executor.submit(lambda: fn.lower(*shapes, **named).compile())
        return self._compiled[key]

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - start


def _shape(leaf: Any) -> Any:
    """Shape and dtype of an array or of a shape, with its sharding on a mesh."""
    sharding = getattr(leaf, "sharding", None)
    on_mesh = isinstance(sharding, jax.sharding.NamedSharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) if on_mesh else jax.typeof(leaf)
