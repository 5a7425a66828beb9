"""Files of images on the lowest level: how they are read, written and complained about."""

import contextlib
import gzip
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fedmd_jax.checks import as_array, check_channels_last
from fedmd_jax.hints import one_line

# Of what is unpacked: no more than this, or so many times the file. MNIST's digits are packed to a fifth.
_LARGE, _RATIO = 2**28, 100


class DataError(ValueError):
    """A data set is missing, damaged or not what was asked for; the message is one line and says what to do."""


class Images(NamedTuple):
    """Labelled images as they are stored, before any scaling."""

    images: np.ndarray  # [N, H, W, C], uint8
    labels: np.ndarray  # [N], int32, from 0


def checked(images: np.ndarray, labels: np.ndarray, where: Any) -> Images:
    """The arrays as `Images`.

    Args:
      images: what should be pixels, [N, H, W, C], uint8.
      labels: what should be classes from 0, [N], integers.
      where: what they are from; a complaint begins with it.

    Raises:
      DataError: they are something else.
    """
    images, labels = _as_arrays(where, images=images, labels=labels)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise DataError(f"{where}: images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")
    try:
        check_channels_last(str(where), images.shape)
    except ValueError as error:
        raise DataError(str(error)) from error
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"{where}: labels must be integers [N], got {labels.dtype} {list(labels.shape)}")
    if len(images) != len(labels):
        raise DataError(f"{where}: {len(images)} images but {len(labels)} labels")
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise DataError(f"{where}: labels must be 0 or more and fit int32, got {labels.min()}..{labels.max()}")
    return Images(np.require(images, requirements=["C", "W"]), labels.astype(np.int32))


def checked_columns(columns: dict[str, np.ndarray], num_rows: int, where: Any) -> dict[str, np.ndarray]:
    """What is known of each image beside its label, as arrays.

    Args:
      columns: the columns by name, each [N], integers or strings.
      num_rows: N.
      where: what they are from; a complaint begins with it.

    Raises:
      DataError: they are something else.
    """
    columns = dict(zip(columns, _as_arrays(where, **columns), strict=True))
    for name, column in columns.items():
        if column.dtype.kind not in "iuU" or column.shape != (num_rows,):
            raise DataError(
                f"{where}: column {name!r} must be integers or strings [{num_rows}], "
                f"got {column.dtype} {list(column.shape)}"
            )
    return columns


def _as_arrays(where: Any, **values: Any) -> list[np.ndarray]:
    try:
        return [as_array(name, value) for name, value in values.items()]
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


@contextlib.contextmanager
def reading(path: Any) -> Iterator[None]:
    """Turns whatever a broken file makes the libraries raise into one line that names the file.

    Args:
      path: the file that is read within.

    Raises:
      DataError: anything is wrong with it.
    """
    try:
        yield
    except (DataError, ImportError):
        raise
    except MemoryError as error:  # a header can promise anything
        raise DataError(f"cannot read {path}, which promises more than there is memory") from error
    except Exception as error:  # zipfile, zlib, array_record and protobuf share no base class
        raise DataError(f"cannot read {path}, it may be missing or damaged: {reason(error)}") from error


def reason(error: Exception) -> str:
    """An error of a library in one line."""
    return one_line(f"{type(error).__name__}: {error}")


def check_size(where: Any, num_bytes: int, num_stored: int) -> None:
    """Refuses a file that is made to fill the memory: a few bytes that unpack to gigabytes.

    Args:
      where: what it is; the complaint begins with it.
      num_bytes: of what it promises to hold.
      num_stored: of the file.

    Raises:
      DataError: it promises a lot more than images of its size could become.
    """
    if num_bytes > _LARGE and num_bytes > _RATIO * num_stored:
        raise DataError(f"{where}: {num_stored:,} bytes promise to become {num_bytes:,}, which is no file of images")


def read_npz(path: pathlib.Path, keys: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Arrays of a NumPy archive; pickles are not opened.

    Args:
      path: the archive; also something in a package.
      keys: the arrays that are wanted, at least two; others may be there.

    Raises:
      DataError: the file is damaged or has no such arrays.
    """
    with reading(path), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        found = sorted(getattr(archive, "files", []))  # a lone .npy under a wrong name loads as a plain array
        if not set(keys) <= set(found):
            wanted = f"{', '.join(keys[:-1])} and {keys[-1]}"
            raise DataError(f"{path}: wanted an npz archive of {wanted}, found {found}")
        for member in archive.zip.infolist():
            check_size(path, member.file_size, member.compress_size)
        arrays = {key: archive[key] for key in keys}
        for key, array in arrays.items():
            if not isinstance(array, np.ndarray):  # of what does not begin like an array NumPy gives the bytes
                raise DataError(f"{path}: its {key} are no array, it may be damaged")
        return tuple(arrays.values())


def idx_names(name: str) -> tuple[str, ...]:
    """The names that an idx file has: as published, unzipped, and with a dot; only the name itself of any other file.

    >>> idx_names("train-images-idx3-ubyte.gz")[1:]
    ('train-images-idx3-ubyte', 'train-images.idx3-ubyte.gz', 'train-images.idx3-ubyte')
    """
    if not name.endswith("-ubyte.gz"):
        return (name,)
    plain = name.removesuffix(".gz")
    return tuple(stem + suffix for stem in (plain, plain.replace("-idx", ".idx")) for suffix in (".gz", ""))


def stored(path: pathlib.Path) -> pathlib.Path:
    """The file of the first of its `idx_names` that exists; the path itself if none does."""
    # No folder: some archives have the file in a folder of its name.
    return next((found for found in map(path.with_name, idx_names(path.name)) if found.is_file()), path)


def open_unzipped(path: pathlib.Path) -> BinaryIO:
    """The content of a file, zipped or not, whatever its name says: browsers unzip without changing it."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if zipped else path.open("rb")


def read_idx(path: pathlib.Path, rank: int) -> np.ndarray:
    """An array of bytes in the format of MNIST's first publication.

    Args:
      path: the file, gzipped or not.
      rank: 3 for images [N, H, W], 1 for labels [N].

    Raises:
      DataError: the file is damaged or something else.
    """
    with reading(path), open_unzipped(path) as file:
        header = file.read(4 + 4 * rank)
        # Two zeros, 8 for unsigned bytes, the rank; then the sizes.
        if len(header) < 4 + 4 * rank or header[:4] != bytes([0, 0, 8, rank]):
            raise DataError(
                f"{path}: wanted an idx file of bytes of rank {rank}, got one that begins with {header[:4]!r}"
            )
        shape = np.frombuffer(header, ">u4", offset=4).tolist()
        num_bytes = math.prod(shape)
        check_size(path, num_bytes, path.stat().st_size)
        content = file.read(num_bytes + 1)  # one more, to see the end
        if len(content) != num_bytes:
            found = len(content) if len(content) < num_bytes else "more"
            raise DataError(f"{path}: its header promises {shape}, {num_bytes} bytes, got {found}")
        return np.frombuffer(content, np.uint8).reshape(shape)


def write_npz(path: pathlib.Path, **arrays: np.ndarray) -> None:
    """Writes a compressed NumPy archive that is never seen half written; folders are made as needed.

    Args:
      path: the file to write or replace.
      **arrays: the arrays by key, any shape and dtype.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Same folder, so that the replacement is a rename; not `tempfile`, whose files no other user may read.
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
