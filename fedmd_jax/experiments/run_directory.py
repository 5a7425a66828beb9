"""The directory that a run writes: the directory and each of its files appear whole or not at all."""

import contextlib
import dataclasses
import errno
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax

import fedmd_jax
from fedmd_jax.checks import one_line
from fedmd_jax.client.evaluation import Evaluation
from fedmd_jax.data.files import replacing
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.mapping.groups import Groups
from fedmd_jax.simulation.metrics import RoundMetrics

CONFIG, METRICS, SUMMARY, PLOT = "config.json", "metrics.jsonl", "summary.json", "accuracy.png"
CONFUSION = "confusion.jsonl"
CHECKPOINTS = "checkpoints"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# What decides a run besides its settings.
_VARIABLES = ("FEDMD_JAX_DATA", "TFDS_DATA_DIR", "JAX_PLATFORMS", "XLA_FLAGS")

Record = dict[str, Any]


class RunDirectoryError(ValueError):
    """A run directory cannot be made or read; the message is one line."""


class WriteError(OSError):
    """A file of a run cannot be written, on a full disk for example; the message is one line."""


@contextlib.contextmanager
def writing(problem: str) -> Iterator[None]:
    """An `OSError` within becomes a `WriteError`.

    Args:
      problem: the beginning of the message.

    >>> with writing("cannot write a.txt"):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    fedmd_jax.experiments.run_directory.WriteError: cannot write a.txt: No space left on device
    """
    try:
        yield
    except OSError as error:
        raise WriteError(f"{problem}: {_reason(error)}") from error


def create(
    path: pathlib.Path, files: Mapping[str, bytes], fill: Callable[[pathlib.Path], Any] = lambda _: None
) -> pathlib.Path:
    """Makes the directory of a new run, with its first files in it.

    Args:
      path: the directory, which must not exist; its parents are made as needed.
      files: content by name.
      fill: writes more into the directory that it is given, before it gets its name.

    Returns:
      The path.

    Raises:
      RunDirectoryError: it exists, or cannot be made; nothing is left behind then.
    """
    check_new(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True)
        for name, content in files.items():
            (partial / name).write_bytes(content)
        fill(partial)
        partial.rename(path)
    except (OSError, ValueError) as error:  # ValueError: no path has a null character
        check_new(path)  # another run was faster
        raise RunDirectoryError(f"cannot make the output directory {path}: {_reason(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def check_new(path: pathlib.Path) -> None:
    """A `RunDirectoryError` if the path exists."""
    if os.path.lexists(path):
        raise RunDirectoryError(f"the output directory must be new, but {path} exists")


def fresh_path(stem: pathlib.Path) -> pathlib.Path:
    """`stem`, or the first of `stem-2`, `stem-3`, ... that does not exist."""
    path, numbers = stem, itertools.count(2)
    while os.path.lexists(path):
        path = stem.with_name(f"{stem.name}-{next(numbers)}")
    return path


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that is never seen half written, and that survives the machine if this returns.

    Raises:
      WriteError: it cannot be written; the file is as it was before.
    """
    with writing(f"cannot write {path}"), replacing(path) as file:
        file.write(content)


def append_lines(path: pathlib.Path, records: Sequence[Record]) -> None:
    """Appends JSON objects, one a line, in a single write: all of them or none.

    Raises:
      WriteError: they cannot be written; the file is as it was before.
    """
    block = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
    with writing(f"cannot write {path}"), path.open("ab", buffering=0) as file:
        size = file.tell()
        if file.write(block) < len(block):  # a full disk takes what it can, and complains at the next write only
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """The run directory for this process alone, also for what it starts.

    Args:
      path: the directory.

    Raises:
      RunDirectoryError: another process has it, or its config.json cannot be opened.
    """
    with reading(path / CONFIG):
        file = (path / CONFIG).open("r+b")  # an exclusive lock on NFS needs a file open for writing
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunDirectoryError(f"another process is running in {path}") from error
        except (ImportError, OSError):  # Windows, where a locked file cannot be read, and file systems without locks
            pass
        yield


class Writer:
    """Writes the metrics of a run.

    Attributes:
      path: the run directory.
      metrics: the records so far.
    """

    def __init__(self, path: pathlib.Path, metrics: list[Record]):
        self.path, self.metrics = path, metrics

    @classmethod
    def create(cls, path: pathlib.Path, name: str, experiment: Experiment, **known: Any) -> "Writer":
        """Makes the directory, with config.json and an empty metrics.jsonl.

        Args:
          path: the directory, which must not exist.
          name: of the experiment.
          experiment: its settings.
          **known: more content of config.json.

        Raises:
          RunDirectoryError: it exists, or cannot be made.
        """
        settings = dataclasses.asdict(experiment)
        config = {"experiment": name, "settings": settings, "seed": experiment.seed, **known, **origin()}
        create(path, {CONFIG: to_json(config), METRICS: b""})
        return cls(path, [])

    @property
    def num_bytes(self) -> int:
        """Size of metrics.jsonl."""
        return (self.path / METRICS).stat().st_size

    @property
    def num_rounds_done(self) -> int | None:
        """The last round that is on disk; None before round 0."""
        return self.metrics[-1]["round"] if self.metrics else None

    def append(self, records: Sequence[Record]) -> None:
        """Appends the lines of a round; `WriteError` if that fails, and none of them is written then."""
        append_lines(self.path / METRICS, records)
        self.metrics += records

    def write_confusion(self, records: Sequence[Record]) -> None:
        """Writes confusion.jsonl, in the place of that of an earlier round; `WriteError` if that fails."""
        replace_file(self.path / CONFUSION, "".join(json.dumps(record) + "\n" for record in records).encode())


def confusion_records(groups: Groups, round_: int, evaluations: Mapping[str, Evaluation]) -> list[Record]:
    """The lines of confusion.jsonl: one per client, with its counts by label and predicted class after a round.

    Args:
      groups: the architecture groups.
      round_: number of the round.
      evaluations: per group, on the host, with confusion counts.
    """
    return [
        {"round": round_, "client_id": client_id, "architecture": name, "confusion": counts.tolist()}
        for name, group in groups.items()
        for client_id, counts in zip(group.client_ids, evaluations[name].confusion, strict=True)
    ]


def round_records(
    metrics: RoundMetrics, local: RoundMetrics | None = None, reestimated: RoundMetrics | None = None
) -> list[Record]:
    """The lines of metrics.jsonl for one round: one per client, and one for the network of the server if it has one.

    A loss that is not finite is null.

    Args:
      metrics: of the algorithm.
      local: of the local-only baseline, if there is one.
      reestimated: of the same clients with the batch statistics of the public subset, if they were evaluated.
    """
    records = [{"event": "round", **client} for client in metrics.to_dicts()]
    for record in records:
        for loss in ("digest_loss", "revisit_loss"):
            if not math.isfinite(record[loss] or 0.0):
                record[loss] = None
    if local is not None:
        for record, own in zip(records, local.clients, strict=True):
            record |= {"local_accuracy": own.accuracy, "local_status": own.status}
    if reestimated is not None:
        for record, own in zip(records, reestimated.clients, strict=True):
            record["reestimated_accuracy"] = own.accuracy
    return records + metrics.server_dicts()


def reopen(path: pathlib.Path, num_bytes: int) -> Writer:
    """Restores the directory of an interrupted run as it was when its metrics had this size.

    Args:
      path: the directory.
      num_bytes: of metrics.jsonl; the rest is cut, and summary, plot and later confusion counts are removed.

    Raises:
      RunDirectoryError: metrics.jsonl is shorter, or damaged.
      WriteError: nothing can be written.
    """
    file = path / METRICS
    with reading(file):
        kept = file.read_bytes()[:num_bytes]
        if len(kept) < num_bytes:
            raise ValueError(f"it has {len(kept)} bytes, wanted at least {num_bytes}")
        records = list(map(json.loads, kept.splitlines()))
    counts = read_confusion(path) if (path / CONFUSION).exists() else []
    with writing(f"cannot write {file}"):
        for left in (path / SUMMARY, path / PLOT, *path.glob(".*.tmp")):
            left.unlink(missing_ok=True)
        if counts and (not records or counts[0]["round"] > records[-1]["round"]):
            (path / CONFUSION).unlink()
        os.truncate(file, num_bytes)
    return Writer(path, records)


def read_config(path: pathlib.Path) -> Record:
    """The content of config.json of a run, or of the first of several seeds.

    Raises:
      RunDirectoryError: it is missing, or is not what a run writes.
    """
    with reading(path):
        found = _config_files(path)
    if not found:
        raise RunDirectoryError(f"no run to resume: {path} has no {CONFIG}")
    return read_config_file(found[0])


def read_config_file(file: pathlib.Path) -> Record:
    """The content of a config.json; `RunDirectoryError` if it is not what a run writes."""
    config = _read_json(file)
    with reading(file):
        if not isinstance(config["experiment"] + config["command"], str) or not isinstance(config["settings"], dict):
            raise ValueError("it is not what a run writes")
    return {"num_seeds": None, "log": None, **config}


def is_smoke(path: pathlib.Path) -> bool:
    """Whether a run, or one of several seeds in a directory, was started with `--smoke`."""
    return any("--smoke" in read_config_file(file)["command"].split() for file in _config_files(path))


def is_finished(path: pathlib.Path) -> bool:
    """Whether a run has come to its end in this directory, which the summary says."""
    try:
        return _read_json(path / SUMMARY).get("interrupted") is False
    except RunDirectoryError:
        return False


def to_json(content: Any) -> bytes:
    """Strict JSON, no NaN, as the content of a file."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def read_summary(path: pathlib.Path) -> Record:
    """The content of summary.json of a run or of several seeds.

    Raises:
      RunDirectoryError: it is missing or damaged.
    """
    if not os.path.isfile(path / SUMMARY):
        state = "is unfinished" if os.path.isfile(path / CONFIG) else "is not there"
        raise RunDirectoryError(f"no run to report on: the run in {path} {state}, it has no {SUMMARY}")
    return _read_json(path / SUMMARY)


def read_run(path: pathlib.Path) -> tuple[Record, list[Record]]:
    """Summary and metrics of a run that is finished, or that was interrupted after round 0.

    Args:
      path: the directory.

    Returns:
      The content of summary.json and the records of metrics.jsonl, of clients and of the server.

    Raises:
      RunDirectoryError: the run is unfinished, or a file is missing or damaged.
    """
    summary, metrics = read_summary(path), read_metrics(path, events=("round", "server"))
    with reading(path / METRICS):
        found = {(record["round"], record.get("client_id")) for record in metrics}
    with reading(path / SUMMARY):
        client_ids = [client["client_id"] for client in summary["clients"]]
        missing = {*itertools.product(range(summary["num_rounds_done"] + 1), client_ids)} - found
    if missing:
        raise RunDirectoryError(f"cannot read {path}: {METRICS} has no round {min(missing)[0]} of all clients")
    return summary, metrics


def read_metrics(path: pathlib.Path, events: Collection[str] = ("round",)) -> list[Record]:
    """The records of metrics.jsonl, also of a run that is not finished; `RunDirectoryError` if damaged.

    Args:
      path: the directory.
      events: the records that are wanted: "round", of a client after a round, and "server", of the server's network.
    """
    with reading(path / METRICS):
        records = map(json.loads, (path / METRICS).read_bytes().splitlines())
        return [record for record in records if record["event"] in events]


def read_confusion(path: pathlib.Path) -> list[Record]:
    """The records of confusion.jsonl by client, see `confusion_records`.

    Raises:
      RunDirectoryError: it is missing or damaged.
    """
    if not os.path.isfile(path / CONFUSION):
        raise RunDirectoryError(f"accuracies by class are of one run: {path} has no {CONFUSION}")
    with reading(path / CONFUSION):
        records = list(map(json.loads, (path / CONFUSION).read_bytes().splitlines()))
        return sorted(records, key=lambda record: record["client_id"])


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """An error within, caused by a file of a run that is missing or damaged, becomes a `RunDirectoryError`."""
    try:
        yield
    except RunDirectoryError:
        raise
    except (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        what = getattr(error, "strerror", None) or f"it may be damaged ({type(error).__name__}: {error})"
        raise RunDirectoryError(one_line(f"cannot read {path}: {what}")) from error


def _config_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Of a run, or of several seeds in order."""
    seeds = sorted(path.glob(f"seed*/{CONFIG}"), key=lambda file: (len(file.parent.name), file))
    return [file for file in (path / CONFIG, *seeds) if file.is_file()]


def _read_json(path: pathlib.Path) -> Record:
    """The JSON object that is the content of a file."""
    with reading(path):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"wanted a JSON object, got {type(content).__name__}")
        return content


def origin() -> Record:
    """What results depend on besides the settings: versions, device and environment variables."""
    versions = {"python": platform.python_version(), "fedmd_jax": fedmd_jax.__version__}
    devices, num_processes = jax.devices(), jax.process_count()
    device = {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
    return {
        "versions": versions | {package: importlib.metadata.version(package) for package in _PACKAGES},
        "device": device | ({"processes": num_processes} if num_processes > 1 else {}),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(str(error))
