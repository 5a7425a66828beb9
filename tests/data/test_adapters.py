"""Data sets of other libraries, by small stand-ins and, if they are installed, by the libraries themselves."""

import numpy as np
import pytest
from PIL import Image

import fedmd_jax as fmd
from fedmd_jax.data import (
    DataError,
    arrays_from_folder,
    arrays_from_hugging_face,
    arrays_from_torch,
    class_names,
    load_column,
    load_images,
    scale,
)

rng = np.random.default_rng(0)
GREY, COLOUR = rng.integers(0, 256, (3, 6, 8), np.uint8), rng.integers(0, 256, (3, 6, 8, 3), np.uint8)
LABELS = [2, 0, 1]


class Tensor:
    """What NumPy sees of a tensor."""

    def __init__(self, array):
        self.array = np.asarray(array)
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype)

    def __index__(self):
        return self.array.__index__()


def pairs(inputs, labels=LABELS):
    return list(zip(inputs, labels, strict=True))


def check(found, inputs, dtype, labels=LABELS):
    np.testing.assert_array_equal(found[0], inputs)
    assert found[0].dtype == dtype
    assert found[1].tolist() == labels
    assert found[1].dtype.kind == "i"


def test_images_become_channels_last():
    floats = (COLOUR / np.float32(255)).transpose(0, 3, 1, 2)
    check(arrays_from_torch(pairs(map(Image.fromarray, GREY))), GREY[..., None], np.uint8)
    check(arrays_from_torch(pairs(map(Image.fromarray, COLOUR))), COLOUR, np.uint8)
    labels = [Tensor(label) for label in LABELS]
    check(arrays_from_torch(pairs(map(Tensor, floats), labels)), scale(COLOUR), np.float32)
    check(arrays_from_torch(pairs(COLOUR), channels_first=False), COLOUR, np.uint8)
    check(arrays_from_hugging_face({"image": list(COLOUR), "label": LABELS}), COLOUR, np.uint8)
    columns = {"pixels": list(floats), "y": np.array(LABELS)}
    found = arrays_from_hugging_face(columns, inputs="pixels", labels="y", channels_first=True)
    check(found, scale(COLOUR), np.float32)


def test_grey_images_among_coloured_ones_become_coloured():
    images = [Image.fromarray(GREY[0]), Image.fromarray(COLOUR[1]), Image.fromarray(COLOUR[2]).convert("P")]
    found, _ = arrays_from_torch(pairs(images))
    np.testing.assert_array_equal(found[0], np.repeat(GREY[0][..., None], 3, axis=-1))
    np.testing.assert_array_equal(found[1], COLOUR[1])
    np.testing.assert_array_equal(found[2], np.asarray(images[2].convert("RGB")))


def test_features_and_token_ids_are_taken_as_they_are():
    features, tokens = rng.normal(size=(3, 4)), [[1, 2], [3, 4], [5, 6]]
    check(arrays_from_torch(pairs(features)), features, np.float64)
    check(arrays_from_hugging_face({"input_ids": tokens, "label": LABELS}, inputs="input_ids"), tokens, np.int64)
    texts = {"text": ["a b", "c d", "e f"], "label": LABELS}
    found = arrays_from_hugging_face(texts, inputs="text", transform=lambda text: [ord(c) - 96 for c in text.split()])
    check(found, tokens, np.int64)


def test_the_arrays_are_ready_for_a_federation():
    images, labels = arrays_from_torch(pairs(map(Image.fromarray, COLOUR)))
    public = fmd.public_dataset(scale(images), labels)
    private = fmd.stack_private({"a": fmd.ArchitectureGroup(None, (0,))}, {0: (scale(images), labels)})
    np.testing.assert_array_equal(public.inputs, private["a"].inputs[0])
    np.testing.assert_array_equal(private["a"].labels[0], LABELS)


class NoLength:
    def __getitem__(self, i):
        return GREY[0], 0


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (NoLength(), r"a data set with len\(dataset\) and dataset\[i\] is needed, got NoLength"),
        (iter([]), r"a data set with len\(dataset\) and dataset\[i\] is needed, got list_iterator"),
        ([], "at least one example is needed, got none"),
        ([GREY[0]], r"items of the data set must be \(input, label\), got uint8 of shape \(6, 8\)"),
        ([(GREY[0], 1, 2)], r"items of the data set must be \(input, label\), got "),
        ([(GREY[0], 1.5)], "labels must be integers, got 1.5 in example 0"),
        ([(GREY[0], 0), (GREY[0], "cat")], "labels must be integers, got 'cat' in example 1"),
        ([(COLOUR[0], 0)], r"images must be \[C, H, W\], got \(6, 8, 3\): channels_first=False takes \[H, W, C\]"),
        ([(Image.fromarray(GREY[0]).convert("RGBA"), 0)], r"images must have .* got RGBA: image.convert\('RGB'\) "),
        ([("a text", 0)], r"inputs must be images or arrays of numbers \(texts need .*\), got 'a text'"),
        (
            [(GREY[0], 0), (GREY[0], 0), (GREY[0, :5], 0)],
            r"all inputs must have one shape, got \(6, 8\) and, in example 2, \(5, 8\): resize or pad",
        ),
    ],
)
def test_other_data_sets_are_refused(dataset, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        arrays_from_torch(dataset)


def test_a_missing_column_is_refused():
    with pytest.raises(ValueError, match=r"^one split with a column 'image' is needed, got dict$"):
        arrays_from_hugging_face({"pixels": []})


# A folder of images by class.


@pytest.fixture
def folder(tmp_path, write_image):
    """Images of three classes, of which test lacks the first."""
    for split, names in (("train", "abc"), ("test", "bc")):
        for label, name in enumerate("abc"):
            if name in names:
                write_image(tmp_path / "scans" / split / name / "10.png", GREY[label])
                write_image(tmp_path / "scans" / split / name / "2.png", GREY[label] // 2)
    (tmp_path / "scans" / "train" / "a" / "notes.txt").touch()
    (tmp_path / "scans" / "train" / ".cache").mkdir()
    return tmp_path / "scans"


def both(array):
    """The two images of a class, by file name."""
    return np.stack([array, array // 2], axis=1).reshape(-1, 6, 8, 1)


def test_a_folder_of_images_by_class(folder):
    assert class_names(folder / "train") == ["a", "b", "c"]
    check(arrays_from_folder(str(folder / "train")), both(GREY), np.uint8, [0, 0, 1, 1, 2, 2])
    found = arrays_from_folder(folder / "train", classes=["c", "a"], transform=lambda image: image.resize((8, 3)))
    assert found[0].shape == (4, 3, 8, 1)
    check(arrays_from_folder(folder / "train", classes=["c", "a"]), both(GREY[[2, 0]]), np.uint8, [0, 0, 1, 1])


def test_a_folder_without_images_or_with_damaged_ones_is_refused(folder):
    with pytest.raises(DataError, match=r"^a folder of images by class is needed, found no folder nowhere$"):
        arrays_from_folder("nowhere")
    with pytest.raises(DataError, match=r"d: at least one image is needed, found none$"):
        arrays_from_folder(folder / "train", classes=["a", "d"])
    (folder / "train" / "b" / "2.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"^cannot read .*b/2\.png, it may be missing or damaged: "):
        arrays_from_folder(folder / "train")


def test_load_images_reads_a_folder_by_path_or_by_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name, data_dir in ((str(folder), None), ("./scans", None), ("scans", None), ("scans", folder.parent)):
        check(load_images(name, "train", data_dir=data_dir), both(GREY), np.uint8, [0, 0, 1, 1, 2, 2])
        check(load_images(name, "test", data_dir=data_dir), both(GREY[1:]), np.uint8, [1, 1, 2, 2])
    check(load_images("./scans/test", "train"), both(GREY[1:]), np.uint8, [0, 0, 1, 1])  # has no splits


def test_load_images_refuses_a_folder_that_does_not_fit(folder, write_image):
    def refused(message, split="test", path=folder):
        with pytest.raises(DataError, match=message):
            load_images(str(path), split)

    refused(r"scans: wanted a folder of images by class, dev/CLASS/\*\.png, found no image there$", "dev")
    refused(r"train/CLASS/\*\.png, found no image there$", "train", folder / "train" / ".cache")
    with pytest.raises(DataError, match=r"train has images and labels only, wanted the column 'writer'$"):
        load_column(str(folder), "train", "writer")
    write_image(folder / "test" / "d" / "1.png", GREY[0])
    refused(r"test has the classes \['d'\], which .*train does not have$")
    write_image(folder / "train" / "d" / "1.png", GREY[0, :5])
    refused(r"all inputs must have one shape, got \(6, 8, 1\) and, in example 6, \(5, 8, 1\): resize", "train")


# The libraries themselves.


def test_torch():
    torch = pytest.importorskip("torch")
    dataset = torch.utils.data.TensorDataset(torch.tensor(GREY)[:, None], torch.tensor(LABELS))
    check(arrays_from_torch(dataset), GREY[..., None], np.uint8)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(dataset)

    for refused in (torch.utils.data.DataLoader(dataset), Stream()):
        with pytest.raises(ValueError, match=r"^a data set with len\(dataset\) and dataset\[i\] is needed, got "):
            arrays_from_torch(refused)


def test_torchvision(folder):
    torchvision = pytest.importorskip("torchvision")
    to_tensor = torchvision.transforms.ToTensor()
    for transform, convert, dtype in ((None, lambda images: images, np.uint8), (to_tensor, scale, np.float32)):
        dataset = torchvision.datasets.ImageFolder(folder / "test", transform=transform)
        images = np.repeat(both(GREY[1:]), 3, axis=-1)  # torchvision converts all to RGB
        check(arrays_from_torch(dataset), convert(images), dtype, [0, 0, 1, 1])


def test_hugging_face(folder):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    columns = {"image": [Image.fromarray(image) for image in GREY], "label": LABELS}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    check(arrays_from_hugging_face(dataset), GREY[..., None], np.uint8)
    tokens = datasets.Dataset.from_dict({"ids": [[1, 2], [3, 4], [5, 6]], "label": LABELS})
    check(arrays_from_hugging_face(tokens, inputs="ids"), [[1, 2], [3, 4], [5, 6]], np.int64)
    check(arrays_from_hugging_face(tokens.with_format("numpy"), inputs="ids"), [[1, 2], [3, 4], [5, 6]], np.int64)
    for refused in (tokens, datasets.DatasetDict(train=tokens), tokens.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"^one split with a column 'image' is needed, got "):
            arrays_from_hugging_face(refused)
