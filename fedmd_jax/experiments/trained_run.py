"""A run, read from its directory: results, data and trained clients."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from fedmd_jax.checks import describe_value
from fedmd_jax.experiments import datasets, run_directory as files
from fedmd_jax.experiments.presets import EXPERIMENTS
from fedmd_jax.experiments.results.figures import draw_seeds
from fedmd_jax.experiments.run_directory import Record, RunDirectoryError
from fedmd_jax.experiments.settings import Experiment, settings_from
from fedmd_jax.simulation.trained import Ensemble, TrainedClient
from fedmd_jax.types import PrivateDataset


def load_run(path: str | pathlib.Path) -> "TrainedRun":
    """Reads the directory of a run, for its results and its trained clients.

    The run may have used any devices, and other versions of this package and of JAX. Clients and data are loaded when
    they are first asked for.

    Args:
      path: the run directory; of several seeds that of one seed, such as `runs/letters/seed0`.

    Raises:
      RunDirectoryError: no run directory, a damaged one, or one of several seeds.
      CheckpointError: a damaged checkpoint.

    Example:
      Use client 2 of a finished run in another program, on new images. Networks take inputs, not pixels, so that
      images are converted first.

      >>> import fedmd_jax as fmd
      >>> def predict(images, path="runs/quickstart-seed0"):  # images: uint8, [N, 28, 28, 1]
      ...     client = fmd.load_run(path).client(2)
      ...     return client.predict(client.preprocess(images))

      Classes are numbered from 0: first the public classes, then the private classes in the order of the setting
      `data.private_classes`. In the quickstart 0 to 9 are digits, 10 to 15 the letters a to f.

      On the test set a client has the accuracy that the run recorded, and so has the ensemble of all clients. (On
      another kind of device the class of an example may differ, if its two highest logits are equal but for rounding.)
      ::

        run = fmd.load_run("runs/quickstart-seed0")
        inputs, labels, _ = run.test_data()
        (client.predict(inputs) == labels).sum()  # len(labels) * run.summary["clients"][2]["final_accuracy"]
        (run.ensemble().predict(inputs) == labels).sum()  # len(labels) * run.summary["mean"]["ensemble_accuracy"]

      `fmd.export_client(client, "client2")` writes files for programs that do not have this package.
    """
    path = pathlib.Path(path).expanduser()
    seeds = sorted(config.parent for config in path.glob(f"seed*/{files.CONFIG}"))
    if seeds and not (path / files.CONFIG).exists():
        raise RunDirectoryError(f"{path} has several seeds, load one of them: load_run({str(seeds[0])!r})")
    config = files.read_config_file(path / files.CONFIG)
    with files.reading(path):
        default = dataclasses.asdict(EXPERIMENTS["quickstart"])
        experiment = settings_from(Experiment, _of_this_version(config["settings"], default))
    return TrainedRun(path, config, experiment)


class TrainedRun:
    """Results, data and trained clients of a run, from `load_run`.

    Attributes:
      path: the run directory.
      config: the content of config.json.
      round: the last round with a checkpoint, the one whose clients are loaded; None without checkpoints. It is below
        `config["settings"]["num_rounds"]` if the run is not finished.
    """

    def __init__(self, path: pathlib.Path, config: Record, experiment: Experiment):
        from fedmd_jax.experiments.stored_clients import find_checkpoint  # Orbax takes a second to import

        self.path, self.config, self._experiment = path, config, experiment
        self._checkpoint = find_checkpoint(path, experiment.seed)
        self.round = None if self._checkpoint is None else int(self._checkpoint.name)

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.path)!r}, clients={len(self._experiment.networks)}, round={self.round})"

    @functools.cached_property
    def summary(self) -> Record | None:
        """The content of summary.json; None if the run was killed or is still going."""
        return files.read_summary(self.path) if (self.path / files.SUMMARY).is_file() else None

    @functools.cached_property
    def history(self) -> list[Record]:
        """The records of metrics.jsonl, one per round and client, as `pandas.DataFrame` takes them."""
        return files.read_metrics(self.path)

    @functools.cached_property
    def clients(self) -> dict[int, TrainedClient]:
        """Client id -> client after round `self.round`.

        Raises:
          CheckpointError: there is no checkpoint, or it is damaged.
        """
        from fedmd_jax.experiments.checkpoint import CheckpointError
        from fedmd_jax.experiments.stored_clients import load_clients

        if self._checkpoint is None:
            raise CheckpointError(f"{self.path} has no checkpoint: no round is done, or checkpoint_every is None")
        return load_clients(self._checkpoint, self._experiment)

    def client(self, client_id: int) -> TrainedClient:
        """One of the clients; `ValueError` if there is none with this id."""
        if client_id not in self.clients:
            raise ValueError(f"client_id must be one of {list(self.clients)}, got {describe_value(client_id)}")
        return self.clients[client_id]

    def ensemble(self, client_ids: Sequence[int] | None = None) -> Ensemble:
        """The ensemble of all clients, or of some."""
        return Ensemble(map(self.client, self.clients if client_ids is None else client_ids))

    def test_data(self) -> PrivateDataset:
        """The labelled examples on which the run was evaluated, as the networks take them.

        They are read and preprocessed again, from the data folder of the settings.

        Returns:
          Inputs [N, ...], labels [N] and N.

        Raises:
          ValueError: the data is missing or damaged.
        """
        experiment = self._experiment
        return datasets.load(experiment.data, num_clients=len(experiment.networks), seed=experiment.seed).test

    def plot(self) -> Any:
        """Accuracy per round, a `matplotlib.figure.Figure`, as in accuracy.png.

        Raises:
          RunDirectoryError: the run has no summary yet.
        """
        return draw_seeds([files.read_run(self.path)])


def _of_this_version(content: Any, default: Any) -> Any:
    """Settings of a run of another version: unknown ones are dropped, missing ones have their defaults."""
    if not (isinstance(content, dict) and isinstance(default, dict)):
        return content
    return {name: _of_this_version(content.get(name, value), value) for name, value in default.items()}
