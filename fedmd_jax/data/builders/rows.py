"""Converts a table of columns to the rows that a builder of TensorFlow Datasets yields."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fedmd_jax.data.originals import png


def rows(table: dict[str, np.ndarray]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with their numbers as keys, images as PNG bytes.

    Args:
      table: columns, [N, ...] each; `image` is uint8 [N, H, W, C].

    Yields:
      A row's number, from 0, and its features.
    """
    others = {name: column.tolist() for name, column in table.items() if name != "image"}
    for i, image in enumerate(table["image"]):
        yield i, {"image": png(image)} | {name: column[i] for name, column in others.items()}
