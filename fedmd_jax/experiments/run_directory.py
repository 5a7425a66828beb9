"""The directory that a run writes: every file appears whole or not at all."""

import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

import jax

CONFIG, METRICS, SUMMARY, PLOT = "config.json", "metrics.jsonl", "summary.json", "accuracy.png"
_PACKAGES = ("fedmd_jax", "jax", "jaxlib", "flax", "optax", "numpy")


class RunDirectoryError(ValueError):
    """A run directory cannot be made or read; the message is one line."""


def create(path: pathlib.Path) -> pathlib.Path:
    """Makes the directory of a new run.

    Raises:
      RunDirectoryError: it exists, or cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except FileExistsError:
        raise RunDirectoryError(f"the output directory must be new, but {path} exists") from None
    except OSError as error:
        raise RunDirectoryError(f"cannot make the output directory {path}: {error.strerror}") from None
    return path


def fresh_path(stem: pathlib.Path) -> pathlib.Path:
    """`stem`, or the first of `stem-2`, `stem-3`, ... that does not exist."""
    path, number = stem, 1
    while path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}-{number}")
    return path


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that is never seen half written, and that survives the machine if this returns."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Strict JSON: no NaN."""
    replace_file(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def append_lines(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    """Appends JSON objects, one a line, all in a single write."""
    block = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(file, block)
    finally:
        os.close(file)


def read_run(path: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and metrics of a finished run.

    Raises:
      RunDirectoryError: a file is missing or is not what a run writes.
    """
    try:
        summary = json.loads((path / SUMMARY).read_text())
        metrics = [json.loads(line) for line in (path / METRICS).read_text().splitlines()]
    except FileNotFoundError as error:
        raise RunDirectoryError(f"{path} is not the directory of a finished run: no {error.filename}") from None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"cannot read the run in {path}: {error}") from None
    if not isinstance(summary, dict) or not isinstance(summary.get("clients"), list):
        raise RunDirectoryError(f"cannot read the run in {path}: {SUMMARY} has no list of clients")
    return summary, metrics


def versions() -> dict[str, str]:
    """What the results hang on besides the settings."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            found[package] = "unknown"
    return found


def device() -> dict[str, Any]:
    """Which accelerator, and how many."""
    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
