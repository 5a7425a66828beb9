"""Images as NumPy arrays: sources, preparation, and partitions among clients."""

from fedmd_jax.data.files import DataError, Images
from fedmd_jax.data.originals import merge_case
from fedmd_jax.data.partition import (
    lognormal,
    power_law,
    split_by_class,
    split_by_quantity,
    split_by_superclass,
    split_by_writer,
    split_dirichlet,
    split_k_classes,
)
from fedmd_jax.data.prepare import center, center_ink, mean_image, scale
from fedmd_jax.data.preparing import prepare_data
from fedmd_jax.data.sources import load_column, load_images, save_images

__all__ = [
    "DataError",
    "Images",
    "center",
    "center_ink",
    "load_column",
    "load_images",
    "lognormal",
    "mean_image",
    "merge_case",
    "power_law",
    "prepare_data",
    "save_images",
    "scale",
    "split_by_class",
    "split_by_quantity",
    "split_by_superclass",
    "split_by_writer",
    "split_dirichlet",
    "split_k_classes",
]
