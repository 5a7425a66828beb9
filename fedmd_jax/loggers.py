"""Metrics of rounds for TensorBoard and Weights & Biases: callbacks of `run_federation`, and `fedmd-jax run --log`.

Each logs the accuracies and losses of each round, of every client and their mean: `accuracy/client_3`,
`accuracy/mean`, `digest_loss/client_3`, ..., and `accuracy/server` if the server has a network; the step is the number
of the round. In rounds with a consensus of scores there is `consensus_size`.
"""

import importlib
import os
import pathlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, Literal, Self

import numpy as np

from fedmd_jax.simulation.metrics import RoundMetrics

_NAMES = ("accuracy", "local_accuracy", "digest_loss", "revisit_loss")


class Logger:
    """Base class of the loggers: callbacks of `run_federation` that are closed at the end of a `with` block.

    Attributes:
      package: name of the package that the logger needs.
      extra: extra of `fedmd_jax` that installs it.

    Example:
      >>> import fedmd_jax as fmd
      >>> class Printer(fmd.loggers.Logger):
      ...     def _write(self, step, scalars):
      ...         print(step, scalars)
      >>> Printer().log([{"round": 1, "client_id": 0, "accuracy": 0.5}])
      1 {'accuracy/client_0': 0.5, 'accuracy/mean': 0.5}
    """

    package: str
    extra: str

    def __call__(self, metrics: RoundMetrics, states: Any = None) -> None:
        """Logs a round."""
        self.log(metrics.to_dicts() + metrics.server_dicts())

    def log(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Logs the records of a round, from `RoundMetrics.to_dicts` or `metrics.jsonl`."""
        records = list(records)
        clients, servers = ([r for r in records if ("client_id" in r) == is_client] for is_client in (True, False))
        scalars: dict[str, float] = {"accuracy/server": servers[0]["accuracy"]} if servers else {}
        for name in _NAMES:
            values = {r["client_id"]: r[name] for r in clients if r.get(name) is not None}
            scalars |= {f"{name}/client_{client_id}": value for client_id, value in values.items()}
            scalars |= {f"{name}/mean": float(np.mean(list(values.values())))} if values else {}
        scalars |= {"consensus_size": clients[0]["consensus_size"]} if "consensus_size" in clients[0] else {}
        self._write(records[0]["round"], scalars)

    @classmethod
    def load(cls) -> ModuleType:
        """The package; a `ModuleNotFoundError` that says how to install it."""
        try:
            return importlib.import_module(cls.package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{cls.__name__} needs {cls.package}: pip install 'fedmd_jax[{cls.extra}]'", name=error.name
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes what is not written yet. Nothing can be logged after it."""

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        raise NotImplementedError


class TensorBoard(Logger):
    """Writes event files for TensorBoard: `tensorboard --logdir FOLDER`.

    Example:
      >>> import fedmd_jax as fmd
      >>> def run_and_log(folder, *arguments, **settings):
      ...     with fmd.loggers.TensorBoard(folder) as logger:
      ...         return fmd.run_federation(*arguments, callback=logger, **settings)
    """

    package, extra = "tensorboardX", "tensorboard"

    def __init__(self, folder: str | os.PathLike, *, first_round: int = 0):
        """Opens a new event file.

        Args:
          folder: of the run; made if needed.
          first_round: number of the first round that will be logged; what the folder has of later ones is not shown.

        Raises:
          ModuleNotFoundError: tensorboardX is not installed.
        """
        suffix = f".{first_round}"  # else a file of the same second would be overwritten
        options = {"purge_step": first_round, "filename_suffix": suffix}
        self._writer = self.load().SummaryWriter(os.fspath(folder), **options)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class WandB(Logger):
    """Logs to Weights & Biases, or into a folder that `wandb sync` uploads, with WANDB_MODE=offline.

    Example:
      >>> import fedmd_jax as fmd
      >>> def run_and_log(folder, *arguments, **settings):
      ...     with fmd.loggers.WandB(folder, project="letters", config={"distance": "mae"}) as logger:
      ...         return fmd.run_federation(*arguments, callback=logger, **settings)
    """

    package, extra = "wandb", "wandb"

    def __init__(self, folder: str | os.PathLike, **options: Any):
        """Begins a run, or continues the last run of the folder.

        Args:
          folder: where wandb keeps its files, in `wandb/`.
          **options: arguments of `wandb.init`, such as project and config.

        Raises:
          ModuleNotFoundError: wandb is not installed.
          ValueError: wandb cannot begin a run, for example without an account.
        """
        wandb = self.load()
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        runs = sorted((folder / "wandb").glob("*run-*-*"))  # run-DATE-ID, offline-run-DATE-ID
        known = {"id": runs[-1].name.removeprefix("offline-").split("-", 2)[2], "resume": "allow"} if runs else {}
        # A process may have several runs, one for each seed.
        options = {"reinit": "create_new", "name": folder.name, **known, **options}
        try:
            self._run = wandb.init(dir=str(folder), **options)
        except wandb.Error as error:
            raise ValueError(f"wandb cannot begin a run (WANDB_MODE=offline needs no account): {error}") from error

    def close(self) -> None:
        """Ends the run, and waits until it is uploaded."""
        self._run.finish()

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)


LogKind = Literal["tensorboard", "wandb"]
LOGGERS: dict[LogKind, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB}
