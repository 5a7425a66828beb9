"""Where images come from: the wheel, a folder of plain files, or TensorFlow Datasets; never the network.

`load_images("mnist", "train")` looks in one folder (`data_dir`, else `FEDMD_JAX_DATA`, else the directory of TensorFlow
Datasets) and takes the first of these that is there:

1. Plain arrays, `mnist/train.npz`, the format that `save_images` writes: a NumPy archive of `images`, uint8
   [N, H, W, C], and `labels`, integers [N] from 0. For a name with a configuration, such as `emnist/letters`, the
   folder is `emnist/letters` or `emnist_letters`. This is the way to bring your own data.
2. The original files of the MNIST family, gzipped idx: `mnist/train-images-idx3-ubyte.gz`, `mnist/t10k-...` and, for
   EMNIST, `emnist_letters/emnist-letters-train-images-idx3-ubyte.gz` and so on.
3. A data set that TensorFlow Datasets has prepared as array_record, `mnist/3.0.1/`. Reading needs no tensorflow, but
   is slow (MNIST takes 9 s, its original files 0.3 s): `save_images` what was read, and it is found as 1 from then on.

EMNIST images are stored transposed and its letters are numbered from 1; whichever file they come from, they leave here
upright and numbered from 0.
"""

import contextlib
import gzip
import importlib.resources
import math
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

_SPLITS = ("train", "test")  # of the embedded data and of idx files; other files may have any
_EMBEDDED = ("embedded/digits", "embedded/letters")


class DataError(ValueError):
    """A data set is missing, damaged or not what was asked for; the message is one line and says what to do."""


class Images(NamedTuple):
    """Labelled images as they are stored, before any scaling."""

    images: np.ndarray  # [N, H, W, C], uint8
    labels: np.ndarray  # [N], int32, from 0


def load_images(name: str, split: str, *, data_dir: str | os.PathLike | None = None) -> Images:
    """Reads one split of a data set; the module's docstring says where from.

    Args:
      name: `"embedded/digits"` (MNIST, 8,000 and 1,000 images) or `"embedded/letters"` (EMNIST a-f, 1,800 and 2,400),
        which are part of this package; else a name as in TensorFlow Datasets: `"mnist"`, `"emnist/letters"`.
      split: `"train"` or `"test"`, or any other split that the files have. Slices such as `"train[:10%]"` are refused.
      data_dir: the folder to look in. Default: the environment variable FEDMD_JAX_DATA, else TFDS_DATA_DIR, else
        `~/tensorflow_datasets`.

    Returns:
      All images of the split, uint8 [N, H, W, C], and their labels, int32 [N]. TensorFlow Datasets has shuffled the
      rows of its files, and its own builder of `emnist/letters` loses a third of the images and the letters t-z of the
      test split: prefer the original files.

    Raises:
      DataError: nothing is there, a file is damaged or holds something else, or a name is not one.

    >>> images, labels = load_images("embedded/letters", "test")
    >>> images.shape, images.dtype, labels.shape, labels.dtype
    ((2400, 28, 28, 1), dtype('uint8'), (2400,), dtype('int32'))
    """
    _check_name(name, split)
    if name.startswith("embedded/"):
        return _load_embedded(name, split)
    folder, origin = _data_folder(data_dir)
    if path := _find_arrays(folder, name, split):
        return _checked(*_read_npz(path), path)
    if paths := _find_idx(folder, name, split):
        return _checked(*_unrotate_emnist(name, _read_idx(paths[0], 3)[..., None], _read_idx(paths[1], 1)), paths[0])
    if path := _find_tfds(folder, name):
        return _checked(*_unrotate_emnist(name, *_read_tfds(path, split)), path)
    raise DataError(_not_found(folder, origin, name, split))


def save_images(
    folder: str | os.PathLike, name: str, split: str, images: np.ndarray, labels: np.ndarray
) -> pathlib.Path:
    """Writes a split as `{folder}/{name}/{split}.npz`, where `load_images` with `data_dir=folder` finds it first.

    The file appears whole or not at all; an existing one is replaced.

    Args:
      folder: the data folder; made if missing.
      name: name of the data set, such as `"my_scans"` or `"my_scans/small"`.
      split: name of the split, such as `"train"`.
      images: pixels, [N, H, W, C], uint8.
      labels: classes from 0, [N], integers.

    Returns:
      The path of the file.

    Raises:
      DataError: the arrays or the names are not such; nothing is written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_images(folder, "dots", "train", np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 1]))
    ...     load_images("dots", "train", data_dir=folder).labels
    array([0, 1], dtype=int32)
    """
    _check_name(name, split)
    if name.startswith("embedded/"):
        raise DataError(f"data set {name!r} cannot be written: names under embedded/ belong to the package")
    path = pathlib.Path(os.path.expanduser(folder)) / name / f"{split}.npz"
    arrays = _checked(images, labels, "save_images")
    write_npz(path, **arrays._asdict())
    return path


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


# What may go wrong in a call of load_images.


def _check_name(name, split):
    """A name or a split becomes part of a path: nothing that climbs out of the folder, nothing that is no name."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise DataError(f"a data set is named like 'mnist' or 'emnist/letters', got {name!r}")
    if not re.fullmatch(r"\w+", split):
        raise DataError(f"a split is a plain name such as 'train' or 'test' (slice the arrays yourself), got {split!r}")


def _checked(images, labels, where):
    """The arrays as `Images`, or a DataError that begins with `where` they are from."""
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise DataError(f"{where}: images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"{where}: labels must be integers [N], got {labels.dtype} {list(labels.shape)}")
    if len(images) != len(labels):
        raise DataError(f"{where}: {len(images)} images but {len(labels)} labels")
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise DataError(f"{where}: labels must be 0 or more and fit int32, got {labels.min()}..{labels.max()}")
    return Images(np.require(images, requirements=["C", "W"]), labels.astype(np.int32))


@contextlib.contextmanager
def _reading(path):
    """Turns whatever a broken file makes the libraries raise into one line that names the file."""
    try:
        yield
    except (DataError, ImportError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib, array_record and protobuf share no base class
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"cannot read {path}, it may be missing or damaged: {reason}") from error


def _not_found(folder, origin, name, split):
    files = [*_array_files(folder, name, split), *_idx_files(folder, name, split)[:1]]
    wanted = ", ".join(str(path.relative_to(folder)) for path in files)
    if not folder.is_dir():
        origin += "; there is no such folder"
    return (
        f"no data set {name!r} with split {split!r} in {folder} (from {origin}): "
        f"wanted {wanted} or a TFDS folder {name}/VERSION; "
        f"set FEDMD_JAX_DATA or data_dir to a folder that has one of them, write one with fedmd_jax.data.save_images, "
        f"or prepare one with tfds.builder({name!r}, file_format='array_record').download_and_prepare(), "
        f"which needs tensorflow and a network"
    )


# The folder, and what is in it. A `_find` function answers None where its kind of file is absent.


def _data_folder(data_dir):
    """The one folder to look in, and who named it."""
    if data_dir is not None:
        return pathlib.Path(os.path.expanduser(data_dir)), "data_dir"
    for variable in ("FEDMD_JAX_DATA", "TFDS_DATA_DIR"):
        if value := os.environ.get(variable):
            return pathlib.Path(os.path.expanduser(value)), variable
    return pathlib.Path(os.path.expanduser("~/tensorflow_datasets")), "the default, FEDMD_JAX_DATA is not set"


def _array_files(folder, name, split):
    return [folder / each / f"{split}.npz" for each in dict.fromkeys((name, name.replace("/", "_")))]


def _find_arrays(folder, name, split):
    return next((path for path in _array_files(folder, name, split) if path.is_file()), None)


def _idx_files(folder, name, split):
    """Images and labels as their publishers name them; none where the publisher has no such split."""
    if split not in _SPLITS:
        return []
    base, _, config = name.partition("/")
    stem = f"{base}-{config}-{split}" if config else {"train": "train", "test": "t10k"}[split]
    return [folder / name.replace("/", "_") / f"{stem}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]


def _find_idx(folder, name, split):
    # One of the two is enough: that the other is missing is then said by its reader.
    paths = _idx_files(folder, name, split)
    return paths if any(path.is_file() for path in paths) else None


def _find_tfds(folder, name):
    """The newest prepared version; a version that is still being written is in a folder of another name."""
    versions = {}
    for path in (folder / name).glob("*/dataset_info.json"):
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name):
            versions[tuple(map(int, path.parent.name.split(".")))] = path.parent
    return versions[max(versions)] if versions else None


# The readers.


def _load_embedded(name, split):
    if name not in _EMBEDDED:
        raise DataError(f"the embedded data sets are {' and '.join(_EMBEDDED)}, got {name!r}")
    if split not in _SPLITS:
        raise DataError(f"{name} has the splits {' and '.join(_SPLITS)}, got {split!r}")
    path = importlib.resources.files("fedmd_jax.data.embedded") / "digits_and_letters.npz"
    return _checked(*_read_npz(path, prefix=f"{name.removeprefix('embedded/')}_{split}_"), path)


def _read_npz(path, *, prefix=""):
    keys = [prefix + "images", prefix + "labels"]
    with _reading(path), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        found = sorted(getattr(archive, "files", []))  # a lone .npy under a wrong name loads as a plain array
        if not set(keys) <= set(found):
            raise DataError(f"{path}: wanted an npz archive of {keys[0]} and {keys[1]}, found {found}")
        return tuple(archive[key] for key in keys)


def _read_idx(path, rank):
    """An array of bytes in the format of MNIST's first publication: [N, H, W] for rank 3, [N] for rank 1."""
    with _reading(path):
        raw = gzip.decompress(path.read_bytes())
        start = 4 + 4 * rank
        # Two zeros, 8 for unsigned bytes, the rank; then the sizes.
        if len(raw) < start or raw[:4] != bytes([0, 0, 8, rank]):
            raise DataError(f"{path}: wanted an idx file of bytes of rank {rank}, got one that begins with {raw[:4]!r}")
        shape = np.frombuffer(raw, ">u4", count=rank, offset=4).tolist()
        if len(raw) - start != math.prod(shape):
            raise DataError(f"{path}: its header promises {shape}, {math.prod(shape)} bytes, got {len(raw) - start}")
        return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _read_tfds(path, split):
    # Imported here: it takes half a second, and most callers read something else.
    import tensorflow_datasets as tfds

    # Not `tfds.data_source(name)`: given a folder, TFDS neither looks for builder code of the same version nor for a
    # network, where it would retry for minutes.
    with _reading(path):
        builder = tfds.builder_from_directory(path)
        if split not in builder.info.splits:
            raise DataError(f"{path}: has the splits {sorted(builder.info.splits)}, got {split!r}")
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise DataError(
                f"{path}: wanted a data set prepared with file_format='array_record', which can be read without "
                f"tensorflow, got {builder.info.file_format.value!r}; prepare it again in another data_dir"
            )
        if not {"image", "label"} <= set(builder.info.features):
            raise DataError(f"{path}: wanted the features image and label, found {sorted(builder.info.features)}")
        source = builder.as_data_source(split=split)
        # Tens of thousands of records are read in half the time of one by one.
        rows = source.__getitems__(list(range(len(source))))
        return np.stack([row["image"] for row in rows]), np.array([row["label"] for row in rows])


def _unrotate_emnist(name, images, labels):
    """The one place that knows how NIST ships EMNIST, in idx files and, passed on unchanged, in TFDS."""
    base, _, config = name.partition("/")
    if base != "emnist":
        return images, labels
    # int64, so that a label 0 among the letters becomes -1 and is refused, not 255.
    return images.transpose(0, 2, 1, 3), labels.astype(np.int64) - (config == "letters")
