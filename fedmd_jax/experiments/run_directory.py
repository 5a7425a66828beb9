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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

import fedmd_jax
from fedmd_jax.checks import one_line
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.simulation.metrics import RoundMetrics

CONFIG, METRICS, SUMMARY, PLOT = "config.json", "metrics.jsonl", "summary.json", "accuracy.png"
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


def create(path: pathlib.Path, files: Mapping[str, bytes]) -> pathlib.Path:
    """Makes the directory of a new run, with its first files in it.

    Args:
      path: the directory, which must not exist; its parents are made as needed.
      files: content by name.

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
        partial.rename(path)
    except OSError as error:
        check_new(path)  # another run was faster
        raise RunDirectoryError(f"cannot make the output directory {path}: {_reason(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def check_new(path: pathlib.Path) -> None:
    """A `RunDirectoryError` if the path exists."""
    if os.path.lexists(path):
        raise RunDirectoryError(f"the output directory must be new, but {path} exists")


def user_path(text: str) -> pathlib.Path:
    """A path from the command line.

    Raises:
      RunDirectoryError: no file system can have such a path: it is too long, or has impossible characters.
    """
    path = pathlib.Path(os.path.normpath(os.path.expanduser(text)))
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"cannot look for {str(path)!r:.80}: {_reason(error)}") from error
    return path


def fresh_path(stem: pathlib.Path) -> pathlib.Path:
    """`stem`, or the first of `stem-2`, `stem-3`, ... that does not exist."""
    path, number = stem, 1
    while os.path.lexists(path):
        number += 1
        path = stem.with_name(f"{stem.name}-{number}")
    return path


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that is never seen half written, and that survives the machine if this returns.

    Raises:
      WriteError: it cannot be written; the file is as it was before.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(f"cannot write {path}"):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


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
    try:
        descriptor = os.open(path / CONFIG, os.O_RDWR)  # an exclusive lock on NFS needs a file open for writing
    except OSError as error:
        raise RunDirectoryError(f"cannot open {path / CONFIG}: {_reason(error)}") from error
    try:
        with contextlib.suppress(ImportError):  # Windows, where a locked file cannot be read
            import fcntl

            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunDirectoryError(f"another process is running in {path}") from error
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        os.close(descriptor)


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
        config = {
            "experiment": name,
            "settings": dataclasses.asdict(experiment),
            "seed": experiment.seed,
            **known,
            **origin(),
        }
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


def round_records(metrics: RoundMetrics, local: Mapping[int, tuple[float, str]]) -> list[Record]:
    """The lines of metrics.jsonl for one round, one per client; a loss that is not finite is null.

    Args:
      metrics: of FedMD.
      local: accuracy and status of the local-only baseline by client id; empty without it.
    """
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
            **dict(zip(("local_accuracy", "local_status"), local.get(client.client_id, ()), strict=False)),
        }
        for client in metrics.clients
    ]


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def reopen(path: pathlib.Path, num_bytes: int) -> Writer:
    """Restores the directory of an interrupted run as it was when its metrics had this size.

    Args:
      path: the directory.
      num_bytes: of metrics.jsonl; the rest is cut, and summary and plot, which were made of it, are removed.

    Raises:
      RunDirectoryError: metrics.jsonl is shorter, or damaged.
      WriteError: nothing can be written.
    """
    file = path / METRICS
    kept = _read(file)[:num_bytes]
    if len(kept) < num_bytes:
        raise RunDirectoryError(f"cannot resume {path}: {METRICS} has {len(kept)} bytes, wanted at least {num_bytes}")
    records = _records(file, kept.splitlines())
    with writing(f"cannot write {file}"):
        for left in (path / SUMMARY, path / PLOT, *path.glob(".*.tmp")):
            left.unlink(missing_ok=True)
        os.truncate(file, num_bytes)
    return Writer(path, records)


def read_config(path: pathlib.Path) -> Record:
    """The content of config.json, with the parts that say what was run.

    Raises:
      RunDirectoryError: it is missing, or is not what a run writes.
    """
    if not path.is_dir():
        raise RunDirectoryError(f"no run to resume: {path} is not a directory")
    if not (path / CONFIG).is_file():
        raise RunDirectoryError(f"no run to resume: {path} has no {CONFIG}")
    return read_config_file(path / CONFIG)


def read_config_file(file: pathlib.Path) -> Record:
    """The content of a config.json; `RunDirectoryError` if it is not what a run writes."""
    config = _record(file)
    for name, kind in {"experiment": str, "settings": dict, "command": str}.items():
        if not isinstance(config.get(name), kind):
            raise RunDirectoryError(f"cannot read {file}: {name} is damaged or missing")
    return {"num_seeds": None, **config}


def is_finished(path: pathlib.Path) -> bool:
    """Whether a run has come to its end in this directory, which the summary says."""
    try:
        return _record(path / SUMMARY).get("interrupted") is False
    except RunDirectoryError:
        return False


def to_json(content: Any) -> bytes:
    """Strict JSON, no NaN, as the content of a file."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def read_run(path: pathlib.Path) -> tuple[Record, list[Record]]:
    """Summary and metrics of a finished run.

    Args:
      path: the directory.

    Returns:
      The content of summary.json and the round records of metrics.jsonl.

    Raises:
      RunDirectoryError: the run is unfinished, or a file is missing or incomplete.
    """
    if not path.is_dir():
        raise RunDirectoryError(f"no run to report on: {path} is not a directory")
    if not (path / SUMMARY).is_file():
        state = "is unfinished" if (path / CONFIG).is_file() else "is not one of fedmd-jax"
        raise RunDirectoryError(f"the run in {path} {state}: it has no {SUMMARY}")
    summary, lines = _record(path / SUMMARY), _read(path / METRICS).splitlines()
    metrics = [record for record in _records(path / METRICS, lines) if record.get("event") == "round"]
    with reading(path):
        found = {(record["round"], record["client_id"]) for record in metrics}
        for round_, client in itertools.product(range(summary["num_rounds_done"] + 1), summary["clients"]):
            if (round_, client["client_id"]) not in found:
                raise ValueError(f"no round {round_} of client {client['client_id']} in {METRICS}")
    return summary, metrics


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """An error within, caused by damaged content of a run directory, becomes a `RunDirectoryError`."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, RunDirectoryError):
            raise
        what = f"{type(error).__name__}: {error}"
        raise RunDirectoryError(one_line(f"cannot read {path}, a file in it may be damaged ({what})")) from error


def read_seed_list(path: pathlib.Path) -> list[int] | None:
    """The seeds in the summary of a directory of several; None if it is of one run."""
    if not (path / SUMMARY).is_file():
        return None
    return _record(path / SUMMARY).get("seeds")


def is_smoke(path: pathlib.Path) -> bool:
    """Whether a run, or one of several seeds in a directory, was started with `--smoke`."""
    configs = [path / CONFIG, *sorted(path.glob(f"seed*/{CONFIG}"))]
    commands = [_record(config).get("command") for config in configs if config.is_file()]
    return any("--smoke" in str(command).split() for command in commands)


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {_reason(error)}") from error


def _record(path: pathlib.Path) -> Record:
    """The JSON object that is the content of a file."""
    return _records(path, [_read(path)])[0]


def _records(path: pathlib.Path, parts: Sequence[bytes]) -> list[Record]:
    """The JSON objects in parts of a file."""
    try:
        records = [json.loads(part.decode(), parse_constant=_no_number) for part in parts]
    except (ValueError, RecursionError) as error:
        raise RunDirectoryError(f"cannot read {path}: {one_line(str(error))}") from error
    if not all(isinstance(record, dict) for record in records):
        raise RunDirectoryError(f"cannot read {path}: wanted JSON objects, got something else")
    return records


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


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
