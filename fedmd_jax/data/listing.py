"""The known data sets as text: what there is, and in which form a folder has them."""

import os
import pathlib

from fedmd_jax.data.catalogue import CATALOGUE, DataSet, find_files
from fedmd_jax.data.files import DataError, idx_names
from fedmd_jax.data.sources import data_folder, find_arrays, find_idx, find_tfds, records_info

_EMBEDDED = (
    ("embedded/digits", "a part of mnist", 10, (8_000, 1_000)),
    ("embedded/letters", "the letters a to f of emnist/letters, a part", 6, (1_800, 2_400)),
)


def files_of(data_set: DataSet) -> str:
    """The files from which a data set can be prepared, as text of several lines."""
    lines = [f"{data_set.name}: {data_set.title}", "--from takes a folder with one of"]
    for source in data_set.sources:
        lines.append(f"* {source.title}: there, or under {' or '.join(source.folders)},")
        lines += [f"  {file}" for file in source.checksums]
        if any(len(idx_names(file)) > 1 for file in source.checksums):
            lines.append("  (or unzipped, or named like train-images.idx3-ubyte)")
    download = "has no download" if data_set.url is None else f"is downloaded from {data_set.url} without --from"
    return "\n".join([*lines, f"{data_set.name} {download}"])


def titles() -> dict[str, str]:
    """What each of the known data sets is, by name.

    >>> titles()["mnist"]
    'handwritten digits, 28x28 grey'
    """
    return {name: title for name, title, *_ in _EMBEDDED} | {name: each.title for name, each in CATALOGUE.items()}


def table(data_dir: str | os.PathLike | None = None) -> str:
    """The known data sets, and in which form a folder has them.

    Args:
      data_dir: the folder, as for `load_images`.

    Returns:
      Two lines for each.
    """
    folder, origin = data_folder(data_dir)
    lines = [f"data folder: {folder} ({origin})", "", f"{'name':<18}{'classes':>7}{'train':>10}{'test':>9}  found"]
    for name, title, num_classes, sizes in _EMBEDDED:
        lines += _entry(name, num_classes, sizes, "in the package", title)
    for data_set in CATALOGUE.values():
        details = f"{data_set.title}; {data_set.terms}"
        lines += _entry(data_set.name, data_set.num_classes, data_set.sizes, _found(data_set, folder), details)
    return "\n".join(lines)


def _entry(name, num_classes, sizes, found, details):
    train, test = (f"{size:,}" for size in sizes) if sizes else ("varies", "varies")
    return [f"{name:<18}{num_classes:>7}{train:>10}{test:>9}  {found}", f"  {details}"]


def _found(data_set: DataSet, folder: pathlib.Path) -> str:
    """The form that `load_images` reads, in its order; else the files that could be prepared."""
    version = find_tfds(folder, data_set.name)
    arrays = find_arrays(folder, data_set.name, "train")
    if arrays and (version is None or arrays.parent != version):
        return f"plain arrays, {arrays.relative_to(folder)}"
    if not arrays and (paths := find_idx(folder, data_set.name, "train")):
        return f"original files, {paths[0].parent.relative_to(folder)}"
    if version:
        return _prepared(version, data_set, remark="" if arrays else ", records only, slow to read")
    if files := find_files(data_set, folder):
        return f"not prepared, but {files[1][0].relative_to(folder)} is there for prepare --from"
    return "no"


def _prepared(version, data_set, *, remark):
    try:
        file_format, sizes = records_info(version)
    except DataError:
        return f"damaged, {version}"
    if file_format != "array_record":
        return f"prepared as {file_format}, which is not read, {version.name}"
    return f"prepared, {version.name}, {describe_sizes(sizes, data_set)}{remark}"


def describe_sizes(sizes, data_set):
    """The number of examples per split, and of the whole data set if that is another."""
    own = ", ".join(f"{sizes[split]:,} {split}" for split in sorted(sizes, reverse=True))
    if data_set.sizes is None or data_set.sizes == (sizes.get("train"), sizes.get("test")):
        return own
    return f"{own} (a part: the whole has {data_set.sizes[0]:,} and {data_set.sizes[1]:,})"
