"""Public subsets of changed images: clients score more kinds of images, with the same communication."""

from collections.abc import Callable, Sequence
from functools import partial

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.algorithms.public_subset import draw_public_subset
from fedmd_jax.checks import check_not_negative, check_numbers, check_positive
from fedmd_jax.types import PublicDataset

# (key, inputs [M, ...]) -> changed inputs [M, ...].
Augmentation = Callable[[chex.PRNGKey, chex.Array], chex.Array]


def warp_images(
    key: chex.PRNGKey, images: chex.Array, *, angle: float = 180.0, scale: float = 1.4, shear: float = 0.3
) -> chex.Array:
    """Turns, scales and shears each image by random amounts about its centre.

    The amounts change the positions at which the image is read, by linear interpolation; positions outside have the
    value at the border.

    Args:
      key: decides the amounts.
      images: [M, H, W, C], floats.
      angle: largest angle in degrees, in both directions.
      scale: largest factor of height and of width, which are drawn separately; the smallest is 1 / scale.
      shear: largest shift of a position along the height per pixel of width, in both directions.

    Returns:
      The changed images, [M, H, W, C].

    Raises:
      ValueError: the images are not floats of rank 4, or an amount is negative or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> images = jnp.arange(8.0).reshape(2, 2, 2, 1)
      >>> fmd.algorithms.warp_images(jax.random.key(0), images).shape
      (2, 2, 2, 1)
      >>> bool((fmd.algorithms.warp_images(jax.random.key(0), images, angle=0, scale=1, shear=0) == images).all())
      True
    """
    check_numbers("images that are warped", images, kind=jnp.floating, rank=4)
    check_not_negative("angle", angle)
    check_positive("scale", scale)
    check_not_negative("shear", shear)
    num_images, height, width, _ = images.shape
    key_angle, key_scale, key_shear = jax.random.split(key, 3)
    angles = jnp.deg2rad(angle) * jax.random.uniform(key_angle, (num_images,), minval=-1)
    scales = scale ** jax.random.uniform(key_scale, (num_images, 2), minval=-1)
    shears = shear * jax.random.uniform(key_shear, (num_images,), minval=-1)
    middle = (height - 1) / 2, (width - 1) / 2
    y, x = (jnp.arange(size, dtype=jnp.float32) - at for size, at in zip((height, width), middle, strict=True))
    y, x = jnp.meshgrid(y, x, indexing="ij")

    def warp(image, angle, scales, shear):
        along, across = scales[0] * y + shear * x, scales[1] * x
        rows = jnp.cos(angle) * along - jnp.sin(angle) * across + middle[0]
        columns = jnp.sin(angle) * along + jnp.cos(angle) * across + middle[1]
        look_up = partial(jax.scipy.ndimage.map_coordinates, coordinates=[rows, columns], order=1, mode="nearest")
        return jax.vmap(look_up, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(warp)(images.astype(jnp.float32), angles, scales, shears).astype(images.dtype)


def cut_images(key: chex.PRNGKey, images: chex.Array) -> chex.Array:
    """Cuts each image along a random line and replaces the larger side by that of another image of the subset.

    Args:
      key: decides lines and pairs.
      images: [M, H, W, C], floats.

    Returns:
      The changed images, [M, H, W, C]. The line is at most half as far from the centre as the border is.

    Raises:
      ValueError: the images are not floats of rank 4.

    References:
      With boxes instead of lines, and labels that are mixed: Yun et al. 2019, "CutMix".

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> images = jnp.broadcast_to(jnp.array([1.0, 2.0, 3.0])[:, None, None, None], (3, 8, 8, 1))
      >>> cut = fmd.algorithms.cut_images(jax.random.key(0), images)
      >>> cut.shape, sorted(set(cut.ravel().tolist()))
      ((3, 8, 8, 1), [1.0, 2.0, 3.0])
    """
    check_numbers("images that are cut", images, kind=jnp.floating, rank=4)
    key_angle, key_distance, key_pairs = jax.random.split(key, 3)
    num_images, height, width, _ = images.shape
    angles = jax.random.uniform(key_angle, (num_images, 1, 1, 1), maxval=2 * jnp.pi)
    distances = jax.random.uniform(key_distance, (num_images, 1, 1, 1), maxval=0.5)
    y = jnp.linspace(-1, 1, height)[None, :, None, None]
    x = jnp.linspace(-1, 1, width)[None, None, :, None]
    is_kept = jnp.sin(angles) * y + jnp.cos(angles) * x > distances
    return jnp.where(is_kept, images, jax.random.permutation(key_pairs, images))


def draw_augmented_subset(
    key: chex.PRNGKey,
    public: PublicDataset,
    size: int,
    *,
    augmentations: Sequence[Augmentation] = (warp_images, cut_images),
    draw_subset: Callable[[chex.PRNGKey, PublicDataset, int], PublicDataset] = draw_public_subset,
) -> PublicDataset:
    """Draws a public subset and changes its inputs at random; all clients of a round get the same inputs.

    `fedmd(..., draw_subset=draw_augmented_subset)`. Clients draw the inputs themselves, from the key of the round, so
    that nothing more is sent. Images that are less alike convey more of what other clients know.

    Args:
      key: key of the round.
      public: inputs [P, ...].
      size: number of examples M, at most P.
      augmentations: changes of the inputs, one after the other.
      draw_subset: how the examples are drawn.

    Returns:
      Inputs [M, ...]; labels are dropped, since they may be wrong for changed inputs.

    Raises:
      ValueError: what `draw_subset` and the augmentations refuse.

    References:
      Not in Li and Wang 2019. Distillation on strongly augmented images: Beyer et al. 2022, "Knowledge distillation: A
      good teacher is patient and consistent".

    Example:
      >>> import jax, numpy as np, fedmd_jax as fmd
      >>> public = fmd.public_dataset(np.zeros((5, 8, 8, 1)), labels=np.arange(5))
      >>> subset = fmd.algorithms.draw_augmented_subset(jax.random.key(0), public, 3)
      >>> subset.inputs.shape, subset.labels
      ((3, 8, 8, 1), None)
    """
    key_draw, *keys = jax.random.split(key, 1 + len(augmentations))
    inputs = draw_subset(key_draw, public, size).inputs
    for augment, key_augment in zip(augmentations, keys, strict=True):
        inputs = augment(key_augment, inputs)
    return PublicDataset(inputs, None)
