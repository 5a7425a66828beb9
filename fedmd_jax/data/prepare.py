"""From stored pixels to what a network sees: uint8 images become centred float32 images."""

import numpy as np


def scale(images: np.ndarray) -> np.ndarray:
    """Pixels as floats between 0 and 1.

    Args:
      images: pixels, [N, H, W, C], uint8.

    Returns:
      The images divided by 255, [N, H, W, C], float32.

    Raises:
      ValueError: the images are not uint8 of rank 4 (scaling what is scaled already would go unnoticed).

    >>> scale(np.array([0, 51, 255], np.uint8).reshape(1, 1, 3, 1)).ravel().tolist()
    [0.0, 0.20000000298023224, 1.0]
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")
    return np.divide(images, 255, dtype=np.float32)


def mean_image(images: np.ndarray) -> np.ndarray:
    """The mean of each pixel over a set of images.

    Args:
      images: images, [N, H, W, C] with N at least 1, floats.

    Returns:
      The mean image, [H, W, C], of the same dtype; summed in float64, so that its last bits do not depend on N.

    Raises:
      ValueError: the images are not floats of rank 4, or there are none.

    >>> mean_image(np.array([[[[0.25]]], [[[0.75]]]], np.float32)).tolist()
    [[[0.5]]]
    """
    _check_floats(images)
    return images.mean(axis=0, dtype=np.float64).astype(images.dtype)


def center(public: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Subtracts the mean image of the public training images from every set.

    The released FedMD code centres public and private images each by a mean of their own, and takes the private mean
    over the whole source data set, most of which no client owns. Here every set is centred by the public mean alone:
    all clients know it, nothing private enters it, and the same pixels look the same to a network in every set.

    Args:
      public: public training images, [P, H, W, C], floats.
      *others: any other sets (public test, private, private test), [N, H, W, C] each, floats.

    Returns:
      All the sets in the order given, centred: `(public, *others)`.

    Raises:
      ValueError: a set is not floats of rank 4, `public` is empty, or the sets differ in image shape.

    >>> public, private = center(np.full((2, 1, 1, 1), 0.5, np.float32), np.ones((1, 1, 1, 1), np.float32))
    >>> public.ravel().tolist(), private.ravel().tolist()
    ([0.0, 0.0], [0.5])
    """
    mean = mean_image(public)
    for images in others:
        _check_floats(images, min_examples=0)
        if images.shape[1:] != mean.shape:
            raise ValueError(
                f"all sets must have images of one shape, got {list(images.shape[1:])} beside public {list(mean.shape)}"
            )
    return tuple(images - mean for images in (public, *others))


def _check_floats(images, *, min_examples=1):
    if not np.issubdtype(images.dtype, np.floating) or images.ndim != 4 or len(images) < min_examples:
        raise ValueError(
            f"images must be floats [N, H, W, C] with N >= {min_examples} (see scale), "
            f"got {images.dtype} {list(images.shape)}"
        )
