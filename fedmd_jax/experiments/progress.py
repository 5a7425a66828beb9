"""The observers that show how far a run is: bars on a terminal, plain lines elsewhere."""

import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import TextIO

import tqdm

from fedmd_jax.experiments.kept import ROUNDS
from fedmd_jax.experiments.observer import TITLES, Observer
from fedmd_jax.metrics import OK, RoundMetrics

_SECONDS_BETWEEN_TICKS = 0.5


class Progress(Observer):
    """An observer for people; closed at the end of a `with` block."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves what is shown as it is."""


class Lines(Progress):
    """A line for each phase and each round, for a log."""

    def __init__(self, num_rounds: int, file: TextIO | None = None):
        self._num_rounds, self._file = num_rounds, file

    def phase(self, title: str) -> None:
        """Says what begins."""
        print(f"{title} ...", file=self._file, flush=True)

    def round(self, metrics: RoundMetrics) -> None:
        """Says how good the clients are now."""
        accuracies = [client.accuracy for client in metrics.clients]
        spread = f"({min(accuracies):.3f} to {max(accuracies):.3f})"
        number = f"round {metrics.round:>{len(str(self._num_rounds))}}/{self._num_rounds}"
        print(f"{number}  accuracy {metrics.mean_accuracy:.3f} {spread}{_note(metrics)}", file=self._file, flush=True)


class Bars(Progress):
    """A bar for the rounds, with the accuracy so far and the time left, and a clock for every other phase.

    A thread keeps the clocks going, since the compiler and long phases say nothing for a while.
    """

    def __init__(self, num_rounds: int, file: TextIO | None = None):
        self._num_rounds, self._file = num_rounds, file
        self._bar: tqdm.tqdm | None = None
        self._first: tuple[int, float] | None = None  # the first round after the one that compiles, and when it began
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._ticker.start()

    def phase(self, title: str) -> None:
        """Leaves the clock of the phase before, and starts a new one."""
        counted = title == ROUNDS and self._num_rounds > 0
        form = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}" if counted else "{desc}  {elapsed}{postfix}"
        with self._lock:
            self._close_bar()
            self._bar = tqdm.tqdm(
                desc=title,
                total=self._num_rounds if counted else None,
                bar_format=form,
                dynamic_ncols=True,
                file=self._file or sys.stderr,
            )

    def round(self, metrics: RoundMetrics) -> None:
        """Moves the bar."""
        left = self._time_left(metrics.round)
        with self._lock:
            self._bar.n = metrics.round
            self._bar.set_postfix_str(f"accuracy {metrics.mean_accuracy:.3f}{left}{_note(metrics)}")

    def close(self) -> None:
        """Leaves the last bar as it is."""
        self._stop.set()
        self._ticker.join()
        self._close_bar()

    def _time_left(self, round_: int) -> str:
        """From the rounds after the first, which compiles; empty where nothing is known or nothing is left."""
        if round_ > 0 and self._first is None:
            self._first = round_, time.monotonic()
        if round_ == 0 or not self._first[0] < round_ < self._num_rounds:
            return ""
        first, began = self._first
        seconds = (time.monotonic() - began) / (round_ - first)
        return f", {tqdm.tqdm.format_interval(seconds * (self._num_rounds - round_))} left"

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None

    def _tick(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_TICKS):
            with self._lock:
                if self._bar is not None:
                    self._bar.refresh()


class Several:
    """Progress of several seeds side by side, told as of one: the phase of who is behind, and the clients of all."""

    def __init__(self, progress: Progress, first_rounds: Sequence[int]):
        """Tells nothing yet.

        Args:
          progress: hears a phase when the last seed begins it, and a round when all have ended it that go through it.
          first_rounds: of each seed, the first round that it will tell of.
        """
        self._progress, self._first_rounds = progress, first_rounds
        self._phases: list[str | None] = [None] * len(first_rounds)
        self._told: str | None = None
        self._rounds: dict[int, list[RoundMetrics]] = {}
        self._lock = threading.Lock()

    def observers(self) -> list[Observer]:
        """One for each of the seeds."""
        return [_OneOfSeveral(self, seed) for seed in range(len(self._phases))]

    def phase(self, seed: int, title: str) -> None:
        """Of the seed in this place."""
        with self._lock:
            self._phases[seed] = title
            if None in self._phases:
                return
            behind = min(self._phases, key=_place)
            if behind != self._told:
                self._told = behind
                self._progress.phase(behind)

    def round(self, metrics: RoundMetrics) -> None:
        """Of any seed."""
        with self._lock:
            told = self._rounds.setdefault(metrics.round, [])
            told.append(metrics)
            if len(told) == sum(first <= metrics.round for first in self._first_rounds):
                clients = tuple(client for each in told for client in each.clients)
                self._progress.round(RoundMetrics(metrics.round, clients, any(each.digested for each in told)))


class _OneOfSeveral(Observer):
    def __init__(self, several: Several, seed: int):
        self.phase, self.round = partial(several.phase, seed), several.round


def _place(title: str) -> tuple[int, int]:
    """Which phase it is, and which of its networks."""
    number = re.search(r", networks? (\d+)", title)
    return next(i for i, known in enumerate(TITLES) if title.startswith(known)), int(number[1]) if number else 0


def make_progress(num_rounds: int) -> Progress:
    """Bars on a terminal, lines elsewhere."""
    on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and _has_a_size(sys.stderr)
    return Bars(num_rounds) if on_terminal else Lines(num_rounds)


def _has_a_size(terminal: TextIO) -> bool:
    """Some, such as those of containers, are of no rows and columns: no bar would be seen there."""
    try:
        return min(os.get_terminal_size(terminal.fileno())) > 1
    except OSError:
        return False


def _note(metrics: RoundMetrics) -> str:
    num_faulty = sum(client.status != OK for client in metrics.clients)
    faulty = f", {num_faulty} of {len(metrics.clients)} clients absent or failed" if num_faulty else ""
    return faulty + ("" if metrics.digested else ", no consensus: nobody with a weight was heard")
