"""Builds digits_and_letters.npz, the data set inside the package, from the original MNIST and EMNIST files.

    python -m fedmd_jax.data.embedded.build FOLDER

FOLDER holds `mnist/*.gz` and `emnist_letters/*.gz`, see `fedmd_jax.data.sources`. LICENSE.md says what is chosen.
"""

import pathlib

import numpy as np
import tyro

from fedmd_jax.data.files import write_npz
from fedmd_jax.data.partition import split_by_class
from fedmd_jax.data.sources import load_images

PATH = pathlib.Path(__file__).with_name("digits_and_letters.npz")
SEED = 191003581  # FedMD is arXiv 1910.03581


def choose(folder: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Draws the content of the file: class-balanced random parts of MNIST and of the letters a-f of EMNIST.

    Args:
      folder: the data folder with the original files.

    Returns:
      `{digits,letters}_{train,test}_{images,labels}`: images uint8 [N, 28, 28, 1], labels uint8 [N] from 0.

    Raises:
      ValueError: a file is missing or damaged, or has too few images of a class.
    """
    rng = np.random.Generator(np.random.PCG64(SEED))
    arrays = {}
    for key, name, split, num_classes, examples_per_class in (
        ("digits_train", "mnist", "train", 10, 800),
        ("digits_test", "mnist", "test", 10, 100),
        ("letters_train", "emnist/letters", "train", 6, 300),
        ("letters_test", "emnist/letters", "test", 6, 400),
    ):
        images, labels = load_images(name, split, data_dir=folder)
        (chosen,) = split_by_class(
            labels, num_clients=1, examples_per_class=examples_per_class, classes=range(num_classes), rng=rng
        )
        chosen = np.sort(chosen)  # the order of the source, in which MNIST's digits are mixed
        arrays[f"{key}_images"] = images[chosen]
        arrays[f"{key}_labels"] = labels[chosen].astype(np.uint8)
    return arrays


def main(folder: tyro.conf.Positional[pathlib.Path], out: pathlib.Path = PATH) -> None:
    """Draws the data set and writes the file.

    Args:
      folder: The data folder with the original files.
      out: The file to write.
    """
    write_npz(out, **choose(folder))
    print(f"{out.name}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    tyro.cli(main)
