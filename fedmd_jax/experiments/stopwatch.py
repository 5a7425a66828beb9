"""Where the seconds of a run go, compilation apart."""

import contextlib
import time
from collections.abc import Iterator

import jax

# Lowering and compiling. Tracing is left in its phase: traces nest, and their sum would count twice.
_COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


class Stopwatch:
    """Seconds by phase; what JAX spends on compiling is taken out of the phase and counted as `compile`.

    >>> watch = Stopwatch(("rounds",))
    >>> with watch("rounds"):
    ...     pass
    >>> sorted(watch.seconds())
    ['compile', 'rounds', 'total']
    """

    def __init__(self, phases: tuple[str, ...] = ("transfer", "pooled", "rounds", "evaluate")):
        self._start = time.perf_counter()
        self._seconds = {"compile": 0.0, **dict.fromkeys(phases, 0.0)}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measures what happens within; phases do not nest."""
        compiling = []

        def listen(event, duration, **_):
            if event in _COMPILING:
                compiling.append(duration)

        jax.monitoring.register_event_duration_secs_listener(listen)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            jax.monitoring.unregister_event_duration_listener(listen)
            self._seconds["compile"] += sum(compiling)
            self._seconds[phase] += elapsed - sum(compiling)

    def seconds(self) -> dict[str, float]:
        """Seconds so far, by phase, with the total of everything since the watch was made."""
        return {**self._seconds, "total": time.perf_counter() - self._start}
