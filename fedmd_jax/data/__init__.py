"""Images as NumPy arrays: where they come from, how they are prepared, and who owns which. No JAX, no Flax."""

from fedmd_jax.data.partition import split_by_class
from fedmd_jax.data.prepare import center, mean_image, scale
from fedmd_jax.data.sources import DataError, Images, load_images, save_images

__all__ = [
    "DataError",
    "Images",
    "center",
    "load_images",
    "mean_image",
    "save_images",
    "scale",
    "split_by_class",
]
