"""Data sets prepared from fake files of every known form; CI has no tensorflow, and nothing here has a network."""

import errno
import gzip
import hashlib
import importlib.util
import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from fedmd_jax.data import DataError, load_column, load_images, merge_case, prepare_data, preparing
from fedmd_jax.data.builders import EmnistLetters, LeafFemnist
from fedmd_jax.data.catalogue import CATALOGUE
from fedmd_jax.data.files import write_npz
from fedmd_jax.data.originals import LEAF_CLASSES, pixels
from fedmd_jax.data.sources import find_tfds, read_records

SIZES = {"train": 9, "test": 4}


generator = np.random.default_rng


def random_images(split, shape):
    return generator(SIZES[split]).integers(0, 256, (SIZES[split], *shape), np.uint8)


def residuals(images):
    """What `pixels` undoes."""
    channels = images.transpose(3, 0, 1, 2).copy()
    channels[0] -= channels[1]
    channels[2] -= channels[1]
    for axis in (2, 3):
        channels = np.diff(channels, axis=axis, prepend=np.uint8(0))
    return channels


# Files as their publishers make them. Each function returns what must be read: split -> images, labels, columns.


def idx_files(folder, write_idx, stems, labels_of, first=0):
    """What is read, but for the orientation of the images."""
    expected = {}
    for split, stem in stems.items():
        images, labels = random_images(split, (28, 28)), labels_of(np.arange(SIZES[split]))
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", labels + first)
        expected[split] = images[..., None], labels, {}
    return expected


def mnist_files(folder, write_idx):
    return idx_files(folder / "mnist", write_idx, {"train": "train", "test": "t10k"}, lambda rows: rows % 10)


def emnist_files(folder, write_idx):
    stems = {split: f"emnist-letters-{split}" for split in SIZES}
    expected = idx_files(folder / "emnist_letters", write_idx, stems, lambda rows: 25 - rows, first=1)
    return {split: (images.transpose(0, 2, 1, 3), *rest) for split, (images, *rest) in expected.items()}


def cifar_rows(coarse=False):
    """Images, labels and ids of each split, and superclasses of CIFAR-100."""
    rows = {}
    for split, size in SIZES.items():
        numbers = np.arange(size, dtype=np.uint8) * 7
        columns = {"id": np.array([f"{split}_{i:05d}" for i in range(size)])}
        rows[split] = (
            random_images(split, (32, 32, 3)),
            numbers % (100 if coarse else 10),
            columns | ({"coarse_label": numbers % 20} if coarse else {}),
        )
    return rows


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def cifar_bytes(images, *labels):
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([np.stack(labels, axis=1), planes], axis=1).tobytes()


def names(count, kind):
    return [f"{kind}{i}" for i in range(count)]


def lines(texts):
    return "\n".join([*texts, ""]).encode()


def cifar10_archive(folder, write_idx):
    rows = cifar_rows()
    files = {"batches.meta.txt": lines(names(10, "thing")) + b"\n", "test_batch.bin": cifar_bytes(*rows["test"][:2])}
    for i, some in enumerate(np.array_split(np.arange(SIZES["train"]), 5)):
        files[f"data_batch_{i + 1}.bin"] = cifar_bytes(*(column[some] for column in rows["train"][:2]))
    write_tar(folder / "cifar-10-binary.tar.gz", {f"cifar-10-batches-bin/{name}": files[name] for name in files})
    return rows


def cifar10_residuals(folder, write_idx):
    rows, arrays = cifar_rows(), {"label_names": np.array(names(10, "thing"))}
    for split, (images, labels, _) in rows.items():
        arrays |= {f"{split}_residual": residuals(images), f"{split}_labels": labels}
    write_npz(folder / "cifar10" / "cifar10.npz", **arrays)
    return rows


def cifar100_archive(folder, write_idx):
    rows = cifar_rows(coarse=True)
    files = {"coarse_label_names.txt": lines(names(20, "super")), "fine_label_names.txt": lines(names(100, "fine"))}
    for split, (images, labels, columns) in rows.items():
        files[f"{split}.bin"] = cifar_bytes(images, columns["coarse_label"], labels)
    path = folder / "cifar100" / "cifar-100-binary.tar.gz"
    write_tar(path, {f"cifar-100-binary/{name}": files[name] for name in files})
    return rows


def cifar100_residuals(folder, write_idx):
    arrays = {f"{kind}_label_names": np.array(names(n, kind)) for kind, n in (("fine", 100), ("coarse", 20))}
    expected = {}
    for split, (images, fine, columns) in cifar_rows(coarse=True).items():
        index = np.arange(len(fine)) * 5 + 3  # only some rows of the whole
        arrays |= {f"{split}_residual": residuals(images), f"{split}_fine_labels": fine, f"{split}_index": index}
        arrays |= {f"{split}_coarse_labels": columns["coarse_label"]}
        expected[split] = images, fine, columns | {"id": np.array([f"{split}_{i:05d}" for i in index])}
    write_npz(folder / "cifar100_fedmd" / "cifar100_fedmd.npz", **arrays)
    return expected


def leaf_rows():
    for split, size in SIZES.items():
        yield split, random_images(split, (28, 28)), 61 - np.arange(size), np.arange(size) % 3


def leaf_arrays(folder, write_idx):
    writers = np.array(["f0001_00", "f0002_11", "f0003_22"])
    columns = [np.concatenate(column) for column in list(zip(*leaf_rows(), strict=True))[1:]]
    is_test = np.repeat([False, True], list(SIZES.values()))
    order = generator(0).permutation(len(is_test))  # train and test in no order
    images, labels, writer, is_test = (column[order] for column in (*columns, is_test))
    path = folder / "femnist_leaf" / "femnist_leaf105.npz"
    write_npz(path, images=images, labels=labels, writer=writer, leaf_test=is_test, writer_names=writers)
    return {
        split: (images[rows][..., None], labels[rows], {"writer": writers[writer[rows]]})
        for split, rows in (("train", ~is_test), ("test", is_test))
    }


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


def check_loaded(name, data_dir, expected):
    for split, (images, labels, columns) in expected.items():
        loaded = load_images(name, split, data_dir=data_dir)
        np.testing.assert_array_equal(loaded.images, images)
        np.testing.assert_array_equal(loaded.labels, labels)
        for column, values in columns.items():
            np.testing.assert_array_equal(load_column(name, split, column, data_dir=data_dir), values)


@pytest.mark.parametrize("form", FORMS)
def test_arrays_and_records_have_what_the_files_have(form, source, tmp_path, write_idx):
    name, write = FORMS[form]
    expected = write(source, write_idx)
    prepared = prepare_fake(name, source, tmp_path / "data")
    assert prepared == (find_tfds(tmp_path / "data", name), SIZES, True)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [name.split("/")[0]]
    check_loaded(name, tmp_path / "data", expected)
    for split in SIZES:
        (prepared.path / f"{split}.npz").unlink()
    check_loaded(name, tmp_path / "data", expected)  # from the records
    rows = tfds.data_source(name, split="test", data_dir=tmp_path / "data", download=False)
    images, labels = read_records(prepared.path, "test", ["image", "label"])
    assert sorted((row["label"], row["image"].tobytes()) for row in rows) == sorted(
        (label, image.tobytes()) for image, label in zip(images, labels, strict=True)
    )


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


def rename_idx(source, form):
    """Renames, and unzips if the name says so; returns the last of the files."""
    for path in list(source.rglob("*.gz")):
        stem, _, rank = path.name.removesuffix("-ubyte.gz").rpartition("-idx")
        renamed = path.with_name(form.format(stem, rank))
        content = gzip.decompress(path.read_bytes())
        path.unlink()
        renamed.write_bytes(gzip.compress(content, 1) if renamed.suffix == ".gz" else content)
    return renamed


@pytest.mark.parametrize("form", IDX_NAMES)
@pytest.mark.parametrize(("name", "write"), [("mnist", mnist_files), ("emnist/letters", emnist_files)])
def test_idx_files_have_other_names_and_may_be_unzipped(name, write, form, source, tmp_path, write_idx):
    expected = write(source, write_idx)
    rename_idx(source, form)
    prepare_fake(name, source, tmp_path / "data")
    check_loaded(name, source, expected)
    check_loaded(name, tmp_path / "data", expected)


def test_idx_files_may_be_unzipped_under_their_names_and_beside_folders_of_theirs(source, write_idx):
    """Browsers unzip silently; one archive of MNIST has every file a second time, in a folder of its name."""
    expected = mnist_files(source, write_idx)
    for path in list(source.rglob("*.gz")):
        path.write_bytes(gzip.decompress(path.read_bytes()))
        path.with_suffix("").mkdir()
    check_loaded("mnist", source, expected)


@pytest.mark.parametrize("form", ["{}-idx{}-ubyte.gz", *IDX_NAMES])
def test_checksums_of_idx_files_are_of_their_content(form, source, tmp_path, write_idx, monkeypatch):
    mnist_files(source, write_idx)
    [known] = CATALOGUE["mnist"].sources
    for path in source.rglob("*.gz"):
        content = gzip.decompress(path.read_bytes())
        monkeypatch.setitem(known.checksums, path.name, hashlib.sha256(content).hexdigest())
    last = rename_idx(source, form)
    assert prepare_data("mnist", source=source, data_dir=tmp_path / "data").sizes == SIZES
    last.write_bytes(last.read_bytes()[:-1])
    message = complaint("mnist", source=source, data_dir=tmp_path / "other")
    assert message.startswith(f"{last}, " if last.suffix != ".gz" else f"cannot read {last}, ")


def test_files_may_be_in_the_folder_itself(source, tmp_path, write_idx):
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
    assert f"found {hashlib.sha256(b'half').hexdigest()}; " in message
    assert everything_in(tmp_path / "data") == []


def test_a_file_that_is_missing_is_named(source, tmp_path, write_idx):
    mnist_files(source, write_idx)
    gone = source / "mnist" / "t10k-labels-idx1-ubyte.gz"
    gone.unlink()
    message = complaint("mnist", source=source, data_dir=tmp_path / "data", checksums=False)
    assert message == f"{gone} is missing, mnist is not whole without it"


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_file_is_named_also_without_checksums(form, source, tmp_path, write_idx):
    name, write = FORMS[form]
    write(source, write_idx)
    if form != "leaf json":  # of which every user has another sample
        assert "wanted sha256" in complaint(name, source=source, data_dir=tmp_path / "data")
    damaged = max((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-200])
    message = complaint(name, source=source, data_dir=tmp_path / "data", checksums=False)
    assert message.startswith(f"cannot read {damaged}, it may be missing or damaged: ")
    assert everything_in(tmp_path / "data") == []


def test_pixels_of_leaf_are_from_0_to_1(source, tmp_path, write_idx):
    leaf_json(source, write_idx)
    [path] = (source / "data" / "test").iterdir()
    content = json.loads(path.read_text())
    content["user_data"]["f0001_00"]["x"][0][7] = 255
    path.write_text(json.dumps(content))
    message = complaint("leaf/femnist", source=source, data_dir=tmp_path / "data")
    assert message.endswith("ValueError: pixels of writer 'f0001_00' must be numbers from 0 to 1")


def test_wrong_labels_are_refused_before_anything_is_written(source, tmp_path, write_idx):
    emnist_files(source, write_idx)
    write_idx(source / "emnist_letters" / "emnist-letters-test-labels-idx1-ubyte.gz", np.zeros(SIZES["test"]))
    message = complaint("emnist/letters", source=source, data_dir=tmp_path / "data", checksums=False)
    assert message == "emnist/letters, test: labels must be 0 or more and fit int32, got -1..-1"
    assert everything_in(tmp_path / "data") == []


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


# Interrupted, or prepared already.


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["fedmd_jax.data.builders.Image.fromarray", "fedmd_jax.data.preparing.write_npz"])
def test_an_interruption_leaves_nothing(error, moment, source, tmp_path, write_idx, monkeypatch):
    mnist_files(source, write_idx)

    def break_off(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(moment, break_off)
        with pytest.raises(type(error)):
            prepare_fake("mnist", source, tmp_path / "data")
    assert everything_in(tmp_path / "data") == []
    assert prepare_fake("mnist", source, tmp_path / "data").is_new


def test_a_killed_preparation_is_not_taken_for_a_finished_one(source, tmp_path, write_idx):
    mnist_files(source, write_idx)
    path = prepare_fake("mnist", source, tmp_path / "data").path
    (tmp_path / "data" / "mnist").rename(tmp_path / "data" / ".mnist.preparing.x")
    with pytest.raises(DataError, match="no data set 'mnist'"):
        load_images("mnist", "train", data_dir=tmp_path / "data")
    assert prepare_fake("mnist", source, tmp_path / "data") == (path, SIZES, True)


def test_the_data_set_of_a_faster_process_is_taken(source, tmp_path, write_idx, monkeypatch):
    mnist_files(source, write_idx)
    real = preparing.write_npz

    def late(*args, **kwargs):
        monkeypatch.setattr(preparing, "write_npz", real)
        assert prepare_fake("mnist", source, tmp_path / "data").is_new
        real(*args, **kwargs)

    monkeypatch.setattr(preparing, "write_npz", late)
    ours = prepare_fake("mnist", source, tmp_path / "data")
    assert ours == (find_tfds(tmp_path / "data", "mnist"), SIZES, False)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mnist"]


def test_what_is_there_is_left_alone(source, tmp_path, write_idx):
    mnist_files(source, write_idx)
    first = prepare_fake("mnist", source, tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    again = prepare_data("mnist", data_dir=tmp_path / "data")  # needs no source, no network
    assert again == first._replace(is_new=False)
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == before


def test_what_cannot_be_used_is_not_called_prepared(source, tmp_path, write_idx):
    emnist_files(source, write_idx)
    path = prepare_fake("emnist/letters", source, tmp_path / "data").path
    info = json.loads((path / "dataset_info.json").read_text())
    for change, expected in (
        (
            {"splits": [{"name": "train", "shardLengths": ["44400", "44400"]}]},
            "is from the stock builder, which has 88,800 of 124,800 training images ",
        ),
        ({"fileFormat": "tfrecord"}, "is prepared as tfrecord, wanted array_record, "),
    ):
        (path / "dataset_info.json").write_text(json.dumps(info | change))
        assert complaint("emnist/letters", data_dir=tmp_path / "data").startswith(f"{path} {expected}")


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
    check_loaded("emnist/letters", tmp_path / "data", downloaded)


@pytest.mark.parametrize("error", [ConnectionError("reset"), RuntimeError("wrong\nchecksum")])
def test_an_interrupted_download_leaves_nothing_and_says_why(error, downloaded, tmp_path, monkeypatch):
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
        for column, values in zip(found, (images, labels, columns["writer"]), strict=True):
            np.testing.assert_array_equal(column, values)


def test_other_users_may_read_the_files(source, tmp_path, write_idx):
    mnist_files(source, write_idx)
    path = prepare_fake("mnist", source, tmp_path / "data").path
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    assert path.stat().st_mode == (tmp_path / "folder").stat().st_mode
    for file in path.iterdir():
        assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
