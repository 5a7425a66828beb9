"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import os
import sys
from typing import Literal, TextIO

from fedmd_jax.simulation.metrics import RoundMetrics
from fedmd_jax.simulation.progress import Bar, Progress, describe_faults

ProgressKind = Literal["auto", "bar", "lines", "none"]


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
        told = f"accuracy {metrics.mean_accuracy:.3f} {extremes}{describe_faults(metrics)}"
        print(f"{number}  {told}", file=self._file, flush=True)


def make_progress(kind: ProgressKind, num_rounds: int) -> Progress:
    """Progress of a kind; auto is a bar on a terminal, else lines."""
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else "lines"
    return {"bar": Bar, "lines": Lines, "none": lambda num_rounds: Progress()}[kind](num_rounds)
