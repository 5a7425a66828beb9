"""Checkpoints of a run and a cache of pretrained clients: packed trees, written by Orbax, with a checksum.

A checkpoint holds the states of all clients (parameters, batch statistics, both optimizers) for the algorithm and,
unless it is switched off, for the local-only baseline, what the server remembers, its network, and a record in JSON:
the round, the size of the metrics in bytes, the seconds of each phase, what the run is (settings, seeds, data, versions
and devices), where it was continued, and what `load_run` needs of the data (number of classes, preprocessing).
`--resume` reads the latest one.

Orbax does not notice a flipped bit in the arrays that it reads, so a checksum of arrays and record is kept beside them.
All arrays of a group are packed into one buffer per dtype, since Orbax takes a millisecond for each array. In many
processes all of them call these functions together, on one shared folder.
"""

import contextlib
import hashlib
import json
import logging
import operator
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from fedmd_jax.checks import one_line
from fedmd_jax.experiments.run_directory import Record, WriteError
from fedmd_jax.mapping.packing import buffer_lengths, pack, unpack
from fedmd_jax.mapping.sharding import fetch_to_host, gather_clients

CLIENTS = "fedmd"  # name of the clients of the algorithm in a checkpoint, whichever it is
_KEEP = 2  # last checkpoints, beside the best
Trees = Mapping[str, chex.ArrayTree]  # by name, such as that of a group

for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).setLevel(logging.CRITICAL)  # Orbax logs an error once per thread; here it is raised once


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line."""


class Checkpoints:
    """Checkpoints of the rounds of a run: the last two and the best, written in the background.

    Attributes:
      path: the folder.
      latest: the last round with a checkpoint; None if there is none.
    """

    def __init__(self, path: pathlib.Path):
        """Opens the folder, which is made if it does not exist, and removes what a killed process has left unfinished.

        Args:
          path: the folder.

        Raises:
          WriteError: the folder cannot be made.
          CheckpointError: the metadata of a checkpoint is damaged.
        """
        policies = ocp.training.preservation_policies
        # A killed process may leave a checkpoint half deleted: without metrics, so that it is deleted again.
        accuracy = operator.itemgetter("accuracy")
        best = policies.BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)
        keep = policies.AnyPreservationPolicy([policies.LatestN(_KEEP), best])
        self.path = path.absolute()
        options = {"preservation_policy": keep, "cleanup_tmp_directories": True}
        try:
            self._checkpointer = ocp.training.Checkpointer(self.path, **options)
        except OSError as error:
            raise WriteError(f"cannot open the folder {self.path}: {error.strerror or error}") from error
        except Exception as error:
            raise CheckpointError(one_line(f"the checkpoint in {self.path} is damaged: {error}; {_HINT}")) from error
        latest = self._checkpointer.latest
        self.latest = None if latest is None else latest.step

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._checkpointer.is_saving_in_progress()

    def save(self, round_: int, trees: Mapping[str, Trees], record: Record, *, accuracy: float) -> None:
        """Copies the trees to the host and returns; they are written in the background, after the checkpoint before.

        Args:
          round_: number of rounds that are done.
          trees: states by name and group.
          record: JSON content.
          accuracy: the checkpoint with the highest is kept.

        Raises:
          WriteError: the checkpoint before could not be written.
        """
        packed = {name: _packed(states) for name, states in trees.items()}
        metadata = {"record": record, "checksum": fingerprint(record, packed)}
        with _writing(self.path / str(round_)):
            known = {"metrics": {"accuracy": accuracy}, "custom_metadata": metadata}
            self._checkpointer.save_async(round_, packed, force=True, **known)
        self.latest = round_

    def load(
        self, shapes: Mapping[str, Trees], check: Callable[[Record], Any]
    ) -> tuple[dict[str, dict[str, chex.ArrayTree]], Record]:
        """Loads the latest checkpoint, as `load_checkpoint` does."""
        return load_checkpoint(self.path / str(self.latest), shapes, check)

    def wait(self) -> None:
        """Waits until the last checkpoint is written; `WriteError` if that failed."""
        with _writing(self.path / str(self.latest)):
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits, and ends the threads; what fails here was raised by `wait` before."""
        with contextlib.suppress(Exception):
            self._checkpointer.close()


class PretrainedCache:
    """Groups of clients after the public half of transfer learning, each under a fingerprint of what decides it.

    Attributes:
      folder: of all groups.
    """

    def __init__(self, folder: pathlib.Path, fingerprints: Mapping[str, str], shapes: Trees):
        """Reads nothing yet.

        Args:
          folder: made by the first `save`.
          fingerprints: by group.
          shapes: of the states, by group.
        """
        self.folder, self._fingerprints, self._shapes = folder.absolute(), fingerprints, shapes

    def path(self, name: str) -> pathlib.Path:
        """Where a group is kept."""
        return self.folder / self._fingerprints[name]

    def found(self) -> list[str]:
        """The groups that are in the cache; the same in all processes."""
        there = np.array([os.path.isdir(self.path(name)) for name in self._fingerprints])
        there = multihost_utils.broadcast_one_to_all(there)
        return [name for name, is_there in zip(self._fingerprints, there, strict=True) if is_there]

    def save(self, name: str, states: chex.ArrayTree, record: Record) -> None:
        """Keeps the clients of a group; `WriteError` if that fails."""
        packed = _packed({name: states})
        metadata = {"record": record, "checksum": fingerprint(record, packed)}
        if name not in self.found():  # else another run was faster
            with _writing(self.path(name)):
                ocp.save(self.path(name), packed, custom_metadata=metadata)

    def load(self, name: str) -> tuple[chex.ArrayTree, Record]:
        """The clients of a group as NumPy arrays, and the record; `CheckpointError` if they are damaged."""
        shapes = {name: self._shapes[name]}
        packed, record = _load(self.path(name), _packed_shapes(shapes), lambda record: None)
        return _unpacked(packed, shapes)[name], record


def load_checkpoint(
    path: pathlib.Path, shapes: Mapping[str, Trees], check: Callable[[Record], Any] = lambda record: None
) -> tuple[dict[str, dict[str, chex.ArrayTree]], Record]:
    """Loads one checkpoint of a round.

    Args:
      path: of the checkpoint.
      shapes: arrays or shapes, by name and group; what else the checkpoint has is read, checked and dropped.
      check: called with the record before arrays are read; raises a `CheckpointError` to refuse it.

    Returns:
      NumPy arrays by name and group, and the record.

    Raises:
      CheckpointError: it is damaged, or of other arrays.
    """
    wanted = {name: _packed_shapes(of_groups) for name, of_groups in shapes.items()}
    packed, record = _load(path, wanted, check)
    return {name: _unpacked(packed[name], shapes[name]) for name in shapes}, record


def read_record(path: pathlib.Path) -> Record:
    """The record of a checkpoint; `CheckpointError` if it is damaged."""
    try:
        return ocp.metadata(path).custom_metadata["record"]
    except Exception as error:
        raise CheckpointError(f"the checkpoint {path} is damaged ({type(error).__name__}); {_HINT}") from error


def fingerprint(known: object, data: chex.ArrayTree = ()) -> str:
    """A hash of JSON content and arrays.

    Args:
      known: JSON content.
      data: arrays.
    """
    digest = hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16)
    for leaf in jax.tree.leaves(data):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(array.reshape(-1).view(np.uint8))  # bfloat16 has no buffer
    return digest.hexdigest()


def difference(wanted: Any, found: Any, where: str = "") -> str | None:
    """Describes the first difference between two trees of dictionaries; None if they are equal.

    >>> difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    'a.c is 3 there, 2 here'
    """
    if not (isinstance(wanted, dict) and isinstance(found, dict)):
        return None if wanted == found else f"{where or 'it'} is {found!r:.80} there, {wanted!r:.80} here"
    for key in {**wanted, **found}:
        place = f"{where}.{key}" if where else key
        if key not in found or key not in wanted:
            return f"{place} is known {'here' if key in wanted else 'there'} only"
        if found_in := difference(wanted[key], found[key], place):
            return found_in
    return None


def _packed(trees: Trees) -> dict[str, dict[str, np.ndarray]]:
    """Per group one flat NumPy buffer per dtype, from all devices of all processes."""
    trees = gather_clients(fetch_to_host(trees))
    return {name: pack(tree, buffer_lengths([tree])) for name, tree in trees.items()}


def _packed_shapes(shapes: Trees) -> dict[str, dict[str, np.ndarray]]:
    """Buffers of the sizes that `_packed` returns; their memory is not touched."""
    return {
        name: {dtype: np.empty(length, dtype) for dtype, length in buffer_lengths([tree]).items()}
        for name, tree in shapes.items()
    }


def _unpacked(packed: Mapping[str, dict[str, np.ndarray]], shapes: Trees) -> dict[str, chex.ArrayTree]:
    return {name: unpack(packed[name], shapes[name]) for name in shapes}


def _load(path: pathlib.Path, wanted: Trees, check: Callable[[Record], Any]) -> tuple[Any, Record]:
    """Packed buffers and record, as they were saved; also buffers of names that are not wanted, for the checksum."""
    try:
        saved = ocp.metadata(path)
        metadata = saved.custom_metadata
        check(record := metadata["record"])
        others = {name: saved.metadata[name] for name in saved.metadata if name not in wanted}
        wanted = {**wanted, **jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), others)}
        packed = ocp.load(path, wanted)
        chex.assert_trees_all_equal_shapes_and_dtypes(packed, wanted)  # NumPy arrays come in any shape
        is_damaged = metadata["checksum"] != fingerprint(record, packed)
    except CheckpointError:
        raise
    except Exception as error:  # whatever Orbax raises for damaged files, missing groups and other shapes
        raise CheckpointError(
            f"the checkpoint {path} is damaged or of other clients ({type(error).__name__}); {_HINT}"
        ) from error
    if is_damaged:
        raise CheckpointError(f"the checkpoint {path} is damaged: its checksum differs; {_HINT}")
    return packed, record


_HINT = "remove it to resume without it"


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    """Whatever Orbax raises becomes a `WriteError` of one line."""
    try:
        yield
    except Exception as error:  # errors of TensorStore have no common type, on a full disk for example
        reason = getattr(error, "strerror", None) or str(error)
        reason = reason.partition(" [source locations")[0].rpartition(": ")[2].partition(" [")[0] or repr(error)
        raise WriteError(one_line(f"cannot write the checkpoint {path}: {reason}")) from error
