"""The observer that writes the run directory."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

from fedmd_jax.communication import Communication
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.observer import Observer
from fedmd_jax.experiments.results.figures import plot, write_plot
from fedmd_jax.experiments.results.report import summarize
from fedmd_jax.experiments.run_directory import Record
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.metrics import RoundMetrics


class Recorder(Observer):
    """Writes each result when it is known; no other process does in the same directory, until it is closed.

    Attributes:
      num_rounds_done: rounds that are on disk; None before round 0.
      num_bytes: of metrics.jsonl.

    Raises:
      RunDirectoryError: the directory exists or cannot be made, or is not one where a run can go on.
      WriteError: from any method, a file cannot be written.
    """

    def __init__(
        self,
        path: pathlib.Path,
        name: str,
        experiment: Experiment,
        *,
        command: str,
        clients_at_once: Mapping[str, int] | None = None,
        pretrained_from: Mapping[str, str] | None = None,
        resume_at: int | None = None,
        lock: files.Lock | None = None,
    ):
        """Makes the directory, with config.json and an empty metrics.jsonl; or goes on in one.

        Args:
          path: the directory, which must not exist unless the run goes on.
          name: of the experiment.
          experiment: its settings.
          command: with which it was started.
          clients_at_once: how many clients of each group run at once, where it is known.
          pretrained_from: from where clients are taken after the public half of transfer learning, of groups whose are.
          resume_at: where a run goes on, how many bytes of metrics.jsonl it has when it does; those after are cut.
          lock: of the directory, where a run goes on; it is this recorder's from here on.
        """
        self._path, self._name, self._experiment = path, name, experiment
        self._metrics: list[Record] = []
        self._local: dict[int, float] | None = None
        self._undone: dict[int, list[int]] = {}
        self._pooled: dict[int, float] | None = None
        self._origin = files.origin()
        if resume_at is not None:
            self._lock, self._metrics = lock, files.reopen(path, resume_at)
            return
        config = {
            "experiment": name,
            "settings": dataclasses.asdict(experiment),
            "seed": experiment.seed,
            "command": command,
            "clients_at_once": clients_at_once,
            "pretrained_from": pretrained_from,
            **self._origin,
        }
        files.create(path, {files.CONFIG: files.to_json(config), files.METRICS: b""})
        self._lock = files.lock(path)

    def close(self) -> None:
        """Lets others write."""
        self._lock.close()

    @property
    def num_bytes(self) -> int:
        """Of metrics.jsonl."""
        return (self._path / files.METRICS).stat().st_size

    @property
    def num_rounds_done(self) -> int | None:
        """Round 0 counts as done when its accuracies are written."""
        return self._metrics[-1]["round"] if self._metrics else None

    def round(self, metrics: RoundMetrics) -> None:
        """Appends the lines of the round."""
        records = round_records(metrics)
        files.append_lines(self._path / files.METRICS, records)
        self._metrics += records

    def local(self, accuracy: dict[int, float], undone: dict[int, list[int]]) -> None:
        """Keeps the control for the summary."""
        self._local, self._undone = accuracy, undone

    def pooled(self, accuracy: dict[int, float]) -> None:
        """Keeps the upper bound for the summary."""
        self._pooled = accuracy

    def finish(
        self,
        communication: Communication,
        seconds: dict[str, float],
        *,
        interrupted: bool,
        continued: Sequence[Record] = (),
    ) -> Record:
        """Writes summary and plot of the rounds that are done, at least round 0.

        Args:
          communication: what these rounds have sent.
          seconds: by phase.
          interrupted: whether the run was to go on.
          continued: where it went on with other versions or devices, if it did.

        Returns:
          The summary.
        """
        summary = {
            **summarize(
                self._name,
                self._experiment,
                self._metrics,
                local=self._local,
                undone=self._undone,
                pooled=self._pooled,
                communication=communication,
                seconds=seconds,
            ),
            "interrupted": interrupted,
            **({"continued": list(continued)} if continued else {}),
            **self._origin,
        }
        write_plot(self._path / files.PLOT, plot, summary, self._metrics)
        files.replace_file(self._path / files.SUMMARY, files.to_json(summary))  # last: it says that all is there
        return summary


def round_records(metrics: RoundMetrics) -> list[Record]:
    """The lines of metrics.jsonl for one round, one per client; a loss that is not finite is null."""
    return [
        {
            "event": "round",
            "round": metrics.round,
            "client_id": client.client_id,
            "architecture": client.architecture,
            "accuracy": client.accuracy,
            "digest_loss": _finite(client.digest_loss),
            "revisit_loss": _finite(client.revisit_loss),
            "status": client.status,
        }
        for client in metrics.clients
    ]


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None
