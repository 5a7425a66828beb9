"""A data folder of tiny images, and an experiment with them."""

import numpy as np
import pytest

from fedmd_jax.data import save_images
from fedmd_jax.experiments.settings import Data, Experiment, Phase, StoppablePhase

PUBLIC_CLASSES, PRIVATE_CLASSES = 4, 5


def images(seed, num_per_class, num_classes, size=5):
    """Labelled images; the last pixel of each is its own number, by which a test can tell them apart."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(num_classes), num_per_class))
    pixels = rng.integers(0, 256, (len(labels), size, size, 1), dtype=np.uint8)
    pixels[:, -1, -1, 0] = np.arange(len(labels))
    return pixels, labels


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    save_images(folder, "dots", "train", *images(0, 10, PUBLIC_CLASSES))
    save_images(folder, "marks", "train", *images(1, 12, PRIVATE_CLASSES))
    save_images(folder, "marks", "test", *images(2, 8, PRIVATE_CLASSES))
    save_images(folder, "large", "train", *images(3, 10, PUBLIC_CLASSES, size=6))
    return folder


@pytest.fixture
def data(data_folder):
    return Data(
        public="dots",
        private="marks",
        data_dir=str(data_folder),
        num_public=30,
        private_classes=(4, 1, 2),
        examples_per_class=3,
        num_test=20,
    )


@pytest.fixture
def experiment(data):
    phase, stoppable = Phase(num_epochs=1, batch_size=16), StoppablePhase(num_epochs=1, batch_size=16)
    return Experiment(
        networks=("mlp:n1=3", "mlp", "mlp:n1=3"),
        weights=(1.0, 2.0, 3.0),
        data=data,
        public_training=stoppable,
        private_training=stoppable,
        pooled_training=stoppable,
        digest=phase,
        revisit=phase,
        num_rounds=2,
        subset_size=10,
    )
