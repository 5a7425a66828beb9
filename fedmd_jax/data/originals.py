"""Readers of the published files of data sets.

A table has the columns of the data set's features in TensorFlow Datasets, unchanged (EMNIST's images transposed and its
letters from 1): `image`, uint8 [N, H, W, C], `label`, integers [N], and others [N].
"""

import json
import pathlib
import tarfile
from typing import NamedTuple

import numpy as np

from fedmd_jax.checks import as_array, describe_value, one_line
from fedmd_jax.data.files import DataError, read_idx, read_npz, reading

SPLITS = ("train", "test")
LEAF_CLASSES = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")


class Original(NamedTuple):
    """The content of the files of a data set."""

    tables: dict[str, dict[str, np.ndarray]]  #: split -> column -> [N, ...]
    names: dict[str, list[str]]  #: class names of a column, if the files have them


def read_idx_files(paths: list[pathlib.Path]) -> Original:
    """Reads MNIST and EMNIST.

    Args:
      paths: images and labels of train, then of test.

    Raises:
      DataError: a file is damaged.
    """
    tables = {}
    for split, images, labels in zip(SPLITS, paths[::2], paths[1::2], strict=True):
        tables[split] = {"image": read_idx(images, 3)[..., None], "label": read_idx(labels, 1)}
    return Original(tables, {})


def read_cifar10_archive(paths: list[pathlib.Path]) -> Original:
    """Reads the archive `cifar-10-binary.tar.gz`.

    Args:
      paths: the archive.

    Raises:
      DataError: it is damaged.
    """
    batches = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    return _read_cifar_archive(paths[0], "cifar-10-batches-bin", batches, {"label": "batches.meta.txt"})


def read_cifar100_archive(paths: list[pathlib.Path]) -> Original:
    """Reads the archive `cifar-100-binary.tar.gz`.

    Args:
      paths: the archive.

    Raises:
      DataError: it is damaged.
    """
    names = {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"}
    return _read_cifar_archive(paths[0], "cifar-100-binary", {"train": ["train.bin"], "test": ["test.bin"]}, names)


def _read_cifar_archive(path, folder, batches, names):
    """Rows of a byte for each kind of label and 3 x 32 x 32 bytes of pixels; names of classes, one a line."""
    with reading(path), tarfile.open(path) as archive:

        def read(name):
            return archive.extractfile(f"{folder}/{name}").read()

        tables = {}
        for split, files in batches.items():
            raw = np.frombuffer(b"".join(map(read, files)), np.uint8).reshape(-1, len(names) + 3 * 32 * 32)
            labels = {column: raw[:, i] for i, column in enumerate(names)}
            images = np.ascontiguousarray(raw[:, len(names) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            tables[split] = {"id": _ids(split, np.arange(len(raw))), "image": images, **labels}
        return Original(tables, {column: read(file).decode().split() for column, file in names.items()})


def read_cifar10_residuals(paths: list[pathlib.Path]) -> Original:
    """Reads CIFAR-10 with pixels as residuals, see `pixels`: `{train,test}_{residual,labels}` and `label_names`.

    Args:
      paths: the npz archive.

    Raises:
      DataError: it is damaged.
    """
    return _read_residuals(paths[0], {"label": "labels"}, {"label": "label_names"})


def read_cifar100_residuals(paths: list[pathlib.Path]) -> Original:
    """Reads a part of CIFAR-100 with pixels as residuals, see `pixels`; labels and ids are those of the whole data set.

    Args:
      paths: the npz archive of `{train,test}_{residual,fine_labels,coarse_labels,index}` and
        `{fine,coarse}_label_names`.

    Raises:
      DataError: it is damaged.
    """
    columns = {"label": "fine_labels", "coarse_label": "coarse_labels", "index": "index"}
    return _read_residuals(paths[0], columns, {"label": "fine_label_names", "coarse_label": "coarse_label_names"})


def _read_residuals(path, columns, names):
    """Rows of both splits: the arrays `{split}_residual` and those of the columns; class names of columns."""
    with reading(path):
        tables = {}
        for split in SPLITS:
            residual, *values = read_npz(path, [f"{split}_{key}" for key in ("residual", *columns.values())])
            images, table = pixels(residual), dict(zip(columns, values, strict=True))
            ids = _ids(split, table.pop("index", np.arange(len(images))))
            tables[split] = {"id": ids, "image": images, **table}
        texts = read_npz(path, list(names.values()))
        return Original(tables, {column: text.tolist() for column, text in zip(names, texts, strict=True)})


def pixels(residual: np.ndarray) -> np.ndarray:
    """Decodes images from residuals: red and blue minus green, then each pixel minus its neighbours, modulo 256.

    Args:
      residual: [3, N, H, W], uint8.

    Returns:
      Pixels, [N, H, W, 3], uint8.

    >>> pixels(np.array([1, 0, 2, 0, 3, 0], np.uint8).reshape(3, 1, 1, 2)).tolist()
    [[[[3, 2, 5], [3, 2, 5]]]]
    """
    channels = np.cumsum(np.cumsum(residual, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    channels[0] += channels[1]
    channels[2] += channels[1]
    return np.ascontiguousarray(channels.transpose(1, 2, 3, 0))


def _ids(split, index):
    return np.array([f"{split}_{i:05d}" for i in index.tolist()])


def read_leaf_arrays(paths: list[pathlib.Path]) -> Original:
    """Reads LEAF's FEMNIST with arrays `images`, `labels`, `writer`, `writer_names` and LEAF's own split `leaf_test`.

    Args:
      paths: the npz archive.

    Raises:
      DataError: it is damaged.
    """
    keys = ["images", "labels", "writer", "writer_names", "leaf_test"]
    with reading(paths[0]):
        images, labels, writer, writer_names, is_test = read_npz(paths[0], keys)
        if is_test.dtype != bool or (writer < 0).any():  # other numbers would count rows from the end
            raise ValueError("leaf_test must be True or False, and writer a position in writer_names")
        columns = {"image": images[..., None], "label": labels, "writer": writer_names[writer]}
        rows = {"train": ~is_test, "test": is_test}
        return Original({split: {k: v[chosen] for k, v in columns.items()} for split, chosen in rows.items()}, {})


def read_leaf_json(paths: list[pathlib.Path]) -> Original:
    """Reads the output of LEAF's `preprocess.sh`: `train/*.json` and `test/*.json`, black ink on white, from 0 to 1.

    Args:
      paths: the folders `train` and `test`.

    Raises:
      DataError: a file is damaged or missing.
    """
    return Original({split: _read_leaf_folder(path) for split, path in zip(SPLITS, paths, strict=True)}, {})


def _read_leaf_folder(folder):
    images, labels, writers = [], [], []
    for path in sorted(folder.glob("*.json")):
        with reading(path):
            content = json.loads(path.read_text())
            for writer in content["users"]:
                rows = content["user_data"][writer]
                light = np.array(rows["x"])
                if not ((light >= 0) & (light <= 1)).all():
                    raise ValueError(f"pixels of writer {writer!r:.40} must be numbers from 0 to 1")
                ink = 255 - np.rint(255 * light).astype(np.uint8)
                images.append(ink.reshape(len(rows["y"]), 28, 28, 1))
                labels += rows["y"]
                writers += [writer] * len(rows["y"])
    if not labels:
        raise DataError(f"{folder}: wanted LEAF's *.json of FEMNIST, found none with examples")
    return {"image": np.concatenate(images), "label": np.array(labels), "writer": np.array(writers)}


def merge_case(labels: np.ndarray) -> np.ndarray:
    """Maps LEAF's 62 classes to letters without case, then digits: a and A are 0, z and Z are 25, digits 26 to 35.

    Classes 0 to 5 are then the letters a to f, as in EMNIST Letters, and classes above 25 are digits.

    Args:
      labels: classes of `leaf/femnist`, integers 0 to 61, any shape: digits, capitals, small letters.

    Returns:
      Classes from 0 to 35, int32, same shape.

    Raises:
      ValueError: a label is not from 0 to 61.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> fmd.data.merge_case(np.array([0, 9, 10, 36, 35, 61])).tolist()
      [26, 35, 0, 0, 25, 25]
    """
    labels = as_array("labels", labels)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers from 0 to 61, got {describe_value(labels)}")
    if np.any((labels < 0) | (labels > 61)):
        raise ValueError(f"labels must be integers from 0 to 61, got {one_line(str(np.unique(labels).tolist()))}")
    return np.array([*range(26, 36), *range(26), *range(26)], np.int32)[labels]
