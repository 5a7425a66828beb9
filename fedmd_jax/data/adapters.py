"""Data sets of other libraries and folders as NumPy arrays `(inputs, labels)`, ready for a federation.

NumPy arrays need no adapter: `fedmd_jax.public_dataset`, `fedmd_jax.labelled_dataset` and `fedmd_jax.stack_private`
take inputs [N, ...] and labels [N] as they are. Images are [N, H, W, C], the layout of Flax. Every function here reads
the whole data set into memory once, so random augmentations are drawn once.
"""

import operator
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import PIL.Image

from fedmd_jax.checks import as_array, describe_value
from fedmd_jax.data.files import DataError, reading, user_path

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def arrays_from_torch(dataset: Any, *, channels_first: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Reads a data set of torch or torchvision, or anything with `len(dataset)` and `dataset[i] -> (input, label)`.

    Args:
      dataset: a map-style data set. Inputs may be PIL images, tensors or arrays. PIL images become uint8 [H, W, 1] if
        they are grey and uint8 [H, W, 3] if they are coloured. Tensors and arrays keep their dtype.
      channels_first: layout of tensors and arrays of rank 3: True for [C, H, W], which torchvision's `ToTensor` and
        `ToImage` give; False for [H, W, C]. Other ranks are taken as they are.

    Returns:
      Inputs [N, H, W, C] (or [N, ...] for other ranks), and labels [N], integers.

    Raises:
      ValueError: the data set has no length or no examples, an item is not (input, label), inputs differ in shape,
        images have another mode or layout, or a label is not an integer.

    Example:
      With torchvision: `dataset = torchvision.datasets.MNIST("data", train=True)` gives PIL images, so `scale` follows.
      With `transform=ToTensor()` the arrays are floats from 0 to 1 already, and `scale` is left out.

      >>> import numpy as np, PIL.Image, fedmd_jax as fmd
      >>> dataset = [(PIL.Image.new("L", (28, 28), color=51), 7), (PIL.Image.new("L", (28, 28)), 2)]
      >>> images, labels = fmd.data.arrays_from_torch(dataset)
      >>> images.shape, images.dtype, labels.tolist()
      ((2, 28, 28, 1), dtype('uint8'), [7, 2])
      >>> public = fmd.public_dataset(fmd.data.scale(images), labels)
      >>> shares = fmd.data.split_by_class(labels, num_clients=1, examples_per_class=1, rng=np.random.default_rng(0))
      >>> private = {i: (fmd.data.scale(images[rows]), labels[rows]) for i, rows in enumerate(shares)}

      `private` is what `fedmd_jax.stack_private(groups, private)` takes.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"a data set with len(dataset) and dataset[i] is needed, got {type(dataset).__name__}")
    inputs, labels = [], []
    for i in range(len(dataset)):
        item = dataset[i]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ValueError(f"items of the data set must be (input, label), got {describe_value(item)}")
        inputs.append(_as_input(item[0], channels_first))
        labels.append(item[1])
    return _stack(inputs), _as_labels(labels)


def arrays_from_hugging_face(
    dataset: Any,
    *,
    inputs: str = "image",
    labels: str = "label",
    transform: Callable[[Any], Any] | None = None,
    channels_first: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Reads two columns of a data set of Hugging Face, or of anything with `dataset[column]`.

    Args:
      dataset: one split, such as `datasets.load_dataset("mnist", split="train")`.
      inputs: name of the column of inputs: PIL images, as in `arrays_from_torch`, arrays, or token ids of one length.
      labels: name of the column of labels, integers from 0.
      transform: function that is applied to each value of the column of inputs; None for none. Texts need a tokenizer:
        `lambda text: tokenizer(text, padding="max_length", truncation=True, max_length=64)["input_ids"]`.
      channels_first: layout of arrays of rank 3: False for [H, W, C]; True for [C, H, W], as in the format "torch".

    Returns:
      Inputs, [N, ...], and labels, [N], integers.

    Raises:
      ValueError: the data set lacks a column, is not one split or has no examples, inputs are texts or differ in shape,
        images have another mode or layout, or a label is not an integer.

    Example:
      >>> import fedmd_jax as fmd
      >>> dataset = {"text": ["a bad film", "good"], "label": [0, 1]}
      >>> def tokenize(text, num_tokens=4):
      ...     return [len(word) for word in text.split()] + [0] * (num_tokens - len(text.split()))
      >>> tokens, labels = fmd.data.arrays_from_hugging_face(dataset, inputs="text", transform=tokenize)
      >>> tokens.tolist(), labels.tolist()
      ([[1, 3, 4, 0], [4, 0, 0, 0]], [0, 1])
    """
    values = [value if transform is None else transform(value) for value in _column(dataset, inputs)]
    return _stack([_as_input(value, channels_first) for value in values]), _as_labels(_column(dataset, labels))


def arrays_from_folder(
    folder: str | os.PathLike,
    *,
    classes: Sequence[str] | None = None,
    transform: Callable[[PIL.Image.Image], Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a folder of images by class, `folder/CLASS/*.png`, as torchvision's `ImageFolder` does.

    Images are found in subfolders of a class, too. Hidden files and files of other kinds are skipped.

    Args:
      folder: the folder.
      classes: names of the classes to read, in the order of their labels; `class_names(folder)` if None. Give those of
        the training folder when reading a test folder, in which a class may be missing.
      transform: function that is applied to each image; None for none. `lambda image: image.resize((32, 32))` brings
        images to one size.

    Returns:
      Images, uint8 [N, H, W, C], class after class in the order of the file names; C is 1 if all are grey, else 3.
      Labels, [N], integers: positions in `classes`.

    Raises:
      ValueError: there is no such folder, a class has no images, a file is damaged, or images differ in size or have
        another mode.

    Example:
      >>> import pathlib, tempfile, PIL.Image, fedmd_jax as fmd
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for name, color in (("cat", "red"), ("dog", "blue")):
      ...         pathlib.Path(folder, name).mkdir()
      ...         PIL.Image.new("RGB", (8, 6), color).save(pathlib.Path(folder, name, "1.png"))
      ...     images, labels = fmd.data.arrays_from_folder(folder)
      >>> images.shape, images[:, 0, 0].tolist(), labels.tolist()
      ((2, 6, 8, 3), [[255, 0, 0], [0, 0, 255]], [0, 1])
    """
    folder = user_path(folder)
    inputs, labels = [], []
    for label, name in enumerate(class_names(folder) if classes is None else classes):
        paths = image_files(folder / name)
        if not paths:
            raise DataError(f"{folder / name}: at least one image is needed, found none")
        for path in paths:
            with reading(path), PIL.Image.open(path) as image:
                image.load()
            inputs.append(_as_input(image if transform is None else transform(image)))
            labels.append(label)
    return _stack(inputs), _as_labels(labels)


def class_names(folder: str | os.PathLike) -> list[str]:
    """The names of the classes of a folder of images by class: of its subfolders, sorted.

    Args:
      folder: the folder.

    Raises:
      ValueError: there is no such folder.

    Example:
      >>> import pathlib, tempfile, fedmd_jax as fmd
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for name in ("dog", "cat"):
      ...         pathlib.Path(folder, name).mkdir()
      ...     fmd.data.class_names(folder)
      ['cat', 'dog']
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise DataError(f"a folder of images by class is needed, found no folder {folder}")
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All image files in a folder and its subfolders, sorted."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    return sorted(path for path in paths if not path.name.startswith("."))


def _column(dataset, name):
    try:
        return list(dataset[name])
    except (KeyError, TypeError, ValueError) as error:  # which one differs between kinds of data sets
        names = getattr(dataset, "column_names", None)
        found = type(dataset).__name__ + (f" with {describe_value(names)}" if names else "")
        raise ValueError(f"one split with a column {name!r} is needed, got {found}") from error


def _as_input(value: Any, channels_first: bool = False) -> np.ndarray:
    if isinstance(value, PIL.Image.Image):
        if value.mode not in ("1", "L", "P", "RGB"):
            raise ValueError(
                f"images must have the mode 1, L, P or RGB, got {value.mode}: image.convert('RGB') converts"
            )
        pixels = np.asarray(value.convert("L" if value.mode in ("1", "L") else "RGB"))
        return pixels if pixels.ndim == 3 else pixels[..., None]
    array = as_array("an input", value)
    if array.dtype.kind in "OSU":
        raise ValueError(
            f"inputs must be images or arrays of numbers (texts need a tokenizer), got {describe_value(value)}"
        )
    if array.ndim == 3 and channels_first:
        if array.shape[2] in (1, 3) and min(array.shape[:2]) > 4:
            raise ValueError(f"images must be [C, H, W], got {array.shape}: channels_first=False takes [H, W, C]")
        return np.moveaxis(array, 0, -1)
    return array


def _stack(inputs: list[np.ndarray]) -> np.ndarray:
    """All inputs in one array; grey images among coloured ones become coloured."""
    if not inputs:
        raise ValueError("at least one example is needed, got none")
    if {array.shape[-1] for array in inputs if array.ndim == 3} == {1, 3}:
        inputs = [np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array for array in inputs]
    other = next((i for i, array in enumerate(inputs) if array.shape != inputs[0].shape), None)
    if other is not None:
        raise ValueError(
            f"all inputs must have one shape, got {inputs[0].shape} and, in example {other}, {inputs[other].shape}: "
            "resize or pad them in a transform"
        )
    return np.stack(inputs)


def _as_labels(labels: Iterable[Any]) -> np.ndarray:
    numbers = []
    for i, label in enumerate(labels):
        try:
            numbers.append(operator.index(label))
        except TypeError as error:
            raise ValueError(f"labels must be integers, got {describe_value(label)} in example {i}") from error
    return np.array(numbers)
