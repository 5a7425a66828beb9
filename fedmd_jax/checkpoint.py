"""Clients on disk: trees of arrays, written whole or not at all, read back to the bit, and checked when they are read.

A federation goes on where it was interrupted, with the same keys, since round r uses `fold_in(key, r)`:

```
with fmd.Checkpoints("folder") as checkpoints:
    done = checkpoints.latest or 0
    if done:
        states = checkpoints.load(done, states)
    states, history = fmd.run_federation(
        federation, states, public, private, key, test=test, num_rounds=20 - done, first_round=done + 1,
        callback=lambda metrics, states: checkpoints.save(metrics.round, states, score=metrics.mean_accuracy))
```

So do `run_local`, and `run_population` with the `states` of its population. States on a mesh are kept per group, as
`gather_clients` gives them, and go on on any mesh. Of many processes one writes and reads; with `on_host` all
of them fetch the clients for it.

Orbax is imported where it is used: it takes longer than all of this package, which most of its users do without.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import chex
import jax
import numpy as np

from fedmd_jax.checks import check_count
from fedmd_jax.hints import one_line
from fedmd_jax.processes import on_host
from fedmd_jax.spread import Spread, gather_clients

FORMAT = 1  # of what is below; another one is refused
_CHUNK_BYTES = 2**26
_LOGGING = threading.RLock()
_KNOWN: dict[pathlib.Path, tuple[tuple, tuple[Any, str]]] = {}  # what `_metadata` has found, and in which files
_MOST_KNOWN = 128
_ROUND = re.compile("0|[1-9][0-9]*")
_PARTIAL = re.compile(r"\.[0-9]+\.[0-9]+\.tmp(\..*)?")  # what `_hidden` makes of a round, and Orbax of that

Record = dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line and names the checkpoint and the reason."""


def save_tree(path: str | os.PathLike, tree: chex.ArrayTree, *, record: Mapping[str, Any] | None = None) -> None:
    """Writes a tree of arrays as a directory that appears when it is complete.

    All arrays are one run of bytes for Orbax: a fifth of the time for the hundreds of small arrays of a federation, and
    any dtype, shape and name.

    Args:
      path: the directory; one that is there is replaced.
      tree: of arrays without PRNG keys, on this process's devices or on the host (`on_host` puts those of other
        processes there); a `Spread` is gathered.
      record: what JSON knows, kept with the arrays.

    Raises:
      ValueError: a leaf is no array of numbers.
      OSError: it cannot be written; what was there before is as it was.
    """
    _write(pathlib.Path(path), *_host_copy(tree), record or {})


def load_tree(path: str | os.PathLike, like: chex.ArrayTree) -> chex.ArrayTree:
    """Reads what `save_tree` has written.

    Args:
      path: the directory.
      like: the tree, with a shape and a dtype in each place: arrays, or what `jax.eval_shape` gives.

    Returns:
      The tree: writable NumPy arrays where `like` has them, else JAX arrays, with the sharding of `like` if it has one.
      Where that has a `Spread`, what `gather_clients` gives; `spread_clients` is the way back.

    Raises:
      CheckpointError: it is missing, damaged, of another format, or of a tree with other leaves.
    """
    like = _gathered(like)
    layout, content = _layout(like), _checked(pathlib.Path(path), like)
    leaves, offset = [], 0
    for leaf, (_, dtype, shape) in zip(jax.tree.leaves(like), layout, strict=True):
        size = _num_bytes((None, dtype, shape))
        part = content[offset : offset + size].view(jax.numpy.dtype(dtype)).reshape(shape)
        offset += size
        leaves.append(part.copy() if isinstance(leaf, (np.ndarray, np.generic)) else _put(part, leaf))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def check_tree(path: str | os.PathLike, like: chex.ArrayTree) -> None:
    """Reads a checkpoint as `load_tree` would, and says nothing, or a `CheckpointError`."""
    _checked(pathlib.Path(path), _gathered(like))


def read_record(path: str | os.PathLike) -> Record:
    """The record of a checkpoint, without its arrays; `CheckpointError` as in `load_tree`."""
    return _read_note(pathlib.Path(path))["record"]


class Checkpoints:
    """A folder of checkpoints by round, written in the background; the last few and the best are kept.

    A checkpoint is a directory named by its round, which appears when it is complete: a process that is killed leaves
    nothing but what is named `.ROUND.PROCESS.tmp`, which the next one removes. One process at a time writes. Whatever
    else is in the folder stays there, also under names that are numbers.

    The rounds are those of one federation. Who goes back, with the clients of round 10 of 20 and `first_round=11` or
    from the beginning, leaves those after it: as soon as the new round is written, the higher ones are removed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=1) as checkpoints:
    ...     for round_, score in enumerate([0.5, 0.8, 0.7, 0.6]):
    ...         checkpoints.save(round_, {"w": np.full(2, round_)}, score=score)
    ...     checkpoints.wait()
    ...     checkpoints.rounds, checkpoints.load(3, {"w": np.zeros(2, int)})
    ([1, 3], {'w': array([3, 3])})

    Attributes:
      path: the folder, made by the first `save`.
    """

    def __init__(self, path: str | os.PathLike, *, keep: int = 2):
        """Looks at nothing yet.

        Args:
          path: the folder.
          keep: how many of the last checkpoints are kept, beside the one with the highest score.

        Raises:
          ValueError: less than one is to be kept.
        """
        check_count("keep", keep)
        self.path, self._keep = pathlib.Path(path).absolute(), keep
        self._executor: ThreadPoolExecutor | None = None
        self._pending: Future | None = None
        self._scores: dict[int, float | None] = {}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def rounds(self) -> list[int]:
        """Of the checkpoints that are complete, of any format, damaged ones too, ascending."""
        return self._rounds(damaged=True)

    @property
    def latest(self) -> int | None:
        """The last of these rounds; None where there is none."""
        return max(self.rounds, default=None)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    def save(
        self,
        round_: int,
        states: chex.ArrayTree,
        *,
        score: float | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Copies the clients and returns; they are written in the background, after the one before.

        Args:
          round_: the number of rounds that are done; checkpoints of higher ones are removed when this one is written.
          states: the clients, of a federation or of a population, on a mesh or not; the next round may consume them.
          score: a finite number; the checkpoint with the highest is kept, and those without one are not among these.
          record: what JSON knows, kept with the clients, beside the `score`.

        Raises:
          ValueError: a round or a score that is none, or a record with a score of its own.
          OSError: the one before could not be written, or what has the name of this one is no checkpoint.
        """
        note = {"score": _score(score), **(record or {})}
        if "score" in (record or {}):
            raise ValueError(f"record must not have the key 'score', which is an argument, got {record['score']!r:.40}")
        if not isinstance(round_, (int, np.integer)) or round_ < 0:
            raise ValueError(f"round_ must be an integer of at least 0, got {round_!r:.40}")
        self.wait()
        path = self.path / str(round_)
        if os.path.lexists(path) and not _is_checkpoint(path):
            raise FileExistsError(f"cannot write the checkpoint {path}: it would replace what is none, or damaged")
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1)
            self._clean()
        self._pending = self._executor.submit(self._write, int(round_), *_host_copy(states), note)

    def wait(self) -> None:
        """Returns when nothing is being written; `OSError` where that has failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, and lets the thread go."""
        try:
            self.wait()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = None

    def load(self, round_: int, like: chex.ArrayTree) -> chex.ArrayTree:
        """The clients of a round, as `load_tree` gives them.

        Args:
          round_: one of `rounds`.
          like: states of the same federation.

        Raises:
          CheckpointError: it is missing, damaged, of another format, or of other clients.
        """
        return load_tree(self.path / str(round_), like)

    def check(self, round_: int, like: chex.ArrayTree) -> None:
        """Nothing where `load` would give the clients, else its `CheckpointError`."""
        check_tree(self.path / str(round_), like)

    def record(self, round_: int) -> Record:
        """What was given to `save` as `record`, with the `score`; `CheckpointError` where it cannot be read."""
        return read_record(self.path / str(round_))

    def _rounds(self, *, damaged: bool) -> list[int]:
        if not self.path.is_dir():
            return []
        named = [entry for entry in self.path.iterdir() if _ROUND.fullmatch(entry.name)]
        return sorted(int(entry.name) for entry in named if _is_checkpoint(entry) or (damaged and _is_damaged(entry)))

    def _write(self, round_: int, leaves: list, content: np.ndarray, record: Record) -> None:
        _write(self.path / str(round_), leaves, content, record)
        self._scores[round_] = record["score"]
        found = self._rounds(damaged=False)  # what cannot be known to be ours is not removed
        rounds = [other for other in found if other <= round_]
        for old in set(found) - {*rounds[-self._keep :], self._best(rounds)}:
            _remove(self.path / str(old))

    def _best(self, rounds: list[int]) -> int | None:
        for round_ in set(rounds) - set(self._scores):  # of a process before
            try:
                self._scores[round_] = _score(self.record(round_).get("score"))
            except ValueError:  # `CheckpointError` is one, and a score that is none raises one
                self._scores[round_] = None
        scored = [round_ for round_ in rounds if self._scores[round_] is not None]
        return max(scored, key=self._scores.get, default=None)

    def _clean(self) -> None:
        """Removes what a killed process has left."""
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if _PARTIAL.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)


def _score(score: Any) -> float | None:
    """As JSON knows it: of NumPy or JAX, too."""
    if score is None:
        return None
    with contextlib.suppress(TypeError, ValueError):
        if not isinstance(score, (str, bytes)) and math.isfinite(value := float(score)):
            return value
    raise ValueError(f"score must be a finite number or None, got {score!r:.40}")


def _gathered(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Without the layout of a mesh: a checkpoint is the same on any."""

    def is_spread(part: Any) -> bool:
        return isinstance(part, Spread)

    return jax.tree.map(lambda part: gather_clients(part) if is_spread(part) else part, tree, is_leaf=is_spread)


def _host_copy(tree: chex.ArrayTree) -> tuple[list, np.ndarray]:
    """What the leaves are, and all their bytes: a copy, since the next round may be given the same memory.

    The last byte says nothing: Orbax has no arrays of no bytes.
    """
    tree = _gathered(on_host(tree))
    layout, offset = _layout(tree), 0
    content = np.zeros(sum(map(_num_bytes, layout)) + 1, np.uint8)
    for leaf in jax.tree.leaves(tree):
        content[offset : offset + leaf.nbytes] = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
        offset += leaf.nbytes
    return layout, content


def _layout(tree: chex.ArrayTree) -> list:
    """Name, dtype and shape of every leaf, as JSON gives it back; a `ValueError` where one is no array of numbers."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in flat:
        dtype = getattr(leaf, "dtype", None)
        kinds = (jax.numpy.number, jax.numpy.bool_)
        if not hasattr(leaf, "shape") or not any(jax.dtypes.issubdtype(dtype, kind) for kind in kinds):
            name = f"{type(leaf).__name__} of {dtype}" if dtype is not None else type(leaf).__name__
            raise ValueError(f"a checkpoint is of arrays of numbers, got {name} at {jax.tree_util.keystr(path)!r:.80}")
    return [[jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape)] for path, leaf in flat]


def _num_bytes(leaf: Any) -> int:
    _, dtype, shape = leaf
    return int(np.prod(shape, dtype=np.int64)) * jax.numpy.dtype(dtype).itemsize


def _put(part: np.ndarray, like: Any) -> jax.Array:
    sharding = getattr(like, "sharding", None)
    return jax.device_put(part, sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), may_alias=False)


def _digest(note: Mapping[str, Any], content: np.ndarray) -> str:
    known = {key: note[key] for key in ("format", "leaves", "record")}
    digest = hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16)
    digest.update(content)
    return digest.hexdigest()


def _write(path: pathlib.Path, leaves: list, content: np.ndarray, record: Mapping[str, Any]) -> None:
    from orbax.checkpoint import v1 as ocp

    note = json.loads(json.dumps({"format": FORMAT, "leaves": leaves, "record": record}, allow_nan=False))
    note["digest"] = _digest(note, content)
    path = path.absolute()
    partial = _hidden(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _orbax(path):
            ocp.save(partial, {"bytes": content}, custom_metadata=note)
        if path.exists():
            _remove(path)
        partial.rename(path)
    finally:
        for left in path.parent.glob(f"{partial.name}*"):
            shutil.rmtree(left, ignore_errors=True)


def _hidden(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _remove(path: pathlib.Path) -> None:
    """Whoever is killed here leaves the directory whole, or none of its name."""
    removed = path.with_name(f"{_hidden(path).name}.old")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


@contextlib.contextmanager
def _orbax(path: pathlib.Path) -> Iterator[None]:
    """What Orbax raises, and logs once for each of its threads, as one `OSError`."""
    context = _context()
    context.array.saving.use_compression = False  # of weights it saves little
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    try:
        with _quiet(), _asking_nobody(), context:
            yield
    except OSError as error:
        raise OSError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # TensorStore's have no type of their own
        raise OSError(f"cannot write the checkpoint {path}: {_last_words(error)}") from error


def _context() -> Any:
    """Orbax waits for no other process: this one writes and reads alone."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    if jax.process_count() > 1:
        here = jax.process_index()
        context.multiprocessing.primary_host, context.multiprocessing.active_processes = here, {here}
    return context


@contextlib.contextmanager
def _asking_nobody() -> Iterator[None]:
    """Nor does it ask, before it writes, where the others write: it has no option for that (0.12); within `_quiet`."""
    from orbax.checkpoint.experimental.v1._src.saving import execution

    name = "_check_directory_consistency"
    check = getattr(execution, name, None)
    if jax.process_count() == 1 or check is None:
        yield
        return
    setattr(execution, name, lambda directory: None)
    try:
        yield
    finally:
        setattr(execution, name, check)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs nothing within: whatever goes wrong is told once, by who called."""
    log = logging.getLogger("absl")
    with _LOGGING:
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)


def _last_words(error: Exception) -> str:
    """The reason at the end of TensorStore's message, which names the file in every layer before."""
    return str(error).partition(" [source locations")[0].rpartition(": ")[2].partition(" [")[0] or repr(error)


def _is_checkpoint(path: pathlib.Path) -> bool:
    """Whether `_write` has made it, of this version or of another: its description says so."""
    try:
        note = _description(path)
    except CheckpointError:
        return False
    return "format" in note and "digest" in note


def _is_damaged(path: pathlib.Path) -> bool:
    """Whether Orbax has made it, and nobody can read for whom: to be complained about, not to be passed over."""
    try:
        json.loads((path / "_CHECKPOINT_METADATA").read_bytes())
    except (OSError, ValueError, RecursionError):
        return (path / "orbax.checkpoint").is_file()
    return False


def _description(path: pathlib.Path) -> Record:
    """What Orbax keeps beside the arrays, whoever has written it."""
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        _, note = _metadata(path)
        note = json.loads(note)
    except Exception as error:  # whatever Orbax makes of damaged files
        raise _damaged(path, f"its description cannot be read ({type(error).__name__})") from error
    return note if isinstance(note, dict) else {}


def _metadata(path: pathlib.Path) -> tuple[Any, str]:
    """What Orbax knows of the arrays, and as JSON what was kept beside them.

    It takes Orbax tens of milliseconds, and a run asks for each checkpoint again and again.
    """
    from orbax.checkpoint import v1 as ocp

    path = path.absolute()
    files, (known_files, known) = _files(path), _KNOWN.get(path, (None, None))
    if files == known_files:
        return known
    with _quiet(), _context():
        metadata = ocp.metadata(path)
    found = metadata.metadata, json.dumps(metadata.custom_metadata)
    if files and _files(path) == files:  # nobody has replaced it meanwhile
        _KNOWN[path] = files, found
        if len(_KNOWN) > _MOST_KNOWN:
            _KNOWN.pop(next(iter(_KNOWN)), None)
    return found


def _files(path: pathlib.Path) -> tuple:
    """What is there, and when it was changed last."""
    return tuple((str(file), *_changed(file)) for file in sorted(path.rglob("*")))


def _changed(file: pathlib.Path) -> tuple:
    for status in (file.stat, file.lstat):  # whatever others leave there, also links to nothing
        with contextlib.suppress(OSError):
            found = status()
            return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return ()


def _read_note(path: pathlib.Path) -> Record:
    """What stands beside the arrays, every part of it checked."""
    note = _description(path)
    if "format" not in note:
        raise _damaged(path, "it has no description")
    if note["format"] != FORMAT:
        raise CheckpointError(f"the checkpoint {path} is of format {note['format']!r:.40}, wanted {FORMAT}")
    kinds = {"leaves": list, "record": dict, "digest": str}
    if not all(isinstance(note.get(key), kind) for key, kind in kinds.items()):
        raise _damaged(path, "its description is incomplete")
    return note


def _checked(path: pathlib.Path, like: chex.ArrayTree) -> np.ndarray:
    """The bytes of all leaves, known to be those that were written, of such a tree."""
    note, content = _read_note(path), _read_bytes(path)
    if _digest(note, content) != note["digest"]:
        raise _damaged(path, "its content is not what was written")
    _check_leaves(path, note["leaves"], _layout(like))
    return content


def _read_bytes(path: pathlib.Path) -> np.ndarray:
    from orbax.checkpoint import v1 as ocp

    try:
        arrays, _ = _metadata(path)
        (size,) = arrays["bytes"].shape
        with _quiet(), _context():
            if size > sum(file.stat().st_size for file in path.rglob("*") if file.is_file()):
                raise _damaged(path, f"its arrays promise {size} bytes")  # TensorStore would end the process
            content = np.asarray(ocp.load(path.absolute())["bytes"])
    except CheckpointError:
        raise
    except Exception as error:  # missing files, truncated ones, TensorStore's own
        raise _damaged(path, f"its arrays cannot be read ({type(error).__name__})") from error
    if content.dtype != np.uint8 or content.ndim != 1:
        raise _damaged(path, "its arrays are of another kind")
    return content


def _check_leaves(path: pathlib.Path, found: list, wanted: list) -> None:
    """A `CheckpointError` that names the first leaf that is not the same."""
    if found == wanted:
        return
    pairs = ([_told(leaf) for leaf in pair] for pair in zip(wanted, found, strict=False))
    number = f"{len(wanted)} arrays", f"{len(found)}"
    ours, theirs = next((pair for pair in pairs if pair[0] != pair[1]), number)
    raise CheckpointError(one_line(f"the checkpoint {path} is of other clients: wanted {ours}, got {theirs}"))


def _told(leaf: Any) -> str:
    return " ".join(map(str, leaf)) if isinstance(leaf, list) else repr(leaf)


def _damaged(path: pathlib.Path, reason: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint {path} is damaged: {reason}")
