"""Preprocessing of images: from uint8 pixels to centred float32 images."""

import numpy as np
import PIL.Image

from fedmd_jax.checks import as_array


def scale(images: np.ndarray) -> np.ndarray:
    """Scales pixels to floats between 0 and 1.

    Args:
      images: pixels, [N, H, W, C], uint8.

    Returns:
      The images divided by 255, [N, H, W, C], float32.

    Raises:
      ValueError: the images are not uint8 of rank 4 (so that images are not scaled twice).

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> fmd.data.scale(np.array([0, 51, 255], np.uint8).reshape(1, 1, 3, 1)).ravel().tolist()
      [0.0, 0.20000000298023224, 1.0]
    """
    images = as_array("images", images)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")
    return np.divide(images, 255, dtype=np.float32)


def center_ink(images: np.ndarray) -> np.ndarray:
    """Crops, scales and centres handwriting, as was done for MNIST.

    Pixels up to 31 are not ink: downscaling left a halo around the characters of LEAF. Specks are removed: parts that
    touch no other part and have less than a tenth of the ink of the largest one; the dot of an i has more. The bounding
    box of the ink is scaled, with its aspect ratio, so that its longer side takes 20 of 28 pixels, and its centre of
    mass is moved to the centre of the image. LEAF's images are downscaled fields of a form in which the characters are
    small, thin and off centre, unlike those of MNIST.

    Args:
      images: white ink on black, [N, H, W, 1], uint8.

    Returns:
      Images of the same shape; those without ink are black.

    Raises:
      ValueError: the images are not uint8 of rank 4 with one channel.

    References:
      LeCun, Cortes and Burges, The MNIST database of handwritten digits, on its preprocessing.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> image = np.zeros((1, 28, 28, 1), np.uint8)
      >>> image[0, 2:7, 3:5] = 255
      >>> rows, columns = np.nonzero(fmd.data.center_ink(image)[0, :, :, 0] > 127)
      >>> (rows.min(), rows.max(), columns.min(), columns.max())
      (np.int64(4), np.int64(23), np.int64(10), np.int64(17))
    """
    images = as_array("images", images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 1 or 0 in images.shape[1:]:
        raise ValueError(f"images must be uint8 [N, H, W, 1], got {images.dtype} {list(images.shape)}")
    ink = _without_specks(np.where(images > _FAINT, images, 0).astype(np.uint8)[:, :, :, 0])
    return np.stack([_center_one(image)[:, :, None] for image in ink]) if len(images) else images


_FAINT = 31
_SPECK = 0.1  # of the largest part; separate dots and strokes of LEAF's letters have at least .11


def _without_specks(images):
    """Images, [N, H, W], without their small parts: connected components, whose pixels touch at edges or corners."""
    import scipy.ndimage  # takes a third of a second, and only LEAF's images need it

    touching = np.zeros((3, 3, 3))
    touching[1] = 1  # not the images before and after
    parts, _ = scipy.ndimage.label(images, touching)
    ink = np.bincount(parts.ravel(), weights=images.ravel())[parts]  # of the part that a pixel is in
    return np.where(ink < _SPECK * ink.max(axis=(1, 2), keepdims=True, initial=0), 0, images)


def _center_one(image):
    rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
    if len(rows) == 0:
        return image
    ink = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = min(image.shape) * 20 / 28
    height, width = (max(1, round(side * size / max(ink.shape))) for side in ink.shape)
    ink = np.asarray(PIL.Image.fromarray(ink).resize((width, height), PIL.Image.Resampling.BICUBIC))
    middle = [
        np.sum(np.arange(side) * ink.sum(axis=1 - axis)) / max(ink.sum(), 1) for axis, side in enumerate(ink.shape)
    ]
    corner = [
        int(np.clip(round((side - 1) / 2 - at), 0, side - length))
        for side, at, length in zip(image.shape, middle, ink.shape, strict=True)
    ]
    centred = np.zeros_like(image)
    centred[corner[0] : corner[0] + height, corner[1] : corner[1] + width] = ink
    return centred


def mean_image(images: np.ndarray) -> np.ndarray:
    """The mean of each pixel over a set of images.

    Args:
      images: images, [N, H, W, C] with N at least 1, floats.

    Returns:
      The mean image, [H, W, C], of the same dtype; summed in float64, so that its last bits do not depend on N.

    Raises:
      ValueError: the images are not floats of rank 4, or there are none.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> fmd.data.mean_image(np.array([[[[0.25]]], [[[0.75]]]], np.float32)).tolist()
      [[[0.5]]]
    """
    images = _as_floats(images)
    return images.mean(axis=0, dtype=np.float64).astype(images.dtype)


def center(public: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Subtracts the mean image of the public training images from every set.

    The released FedMD code centres public and private images by separate means, and takes the private mean over the
    whole source data set, most of which no client owns. Here every set is centred by the public mean: all clients know
    it, it contains nothing private, and equal pixels stay equal in all sets.

    Args:
      public: public training images, [P, H, W, C], floats.
      *others: any other sets (public test, private, private test), [N, H, W, C] each, floats.

    Returns:
      All the sets in the order given, centred, as `(public, *others)`.

    Raises:
      ValueError: a set is not floats of rank 4, `public` is empty, or the sets differ in image shape.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> public, private = fmd.data.center(np.full((2, 1, 1, 1), 0.5, np.float32), np.ones((1, 1, 1, 1), np.float32))
      >>> public.ravel().tolist(), private.ravel().tolist()
      ([0.0, 0.0], [0.5])
    """
    mean = mean_image(public)
    public, *others = _as_floats(public), *(_as_floats(images, min_examples=0) for images in others)
    for images in others:
        if images.shape[1:] != mean.shape:
            raise ValueError(
                f"all sets must have images of one shape, got {list(images.shape[1:])} beside public {list(mean.shape)}"
            )
    return tuple(images - mean for images in (public, *others))


def _as_floats(images, *, min_examples=1):
    images = as_array("images", images)
    if not np.issubdtype(images.dtype, np.floating) or images.ndim != 4 or len(images) < min_examples:
        raise ValueError(
            f"images must be floats [N, H, W, C] with N >= {min_examples} (see scale), "
            f"got {images.dtype} {list(images.shape)}"
        )
    return images
