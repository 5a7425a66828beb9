"""A watch for rounds that diverge: the consensus grows, and accuracies fall."""

import itertools
from collections.abc import Iterable
from operator import itemgetter

import numpy as np

from fedmd_jax.experiments.run_directory import Record


class Watch:
    """Says once that the consensus has grown to twice its first size while the mean accuracy falls.

    >>> watch = Watch()
    >>> watch(1, 0.70, 4.0), watch(2, 0.75, 6.0), watch(3, 0.74, 9.0), watch(4, 0.72, 7.0)
    (None, None, None, None)
    >>> watch(5, 0.72, 9.0)
    'after round 5 the mean accuracy is 0.720 (best: 0.750), and the size of the consensus 9.00 (first: 4.00)'
    >>> watch(6, 0.60, 20.0)
    """

    def __init__(self, records: Iterable[Record] = ()):
        """Begins after some rounds.

        Args:
          records: their lines of metrics.jsonl.
        """
        self._first_size: float | None = None
        self._best_accuracy, self._found = 0.0, False
        of_clients = [record for record in records if "client_id" in record]
        for round_, lines in itertools.groupby(of_clients, key=itemgetter("round")):
            accuracies, sizes = zip(*((line["accuracy"], line.get("consensus_size")) for line in lines), strict=True)
            self(round_, float(np.mean(accuracies)), sizes[0])

    def __call__(self, round_: int, accuracy: float, size: float | None) -> str | None:
        """What is to be said after a round: in the first one that diverges, else nothing.

        A round diverges if the size is more than twice the first one, and the accuracy more than 2 points below its
        best.

        Args:
          round_: number of the round.
          accuracy: mean over the clients.
          size: of the consensus, if there is one of scores.
        """
        best = self._best_accuracy = max(self._best_accuracy, accuracy)
        if size is None or self._found:
            return None
        if self._first_size is None:
            self._first_size = size
        self._found = size > 2 * self._first_size and accuracy < best - 0.02
        if not self._found:
            return None
        fallen = f"the mean accuracy is {accuracy:.3f} (best: {best:.3f})"
        return (
            f"after round {round_} {fallen}, and the size of the consensus {size:.2f} (first: {self._first_size:.2f})"
        )
