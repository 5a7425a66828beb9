"""Loads images from the wheel, from a folder of files, or from TensorFlow Datasets; never from the network.

`load_images("mnist", "train")` searches one folder (`data_dir`, else `FEDMD_JAX_DATA`, else the directory of TensorFlow
Datasets) for the following, in this order:

1. Plain arrays, `mnist/train.npz`, the format that `save_images` writes: a NumPy archive of `images`, uint8
   [N, H, W, C], `labels`, integers [N] from 0, and columns [N] of any other name for `load_column`. For a name with a
   configuration, such as `emnist/letters`, the folder is `emnist/letters` or `emnist_letters`. This is the way to bring
   your own data.
2. The original files of the MNIST family, in idx format: `mnist/train-images-idx3-ubyte.gz`, `mnist/t10k-...` and, for
   EMNIST, `emnist_letters/emnist-letters-train-images-idx3-ubyte.gz` and so on. They may be unzipped
   (`train-images-idx3-ubyte`) and have a dot in their names (`train-images.idx3-ubyte`).
3. A data set that TensorFlow Datasets has prepared as array_record, `mnist/3.0.1/`. Reading the records needs no
   tensorflow, but is slow (MNIST takes 9 s). `fedmd-jax data prepare` therefore puts plain arrays of the same rows
   beside them, `mnist/3.0.1/train.npz`, which count as plain arrays (0.3 s).

4. A folder of images by class, `my_scans/train/CLASS/*.png` and `my_scans/test/CLASS/*.png`; without them, the folder
   itself, `my_scans/CLASS/*.png`, is the split train. Classes are numbered in the order of their names in the split
   train. The name may also be a path, such as `~/my_scans`.

EMNIST images are stored transposed and its letters are numbered from 1; they are returned upright and numbered from 0.
Rows are returned in the order of the original files, also from the shuffled records of TensorFlow Datasets, so that a
seed selects the same images from every source.
"""

import importlib.resources
import json
import os
import pathlib
import re

import numpy as np

from fedmd_jax.checks import value_errors_as
from fedmd_jax.data import files
from fedmd_jax.data.adapters import arrays_from_folder, class_names, image_files
from fedmd_jax.data.files import DataError, Images

_SPLITS = ("train", "test")  # of the embedded data and of idx files; other files may have any
_IMAGES = ["images", "labels"]
_FEATURES = {"images": "image", "labels": "label"}  # names in TensorFlow Datasets
_NO_COLUMNS = ("path", "file", "allow_pickle")  # arguments of NumPy and `write_npz`
_EMBEDDED = ("embedded/digits", "embedded/letters")


def load_images(name: str, split: str, *, data_dir: str | os.PathLike | None = None) -> Images:
    """Loads one split of a data set. The module's docstring lists the sources.

    Args:
      name: `"embedded/digits"` (MNIST, 8,000 and 1,000 images) or `"embedded/letters"` (EMNIST a-f, 1,800 and 2,400),
        which are part of this package; else a name as in TensorFlow Datasets: `"mnist"`, `"emnist/letters"`; or the
        path of a folder of images by class.
      split: `"train"` or `"test"`, or any other split that the files have. Slices such as `"train[:10%]"` are refused.
      data_dir: the folder to look in. Default: the environment variable FEDMD_JAX_DATA, else TFDS_DATA_DIR, else
        `~/tensorflow_datasets`.

    Returns:
      All images of the split, uint8 [N, H, W, C], and their labels, int32 [N]. The stock builder of `emnist/letters` in
      TensorFlow Datasets loses a third of the images and the letters t-z of the test split: use `fedmd-jax data
      prepare`, or the original files.

    Raises:
      DataError: no source is found, a file is damaged or has other content, or a name is invalid.

    Example:
      >>> import fedmd_jax as fmd
      >>> images, labels = fmd.data.load_images("embedded/letters", "test")
      >>> images.shape, images.dtype, labels.shape, labels.dtype
      ((2400, 28, 28, 1), dtype('uint8'), (2400,), dtype('int32'))
    """
    path, arrays = _read(name, split, _IMAGES, data_dir)
    return files.check_images(*arrays, path)


def load_column(name: str, split: str, column: str, *, data_dir: str | os.PathLike | None = None) -> np.ndarray:
    """Loads a column of further information on each image, such as its writer or its superclass.

    Args:
      name: name of the data set, as for `load_images`.
      split: name of the split.
      column: `"writer"` of `leaf/femnist`, strings; `"coarse_label"` of `cifar100`, from 0 to 19; `"id"` of `cifar10`
        and `cifar100`, strings; or another that was given to `save_images`.
      data_dir: the folder to look in, as for `load_images`.

    Returns:
      The column, [N], integers or strings, row for row that of `load_images`.

    Raises:
      DataError: no source is found, it has no such column, or a file is damaged.

    Example:
      >>> import tempfile, numpy as np, fedmd_jax as fmd
      >>> pixels, labels, writer = np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 1]), np.array(["ann", "bob"])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = fmd.data.save_images(folder, "notes", "train", pixels, labels, writer=writer)
      ...     fmd.data.load_column("notes", "train", "writer", data_dir=folder).tolist()
      ['ann', 'bob']
    """
    path, (labels, values) = _read(name, split, ["labels", column], data_dir)
    return files.check_columns({column: values}, len(labels), path)[column]


def save_images(
    folder: str | os.PathLike, name: str, split: str, images: np.ndarray, labels: np.ndarray, **columns: np.ndarray
) -> pathlib.Path:
    """Writes a split as `{folder}/{name}/{split}.npz`, where `load_images` with `data_dir=folder` finds it first.

    The file is written atomically and replaces an existing one.

    Args:
      folder: the data folder; created if missing.
      name: name of the data set, such as `"my_scans"` or `"my_scans/small"`.
      split: name of the split, such as `"train"`.
      images: pixels, [N, H, W, C], uint8.
      labels: classes from 0, [N], integers.
      **columns: further information on each image, such as `writer`, for `load_column`: [N], integers or strings.

    Returns:
      The path of the file.

    Raises:
      DataError: the arrays or the names are invalid; nothing is written.

    Example:
      >>> import tempfile, numpy as np, fedmd_jax as fmd
      >>> pixels, labels = np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 1])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = fmd.data.save_images(folder, "dots", "train", pixels, labels)
      ...     fmd.data.load_images("dots", "train", data_dir=folder).labels
      array([0, 1], dtype=int32)
    """
    _check_name(name)
    _check_split(split)
    if name.startswith("embedded/"):
        raise DataError(f"data set {name!r} cannot be written: names under embedded/ belong to the package")
    for column in columns:
        if not re.fullmatch(r"\w{1,100}", column) or column in _NO_COLUMNS:
            raise DataError(
                f"save_images: a column is named like 'writer', not {' or '.join(_NO_COLUMNS)}, got {column!r:.80}"
            )
    path = files.user_path(folder) / name / f"{split}.npz"
    arrays = files.check_images(images, labels, "save_images")
    columns = files.check_columns(columns, len(arrays.labels), "save_images")
    files.write_npz(path, **arrays._asdict(), **columns)
    return path


def _read(name, split, columns, data_dir):
    """The path of a split of the first source that is found, and columns of it."""
    _check_split(split)
    if isinstance(name, str) and not _is_name(name) and os.path.isdir(os.path.expanduser(name)):
        return _read_images_by_class(files.user_path(name), split, columns)
    _check_name(name)
    if name.startswith("embedded/"):
        return _read_embedded(name, split, columns)
    folder, origin = data_folder(data_dir)
    if path := find_arrays(folder, name, split):
        return path, files.read_npz(path, columns)
    if paths := find_idx(folder, name, split):
        if columns != _IMAGES:
            raise DataError(f"{paths[0]} has images and labels only, wanted the column {columns[-1]!r}")
        return paths[0], upright_emnist(name, files.read_idx(paths[0], 3)[..., None], files.read_idx(paths[1], 1))
    if path := find_tfds(folder, name):
        arrays = read_records(path, split, [_FEATURES.get(column, column) for column in columns])
        return path, upright_emnist(name, *arrays) if columns == _IMAGES else arrays
    for place in (folder / name, files.user_path(name)):
        if _split_folder(place, split):
            return _read_images_by_class(place, split, columns)
    raise DataError(_not_found(folder, origin, name, split))


def _split_folder(folder, split):
    """The folder of a split of images by class; None if it has no images."""
    has_splits = any((folder / each).is_dir() for each in _SPLITS)
    path = folder if split == "train" and not has_splits else folder / split
    return path if path.is_dir() and any(image_files(path / name) for name in class_names(path)) else None


@value_errors_as(DataError)
def _read_images_by_class(folder, split, columns):
    path, train = _split_folder(folder, split), _split_folder(folder, "train")
    if path is None or train is None:
        wanted = f"{'train' if train is None else split}/CLASS/*.png"
        raise ValueError(f"{folder}: wanted a folder of images by class, {wanted}, found no image there")
    if columns != _IMAGES:
        raise ValueError(f"{path} has images and labels only, wanted the column {columns[-1]!r}")
    classes, found = class_names(train), class_names(path)
    if not set(found) <= set(classes):
        raise ValueError(f"{path} has the classes {sorted(set(found) - set(classes))}, which {train} does not have")
    images, labels = arrays_from_folder(path, classes=found)
    return path, (images, np.array([classes.index(name) for name in found])[labels])


def _read_embedded(name, split, columns):
    if name not in _EMBEDDED:
        raise DataError(f"the embedded data sets are {' and '.join(_EMBEDDED)}, got {name!r}")
    if split not in _SPLITS:
        raise DataError(f"{name} has the splits {' and '.join(_SPLITS)}, got {split!r}")
    path = importlib.resources.files("fedmd_jax.data.embedded") / "digits_and_letters.npz"
    return path, files.read_npz(path, [f"{name.removeprefix('embedded/')}_{split}_{column}" for column in columns])


def _check_name(name):
    """Checks that a name can be part of a path within the data folder."""
    if not _is_name(name):
        raise DataError(
            f"a data set is named like 'mnist' or 'emnist/letters', or is a folder of images by class, got {name!r:.80}"
        )


def _check_split(split):
    if not isinstance(split, str) or not re.fullmatch(r"\w{1,100}", split):
        raise DataError(
            f"a split is a plain name such as 'train' or 'test' (slice the arrays yourself), got {split!r:.80}"
        )


def _is_name(name):
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]{,99}(/\w[\w.-]{,99})?", name)


def _not_found(folder, origin, name, split):
    paths = [*_array_files(folder, name, split), *_idx_files(folder, name, split)[:1]]
    wanted = ", ".join(str(path.relative_to(folder)) for path in paths)
    if not folder.is_dir():
        origin += "; there is no such folder"
    return (
        f"no data set {name!r} with split {split!r} in {folder} (from {origin}): "
        f"wanted {wanted}, images {name}/{split}/CLASS/*.png or a TFDS folder {name}/VERSION; "
        f"set FEDMD_JAX_DATA or data_dir to a folder that has one of them, write one with fedmd_jax.data.save_images, "
        f"or prepare one with fedmd-jax data prepare (fedmd-jax data list names what it knows)"
    )


# The folder and its content. A `find` function returns None if there is no file of its kind.


def data_folder(data_dir: str | os.PathLike | None) -> tuple[pathlib.Path, str]:
    """The data folder, and which setting named it.

    Args:
      data_dir: the folder, if given.
    """
    if data_dir is not None:
        return files.user_path(data_dir), "data_dir"
    for variable in ("FEDMD_JAX_DATA", "TFDS_DATA_DIR"):
        if value := os.environ.get(variable):
            return files.user_path(value), variable
    return files.user_path("~/tensorflow_datasets"), "the default, FEDMD_JAX_DATA is not set"


def _array_files(folder, name, split):
    return [folder / each / f"{split}.npz" for each in dict.fromkeys((name, name.replace("/", "_")))]


def find_arrays(folder: pathlib.Path, name: str, split: str) -> pathlib.Path | None:
    """The file of plain arrays of a split: by itself first, then beside records.

    Args:
      folder: the data folder.
      name: name of the data set.
      split: name of the split.
    """
    candidates = _array_files(folder, name, split)
    if version := find_tfds(folder, name):
        candidates.append(version / f"{split}.npz")
    return next((path for path in candidates if path.is_file()), None)


def _idx_files(folder, name, split):
    """Published file names of images and labels; none if the publisher has no such split."""
    if split not in _SPLITS:
        return []
    base, _, config = name.partition("/")
    stem = f"{base}-{config}-{split}" if config else {"train": "train", "test": "t10k"}[split]
    place = folder / name.replace("/", "_")
    return [files.stored(place / f"{stem}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")]


def find_idx(folder: pathlib.Path, name: str, split: str) -> list[pathlib.Path] | None:
    """The original files of a split, images and labels.

    Args:
      folder: the data folder.
      name: name of the data set.
      split: name of the split.
    """
    # One of the two is enough: the reader reports the other as missing.
    paths = _idx_files(folder, name, split)
    return paths if any(path.is_file() for path in paths) else None


def find_tfds(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """The newest prepared version. A version that is being written is in a folder with another name.

    Args:
      folder: the data folder.
      name: name of the data set.
    """
    versions = {}
    for path in (folder / name).glob("*/dataset_info.json"):
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name):
            versions[tuple(map(int, path.parent.name.split(".")))] = path.parent
    return versions[max(versions)] if versions else None


# The readers.


def records_info(path: pathlib.Path) -> tuple[str, dict[str, int]]:
    """Reads `dataset_info.json` without TensorFlow Datasets, which takes half a second to import.

    Args:
      path: the folder of the version.

    Returns:
      Its file format, and the number of examples of each split.

    Raises:
      DataError: `dataset_info.json` is damaged.
    """
    with files.reading(path):
        info = json.loads((path / "dataset_info.json").read_text())
        return info["fileFormat"], {each["name"]: sum(map(int, each["shardLengths"])) for each in info["splits"]}


def read_records(path: pathlib.Path, split: str, features: list[str]) -> list[np.ndarray]:
    """Reads columns of a data set that TensorFlow Datasets prepared, in the original order of the rows.

    Args:
      path: the folder of the version.
      split: name of the split.
      features: names of the columns.

    Returns:
      One array per feature, [N, ...]; texts as strings.

    Raises:
      DataError: it is damaged, not array_record, or has no such split or feature.
    """
    # Imported here: it takes half a second, and most callers read something else.
    import tensorflow_datasets as tfds

    # Not `tfds.data_source(name)`, which would look for builder code of the same version and retry the network for
    # minutes.
    with files.reading(path):
        _check_features(json.loads((path / "features.json").read_text()))
        builder = tfds.builder_from_directory(path)
        if split not in builder.info.splits:
            raise DataError(f"{path}: has the splits {sorted(builder.info.splits)}, got {split!r}")
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise DataError(
                f"{path}: wanted a data set prepared with file_format='array_record', which can be read without "
                f"tensorflow, got {builder.info.file_format.value!r}; prepare it again in another data_dir"
            )
        if not set(features) <= set(builder.info.features):
            found = sorted(builder.info.features)
            raise DataError(f"{path}: wanted the features {', '.join(features)}, found {found}")
        others = set(builder.info.features) - set(features)
        source = builder.as_data_source(split=split, decoders=dict.fromkeys(others, tfds.decode.SkipDecoding()))
        # Reading all records at once takes half the time of reading them one by one.
        rows = source.__getitems__(list(range(len(source))))
        order = _places(split, len(rows)) if not builder.info.disable_shuffling else slice(None)
        columns = [np.array([row[feature] for row in rows])[order] for feature in features]
        return [np.strings.decode(column) if column.dtype.kind == "S" else column for column in columns]


def _check_features(part: object) -> None:
    """Refuses features of classes outside TensorFlow Datasets, which imports whatever module a file names."""
    for key, value in part.items() if isinstance(part, dict) else ():
        is_class = key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str) and "." in value
        if is_class and not value.startswith("tensorflow_datasets.core.features."):
            raise ValueError(f"features.json names the class {value!r:.80}, wanted TensorFlow Datasets' own")
        _check_features(value)
    for value in part if isinstance(part, list) else ():
        _check_features(value)


def _places(split, num_rows):
    """Position of each original row among the records, which are sorted by a hash of the row number.

    For a builder that does not number its rows this is an arbitrary order.
    """
    from tensorflow_datasets.core import hashing

    hasher = hashing.Hasher(split)
    sorted_rows = sorted(range(num_rows), key=hasher.hash_key)
    return np.argsort(sorted_rows)


def upright_emnist(name: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Transposes EMNIST images and renumbers its letters, which NIST and TFDS ship transposed and numbered from 1.

    Args:
      name: name of the data set; only `emnist/...` is changed.
      images: images as shipped, [N, H, W, C].
      labels: labels as shipped, [N].

    Returns:
      Upright images, and labels from 0.
    """
    base, _, config = name.partition("/")
    if base != "emnist":
        return images, labels
    # int64, so that a label 0 among the letters becomes -1 and is refused, not 255.
    return images.transpose(0, 2, 1, 3), labels.astype(np.int64) - (config == "letters")
