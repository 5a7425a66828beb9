"""Builders of TensorFlow Datasets: two custom ones, and the stock ones with input from files.

Importing this module imports TensorFlow Datasets. The builders are not registered, since the name `emnist` is taken:
call the classes, or read the output of `fedmd-jax data prepare` with `tfds.data_source(name, data_dir=...)`.
"""

import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification import cifar, mnist

from fedmd_jax.data.catalogue import CATALOGUE, read_original
from fedmd_jax.data.originals import LEAF_CLASSES, Original


class _Characters(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The common part of the custom builders, which have `DESCRIPTION`, `CITATION`, `HOMEPAGE` and `_features`."""

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(28, 28, 1))} | self._features()),
            supervised_keys=("image", "label"),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
        )

    def _generate_examples(self, table):
        return _rows(table)


class EmnistLetters(_Characters, skip_registration=True):
    """The complete EMNIST Letters: replaces the stock builder of `emnist/letters`, with the same name and version."""

    name = "emnist"
    VERSION = tfds.core.Version("3.1.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="letters", description="EMNIST Letters, whole"),)
    DESCRIPTION = """\
EMNIST Letters: handwritten letters from NIST Special Database 19 in the format of MNIST, 26 classes numbered from 1
with both cases merged, 124,800 and 20,800 images. This builder reads all of them; the stock builder of TensorFlow
Datasets stops after the first 88,800 and 14,800. Images are as NIST ships them, transposed.
"""
    CITATION = "Cohen et al., EMNIST: Extending MNIST to handwritten letters, 2017, doi:10.1109/IJCNN.2017.7966217"
    HOMEPAGE = "https://www.nist.gov/itl/products-and-services/emnist-dataset"

    def _features(self):
        return {"label": tfds.features.ClassLabel(num_classes=27)}  # 0 is not used

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        data_set = CATALOGUE["emnist/letters"]
        folder = dl_manager.download_and_extract(data_set.url)
        # The archive has been checked.
        original = read_original(data_set, pathlib.Path(folder), checksums=False)
        return {split: self._generate_examples(table) for split, table in original.tables.items()}


class LeafFemnist(_Characters, skip_registration=True):
    """LEAF's FEMNIST with writers, from the output of LEAF's scripts, or the same as arrays, in the manual folder."""

    name = "leaf"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="femnist", description="FEMNIST with writers"),)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "LEAF has no download: run its data/femnist/preprocess.sh -s niid --sf 1.0 -k 0 -t sample (see "
        "https://leaf.cmu.edu) and copy the folders data/train and data/test here."
    )
    DESCRIPTION = """\
FEMNIST of the LEAF benchmark: handwritten digits, capitals and small letters from NIST Special Database 19, each with
the name of its writer. LEAF scales the whole field down, so characters are smaller than EMNIST's. Train and test are
LEAF's own split of each writer's images.
"""
    CITATION = "Caldas et al., LEAF: A Benchmark for Federated Settings, 2018, arXiv:1812.01097"
    HOMEPAGE = "https://leaf.cmu.edu"

    def _features(self):
        return {"label": tfds.features.ClassLabel(names=LEAF_CLASSES), "writer": tfds.features.Text()}

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        original = read_original(CATALOGUE["leaf/femnist"], pathlib.Path(dl_manager.manual_dir))
        return {split: self._generate_examples(table) for split, table in original.tables.items()}


# The builders that download the data sets of the catalogue; stock ones need tensorflow for it.
BUILDERS = {
    "mnist": mnist.MNIST,
    "cifar10": cifar.Cifar10,
    "cifar100": cifar.Cifar100,
    "emnist/letters": EmnistLetters,
    "leaf/femnist": LeafFemnist,
}


def builder_of_files(name: str, original: Original, data_dir: pathlib.Path) -> tfds.core.DatasetBuilder:
    """A builder with the name, version and features of a data set that yields these rows, without tensorflow.

    Args:
      name: name of a data set in the catalogue.
      original: the rows.
      data_dir: where to write.

    Returns:
      A builder that writes array_record.
    """
    base = BUILDERS[name]

    class Local(base, skip_registration=True):
        def _split_generators(self, dl_manager):
            for feature, names in original.names.items():
                self.info.features[feature].names = names
            return {split: _rows(table) for split, table in original.tables.items()}

    Local.name = base.name
    return Local(data_dir=data_dir, file_format="array_record")


def _rows(table: dict[str, np.ndarray]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the features of each row of a table, images as PNG bytes: arrays would need tensorflow."""
    others = {name: column.tolist() for name, column in table.items() if name != "image"}
    for i, image in enumerate(table["image"]):
        png = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(png, "PNG")
        yield i, {"image": png.getvalue()} | {name: column[i] for name, column in others.items()}
