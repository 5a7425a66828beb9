"""Where the seconds of a run go, compilation apart."""

import contextlib
import time
from collections.abc import Iterator

PHASES = ("compile", "transfer", "pooled", "local", "rounds", "evaluate")


class Stopwatch:
    """Seconds by phase; `compile` is the time that the run has waited for the compiler.

    >>> watch = Stopwatch(("rounds",))
    >>> with watch("rounds"):
    ...     pass
    >>> sorted(watch.seconds())
    ['rounds', 'total']
    """

    def __init__(self, phases: tuple[str, ...] = PHASES):
        self._phases = phases
        self.restart()

    def restart(self) -> None:
        """As if it were made now, for the next run."""
        self._start = time.perf_counter()
        self._seconds = dict.fromkeys(self._phases, 0.0)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Measures what happens within, also where it ends in an exception; phases do not nest."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds so far, by phase, with the total of everything since the watch was started."""
        return {**self._seconds, "total": time.perf_counter() - self._start}
