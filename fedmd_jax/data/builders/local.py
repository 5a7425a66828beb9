"""Builders of the data sets of the catalogue, with input from files or from a download."""

import pathlib

import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification import cifar, mnist

from fedmd_jax.data.builders.emnist_letters import EmnistLetters
from fedmd_jax.data.builders.leaf_femnist import LeafFemnist
from fedmd_jax.data.builders.rows import rows
from fedmd_jax.data.originals import Original

_BUILDERS = {
    "mnist": mnist.MNIST,
    "cifar10": cifar.Cifar10,
    "cifar100": cifar.Cifar100,
    "emnist/letters": EmnistLetters,
    "leaf/femnist": LeafFemnist,
}


def builder_of_download(name: str, data_dir: pathlib.Path) -> tfds.core.DatasetBuilder:
    """The builder that downloads a data set; stock ones need tensorflow.

    Args:
      name: name of a data set in the catalogue.
      data_dir: where to write.

    Returns:
      A builder that writes array_record.
    """
    return _BUILDERS[name](data_dir=data_dir, file_format="array_record")


def builder_of_files(name: str, original: Original, data_dir: pathlib.Path) -> tfds.core.DatasetBuilder:
    """A builder with the name, version and features of a data set that yields these rows, without tensorflow.

    Args:
      name: name of a data set in the catalogue.
      original: the rows.
      data_dir: where to write.

    Returns:
      A builder that writes array_record.
    """
    base = _BUILDERS[name]

    class Local(base, skip_registration=True):
        def _split_generators(self, dl_manager):
            for feature, names in original.names.items():
                self.info.features[feature].names = names
            return {split: rows(table) for split, table in original.tables.items()}

    Local.name = base.name
    return Local(data_dir=data_dir, file_format="array_record")
