"""Reading and writing of image files, with errors of one line."""

import contextlib
import gzip
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fedmd_jax.checks import as_array, check_channels_last, one_line, value_errors_as


class DataError(ValueError):
    """A data set is missing, damaged or not the requested one. The message is one line and says what to do.

    Example:
      >>> import fedmd_jax as fmd
      >>> try:
      ...     fmd.data.load_images("embedded/digits", "validation")
      ... except fmd.data.DataError as error:
      ...     print(error)
      embedded/digits has the splits train and test, got 'validation'
    """


class Images(NamedTuple):
    """Labelled images as they are stored, before any scaling.

    Example:
      >>> import fedmd_jax as fmd
      >>> letters = fmd.data.load_images("embedded/letters", "test")
      >>> letters.images.shape, letters.labels.shape
      ((2400, 28, 28, 1), (2400,))
    """

    images: np.ndarray  #: [N, H, W, C], uint8
    labels: np.ndarray  #: [N], int32, from 0


@value_errors_as(DataError)
def check_images(images: np.ndarray, labels: np.ndarray, where: Any) -> Images:
    """Checks arrays and returns them as `Images`.

    Args:
      images: pixels, [N, H, W, C], uint8.
      labels: classes from 0, [N], integers.
      where: origin of the arrays, prefix of the error message.

    Raises:
      DataError: the arrays have other shapes, dtypes or values.
    """
    images, labels = as_array(f"{where}: images", images), as_array(f"{where}: labels", labels)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{where}: images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")
    check_channels_last(str(where), images.shape)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(f"{where}: labels must be integers [N], got {labels.dtype} {list(labels.shape)}")
    if len(images) != len(labels):
        raise ValueError(f"{where}: {len(images)} images but {len(labels)} labels")
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise ValueError(f"{where}: labels must be 0 or more and fit int32, got {labels.min()}..{labels.max()}")
    return Images(np.require(images, requirements=["C", "W"]), labels.astype(np.int32))


@value_errors_as(DataError)
def check_columns(columns: dict[str, np.ndarray], num_rows: int, where: Any) -> dict[str, np.ndarray]:
    """Checks columns of further information on each image and returns them as arrays.

    Args:
      columns: the columns by name, each [N], integers or strings.
      num_rows: number of images, N.
      where: origin of the columns, prefix of the error message.

    Raises:
      DataError: a column has another shape or dtype.
    """
    columns = {name: as_array(f"{where}: column {name!r}", values) for name, values in columns.items()}
    for name, values in columns.items():
        if values.dtype.kind not in "iuU" or values.shape != (num_rows,):
            wanted = f"{where}: column {name!r} must be integers or strings [{num_rows}]"
            raise ValueError(f"{wanted}, got {values.dtype} {list(values.shape)}")
    return columns


@contextlib.contextmanager
def reading(path: Any) -> Iterator[None]:
    """A context that converts any error while a file is read into a one-line error that names the file.

    Args:
      path: the file that is read in this context.

    Raises:
      DataError: reading the file failed.
    """
    try:
        yield
    except (DataError, ImportError):
        raise
    except Exception as error:  # zipfile, zlib, array_record and protobuf share no base class
        raise DataError(f"cannot read {path}, it may be missing or damaged: {reason(error)}") from error


def user_path(path: str | os.PathLike) -> pathlib.Path:
    """A path that a user gave, which may begin with `~`."""
    return pathlib.Path(os.path.expanduser(path))


def reason(error: Exception) -> str:
    """An exception on one line."""
    return one_line(f"{type(error).__name__}: {error}")


def read_npz(path: pathlib.Path, keys: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Reads arrays of a NumPy archive. Pickles are not loaded.

    Args:
      path: the archive, also a resource of a package.
      keys: names of the arrays to read.

    Raises:
      DataError: the file is damaged or lacks one of the arrays.
    """
    with reading(path), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        found = sorted(getattr(archive, "files", []))  # a .npy file with another suffix loads as a plain array
        if not set(keys) <= set(found):
            raise DataError(f"{path}: wanted an npz archive of {', '.join(keys)}, found {found}")
        return tuple(archive[key] for key in keys)


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
    """Reads an array of bytes in the idx format, that of the original MNIST files.

    Args:
      path: the file, gzipped or not.
      rank: 3 for images [N, H, W], 1 for labels [N].

    Raises:
      DataError: the file is damaged or has another format.
    """
    with reading(path), open_unzipped(path) as file:
        header = file.read(4 + 4 * rank)
        # Two zeros, 8 for unsigned bytes, the rank; then the sizes.
        if len(header) < 4 + 4 * rank or header[:4] != bytes([0, 0, 8, rank]):
            raise DataError(
                f"{path}: wanted an idx file of bytes of rank {rank}, got one that begins with {header[:4]!r}"
            )
        shape = np.frombuffer(header, ">u4", offset=4).tolist()
        content = file.read()
        if len(content) != math.prod(shape):
            raise DataError(f"{path}: its header promises {shape}, {math.prod(shape)} bytes, got {len(content)}")
        return np.frombuffer(content, np.uint8).reshape(shape)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` when it is written whole; after an error `path` is as it was before.

    Args:
      path: the file to write or replace.
    """
    # In the same folder, so that the replacement is a rename. Not `tempfile`, whose files other users cannot read.
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # so that the file survives the machine
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_npz(path: pathlib.Path, **arrays: np.ndarray) -> None:
    """Writes a compressed NumPy archive atomically; folders are created as needed.

    Args:
      path: the file to write or replace.
      **arrays: the arrays by key, any shape and dtype.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)
