"""Data sets prepared from fake files of every known form; CI has no tensorflow, and nothing here has a network."""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmd_jax.data import DataError, load_column, load_images, merge_case, prepare_data, preparing
from fedmd_jax.data.builders import EmnistLetters, LeafFemnist
from fedmd_jax.data.catalogue import CATALOGUE
from fedmd_jax.data.originals import LEAF_CLASSES, pixels
from fedmd_jax.data.sources import find_tfds, read_records, upright_emnist

SIZES = {"train": 9, "test": 4}


def random_images(split, shape):
    rng = np.random.default_rng(SIZES[split])
    return rng.integers(0, 256, (SIZES[split], *shape), np.uint8)


def residuals(images):
    """What `pixels` undoes."""
    channels = images.transpose(3, 0, 1, 2).copy()
    channels[0] -= channels[1]
    channels[2] -= channels[1]
    for axis in (2, 3):
        channels = np.diff(channels, axis=axis, prepend=np.uint8(0))
    return channels


# Files as their publishers make them. Each function returns what must be read: split -> images, labels, columns.


def mnist_files(folder, write_idx):
    expected = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images, labels = random_images(split, (28, 28)), np.arange(SIZES[split]) % 10
        write_idx(folder / "mnist" / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(folder / "mnist" / f"{stem}-labels-idx1-ubyte.gz", labels)
        expected[split] = images[..., None], labels, {}
    return expected


def emnist_files(folder, write_idx):
    expected = {}
    for split, size in SIZES.items():
        images, labels = random_images(split, (28, 28)), 25 - np.arange(size)
        stem = folder / "emnist_letters" / f"emnist-letters-{split}"
        write_idx(stem.with_name(f"{stem.name}-images-idx3-ubyte.gz"), images)
        write_idx(stem.with_name(f"{stem.name}-labels-idx1-ubyte.gz"), labels + 1)
        expected[split] = images.transpose(0, 2, 1)[..., None], labels, {}
    return expected


def cifar_rows(num_kinds):
    rows = {}
    for split, size in SIZES.items():
        labels = [np.arange(size) * 7 % (20 if kind < num_kinds - 1 else 10**num_kinds) for kind in range(num_kinds)]
        ids = np.array([f"{split}_{i:05d}" for i in range(size)])
        rows[split] = random_images(split, (32, 32, 3)), labels, ids
    return rows


def write_tar(path, files):
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def cifar_bytes(images, labels):
    return np.concatenate(
        [np.array(labels, "u1").T, images.transpose(0, 3, 1, 2).reshape(len(images), -1)], axis=1
    ).tobytes()


def names(count, kind):
    return "".join(f"{kind}{i}\n" for i in range(count)).encode()


def cifar10_archive(folder, write_idx):
    rows = cifar_rows(1)
    files = {"batches.meta.txt": names(10, "thing") + b"\n"}
    for i, some in enumerate(np.array_split(np.arange(SIZES["train"]), 5)):
        files[f"data_batch_{i + 1}.bin"] = cifar_bytes(rows["train"][0][some], [rows["train"][1][0][some]])
    files["test_batch.bin"] = cifar_bytes(*rows["test"][:2])
    path = folder / "cifar-10-binary.tar.gz"
    write_tar(folder / "x" / path.name, {f"cifar-10-batches-bin/{name}": content for name, content in files.items()})
    (folder / "x" / path.name).rename(path)
    return {split: (images, labels[0], {"id": ids}) for split, (images, labels, ids) in rows.items()}


def cifar10_residuals(folder, write_idx):
    rows, arrays = cifar_rows(1), {"label_names": np.array([f"thing{i}" for i in range(10)])}
    for split, (images, labels, _) in rows.items():
        arrays |= {f"{split}_residual": residuals(images), f"{split}_labels": labels[0].astype("u1")}
    (folder / "cifar10").mkdir()
    np.savez(folder / "cifar10" / "cifar10.npz", **arrays)
    return {split: (images, labels[0], {"id": ids}) for split, (images, labels, ids) in rows.items()}


def cifar100_archive(folder, write_idx):
    rows = cifar_rows(2)
    files = {"coarse_label_names.txt": names(20, "super"), "fine_label_names.txt": names(100, "fine")}
    files |= {f"{split}.bin": cifar_bytes(images, labels) for split, (images, labels, _) in rows.items()}
    path = folder / "cifar100" / "cifar-100-binary.tar.gz"
    write_tar(path, {f"cifar-100-binary/{name}": content for name, content in files.items()})
    return {split: (images, fine, {"id": ids, "coarse_label": c}) for split, (images, (c, fine), ids) in rows.items()}


def cifar100_residuals(folder, write_idx):
    arrays = {
        f"{kind}_label_names": np.array(names(n, kind).decode().split()) for kind, n in (("fine", 100), ("coarse", 20))
    }
    expected = {}
    for split, (images, (coarse, fine), _) in cifar_rows(2).items():
        index = np.arange(len(fine)) * 5 + 3  # only some rows of the whole
        arrays |= {f"{split}_residual": residuals(images), f"{split}_fine_labels": fine.astype("u1")}
        arrays |= {f"{split}_coarse_labels": coarse.astype("u1"), f"{split}_index": index}
        expected[split] = images, fine, {"id": np.array([f"{split}_{i:05d}" for i in index]), "coarse_label": coarse}
    (folder / "cifar100_fedmd").mkdir()
    np.savez(folder / "cifar100_fedmd" / "cifar100_fedmd.npz", **arrays)
    return expected


def leaf_rows():
    for split, size in SIZES.items():
        yield split, random_images(split, (28, 28)), 61 - np.arange(size), np.arange(size) % 3


def leaf_arrays(folder, write_idx):
    names_ = np.array(["f0001_00", "f0002_11", "f0003_22"])
    expected, parts = {}, []
    for split, images, labels, writer in leaf_rows():
        expected[split] = images[..., None], labels, {"writer": names_[writer]}
        parts.append((images, labels, writer, np.full(len(labels), split == "test")))
    keys = ("images", "labels", "writer", "leaf_test")
    arrays = {key: np.concatenate(some) for key, some in zip(keys, zip(*parts, strict=True), strict=True)}
    order = np.argsort(np.arange(len(arrays["labels"])) % 2, kind="stable")  # train and test in no order
    expected = {
        split: (arrays["images"][o][..., None], arrays["labels"][o], {"writer": names_[arrays["writer"][o]]})
        for split in SIZES
        for o in [order[arrays["leaf_test"][order] == (split == "test")]]
    }
    (folder / "femnist_leaf").mkdir()
    ordered = {key: array[order] for key, array in arrays.items()}
    np.savez(folder / "femnist_leaf" / "femnist_leaf105.npz", writer_names=names_, **ordered)
    return expected


def leaf_json(folder, write_idx):
    expected = {}
    for split, images, labels, writer in leaf_rows():
        by_writer = np.argsort(writer, kind="stable")
        users = {
            f"f000{w}_00": {
                "x": [(1 - image / 255).ravel().tolist() for image in images[writer == w]],
                "y": labels[writer == w].tolist(),
            }
            for w in range(3)
        }
        path = folder / "data" / split / "all_data_0_niid_0_keep_0.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"users": list(users), "num_samples": [], "user_data": users}))
        writers = np.array([f"f000{w}_00" for w in writer[by_writer]])
        expected[split] = images[by_writer][..., None], labels[by_writer], {"writer": writers}
    return expected


FORMS = {
    "mnist": ("mnist", mnist_files),
    "emnist": ("emnist/letters", emnist_files),
    "cifar10 archive": ("cifar10", cifar10_archive),
    "cifar10 npz": ("cifar10", cifar10_residuals),
    "cifar100 archive": ("cifar100", cifar100_archive),
    "cifar100 npz": ("cifar100", cifar100_residuals),
    "leaf npz": ("leaf/femnist", leaf_arrays),
    "leaf json": ("leaf/femnist", leaf_json),
}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def prepare_fake(name, source, data_dir):
    return prepare_data(name, source=source, data_dir=data_dir, checksums=False)


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


# From files.


@pytest.mark.parametrize("form", FORMS)
def test_what_is_prepared_is_what_the_files_have(form, source, tmp_path, write_idx):
    name, write = FORMS[form]
    expected = write(source, write_idx)
    prepared = prepare_fake(name, source, tmp_path / "data")
    assert prepared.is_new
    assert prepared.sizes == SIZES
    assert prepared.path == find_tfds(tmp_path / "data", name)
    for split, (images, labels, columns) in expected.items():
        loaded = load_images(name, split, data_dir=tmp_path / "data")
        np.testing.assert_array_equal(loaded.images, images)
        np.testing.assert_array_equal(loaded.labels, labels)
        for column, values in columns.items():
            np.testing.assert_array_equal(load_column(name, split, column, data_dir=tmp_path / "data"), values)
    assert sorted(everything_in(tmp_path / "data"))[0] == name.split("/")[0]
    assert not list((tmp_path / "data").glob(".*"))


@pytest.mark.parametrize("form", FORMS)
def test_tensorflow_datasets_reads_the_same(form, source, tmp_path, write_idx):
    name, write = FORMS[form]
    expected = write(source, write_idx)
    path = prepare_fake(name, source, tmp_path / "data").path
    for split, (images, labels, columns) in expected.items():
        records = upright_emnist(name, *read_records(path, split, ["image", "label"]))
        np.testing.assert_array_equal(records[0], images)
        np.testing.assert_array_equal(records[1], labels)
        (path / f"{split}.npz").unlink()  # columns come from the records then
        for column, values in columns.items():
            np.testing.assert_array_equal(load_column(name, split, column, data_dir=tmp_path / "data"), values)
        rows = tfds.data_source(name, split=split, data_dir=tmp_path / "data", download=False)
        found = sorted((row["label"], row["image"].tobytes()) for row in rows)
        assert found == sorted(zip(*(read_records(path, split, ["label"])[0], images_of(path, split)), strict=True))


def images_of(path, split):
    return [image.tobytes() for image in read_records(path, split, ["image"])[0]]


def test_classes_have_their_names(source, tmp_path, write_idx):
    cifar100_archive(source, write_idx)
    leaf_json(source, write_idx)
    cifar, leaf = (
        tfds.builder_from_directory(prepare_fake(name, source, tmp_path / "data").path).info
        for name in ("cifar100", "leaf/femnist")
    )
    assert cifar.features["label"].names == [f"fine{i}" for i in range(100)]
    assert cifar.features["coarse_label"].names == [f"super{i}" for i in range(20)]
    assert "".join(leaf.features["label"].names) == "".join(LEAF_CLASSES)


IDX_NAMES = ["{}-idx{}-ubyte", "{}.idx{}-ubyte", "{}.idx{}-ubyte.gz"]


@pytest.mark.parametrize("form", IDX_NAMES)
@pytest.mark.parametrize(("name", "write"), [("mnist", mnist_files), ("emnist/letters", emnist_files)])
def test_idx_files_have_other_names_and_may_be_unzipped(name, write, form, source, tmp_path, write_idx):
    expected = write(source, write_idx)
    for path in list(source.rglob("*.gz")):
        stem, _, rank = path.name.removesuffix("-ubyte.gz").rpartition("-idx")
        renamed = path.with_name(form.format(stem, rank))
        renamed.write_bytes(path.read_bytes() if renamed.suffix == ".gz" else gzip.decompress(path.read_bytes()))
        path.unlink()
    prepare_fake(name, source, tmp_path / "data")
    for folder in (source, tmp_path / "data"):
        for split, (images, labels, _) in expected.items():
            loaded = load_images(name, split, data_dir=folder)
            np.testing.assert_array_equal(loaded.images, images)
            np.testing.assert_array_equal(loaded.labels, labels)


def test_idx_files_may_be_unzipped_under_their_names_and_lie_beside_folders_of_theirs(source, tmp_path, write_idx):
    """Browsers unzip without a word; one archive of MNIST has every file a second time, in a folder of its name."""
    expected = mnist_files(source, write_idx)
    for path in list(source.rglob("*.gz")):
        content = gzip.decompress(path.read_bytes())
        path.write_bytes(content)
        path.with_suffix("").mkdir()
    path.rename(path.with_name(path.name.removesuffix(".gz").replace("-idx", ".idx")))
    loaded = load_images("mnist", "test", data_dir=source), load_images("mnist", "train", data_dir=source)
    for found, split in zip(loaded, ("test", "train"), strict=True):
        np.testing.assert_array_equal(found.images, expected[split][0])
        np.testing.assert_array_equal(found.labels, expected[split][1])


@pytest.mark.parametrize("form", ["{}-idx{}-ubyte.gz", *IDX_NAMES])
def test_checksums_of_idx_files_are_of_their_content(form, source, tmp_path, write_idx, monkeypatch):
    mnist_files(source, write_idx)
    [known] = CATALOGUE["mnist"].sources
    for path in list(source.rglob("*.gz")):
        content = gzip.decompress(path.read_bytes())
        monkeypatch.setitem(known.checksums, path.name, hashlib.sha256(content).hexdigest())
        stem, _, rank = path.name.removesuffix("-ubyte.gz").rpartition("-idx")
        path.unlink()
        renamed = path.with_name(form.format(stem, rank))
        renamed.write_bytes(gzip.compress(content, 1) if renamed.suffix == ".gz" else content)
    assert prepare_data("mnist", source=source, data_dir=tmp_path / "data").sizes == SIZES
    renamed.write_bytes(renamed.read_bytes()[:-1])
    message = complaint("mnist", source=source, data_dir=tmp_path / "other")
    assert message.startswith(f"{renamed}, " if renamed.suffix != ".gz" else f"cannot read {renamed}, ")


def test_files_may_lie_in_the_folder_itself(source, tmp_path, write_idx):
    mnist_files(source, write_idx)
    assert prepare_fake("mnist", source / "mnist", tmp_path / "data").sizes == SIZES


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(4), st.just(5), st.just(3))))
@settings(max_examples=30)
def test_pixels_undoes_residuals(images):
    np.testing.assert_array_equal(pixels(residuals(images)), images)


def test_merge_case_is_about_letters():
    merged = merge_case(np.arange(62))
    assert merged.dtype == np.int32
    order = "abcdefghijklmnopqrstuvwxyz0123456789"
    assert [order[label] for label in merged] == [name.lower() for name in LEAF_CLASSES]
    with pytest.raises(ValueError, match=r"labels must be integers from 0 to 61, got \[-1, 3\]"):
        merge_case(np.array([3, -1]))


# Wrong files.


def complaint(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        prepare_data(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


KNOWN = [
    (name, file, checksum)
    for name, data_set in CATALOGUE.items()
    for source in data_set.sources
    for file, checksum in source.checksums.items()
    if checksum is not None
]


@pytest.mark.parametrize(("name", "file", "checksum"), KNOWN)
def test_a_truncated_file_is_named_with_the_checksum_wanted(name, file, checksum, source, tmp_path, monkeypatch):
    files = next(each.checksums for each in CATALOGUE[name].sources if file in each.checksums)
    for other in files:
        (source / other).write_bytes(b"half")
    # Those before it are whole.
    for other in list(files)[: list(files).index(file)]:
        monkeypatch.setitem(files, other, None)
    message = complaint(name, source=source, data_dir=tmp_path / "data")
    assert message.startswith(f"{source / file}, 4 bytes, is truncated or another file: wanted sha256 {checksum}, ")
    assert everything_in(tmp_path / "data") == []


def test_a_file_that_is_missing_is_named(source, tmp_path, write_idx):
    mnist_files(source, write_idx)
    gone = source / "mnist" / "t10k-labels-idx1-ubyte.gz"
    gone.unlink()
    message = complaint("mnist", source=source, data_dir=tmp_path / "data", checksums=False)
    assert message == f"{gone} is missing, mnist is not whole without it"


def test_the_checksum_found_is_that_of_the_file(source, tmp_path):
    (source / "cifar10.npz").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # sha256 of nothing
    assert f"found {empty}; " in complaint("cifar10", source=source, data_dir=tmp_path / "data")


@pytest.mark.parametrize("form", [form for form in FORMS if form != "leaf json"])
def test_a_file_with_the_right_form_and_another_checksum_needs_leave(form, source, tmp_path, write_idx):
    name, write = FORMS[form]
    write(source, write_idx)
    assert "wanted sha256" in complaint(name, source=source, data_dir=tmp_path / "data")


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_file_is_named_also_without_checksums(form, source, tmp_path, write_idx):
    name, write = FORMS[form]
    write(source, write_idx)
    damaged = max((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-200])
    message = complaint(name, source=source, data_dir=tmp_path / "data", checksums=False)
    assert message.startswith(f"cannot read {damaged}, it may be missing or damaged: ")
    assert everything_in(tmp_path / "data") == []


def test_labels_that_are_none_are_refused_before_anything_is_written(source, tmp_path, write_idx):
    emnist_files(source, write_idx)
    write_idx(source / "emnist_letters" / "emnist-letters-test-labels-idx1-ubyte.gz", np.zeros(SIZES["test"]))
    message = complaint("emnist/letters", source=source, data_dir=tmp_path / "data", checksums=False)
    assert message == "emnist/letters, test: labels must be 0 or more and fit int32, got -1..-1"
    assert not find_tfds(tmp_path / "data", "emnist/letters")
    assert not list((tmp_path / "data").glob(".*"))


def test_nothing_to_prepare_from_is_said(source, tmp_path):
    assert complaint("mnist", source=source / "none") == f"no folder {source / 'none'} to prepare mnist from"
    assert complaint("cifar100", source=source) == (
        f"no files of cifar100 in {source}: wanted cifar-100-binary.tar.gz or cifar100_fedmd.npz, "
        "there or under cifar100, cifar100_fedmd"
    )
    (source / "data" / "train").mkdir(parents=True)
    assert complaint("leaf/femnist", source=source).startswith(f"{source / 'data' / 'test'} is missing, ")
    (source / "data" / "test").mkdir()
    assert complaint("leaf/femnist", source=source).startswith(f"{source / 'data' / 'train'}: wanted LEAF's *.json")
    assert complaint("minst", source=source) == "unknown data set 'minst', perhaps you meant mnist"


# Interrupted, twice at a time, and there already.


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["builder", "arrays", "sync"])
def test_what_breaks_off_leaves_nothing(error, moment, source, tmp_path, write_idx, monkeypatch):
    mnist_files(source, write_idx)

    def break_off(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        if moment == "builder":
            patch.setattr("fedmd_jax.data.builders.rows.png", break_off)
        else:
            patch.setattr(preparing, {"arrays": "write_npz", "sync": "_sync"}[moment], break_off)
        with pytest.raises(type(error)):
            prepare_fake("mnist", source, tmp_path / "data")
    assert everything_in(tmp_path / "data") == []
    assert prepare_fake("mnist", source, tmp_path / "data").is_new


def test_a_killed_preparation_is_not_taken_for_a_finished_one_and_is_cleared_away(source, tmp_path, write_idx):
    mnist_files(source, write_idx)
    program = (
        "import os, sys\n"
        "from fedmd_jax.data import preparing\n"
        "preparing._sync = lambda path: os.kill(os.getpid(), 9)\n"
        "preparing.prepare_data('mnist', source=sys.argv[1], data_dir=sys.argv[2], checksums=False)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, source, tmp_path / "data"], capture_output=True, check=False
    )
    assert killed.returncode == -9
    leftover = tmp_path / "data" / ".mnist.preparing"
    assert list(leftover.rglob("train.npz"))
    with pytest.raises(DataError, match="no data set 'mnist'"):
        load_images("mnist", "train", data_dir=tmp_path / "data")
    assert prepare_fake("mnist", source, tmp_path / "data").is_new
    assert not leftover.exists()


def test_only_one_prepares_at_a_time(source, tmp_path, write_idx):
    mnist_files(source, write_idx)
    with preparing._workplace(tmp_path / "data", "mnist"):
        message = complaint("mnist", source=source, data_dir=tmp_path / "data", checksums=False)
        assert message == f"another process is preparing mnist in {tmp_path / 'data'}"
    assert prepare_fake("mnist", source, tmp_path / "data").is_new


def between(monkeypatch, place, name, other):
    """Lets somebody else act right before the first call of a function."""
    real = getattr(place, name)

    def late(*args, **kwargs):
        monkeypatch.setattr(place, name, real)
        other()
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, late)


@pytest.mark.parametrize("moment", ["before the folder is locked", "before it is opened"])
def test_what_another_has_prepared_meanwhile_is_taken(moment, source, tmp_path, write_idx, monkeypatch):
    mnist_files(source, write_idx)
    others = []
    place, name = (fcntl, "flock") if moment == "before the folder is locked" else (preparing, "read_original")
    between(monkeypatch, place, name, lambda: others.append(prepare_fake("mnist", source, tmp_path / "data")))
    ours = prepare_fake("mnist", source, tmp_path / "data")
    assert [other.is_new for other in others] == [True]
    assert ours == others[0]._replace(is_new=False)
    assert not (tmp_path / "data" / ".mnist.preparing").exists()


def test_a_lock_on_a_folder_that_is_gone_is_none(tmp_path, monkeypatch):
    """Its owner has removed it, and the next one has made another."""
    others = contextlib.ExitStack()
    first = preparing._workplace(tmp_path, "mnist")
    first.__enter__()

    def change():
        first.__exit__(None, None, None)
        others.enter_context(preparing._workplace(tmp_path, "mnist"))

    between(monkeypatch, fcntl, "flock", change)
    ours = preparing._workplace(tmp_path, "mnist")
    with others, pytest.raises(DataError, match="another process is preparing mnist"):
        ours.__enter__()


def test_many_at_once_take_turns(tmp_path):
    barrier, entered = threading.Barrier(4), []

    def work(number):
        barrier.wait()
        while entered.count(number) < 25:
            with contextlib.suppress(DataError), preparing._workplace(tmp_path / "data", "mnist") as path:
                (path / str(number)).mkdir()
                assert [each.name for each in path.iterdir()] == [str(number)]
                entered.append(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert everything_in(tmp_path / "data") == []


def test_what_is_there_is_left_alone(source, tmp_path, write_idx):
    mnist_files(source, write_idx)
    first = prepare_fake("mnist", source, tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    again = prepare_data("mnist", data_dir=tmp_path / "data")  # needs no source, no network
    assert again == first._replace(is_new=False)
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == before


def spoil(path, **changes):
    info = json.loads((path / "dataset_info.json").read_text())
    (path / "dataset_info.json").write_text(json.dumps(info | changes))


def test_what_cannot_be_used_is_not_called_prepared(source, tmp_path, write_idx):
    emnist_files(source, write_idx)
    path = prepare_fake("emnist/letters", source, tmp_path / "data").path
    spoil(path, splits=[{"name": "train", "shardLengths": ["44400", "44400"]}])
    message = complaint("emnist/letters", data_dir=tmp_path / "data")
    assert message.startswith(f"{path} is from the stock builder, which has 88,800 of 124,800 training images ")
    spoil(path, fileFormat="tfrecord")
    message = complaint("emnist/letters", data_dir=tmp_path / "data")
    assert message.startswith(f"{path} is prepared as tfrecord, wanted array_record, ")


# From the network, which is not there.


def test_a_download_without_tensorflow_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert complaint("cifar10", data_dir=tmp_path / "data") == (
        "downloading cifar10 needs tensorflow, which is not installed: install it, or prepare it with --from a folder "
        "of cifar-10-binary.tar.gz or cifar10.npz"
    )
    assert everything_in(tmp_path / "data") == []


def test_what_has_no_download_is_refused_at_once(tmp_path):
    assert complaint("leaf/femnist", data_dir=tmp_path / "data") == (
        "there is no download of leaf/femnist: prepare it with --from a folder of femnist_leaf105.npz or the folders "
        "train and test that LEAF's preprocess.sh fills"
    )


@pytest.fixture
def with_tensorflow(monkeypatch):
    """As far as `find_spec` knows."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_a_download_without_a_network_is_refused_at_once(tmp_path, monkeypatch, with_tensorflow):
    def no_address(*args):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", no_address)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    message = complaint("mnist", data_dir=tmp_path / "data")
    url, files = CATALOGUE["mnist"].url, "train-images-idx3-ubyte.gz and the three files beside it"
    assert message.startswith(f"no network, cannot reach {url} (")
    assert message.endswith(f": prepare it with --from a folder of {files}")
    assert everything_in(tmp_path / "data") == []


@pytest.fixture
def downloaded(source, write_idx, monkeypatch, with_tensorflow):
    """NIST's archive, as if downloaded and extracted; what must come out of it."""
    expected = emnist_files(source, write_idx)
    (source / "emnist_letters").rename(source / "gzip")
    monkeypatch.setattr(preparing.urllib.request, "urlopen", lambda request, timeout: io.BytesIO())
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda self, url: str(source))
    return expected


def test_a_download_is_prepared_in_the_order_of_its_files(downloaded, tmp_path):
    assert prepare_data("emnist/letters", data_dir=tmp_path / "data").sizes == SIZES
    for split, (images, labels, _) in downloaded.items():
        loaded = load_images("emnist/letters", split, data_dir=tmp_path / "data")
        np.testing.assert_array_equal(loaded.images, images)
        np.testing.assert_array_equal(loaded.labels, labels)


@pytest.mark.parametrize("error", [ConnectionError("reset"), RuntimeError("wrong\nchecksum")])
def test_a_download_that_breaks_off_leaves_nothing_and_says_why(error, downloaded, tmp_path, monkeypatch):
    def break_off(self, url):
        raise error

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", break_off)
    message = complaint("emnist/letters", data_dir=tmp_path / "data")
    assert " ".join(f"{type(error).__name__}: {error}".split()) in message
    assert not find_tfds(tmp_path / "data", "emnist/letters")
    assert not list((tmp_path / "data").glob(".*"))


# The builders by themselves, as users of TensorFlow Datasets call them.


def test_the_letters_builder_knows_its_download_and_whom_to_cite(tmp_path):
    builder = EmnistLetters(data_dir=tmp_path)
    (info,) = builder.url_infos.values()
    assert (list(builder.url_infos), info.size) == ([CATALOGUE["emnist/letters"].url], 561_753_746)
    assert info.checksum == "fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e"
    assert "Cohen" in builder.info.citation
    assert builder.info.features["label"].num_classes == 27


def test_the_leaf_builder_reads_the_manual_folder(source, tmp_path, write_idx):
    expected = leaf_json(source, write_idx)
    builder = LeafFemnist(data_dir=tmp_path / "data", file_format="array_record")
    assert "Caldas" in builder.info.citation
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=source / "data"))
    path = pathlib.Path(builder.data_path)
    for split, (images, labels, columns) in expected.items():
        found = read_records(path, split, ["image", "label", "writer"])
        np.testing.assert_array_equal(found[0], images)
        np.testing.assert_array_equal(found[1], labels)
        assert [writer.decode() for writer in found[2]] == columns["writer"].tolist()


def test_others_may_read_what_is_prepared(source, tmp_path, write_idx):
    mnist_files(source, write_idx)
    path = prepare_fake("mnist", source, tmp_path / "data").path
    (tmp_path / "plain").touch()
    for file in path.iterdir():
        assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert os.access(path, os.R_OK | os.X_OK)
