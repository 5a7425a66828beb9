import gzip
import io
import os
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from fedmd_jax.data import DataError, load_column, load_images, save_images

NUM_ROWS = 12


def complaint(*args, **kwargs):
    """The message of the DataError that load_images must raise: one line."""
    with pytest.raises(DataError) as caught:
        load_images(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def as_set(images, labels):
    return sorted((int(label), image.tobytes()) for image, label in zip(images, labels, strict=True))


@pytest.fixture
def arrays():
    """Images that differ from their transposes, and labels."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (NUM_ROWS, 28, 28, 1), np.uint8), np.arange(NUM_ROWS) % 10


@pytest.fixture(autouse=True)
def no_settings(monkeypatch, tmp_path):
    """The default folder does not exist."""
    for variable in ("FEDMD_JAX_DATA", "TFDS_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


# Names and folders.


@pytest.mark.parametrize("name", ["", "/mnist", "../mnist", "mnist/../..", "a/b/c", "mnist/", "mn ist", "mnist\n"])
def test_an_invalid_name_is_refused(name, tmp_path, arrays):
    message = complaint(name, "train", data_dir=tmp_path)
    expected = "a data set is named like 'mnist' or 'emnist/letters', or is a folder of images by class"
    assert message == f"{expected}, got {name!r}"
    with pytest.raises(DataError, match="a data set is named like"):
        save_images(tmp_path, name, "train", *arrays)


@pytest.mark.parametrize("split", ["", "train[:10%]", "../train", "train+test"])
def test_an_invalid_split_is_refused(split, tmp_path):
    expected = f"a split is a plain name such as 'train' or 'test' (slice the arrays yourself), got {split!r}"
    assert complaint("mnist", split, data_dir=tmp_path) == expected


def test_embedded_names_and_splits_are_known(tmp_path, arrays):
    assert complaint("embedded/cats", "train") == (
        "the embedded data sets are embedded/digits and embedded/letters, got 'embedded/cats'"
    )
    assert complaint("embedded/digits", "dev") == "embedded/digits has the splits train and test, got 'dev'"
    with pytest.raises(DataError, match="names under embedded/ belong to the package"):
        save_images(tmp_path, "embedded/digits", "train", *arrays)


def test_the_folder_is_the_argument_or_fedmd_jax_data_or_the_one_of_tfds(tmp_path, monkeypatch, arrays):
    default = tmp_path / "home" / "tensorflow_datasets"
    message = complaint("x", "train")
    assert f"in {default} (from the default, FEDMD_JAX_DATA is not set; there is no such folder): " in message
    for label, folder in enumerate((default, "by_tfds", "by_us", "by_argument")):
        save_images(tmp_path / folder, "x", "train", arrays[0], np.full(NUM_ROWS, label))
    assert load_images("x", "train").labels[0] == 0
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "by_tfds"))
    assert load_images("x", "train").labels[0] == 1
    monkeypatch.setenv("FEDMD_JAX_DATA", str(tmp_path / "by_us"))
    assert load_images("x", "train").labels[0] == 2
    assert load_images("x", "train", data_dir=tmp_path / "by_argument").labels[0] == 3
    monkeypatch.setenv("FEDMD_JAX_DATA", "")
    assert load_images("x", "train").labels[0] == 1


def test_a_missing_data_set_is_reported_with_places_and_remedies(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMD_JAX_DATA", str(tmp_path))
    assert complaint("emnist/letters", "train") == (
        f"no data set 'emnist/letters' with split 'train' in {tmp_path} (from FEDMD_JAX_DATA): wanted "
        "emnist/letters/train.npz, emnist_letters/train.npz, "
        "emnist_letters/emnist-letters-train-images-idx3-ubyte.gz, images emnist/letters/train/CLASS/*.png or a TFDS "
        "folder emnist/letters/VERSION; "
        "set FEDMD_JAX_DATA or data_dir to a folder that has one of them, write one with fedmd_jax.data.save_images, "
        "or prepare one with fedmd-jax data prepare (fedmd-jax data list names what it knows)"
    )
    message = complaint("mnist", "validation", data_dir=tmp_path / "none")
    expected = "(from data_dir; there is no such folder): wanted mnist/validation.npz, images "
    assert f"in {tmp_path / 'none'} {expected}" in message
    assert "idx" not in message


# Plain arrays.


@pytest.mark.parametrize("name", ["dots", "dots/small"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_saved_images_come_back(name, dtype, tmp_path, arrays):
    images, labels = arrays
    path = save_images(tmp_path, name, "dev", images, labels.astype(dtype))
    assert path == tmp_path / name / "dev.npz"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # other users may read it
    loaded = load_images(name, "dev", data_dir=str(tmp_path))
    np.testing.assert_array_equal(loaded.images, images)
    np.testing.assert_array_equal(loaded.labels, labels)
    assert (loaded.images.dtype, loaded.labels.dtype) == (np.uint8, np.int32)
    assert loaded.images.flags.c_contiguous
    assert loaded.images.flags.writeable


def test_a_configuration_may_be_joined_by_an_underscore(tmp_path, arrays):
    save_images(tmp_path, "dots_small", "train", *arrays)
    np.testing.assert_array_equal(load_images("dots/small", "train", data_dir=tmp_path).images, arrays[0])


def test_plain_arrays_are_taken_as_they_are_and_before_original_files(tmp_path, write_idx, arrays):
    folder = tmp_path / "emnist_letters"
    write_idx(folder / "emnist-letters-train-images-idx3-ubyte.gz", arrays[0][..., 0])
    write_idx(folder / "emnist-letters-train-labels-idx1-ubyte.gz", arrays[1] + 1)
    save_images(tmp_path, "emnist/letters", "train", *arrays)
    np.testing.assert_array_equal(load_images("emnist/letters", "train", data_dir=tmp_path).images, arrays[0])


def test_a_failed_write_leaves_what_was_there(tmp_path, arrays, monkeypatch):
    path = save_images(tmp_path, "dots", "train", *arrays)
    before = path.read_bytes()

    def break_off(file, **arrays):
        file.write(b"half a")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", break_off)
    with pytest.raises(OSError, match="disk full"):
        save_images(tmp_path, "dots", "train", *arrays)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["train.npz"]


def test_columns_come_back_row_for_row(tmp_path, arrays):
    writers = np.array([f"f{i % 3}" for i in range(NUM_ROWS)])
    save_images(tmp_path, "dots", "train", *arrays, writer=writers, coarse=np.arange(NUM_ROWS))
    np.testing.assert_array_equal(load_column("dots", "train", "writer", data_dir=tmp_path), writers)
    np.testing.assert_array_equal(load_column("dots", "train", "coarse", data_dir=tmp_path), np.arange(NUM_ROWS))
    np.testing.assert_array_equal(load_images("dots", "train", data_dir=tmp_path).images, arrays[0])


@pytest.mark.parametrize("column", [np.zeros(NUM_ROWS), np.zeros(NUM_ROWS - 1, int), np.zeros((NUM_ROWS, 1), int)])
def test_an_invalid_column_is_neither_written_nor_read(column, tmp_path, arrays):
    reason = f"column 'writer' must be integers or strings [12], got {column.dtype} {list(column.shape)}"
    with pytest.raises(DataError) as caught:
        save_images(tmp_path, "dots", "train", *arrays, writer=column)
    assert str(caught.value) == f"save_images: {reason}"
    path = save_images(tmp_path, "dots", "train", *arrays)
    np.savez(path, images=arrays[0], labels=arrays[1], writer=column)
    with pytest.raises(DataError) as caught:
        load_column("dots", "train", "writer", data_dir=tmp_path)
    assert str(caught.value) == f"{path}: {reason}"


def test_a_missing_column_is_reported(tmp_path, arrays, write_idx):
    path = save_images(tmp_path, "dots", "train", *arrays)
    idx = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    write_idx(idx, arrays[0][..., 0])
    for name, expected in (
        ("dots", f"{path}: wanted an npz archive of labels, writer, found ['images', 'labels']"),
        ("mnist", f"{idx} has images and labels only, wanted the column 'writer'"),
    ):
        with pytest.raises(DataError) as caught:
            load_column(name, "train", "writer", data_dir=tmp_path)
        assert str(caught.value) == expected
    with pytest.raises(DataError, match="no data set 'emnist/letters' with split 'train' in"):
        load_column("emnist/letters", "train", "writer", data_dir=tmp_path)


BAD_ARRAYS = [
    (
        {"images": np.zeros((2, 3, 8, 9), np.uint8)},
        "images must be [N, H, W, C], got (2, 3, 8, 9), which looks like [N, C, H, W]: "
        "np.moveaxis(inputs, 1, -1) converts them",
    ),
    ({"images": np.zeros((2, 3, 3, 1), np.float32)}, "images must be uint8 [N, H, W, C], got float32 [2, 3, 3, 1]"),
    ({"images": np.zeros((2, 3, 3), np.uint8)}, "images must be uint8 [N, H, W, C], got uint8 [2, 3, 3]"),
    ({"images": np.zeros((0, 3, 3, 1), np.uint8)}, "images must be uint8 [N, H, W, C], got uint8 [0, 3, 3, 1]"),
    ({"labels": np.zeros(2)}, "labels must be integers [N], got float64 [2]"),
    ({"labels": np.zeros((2, 1), np.int32)}, "labels must be integers [N], got int32 [2, 1]"),
    ({"labels": np.zeros(3, np.int32)}, "2 images but 3 labels"),
    ({"labels": np.array([0, -1])}, "labels must be 0 or more and fit int32, got -1..0"),
    ({"labels": np.array([0, 2**40])}, "labels must be 0 or more and fit int32, got 0..1099511627776"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_ARRAYS)
def test_invalid_arrays_are_neither_read_nor_written(change, reason, tmp_path):
    arrays = {"images": np.zeros((2, 3, 3, 1), np.uint8), "labels": np.zeros(2, np.int32)} | change
    with pytest.raises(DataError) as caught:
        save_images(tmp_path, "dots", "train", **arrays)
    assert str(caught.value) == f"save_images: {reason}"
    assert not list(tmp_path.iterdir())
    path = tmp_path / "dots" / "train.npz"
    path.parent.mkdir()
    np.savez(path, **arrays)
    assert complaint("dots", "train", data_dir=tmp_path) == f"{path}: {reason}"


def damage(path, kind):
    """What happens to files."""
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "empty": b"",
            "half": whole[:middle],
            "noise": b"\x00\x01 not an archive",
            "page": b"<html>404</html>",
            "flipped": whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 9]) + whole[middle + 9 :],
        }[kind]
    )


DAMAGES = ["empty", "half", "noise", "page", "flipped"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_npz_is_named(kind, tmp_path, arrays):
    path = save_images(tmp_path, "dots", "train", *arrays)
    damage(path, kind)
    message = complaint("dots", "train", data_dir=tmp_path)
    assert message.startswith(f"cannot read {path}, it may be missing or damaged: ")


def test_an_npz_of_something_else_is_refused(tmp_path, arrays):
    path = save_images(tmp_path, "dots", "train", *arrays)
    np.savez(path, images=arrays[0], y=arrays[1])
    expected = f"{path}: wanted an npz archive of images, labels, found ['images', 'y']"
    assert complaint("dots", "train", data_dir=tmp_path) == expected
    with path.open("wb") as file:
        np.save(file, arrays[0])
    expected = f"{path}: wanted an npz archive of images, labels, found []"
    assert complaint("dots", "train", data_dir=tmp_path) == expected
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.txt", "no array")
    assert "found ['images.txt']" in complaint("dots", "train", data_dir=tmp_path)


def test_pickles_are_not_opened(tmp_path, arrays):
    path = save_images(tmp_path, "dots", "train", *arrays)
    np.savez(path, images=np.array([{}, []], dtype=object), labels=np.arange(2))
    message = complaint("dots", "train", data_dir=tmp_path)
    assert message.startswith(f"cannot read {path}")
    assert "allow_pickle=False" in message


# The original files.


@pytest.mark.parametrize(("split", "stem"), [("train", "train"), ("test", "t10k")])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_original_mnist_files(name, split, stem, tmp_path, write_idx, arrays):
    write_idx(tmp_path / name / f"{stem}-images-idx3-ubyte.gz", arrays[0][..., 0])
    write_idx(tmp_path / name / f"{stem}-labels-idx1-ubyte.gz", arrays[1])
    loaded = load_images(name, split, data_dir=tmp_path)
    np.testing.assert_array_equal(loaded.images, arrays[0])
    np.testing.assert_array_equal(loaded.labels, arrays[1])
    assert (loaded.images.dtype, loaded.labels.dtype) == (np.uint8, np.int32)
    assert loaded.images.flags.writeable


@pytest.mark.parametrize(("config", "first"), [("letters", 1), ("digits", 0)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_original_emnist_files_are_turned_upright_and_letters_begin_at_0(
    config, first, split, tmp_path, write_idx, arrays
):
    stem = tmp_path / f"emnist_{config}" / f"emnist-{config}-{split}"
    write_idx(stem.with_name(f"{stem.name}-images-idx3-ubyte.gz"), arrays[0][..., 0].transpose(0, 2, 1))
    write_idx(stem.with_name(f"{stem.name}-labels-idx1-ubyte.gz"), arrays[1] + first)
    loaded = load_images(f"emnist/{config}", split, data_dir=tmp_path)
    np.testing.assert_array_equal(loaded.images, arrays[0])
    np.testing.assert_array_equal(loaded.labels, arrays[1])
    assert (loaded.images.dtype, loaded.labels.dtype) == (np.uint8, np.int32)
    assert loaded.images.flags.c_contiguous


@pytest.fixture
def mnist_files(tmp_path, write_idx, arrays):
    paths = [tmp_path / "mnist" / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    write_idx(paths[0], arrays[0][..., 0])
    write_idx(paths[1], arrays[1])
    return paths


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_idx_file_is_named(kind, which, tmp_path, mnist_files):
    damage(mnist_files[which], kind)
    message = complaint("mnist", "train", data_dir=tmp_path)
    if kind in ("empty", "noise", "page"):  # what is not zipped is read as an unzipped file
        assert message.startswith(
            f"{mnist_files[which]}: wanted an idx file of bytes of rank {3 - 2 * which}, got one "
        )
    else:
        assert message.startswith(f"cannot read {mnist_files[which]}, it may be missing or damaged: ")


@pytest.mark.parametrize("which", [0, 1])
def test_half_a_pair_is_not_enough(which, tmp_path, mnist_files):
    mnist_files[which].unlink()
    message = complaint("mnist", "train", data_dir=tmp_path)
    assert message.startswith(f"cannot read {mnist_files[which]}, it may be missing or damaged: FileNotFoundError")


def test_an_idx_file_of_something_else_is_refused(tmp_path, mnist_files, write_idx, arrays):
    images, labels = mnist_files
    shutil.copy(images, labels)
    message = complaint("mnist", "train", data_dir=tmp_path)
    assert message == rf"{labels}: wanted an idx file of bytes of rank 1, got one that begins with b'\x00\x00\x08\x03'"
    labels.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 99]) + bytes(98)))
    assert complaint("mnist", "train", data_dir=tmp_path) == f"{labels}: its header promises [99], 99 bytes, got 98"
    write_idx(labels, arrays[1][:-1])
    assert complaint("mnist", "train", data_dir=tmp_path) == f"{images}: 12 images but 11 labels"


def test_letters_that_do_not_begin_at_1_are_refused(tmp_path, write_idx, arrays):
    folder = tmp_path / "emnist_letters"
    images = folder / "emnist-letters-test-images-idx3-ubyte.gz"
    write_idx(images, arrays[0][..., 0])
    write_idx(folder / "emnist-letters-test-labels-idx1-ubyte.gz", arrays[1])
    message = complaint("emnist/letters", "test", data_dir=tmp_path)
    assert message == f"{images}: labels must be 0 or more and fit int32, got -1..8"


# TensorFlow Datasets.


def png(image):
    out = io.BytesIO()
    Image.fromarray(image[..., 0]).save(out, "PNG")
    return out.getvalue()


def prepare_tfds(data_dir, stock, images, labels, *, config=None, file_format="array_record"):
    """Writes a few rows as a stock data set; PNG bytes, because arrays would need tensorflow to encode them."""

    class Local(stock, skip_registration=True):
        def _split_generators(self, dl_manager):
            return {"train": self._rows(), "test": self._rows()}

        def _rows(self):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": png(image), "label": int(label)}

    Local.name = stock.name
    Local(data_dir=data_dir, file_format=file_format, config=config).download_and_prepare()


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """MNIST and EMNIST letters in miniature, as TFDS prepares them."""
    from tensorflow_datasets.image_classification import mnist  # slow to import, and a dependency: missing is a failure

    folder = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (NUM_ROWS, 28, 28, 1), np.uint8)
    prepare_tfds(folder, mnist.MNIST, images, np.arange(NUM_ROWS) % 10)
    prepare_tfds(folder, mnist.EMNIST, images.transpose(0, 2, 1, 3), np.arange(NUM_ROWS) + 1, config="letters")
    return folder, images


@pytest.fixture
def mnist_3(tfds_folder, tmp_path):
    """A copy to spoil: the prepared version of MNIST, and its folder."""
    shutil.copytree(tfds_folder[0] / "mnist", tmp_path / "mnist")
    (version,) = (tmp_path / "mnist").glob("[0-9]*")
    return version


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("name", "num_classes"), [("mnist", 10), ("emnist/letters", 26)])
def test_prepared_data_sets(name, num_classes, split, tfds_folder):
    folder, images = tfds_folder
    loaded = load_images(name, split, data_dir=folder)
    np.testing.assert_array_equal(loaded.images, images)  # in the order of the builder, not of the shuffled records
    np.testing.assert_array_equal(loaded.labels, np.arange(NUM_ROWS) % num_classes)
    assert (loaded.images.dtype, loaded.labels.dtype) == (np.uint8, np.int32)
    assert loaded.images.flags.c_contiguous


def test_the_newest_finished_version_is_read(tfds_folder, mnist_3, tmp_path):
    for other in ("1.0.0", "incomplete.9.9.9", "9.0.0"):  # the last has no dataset_info.json
        (mnist_3.parent / other).mkdir()
    for other in ("1.0.0", "incomplete.9.9.9"):
        (mnist_3.parent / other / "dataset_info.json").write_text("not one")
    assert as_set(*load_images("mnist", "train", data_dir=tmp_path)) == as_set(
        *load_images("mnist", "train", data_dir=tfds_folder[0])
    )
    shutil.copytree(mnist_3.parent / "1.0.0", mnist_3.parent / "10.0.0")
    assert str(mnist_3.parent / "10.0.0") in complaint("mnist", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "split", "message"),
    [
        ("features.json", "", "", "validation", "has the splits ['test', 'train'], got 'validation'"),
        (
            "features.json",
            '"label"',
            '"answer"',
            "train",
            "wanted the features image, label, found ['answer', 'image']",
        ),
        (
            "dataset_info.json",
            '"array_record"',
            '"tfrecord"',
            "train",
            "wanted a data set prepared with file_format='array_record', which can be read without tensorflow, "
            "got 'tfrecord'; prepare it again in another data_dir",
        ),
    ],
)
def test_a_prepared_data_set_of_another_form_is_refused(file, old, new, split, message, mnist_3, tmp_path):
    (mnist_3 / file).write_text((mnist_3 / file).read_text().replace(old, new))
    assert complaint("mnist", split, data_dir=tmp_path) == f"{mnist_3}: {message}"


def test_no_module_is_imported_because_a_file_names_it(mnist_3, tmp_path):
    (tmp_path / "trap.py").write_text("raise SystemExit('the trap was imported')")
    content = (mnist_3 / "features.json").read_text()
    name = "tensorflow_datasets.core.features.image_feature.Image"
    assert name in content
    (mnist_3 / "features.json").write_text(content.replace(name, "trap.Image"))
    assert "features.json names the class 'trap.Image', wanted TensorFlow Datasets' own" in complaint(
        "mnist", "train", data_dir=tmp_path
    )


@pytest.mark.parametrize("pattern", ["dataset_info.json", "features.json", "*train.array_record*"])
@pytest.mark.parametrize("kind", ["empty", "half", "missing"])
def test_a_damaged_prepared_data_set_is_named(pattern, kind, mnist_3, tmp_path):
    (path,) = mnist_3.glob(pattern)
    if kind == "missing":
        path.unlink()
    else:
        damage(path, kind)
    message = complaint("mnist", "train", data_dir=tmp_path)
    if (pattern, kind) == ("dataset_info.json", "missing"):  # then it is not a prepared data set at all
        assert message.startswith("no data set 'mnist'")
    else:
        assert message.startswith(f"cannot read {mnist_3}, it may be missing or damaged: ")
