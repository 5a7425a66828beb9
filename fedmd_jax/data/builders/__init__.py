"""Builders of TensorFlow Datasets: two of our own, and the stock ones fed from files.

Importing this package imports TensorFlow Datasets. Nothing is registered there, since `emnist` is taken: call the
classes, or read what `fedmd-jax data prepare` wrote with `tfds.data_source(name, data_dir=...)`.
"""

from fedmd_jax.data.builders.emnist_letters import EmnistLetters
from fedmd_jax.data.builders.leaf_femnist import LeafFemnist
from fedmd_jax.data.builders.local import builder_of_download, builder_of_files

__all__ = ["EmnistLetters", "LeafFemnist", "builder_of_download", "builder_of_files"]
