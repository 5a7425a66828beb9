import importlib.resources
import os
import pathlib

import numpy as np
import pytest

from fedmd_jax.data import load_images
from fedmd_jax.data.embedded import build

FOLDER = importlib.resources.files("fedmd_jax.data.embedded")
EXPECTED = {  # classes, images per class
    ("embedded/digits", "train"): (10, 800),
    ("embedded/digits", "test"): (10, 100),
    ("embedded/letters", "train"): (6, 300),
    ("embedded/letters", "test"): (6, 400),
}


@pytest.mark.parametrize(("name", "split"), EXPECTED)
def test_what_is_inside(name, split, monkeypatch):
    monkeypatch.setenv("FEDMD_JAX_DATA", "/nowhere")  # not needed
    images, labels = load_images(name, split)
    num_classes, examples_per_class = EXPECTED[name, split]
    assert images.shape == (num_classes * examples_per_class, 28, 28, 1)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    assert np.bincount(labels).tolist() == [examples_per_class] * num_classes
    assert 0.05 < images.mean() / 255 < 0.3  # white ink on black
    assert np.unique(images.reshape(len(images), -1), axis=0).shape[0] == len(images)  # drawn without replacement


@pytest.mark.parametrize("name", ["embedded/digits", "embedded/letters"])
def test_no_test_image_is_a_training_image(name):
    train, test = ({image.tobytes() for image in load_images(name, split).images} for split in ("train", "test"))
    assert not train & test


def test_images_stand_upright():
    # An upright 1 and an upright f are taller than wide; on their side they would be wider than tall.
    for name, label in (("embedded/digits", 1), ("embedded/letters", 5)):
        images, labels = load_images(name, "train")
        ink = images[labels == label, ..., 0] > 100
        heights, widths = ink.any(axis=2).sum(axis=1), ink.any(axis=1).sum(axis=1)
        assert heights.mean() > 1.2 * widths.mean()


def test_it_is_small_and_has_its_licence_beside_it():
    assert (FOLDER / "digits_and_letters.npz").stat().st_size < 4e6
    licence = (FOLDER / "LICENSE.md").read_text()
    for word in ("LeCun", "Attribution-Share Alike 3.0", "Cohen", "Special Database 19", build.__name__):
        assert word in licence


@pytest.fixture
def source_folder(tmp_path, write_idx):
    """A folder laid out like the originals, with enough images of every class, each of them different."""

    def images(num_images, height, width):
        numbers = np.arange(num_images, dtype=">u4").view("u1").reshape(num_images, 2, 2)
        return numbers.repeat(height // 2, axis=1).repeat(width // 2, axis=2)

    def labels(num_classes, num_per_class, first):
        return np.tile(np.arange(first, first + num_classes), num_per_class)

    for folder, stem, num_classes, num_per_class, first, shape in (
        ("mnist", "train", 10, 810, 0, (4, 2)),
        ("mnist", "t10k", 10, 110, 0, (4, 2)),
        ("emnist_letters", "emnist-letters-train", 26, 310, 1, (2, 4)),
        ("emnist_letters", "emnist-letters-test", 26, 410, 1, (2, 4)),
    ):
        write_idx(tmp_path / folder / f"{stem}-images-idx3-ubyte.gz", images(num_classes * num_per_class, *shape))
        write_idx(tmp_path / folder / f"{stem}-labels-idx1-ubyte.gz", labels(num_classes, num_per_class, first))
    return tmp_path


def test_build_is_deterministic_and_balanced(source_folder, tmp_path, capsys):
    outs = [tmp_path / "a.npz", tmp_path / "b" / "b.npz"]
    for out in outs:
        build.main(source_folder, out)
    assert "a.npz: " in capsys.readouterr().out
    assert outs[0].read_bytes() == outs[1].read_bytes()
    arrays = np.load(outs[0], allow_pickle=False)
    for (name, split), (num_classes, examples_per_class) in EXPECTED.items():
        key = f"{name.removeprefix('embedded/')}_{split}"
        images, labels = arrays[f"{key}_images"], arrays[f"{key}_labels"]
        assert images.dtype == labels.dtype == np.uint8
        assert images.shape[1:] == (4, 2, 1)
        assert np.bincount(labels).tolist() == [examples_per_class] * num_classes
        source_name = "mnist" if name == "embedded/digits" else "emnist/letters"
        source = load_images(source_name, split, data_dir=source_folder)
        label_of = {image.tobytes(): label for image, label in zip(*source, strict=True)}
        assert [label_of[image.tobytes()] for image in images] == labels.tolist()


def test_the_file_is_what_the_originals_give():
    folder = pathlib.Path(os.environ.get("FEDMD_JAX_DATA", ""))
    if not all((folder / each).is_dir() for each in ("mnist", "emnist_letters")):
        pytest.skip("FEDMD_JAX_DATA has no original MNIST and EMNIST files to build from")
    arrays = np.load(build.PATH, allow_pickle=False)
    chosen = build.choose(folder)
    assert sorted(chosen) == sorted(arrays.files)
    for key, array in chosen.items():
        np.testing.assert_array_equal(array, arrays[key])
