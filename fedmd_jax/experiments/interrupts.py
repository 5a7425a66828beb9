"""Ctrl-C during a run: it stops the run, but never in the middle of a result, and it is never lost."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from fedmd_jax.experiments.procedure import Observer
from fedmd_jax.federation import RoundMetrics


class CtrlC:
    """Within a `with` block, Ctrl-C raises KeyboardInterrupt except where it is held back.

    It is remembered, since Python drops a KeyboardInterrupt that falls into a destructor or a weak reference's
    callback, of which JAX has many. Where SIGINT is not Python's own (ignored under nohup, or taken by the program
    around) nothing is changed.
    """

    def __init__(self):
        self._pressed, self._held = False, False
        self._unraisable_hook = sys.unraisablehook

    def __enter__(self) -> "CtrlC":
        is_main_thread = threading.current_thread() is threading.main_thread()  # which alone may take signals
        if is_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._unraisable_hook, sys.unraisablehook = sys.unraisablehook, self._report_unraisable
        return self

    def __exit__(self, *_: object) -> None:
        if signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = self._unraisable_hook

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is raised within; `check` raises what came."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def hold(self) -> None:
        """Nothing is raised from here on."""
        self._held = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was ever pressed."""
        if self._pressed:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._pressed = True
        if not self._held:
            raise KeyboardInterrupt

    def _report_unraisable(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._unraisable_hook(unraisable)


class Uninterrupted(Observer):
    """Tells an observer everything as a whole; a Ctrl-C comes after."""

    def __init__(self, observer: Observer, ctrl_c: CtrlC):
        self._observer, self._ctrl_c = observer, ctrl_c

    def phase(self, title: str) -> None:
        """Whole."""
        with self._ctrl_c.held():
            self._observer.phase(title)
        self._ctrl_c.check()

    def round(self, metrics: RoundMetrics) -> None:
        """Whole."""
        with self._ctrl_c.held():
            self._observer.round(metrics)
        self._ctrl_c.check()

    def local(self, accuracy: dict[int, float]) -> None:
        """Whole."""
        with self._ctrl_c.held():
            self._observer.local(accuracy)
        self._ctrl_c.check()

    def pooled(self, accuracy: dict[int, float]) -> None:
        """Whole."""
        with self._ctrl_c.held():
            self._observer.pooled(accuracy)
        self._ctrl_c.check()
