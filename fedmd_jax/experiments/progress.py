"""How far a run is, for people: a bar on a terminal, plain lines elsewhere."""

import os
import sys
from typing import Literal, TextIO

from tqdm.auto import tqdm

from fedmd_jax.simulation.metrics import OK, RoundMetrics

ProgressKind = Literal["auto", "bar", "lines", "none"]


class Progress:
    """Shows nothing."""

    def phase(self, title: str) -> None:
        """A phase begins that may take a while."""

    def round(self, metrics: RoundMetrics) -> None:
        """A round is done."""

    def close(self) -> None:
        """Nothing more will be shown."""


class Lines(Progress):
    """A line for each phase and each round, for a log."""

    def __init__(self, num_rounds: int, file: TextIO | None = None):
        self._num_rounds, self._file = num_rounds, file

    def phase(self, title: str) -> None:
        """Prints the title."""
        print(f"{title} ...", file=self._file, flush=True)

    def round(self, metrics: RoundMetrics) -> None:
        """Prints mean, smallest and largest accuracy."""
        accuracies = [client.accuracy for client in metrics.clients]
        extremes = f"({min(accuracies):.3f} to {max(accuracies):.3f})"
        number = f"round {metrics.round:>{len(str(self._num_rounds))}}/{self._num_rounds}"
        print(f"{number}  accuracy {metrics.mean_accuracy:.3f} {extremes}{_note(metrics)}", file=self._file, flush=True)


class Bar(Progress):
    """A bar over the rounds, with the phase, the accuracy and the time left."""

    def __init__(self, num_rounds: int, file: TextIO | None = None):
        self._bar = tqdm(total=num_rounds, file=file or sys.stderr, dynamic_ncols=True, unit="round")

    def phase(self, title: str) -> None:
        """Shows the title before the bar."""
        self._bar.set_description(title)

    def round(self, metrics: RoundMetrics) -> None:
        """Moves the bar."""
        self._bar.update(metrics.round - self._bar.n)
        self._bar.set_postfix_str(f"accuracy {metrics.mean_accuracy:.3f}{_note(metrics)}")

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def make_progress(kind: ProgressKind, num_rounds: int) -> Progress:
    """Progress of a kind; auto is a bar on a terminal, else lines."""
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else "lines"
    return {"bar": Bar, "lines": Lines, "none": lambda num_rounds: Progress()}[kind](num_rounds)


def _note(metrics: RoundMetrics) -> str:
    num_faulty = sum(client.status != OK for client in metrics.clients)
    faulty = f", {num_faulty} of {len(metrics.clients)} clients dropped or failed" if num_faulty else ""
    return faulty + ("" if metrics.digested else ", no consensus: no client with a weight reported")
