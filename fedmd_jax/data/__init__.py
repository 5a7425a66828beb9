"""Images as NumPy arrays: sources, preparation, and partitions among clients."""

from fedmd_jax.data.adapters import (
    arrays_from_folder as arrays_from_folder,
    arrays_from_hugging_face as arrays_from_hugging_face,
    arrays_from_torch as arrays_from_torch,
    class_names as class_names,
)
from fedmd_jax.data.files import DataError as DataError, Images as Images
from fedmd_jax.data.originals import merge_case as merge_case
from fedmd_jax.data.partition import (
    lognormal as lognormal,
    power_law as power_law,
    split_by_class as split_by_class,
    split_by_quantity as split_by_quantity,
    split_by_superclass as split_by_superclass,
    split_by_writer as split_by_writer,
    split_dirichlet as split_dirichlet,
    split_dirichlet_labels as split_dirichlet_labels,
    split_k_classes as split_k_classes,
)
from fedmd_jax.data.preparing import prepare_data as prepare_data
from fedmd_jax.data.sources import load_column as load_column, load_images as load_images, save_images as save_images
from fedmd_jax.data.transform import (
    center as center,
    center_ink as center_ink,
    mean_image as mean_image,
    scale as scale,
)
