"""An experiment's data: images read, selected, split among the clients, centred, and all labels in one head."""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from fedmd_jax import data as sources
from fedmd_jax.data import Images
from fedmd_jax.experiments.settings import Data
from fedmd_jax.simulation.federation_data import labelled_dataset, public_dataset
from fedmd_jax.simulation.trained import Preprocessing
from fedmd_jax.types import PrivateDataset, PublicDataset

Labelled = TypeVar("Labelled", PublicDataset, PrivateDataset)
_COLUMNS = {"superclasses": "coarse_label", "writers": "writer"}  # what else a split needs to know of each image


class Datasets(NamedTuple):
    """What an experiment trains and tests on, and how many outputs a network needs for it."""

    public: PublicDataset
    private: Mapping[int, tuple[np.ndarray, np.ndarray]]  #: client id -> inputs [n, H, W, channels], labels [n]
    test: PrivateDataset  #: unstacked, the same for all clients: what `Data.evaluate_on` says
    num_classes: int  #: C, public and private classes together
    public_test: PrivateDataset | None  #: unstacked; None unless it was asked for
    preprocess: Preprocessing  #: from private images and those of the test set to inputs


def load(data: Data, *, num_clients: int, seed: int, public_test: bool = False) -> Datasets:
    """Reads, selects, splits and centres the images.

    Labels are renumbered: public classes first, then the private ones in the order of `data.private_classes`, all in
    one head, as in the released code (10 + 6 = 16). The mean image of the public examples is subtracted from all.

    Args:
      data: which images.
      num_clients: how many share the private ones.
      seed: of the selection and of the split.
      public_test: whether the test split of the public data is read, too.

    Returns:
      The datasets; client ids are 0 to `num_clients` - 1.

    Raises:
      ValueError: data that is missing or damaged, or not enough of it.
    """
    rng = np.random.default_rng(seed)
    public = sources.load_images(data.public, "train", data_dir=data.data_dir)
    public_rows = _choose(
        "num_public", f"public dataset {data.public}", np.arange(len(public.labels)), data.num_public, rng
    )
    private, test, shares = _split(data, num_clients, rng)
    if data.evaluate_on == "validation":
        unassigned = np.setdiff1d(np.arange(len(private.labels)), np.concatenate(shares))
        test = Images(private.images[unassigned], private.labels[unassigned])
    _check_shapes(data, public, private, test)
    candidates = np.flatnonzero(np.isin(test.labels, data.private_classes))
    test_rows = _choose("num_test", f"{data.evaluate_on} part of {data.private}", candidates, data.num_test, rng)

    public_inputs = sources.scale(public.images[public_rows])
    mean, num_public_classes = sources.mean_image(public_inputs), int(public.labels.max()) + 1
    # LEAF's letters are cut out and centred like MNIST's digits.
    preprocess = Preprocessing(mean, center_ink=data.private == "leaf/femnist")

    def examples(source, rows):
        labels = _renumber(source.labels[rows], data.private_classes, num_public_classes)
        return preprocess(source.images[rows]), labels

    return Datasets(
        public=public_dataset(public_inputs - mean, public.labels[public_rows]),
        private={client_id: examples(private, rows) for client_id, rows in enumerate(shares)},
        test=labelled_dataset(*examples(test, test_rows)),
        num_classes=num_public_classes + len(data.private_classes),
        public_test=_public_test(data, public.images[public_rows]) if public_test else None,
        preprocess=preprocess,
    )


def pool(private: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> PrivateDataset:
    """The private examples of all clients together, unstacked, by client id."""
    inputs, labels = zip(*(private[client_id] for client_id in sorted(private)), strict=True)
    return labelled_dataset(np.concatenate(inputs), np.concatenate(labels))


def hold_out(dataset: Labelled, share: float, rng: np.random.Generator) -> tuple[Labelled, PrivateDataset]:
    """A random part of the examples for validation, and the rest for training.

    Args:
      dataset: unstacked, without padding.
      share: of the examples, 0..1, that are held out: at least one, and not all.
      rng: draws them.

    Raises:
      ValueError: there are fewer than two examples.
    """
    num_rows = len(dataset.labels)
    if num_rows < 2:
        raise ValueError(f"to hold out validation data takes at least 2 examples, got {num_rows}")
    num_held = min(max(round(share * num_rows), 1), num_rows - 1)
    held, rest = np.split(rng.permutation(num_rows), [num_held])
    make = public_dataset if isinstance(dataset, PublicDataset) else labelled_dataset
    return make(dataset.inputs[rest], dataset.labels[rest]), labelled_dataset(
        dataset.inputs[held], dataset.labels[held]
    )


def _public_test(data: Data, train: np.ndarray) -> PrivateDataset:
    """Centred with the mean of the public examples."""
    test = sources.load_images(data.public, "test", data_dir=data.data_dir)
    _, inputs = sources.center(sources.scale(train), sources.scale(test.images))
    return labelled_dataset(inputs, test.labels)


def _split(data: Data, num_clients: int, rng: np.random.Generator) -> tuple[Images, Images, list[np.ndarray]]:
    """Private images, test images, and the rows of each client's private images."""
    splits, classes = ("train", "test"), data.private_classes
    private, test = (_read(data, split) for split in splits)
    if data.split in _COLUMNS:
        column, test_column = (
            sources.load_column(data.private, split, _COLUMNS[data.split], data_dir=data.data_dir) for split in splits
        )
    if data.split == "superclasses":  # these are the labels; fine classes only decide which client owns an image
        fine, private, test = private.labels, private._replace(labels=column), test._replace(labels=test_column)
    if data.split == "writers":  # the test split of the source has only a tenth of the few images of each writer
        private = test = Images(*(np.concatenate(both) for both in zip(private, test, strict=True)))
        column = np.concatenate([column, test_column])
    found = np.unique(private.labels).tolist()
    if missing := sorted(set(classes) - set(found)):
        raise ValueError(f"{data.private} has no examples of the private_classes {missing}, it has {found}")
    common = {"num_clients": num_clients, "rng": rng}
    if data.split == "writers":
        common["min_examples"] = data.min_examples
        shares = sources.split_by_writer(column, private.labels, classes=classes, **common)
        others = ~np.isin(column, column[np.concatenate(shares)])
        return private, Images(private.images[others], private.labels[others]), shares
    if data.split == "dirichlet":
        common |= {"alpha": data.alpha, "examples_per_client": data.examples_per_class * len(classes)}
        return private, test, sources.split_dirichlet_labels(private.labels, classes=classes, **common)
    common["examples_per_class"] = data.examples_per_class
    if data.split == "superclasses":
        return private, test, sources.split_by_superclass(fine, private.labels, superclasses=classes, **common)
    return private, test, sources.split_by_class(private.labels, classes=classes, **common)


def _read(data: Data, split: str) -> Images:
    """Of the private data; LEAF's are letters without case."""
    images, labels = sources.load_images(data.private, split, data_dir=data.data_dir)
    return Images(images, sources.merge_case(labels) if data.private == "leaf/femnist" else labels)


def _check_shapes(data: Data, *sets: Images) -> None:
    shapes = [images.images.shape[1:] for images in sets]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"public and private images must have one shape, got {shapes[0]} for {data.public}, "
            f"{shapes[1]} and {shapes[2]} for train and test of {data.private}"
        )


def _choose(setting: str, what: str, rows: np.ndarray, num_wanted: int, rng: np.random.Generator) -> np.ndarray:
    if num_wanted > len(rows):
        raise ValueError(f"the {what} has {len(rows)} examples, {setting} wants {num_wanted}")
    return rows[rng.permutation(len(rows))[:num_wanted]]


def _renumber(labels: np.ndarray, classes: tuple[int, ...], start: int) -> np.ndarray:
    """The i-th of the classes becomes `start` + i."""
    position = {label: start + i for i, label in enumerate(classes)}
    return np.array([position[label] for label in labels.tolist()], np.int32)
