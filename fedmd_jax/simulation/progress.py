"""A bar over the rounds."""

import sys
import warnings
from types import TracebackType
from typing import TextIO

from fedmd_jax.simulation.metrics import OK, RoundMetrics


class Progress:
    """Shows nothing. A context manager: after an exception nothing stays on the screen."""

    def phase(self, title: str) -> None:
        """A phase begins that may take a while."""

    def round(self, metrics: RoundMetrics) -> None:
        """A round is done."""

    def close(self) -> None:
        """Nothing more will be shown."""

    def clear(self) -> None:
        """Removes what is on the screen."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.clear()


class Bar(Progress):
    """A bar over the rounds, with the phase, the accuracy and the time left."""

    def __init__(self, num_rounds: int, file: TextIO | None = None, num_done: int = 0):
        """Shows the empty bar.

        Args:
          num_rounds: number of the last round.
          file: where it is shown; stderr by default.
          num_done: rounds that were done before.
        """
        from tqdm import TqdmWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmWarning)  # in a notebook without ipywidgets, where the bar is text
            from tqdm.auto import tqdm

        self._bar = tqdm(total=num_rounds, initial=num_done, file=file or sys.stderr, dynamic_ncols=True, unit="round")

    def phase(self, title: str) -> None:
        """Shows the title before the bar."""
        self._bar.set_description(title)

    def round(self, metrics: RoundMetrics) -> None:
        """Moves the bar."""
        self._bar.update(metrics.round - self._bar.n)
        self._bar.set_postfix_str(f"accuracy {metrics.mean_accuracy:.3f}{describe_faults(metrics)}")

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()

    def clear(self) -> None:
        """Removes the bar."""
        self._bar.leave, self._bar.total = False, None  # with a total, a notebook would keep an unfinished bar, in red
        self._bar.close()


def show_rounds(progress: bool, first_round: int, num_rounds: int) -> Progress:
    """A bar if `progress`, else nothing."""
    num_done = first_round - 1
    return Bar(num_done + num_rounds, num_done=num_done) if progress else Progress()


def describe_faults(metrics: RoundMetrics) -> str:
    """What went wrong in a round, to be appended to a line; empty if nothing did."""
    num_faulty = sum(client.status != OK for client in metrics.clients)
    faulty = f", {num_faulty} of {len(metrics.clients)} clients dropped or failed" if num_faulty else ""
    return faulty + ("" if metrics.digested else ", no consensus: no client with a weight reported")
