"""`fedmd-jax data`: which data sets there are, and preparing one."""

import os
import pathlib
from collections.abc import Sequence

from fedmd_jax import hints
from fedmd_jax.data.catalogue import CATALOGUE, DataSet, find_data_set, find_files
from fedmd_jax.data.files import DataError, idx_names
from fedmd_jax.data.preparing import prepare_data
from fedmd_jax.data.sources import data_folder, find_arrays, find_idx, find_tfds, records_info

USAGE = """\
usage: fedmd-jax data list [--data-dir DIR]                     what there is, and what of it DIR has
       fedmd-jax data prepare NAME [--from FOLDER] [--data-dir DIR] [--no-checksums]

prepare writes NAME into DIR, from its files in FOLDER (no network, no tensorflow) or by downloading them (needs both).
DIR is by default FEDMD_JAX_DATA, else TFDS_DATA_DIR, else ~/tensorflow_datasets. Where it is another, tell runs:
fedmd-jax run ... --data.data-dir DIR (--data-dir is of data only), or set FEDMD_JAX_DATA=DIR for both.
prepare NAME --help says which files it wants. --no-checksums takes files that are not the published ones to the bit.
"""
_COMMANDS = ("list", "prepare")
_WITH_VALUE, _FLAGS = ("--from", "--data-dir"), ("--no-checksums",)
_HELP = ("-h", "--help")
_EMBEDDED = (
    ("embedded/digits", "a part of mnist", 10, (8_000, 1_000)),
    ("embedded/letters", "the letters a to f of emnist/letters, a part", 6, (1_800, 2_400)),
)


def run(argv: Sequence[str]) -> None:
    """Does what the arguments after `fedmd-jax data` say.

    Args:
      argv: the arguments.

    Raises:
      ValueError: they ask for what cannot be, or the data is missing or damaged.
      OSError: a data set cannot be written.
    """
    if not argv or set(argv) & set(_HELP):
        print(USAGE, end="")
        for name in CATALOGUE.keys() & set(argv):
            print(f"\n{files_of(CATALOGUE[name])}")
        return
    command, *rest = argv
    if command not in _COMMANDS:
        raise ValueError(hints.unknown("data command", command, _COMMANDS))
    names, options = _parse(command, rest)
    if command == "list":
        if names:
            raise ValueError(f"data list wants no name, got {names[0]!r}")
        print(table(options.get("--data-dir")))
        return
    if len(names) != 1:
        raise ValueError(
            f"data prepare wants one NAME, got {' '.join(names) or 'none'}; known are {', '.join(CATALOGUE)}"
        )
    _prepare(names[0], options)


def _parse(command: str, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names, and options with their values."""
    with_value, flags = (_WITH_VALUE, _FLAGS) if command == "prepare" else (("--data-dir",), ())
    names, options, words = [], {}, list(words)
    while words:
        option, equals, value = words.pop(0).partition("=")
        if not option.startswith("-"):
            names.append(option + equals + value)
        elif option in flags:
            if equals:
                raise ValueError(f"{option} takes no value, got {value!r}")
            options[option] = ""
        elif option in with_value:
            if not equals and (not words or words[0].startswith("--")):
                raise ValueError(f"{option} wants a folder, got nothing")
            options[option] = value if equals else words.pop(0)
        else:
            raise ValueError(hints.unknown("option", option, (*with_value, *flags)))
    return names, options


def _prepare(name: str, options: dict[str, str]) -> None:
    data_set = find_data_set(name)
    print(f"preparing {name} ...", flush=True)
    prepared = prepare_data(
        name,
        source=options.get("--from"),
        data_dir=options.get("--data-dir"),
        checksums="--no-checksums" not in options,
    )
    done = "prepared in" if prepared.is_new else "there already, nothing is changed (delete it to prepare it again):"
    print(f"{name} {done} {prepared.path}: {_sizes(prepared.sizes, data_set)}")


def files_of(data_set: DataSet) -> str:
    """From what a data set can be prepared, as text of several lines."""
    lines = [f"{data_set.name}: {data_set.title}", "--from takes a folder with one of"]
    for source in data_set.sources:
        lines.append(f"* {source.title}: there, or under {' or '.join(source.folders)},")
        lines += [f"  {file}" for file in source.checksums]
        if any(len(idx_names(file)) > 1 for file in source.checksums):
            lines.append("  (or unzipped, or named like train-images.idx3-ubyte)")
    download = "has no download" if data_set.url is None else f"is downloaded from {data_set.url} without --from"
    return "\n".join([*lines, f"{data_set.name} {download}"])


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
    return f"prepared, {version.name}, {_sizes(sizes, data_set)}{remark}"


def _sizes(sizes, data_set):
    """How many examples there are, and how many there could be."""
    own = ", ".join(f"{sizes[split]:,} {split}" for split in sorted(sizes, reverse=True))
    if data_set.sizes is None or data_set.sizes == (sizes.get("train"), sizes.get("test")):
        return own
    return f"{own} (a part: the whole has {data_set.sizes[0]:,} and {data_set.sizes[1]:,})"
