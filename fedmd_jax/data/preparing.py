"""Prepares a data set: records that TensorFlow Datasets reads, and plain arrays of the same rows beside them.

Both are written: records can be read with `tfds.data_source(name, data_dir=...)`, with features and citation, but
reading them takes seconds to half a minute; `load_images` reads the arrays. They are in one folder, `mnist/3.0.1/`, so
that a single rename publishes everything at once. The records are array_record, which `tfds.load` does not read: it
needs tfrecord, which needs tensorflow.
"""

import contextlib
import importlib.util
import io
import os
import pathlib
import tempfile
import urllib.error
import urllib.request
from typing import NamedTuple

import numpy as np

from fedmd_jax.data.catalogue import DataSet, find_data_set, read_original, wanted
from fedmd_jax.data.files import DataError, check_columns, check_images, reason, user_path, write_npz
from fedmd_jax.data.originals import SPLITS, Original
from fedmd_jax.data.sources import data_folder, find_tfds, read_records, records_info, upright_emnist

_PATIENCE = 5  # seconds to wait for a server


class Prepared(NamedTuple):
    """A prepared data set."""

    path: pathlib.Path  #: the folder of its version
    sizes: dict[str, int]  #: split -> number of examples
    is_new: bool  #: False if it existed before


def prepare_data(
    name: str,
    *,
    source: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
    checksums: bool = True,
) -> Prepared:
    """Prepares a data set for `load_images` and for `tfds.data_source`.

    The data set is published atomically. It is written into a hidden folder `.{name}.preparing.*` of the data folder,
    which only a killed process leaves behind; it can be deleted.

    Args:
      name: name of a data set in the catalogue.
      source: the folder with its files, see `catalogue`; needs neither a network nor tensorflow. None to download it,
        which needs both.
      data_dir: the data folder, as for `load_images`.
      checksums: whether the files must have the known checksums.

    Returns:
      Its path and sizes. An existing data set is not changed.

    Raises:
      DataError: the name is unknown, a file is missing, damaged or another one, there is no network or no tensorflow,
        or another data set is in its place.
      OSError: writing failed.

    Example:
      >>> import fedmd_jax as fmd
      >>> def prepare_and_load(source, data_dir):  # source: a folder with the files of MNIST, as they are published
      ...     fmd.data.prepare_data("mnist", source=source, data_dir=data_dir)
      ...     return fmd.data.load_images("mnist", "train", data_dir=data_dir)
    """
    data_set = find_data_set(name)
    folder, _ = data_folder(data_dir)
    if path := find_tfds(folder, name):
        return Prepared(path, _check_usable(path, data_set), is_new=False)
    if source is None:
        _check_downloadable(data_set)
    original = None if source is None else read_original(data_set, user_path(source), checksums=checksums)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name.replace('/', '_')}.preparing.", dir=folder) as work:
        work = pathlib.Path(work)
        made = _download(name, work, folder / "downloads") if original is None else _write(name, original, work)
        path = folder / made.relative_to(work)
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()  # another process may have been faster
        if is_new:
            made.rename(path)
    return Prepared(path, _check_usable(path, data_set), is_new)


def _check_usable(path, data_set):
    """The sizes of an existing data set, after a check that it is complete."""
    file_format, sizes = records_info(path)
    if file_format != "array_record":
        raise DataError(
            f"{path} is prepared as {file_format}, wanted array_record, which can be read without tensorflow; "
            f"take another data folder"
        )
    if data_set.name == "emnist/letters" and sizes.get("train") == 88_800:
        raise DataError(
            f"{path} is from the stock builder, which has 88,800 of {data_set.sizes[0]:,} training images and no test "
            f"images of the letters t-z; delete that folder to prepare it whole"
        )
    return sizes


# From files.


def _write(name: str, original: Original, work: pathlib.Path) -> pathlib.Path:
    """Writes records and arrays of these rows; returns their folder."""
    arrays = {split: _arrays(name, table, f"{name}, {split}") for split, table in original.tables.items()}
    from fedmd_jax.data.builders import builder_of_files

    builder = builder_of_files(name, original, work)
    # Its progress bars and the path that it prints, which is renamed afterwards, would confuse.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()
    path = pathlib.Path(builder.data_path)
    for split, columns in arrays.items():
        write_npz(path / f"{split}.npz", **columns)
    return path


def _arrays(name: str, table: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Converts a table to the format of `save_images`."""
    images = check_images(*upright_emnist(name, table["image"], table["label"]), where)
    others = {column: values for column, values in table.items() if column not in ("image", "label")}
    return images._asdict() | check_columns(others, len(images.labels), where)


# From the network.


def _check_downloadable(data_set: DataSet) -> None:
    """Raises at once if a download would fail after minutes of retries."""
    remedy = f"prepare it with --from a folder of {wanted(data_set)}"
    if data_set.url is None:
        raise DataError(f"there is no download of {data_set.name}: {remedy}")
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"downloading {data_set.name} needs tensorflow, which is not installed: install it, or {remedy}"
        )
    request = urllib.request.Request(data_set.url, method="HEAD", headers={"User-Agent": "fedmd-jax"})
    try:
        urllib.request.urlopen(request, timeout=_PATIENCE).close()
    except urllib.error.HTTPError as error:
        error.close()  # the server answers, and may accept GET
    except OSError as error:
        raise DataError(f"no network, cannot reach {data_set.url} ({reason(error)}): {remedy}") from error


def _download(name: str, work: pathlib.Path, downloads: pathlib.Path) -> pathlib.Path:
    """Downloads records with the builder, and writes arrays of their rows."""
    import tensorflow_datasets as tfds

    from fedmd_jax.data.builders import BUILDERS

    builder = BUILDERS[name](data_dir=work, file_format="array_record")
    try:
        builder.download_and_prepare(
            download_dir=downloads, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except Exception as error:  # checksums, archives and tensorflow have errors of their own
        raise DataError(f"cannot download and prepare {name}: {reason(error)}") from error
    path = pathlib.Path(builder.data_path)
    features = list(builder.info.features)
    for split in SPLITS:
        table = dict(zip(features, read_records(path, split, features), strict=True))
        write_npz(path / f"{split}.npz", **_arrays(name, table, path))
    return path
