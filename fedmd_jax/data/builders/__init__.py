"""Builders of TensorFlow Datasets: two custom ones, and the stock ones with input from files.

Importing this package imports TensorFlow Datasets. The builders are not registered, since the name `emnist` is taken:
call the classes, or read the output of `fedmd-jax data prepare` with `tfds.data_source(name, data_dir=...)`.
"""

from fedmd_jax.data.builders.emnist_letters import EmnistLetters
from fedmd_jax.data.builders.leaf_femnist import LeafFemnist
from fedmd_jax.data.builders.local import builder_of_download, builder_of_files

__all__ = ["EmnistLetters", "LeafFemnist", "builder_of_download", "builder_of_files"]
