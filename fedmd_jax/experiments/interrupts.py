"""Ctrl-C and SIGTERM during a run: they stop it, but never in the middle of a result, and they are never lost."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from fedmd_jax.experiments.observer import Observer
from fedmd_jax.metrics import RoundMetrics


class CtrlC:
    """Within a `with` block, Ctrl-C raises KeyboardInterrupt except where it is held back, and so does SIGTERM.

    It is remembered, since Python drops a KeyboardInterrupt that falls into a destructor or a weak reference's
    callback, of which JAX has many. Where a signal is not as Python has it (ignored under nohup, or taken by the
    program around) nothing is changed.
    """

    def __init__(self):
        self._signal: int | None = None  # the last that came
        self._held = False
        self._hand_over: Callable[[int], None] | None = None
        self._before: dict[int, Any] = {}
        self._unraisable_hook = sys.unraisablehook

    def __enter__(self) -> "CtrlC":
        pythons = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        is_main_thread = threading.current_thread() is threading.main_thread()  # which alone may take signals
        self._before = {n: own for n, own in pythons.items() if is_main_thread and signal.getsignal(n) is own}
        for number in self._before:
            signal.signal(number, self._handle)
        if self._before:
            self._unraisable_hook, sys.unraisablehook = sys.unraisablehook, self._report_unraisable
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before)
        if self._before:
            sys.unraisablehook = self._unraisable_hook

    @property
    def code(self) -> int:
        """The exit code that tells of what came: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self._signal or signal.SIGINT)

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
        """Raises KeyboardInterrupt if a signal has ever come."""
        if self._signal is not None:
            raise KeyboardInterrupt

    def hand_over(self, to: Callable[[int], None]) -> None:
        """Nothing is raised from here on: another process stops for this one, too.

        Args:
          to: called with the number of each signal.
        """
        self._hand_over = to

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._hand_over is not None:
            self._hand_over(number)
            return
        self._signal = number
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

    def local(self, accuracy: dict[int, float], undone: dict[int, list[int]]) -> None:
        """Whole."""
        with self._ctrl_c.held():
            self._observer.local(accuracy, undone)
        self._ctrl_c.check()

    def pooled(self, accuracy: dict[int, float]) -> None:
        """Whole."""
        with self._ctrl_c.held():
            self._observer.pooled(accuracy)
        self._ctrl_c.check()
