"""The directory that a run writes: it and every file in it appear whole or not at all."""

import contextlib
import errno
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

import fedmd_jax
from fedmd_jax.hints import one_line

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
def writing(problem: str | None = None) -> Iterator[None]:
    """An `OSError` within becomes a `WriteError`.

    Args:
      problem: the beginning of the message; None where the error itself says what could not be written.

    >>> with writing("cannot write a.txt"):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    fedmd_jax.experiments.run_directory.WriteError: cannot write a.txt: No space left on device
    """
    try:
        yield
    except OSError as error:
        raise WriteError(f"{problem}: {_reason(error)}" if problem else str(error)) from error


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
    """A `RunDirectoryError` where there is something already."""
    if os.path.lexists(path):
        raise RunDirectoryError(f"the output directory must be new, but {path} exists")


def check_path(path: pathlib.Path) -> None:
    """A `RunDirectoryError` where no file system can have such a path: too long, or with what no name can have."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"cannot look for {str(path)!r:.80}: {_reason(error)}") from error


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


class Lock:
    """A file that is locked until it is closed, or until nobody has this object."""

    def __init__(self, descriptor: int):
        self.close = weakref.finalize(self, os.close, descriptor)  # does nothing the second time


def lock(path: pathlib.Path) -> Lock:
    """The run directory for this process alone, until what is returned is closed or the process ends.

    Args:
      path: the directory.

    Raises:
      RunDirectoryError: another process has it, or the file cannot be opened.
    """
    try:
        locked_file = os.open(path / CONFIG, os.O_RDWR)  # NFS gives an exclusive lock to who may write only
    except OSError as error:
        raise RunDirectoryError(f"cannot open {path / CONFIG}: {_reason(error)}") from error
    locked = Lock(locked_file)
    try:
        import fcntl
    except ImportError:  # Windows, where nothing warns of a second process: its locks keep others from reading, too
        return locked
    try:
        fcntl.flock(locked_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        locked.close()
        raise RunDirectoryError(f"another process is running in {path}") from error
    except OSError:  # a file system without locks
        pass
    return locked


def reopen(path: pathlib.Path, num_bytes: int) -> list[Record]:
    """Makes the directory of an interrupted run what it was when its metrics had so many bytes.

    Args:
      path: the directory.
      num_bytes: of metrics.jsonl; what comes after is cut, and summary and plot that were made of it are removed.

    Returns:
      The records of metrics.jsonl.

    Raises:
      RunDirectoryError: metrics.jsonl is shorter, or damaged.
      WriteError: nothing can be written.
    """
    file = path / METRICS
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RunDirectoryError(f"cannot read {file}: {_reason(error)}") from error
    kept = content[:num_bytes]
    if len(kept) < num_bytes:
        raise RunDirectoryError(f"cannot go on in {path}: {METRICS} has {len(kept)} bytes, wanted at least {num_bytes}")
    records = _records(file, kept, whole=False)
    for record in records:
        _check(file, record, _ROUND)
    with writing(f"cannot write {file}"):
        for left in (path / SUMMARY, path / PLOT, *path.glob(".*.tmp")):
            left.unlink(missing_ok=True)
        os.truncate(file, num_bytes)
    return records


def read_config(path: pathlib.Path) -> Record:
    """The content of config.json, with the parts that say what was run.

    Raises:
      RunDirectoryError: it is missing, or is not what a run writes.
    """
    if not path.is_dir():
        raise RunDirectoryError(f"no run to go on with: {path} is not a directory")
    if not (path / CONFIG).is_file():
        raise RunDirectoryError(f"no run to go on with: {path} has no {CONFIG}")
    [config] = _parse(path / CONFIG, whole=True)
    _check(
        path / CONFIG,
        config,
        {"experiment": _is_text, "settings": {}, "command": _is_string, "versions": {}, "device": {}},
    )
    return config


def is_finished(path: pathlib.Path) -> bool:
    """Whether a run has come to its end in this directory, which the summary says."""
    try:
        [summary] = _parse(path / SUMMARY, whole=True)
    except RunDirectoryError:
        return False
    return summary.get("interrupted") is False


def to_json(content: Any) -> bytes:
    """Strict JSON, no NaN, as the content of a file."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def read_run(path: pathlib.Path) -> tuple[Record, list[Record]]:
    """Summary and metrics of a finished run.

    Args:
      path: the directory.

    Returns:
      The content of summary.json and the records of metrics.jsonl, all that `report` uses of them checked.

    Raises:
      RunDirectoryError: the run is unfinished, or a file is missing or is not what a run writes.
    """
    if not path.is_dir():
        raise RunDirectoryError(f"no run to report on: {path} is not a directory")
    if not (path / SUMMARY).is_file():
        state = "is unfinished" if (path / CONFIG).is_file() else "is not one of fedmd-jax"
        raise RunDirectoryError(f"the run in {path} {state}: it has no {SUMMARY}")
    [summary] = _parse(path / SUMMARY, whole=True)
    _check(path / SUMMARY, summary, _SUMMARY)
    for client in summary["clients"]:
        faults = client.get("faults") or {}
        where = f"faults of client {client['client_id']}"
        _check(path / SUMMARY, faults, {what: [_is_count] for what in faults}, where)
        _check(path / SUMMARY, list(faults) or ["none"], [_is_text], where)
    for part, kind in {"mean": _optional(_is_number), "seconds": _is_number}.items():
        _check(path / SUMMARY, summary[part], dict.fromkeys(summary[part], kind), part)
        _check(path / SUMMARY, list(summary[part]), [_is_text], part)
    if "continued" in summary:
        _check(path / SUMMARY, summary["continued"], [_CONTINUED], "continued")
    metrics = [record for record in _parse(path / METRICS) if record.get("event") == "round"]
    for record in metrics:
        _check(path / METRICS, record, _ROUND)
    _check_complete(path / METRICS, summary, metrics)
    return summary, metrics


def read_seed_list(path: pathlib.Path) -> list[int] | None:
    """The seeds in the summary of a directory of several; None where it is not one."""
    if not (path / SUMMARY).is_file():
        return None
    [summary] = _parse(path / SUMMARY, whole=True)
    if "seeds" not in summary:
        return None
    _check(path / SUMMARY, summary, {"seeds": [_is_count]})
    return summary["seeds"]


def is_smoke(path: pathlib.Path) -> bool:
    """Whether a run, or one of several seeds in a directory, was started with `--smoke`."""
    configs = [path / CONFIG, *sorted(path.glob(f"seed*/{CONFIG}"))]
    commands = [_parse(config, whole=True)[0].get("command") for config in configs if config.is_file()]
    return any("--smoke" in command.split() for command in commands if isinstance(command, str))


# What is asked of a value.


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_text(value: Any) -> bool:
    """Something to be printed and drawn."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= 1000


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _optional(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or kind(value)


# What a report needs to find, by key; a list holds its only item's kind any number of times.
_ACCURACIES = {
    "transfer_accuracy": _is_share,
    "final_accuracy": _is_share,
    "local_accuracy": _optional(_is_share),  # missing where an older version has written it
    "pooled_accuracy": _optional(_is_share),
}
_SUMMARY = {
    "experiment": _is_text,
    "seed": _is_count,
    "evaluate_on": _optional(_is_text),
    "num_rounds": _is_count,
    "num_rounds_done": _is_count,
    "clients": [
        {
            "client_id": _is_count,
            "architecture": _is_text,
            "faults": lambda faults: faults is None or isinstance(faults, dict),
            **_ACCURACIES,
        }
    ],
    "mean": _ACCURACIES,
    "communication": {f"{kind}_bytes_per_client_round": _is_number for kind in ("upload", "download", "fedavg")},
    "seconds": {"total": _is_number},
}
_ROUND = {
    "round": _is_count,
    "client_id": _is_count,
    "accuracy": _is_share,
    "architecture": _is_text,
    "status": _optional(_is_text),
}
_CONTINUED = {
    "after_round": _optional(_is_count),
    "device": {"count": _is_count, "kind": _is_text},
    "versions": {"fedmd_jax": _is_text, "jax": _is_text},
}


def _parse(path: pathlib.Path, *, whole: bool = False) -> list[Record]:
    """The JSON objects of a file, one a line, or one in all."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {_reason(error)}") from error
    return _records(path, content, whole=whole)


def _records(path: pathlib.Path, content: bytes, *, whole: bool) -> list[Record]:
    try:
        text = content.decode()
        records = [json.loads(part, parse_constant=_no_number) for part in ([text] if whole else text.splitlines())]
    except (ValueError, RecursionError) as error:  # the second where brackets are thousands deep
        raise RunDirectoryError(f"cannot read {path}: {one_line(str(error))}") from error
    if not all(isinstance(record, dict) for record in records):
        raise RunDirectoryError(f"cannot read {path}: wanted JSON objects, got something else")
    return records


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check(path: pathlib.Path, value: Any, wanted: Any, where: str = "") -> None:
    """A `RunDirectoryError` where a value is not of the kind that is wanted of it."""
    if isinstance(wanted, dict) and isinstance(value, dict):
        for key, kind in wanted.items():
            _check(path, value.get(key), kind, f"{where}.{key}" if where else key)
    elif isinstance(wanted, list) and isinstance(value, list) and value:
        for position, item in enumerate(value):
            _check(path, item, wanted[0], f"{where}[{position}]")
    elif isinstance(wanted, (dict, list)) or not wanted(value):
        line = one_line(f"cannot read {path}: {where} is damaged or missing, got {json.dumps(value):.40}")
        raise RunDirectoryError(line)


def _check_complete(path: pathlib.Path, summary: Record, metrics: Sequence[Record]) -> None:
    found = {(record["round"], record["client_id"]) for record in metrics}
    for round_ in range(summary["num_rounds_done"] + 1):
        for client in summary["clients"]:
            if (round_, client["client_id"]) not in found:
                raise RunDirectoryError(f"cannot read {path}: no round {round_} of client {client['client_id']}")


def origin() -> Record:
    """What the results hang on besides the settings: versions, device and environment variables."""
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
