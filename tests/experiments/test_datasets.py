import dataclasses

import numpy as np
import pytest
from experiments.conftest import images

from fedmd_jax.data import load_images, save_images
from fedmd_jax.experiments.datasets import load, pool
from fedmd_jax.experiments.settings import Data


def test_shapes_and_counts(data):
    datasets = load(data, num_clients=3, seed=0)
    assert datasets.num_classes == 4 + 3
    assert datasets.public.inputs.shape == (30, 5, 5, 1)
    assert [inputs.shape for inputs, _ in datasets.private.values()] == [(9, 5, 5, 1)] * 3
    assert list(datasets.private) == [0, 1, 2]
    assert pool(datasets.private).inputs.shape == (27, 5, 5, 1)
    assert datasets.test.inputs.shape == (20, 5, 5, 1)


def test_public_classes_come_first_then_the_private_ones_in_their_order(data):
    datasets = load(data, num_clients=3, seed=0)
    assert set(datasets.public.labels.tolist()) == {0, 1, 2, 3}
    for _, labels in datasets.private.values():
        assert labels.tolist() == [4] * 3 + [5] * 3 + [6] * 3
    assert set(datasets.test.labels.tolist()) == {4, 5, 6}


@pytest.fixture
def mean(data):
    """The mean image of the public examples: with it added, and no other, they are all stored ones again."""
    stored = load_images("dots", "train", data_dir=data.data_dir).images.astype(int)
    known = {image.tobytes() for image in stored}
    centred = np.asarray(load(data, num_clients=3, seed=0).public.inputs)
    candidates = (image / 255 - centred[0] for image in stored)
    return next(mean for mean in candidates if {image.tobytes() for image in pixels(centred, mean)} <= known)


def pixels(inputs, mean):
    return np.rint(255 * (np.asarray(inputs) + mean)).astype(int)


def numbers(inputs, mean):
    """Which images these are, see `images`."""
    return pixels(inputs, mean)[:, -1, -1, 0].tolist()


def test_every_set_is_centred_by_the_public_mean_and_keeps_its_labels(data, mean):
    datasets = load(data, num_clients=3, seed=0)
    assert np.abs(np.asarray(datasets.public.inputs).mean(axis=0)).max() < 1e-6
    private = load_images("marks", "train", data_dir=data.data_dir)
    order = {4: 4, 1: 5, 2: 6}
    for inputs, labels in datasets.private.values():
        rows = numbers(inputs, mean)
        np.testing.assert_allclose(inputs, private.images[rows] / 255 - mean, atol=1e-6)
        assert [order[label] for label in private.labels[rows].tolist()] == labels.tolist()


def test_validation_images_are_training_images_that_nobody_owns(data, mean):
    data = dataclasses.replace(data, evaluate_on="validation", num_test=9)
    datasets = load(data, num_clients=3, seed=0)
    stored = load_images("marks", "train", data_dir=data.data_dir)
    rows = numbers(datasets.test.inputs, mean)
    np.testing.assert_allclose(datasets.test.inputs, stored.images[rows] / 255 - mean, atol=1e-6)
    owned = set(numbers(pool(datasets.private).inputs, mean))
    assert not set(rows) & owned
    assert sorted(rows) == sorted(set(np.flatnonzero(np.isin(stored.labels, (4, 1, 2)))) - owned)
    with pytest.raises(ValueError, match="the validation part of marks has 9 examples, num_test wants 10"):
        load(dataclasses.replace(data, num_test=10), num_clients=3, seed=0)


def test_what_is_evaluated_on_changes_no_training(data):
    on_test, on_validation = (
        load(dataclasses.replace(data, evaluate_on=which, num_test=9), num_clients=3, seed=0)
        for which in ("test", "validation")
    )
    for one, other in zip(on_test.private.values(), on_validation.private.values(), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(on_test.public.inputs, on_validation.public.inputs)


def test_no_private_example_is_owned_twice_and_the_pooled_ones_are_all_of_them(data, mean):
    datasets = load(data, num_clients=3, seed=0)
    owned = [number for inputs, _ in datasets.private.values() for number in numbers(inputs, mean)]
    assert len(set(owned)) == 27
    pooled = pool(datasets.private)
    assert numbers(pooled.inputs, mean) == owned
    labels = np.concatenate([labels for _, labels in datasets.private.values()])
    assert pooled.labels.tolist() == labels.tolist()


def test_the_seed_decides(data):
    one, same, other = (load(data, num_clients=2, seed=seed) for seed in (0, 0, 1))
    for first, second, equal in ((one, same, True), (one, other, False)):
        for pick in (lambda d: d.public.inputs, lambda d: d.private[1][0], lambda d: d.test.inputs):
            assert np.array_equal(pick(first), pick(second)) == equal


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_public": 41}, "the public dataset dots has 40 examples, num_public wants 41"),
        ({"num_test": 25}, "the test part of marks has 24 examples, num_test wants 25"),
        ({"examples_per_class": 5}, r"3 clients with 5 examples per class need 15 of each, but class 4 has 12, .*"),
        ({"private_classes": (0, 9)}, r"marks has no examples of the private_classes \[9\], it has \[0, 1, 2, 3, 4\]"),
        ({"public": "large"}, r"public and private images must have one shape, got \(6, 6, 1\) for large, .*"),
        ({"public": "nothing"}, "no data set 'nothing' with split 'train' in .*"),
    ],
)
def test_data_that_does_not_suffice(data, settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        load(dataclasses.replace(data, **settings), num_clients=3, seed=0)


def test_label_proportions_depend_on_seed_and_alpha_and_sizes_do_not(data):
    skewed = dataclasses.replace(data, split="dirichlet", alpha=0.01, examples_per_class=1)

    def labels_of(data, seed):
        return [sorted(labels.tolist()) for _, labels in load(data, num_clients=4, seed=seed).private.values()]

    found = labels_of(skewed, 0)
    assert [len(labels) for labels in found] == [3] * 4  # one of each class on average
    assert all(set(labels) <= {4, 5, 6} for labels in found)
    assert sum(len(set(labels)) == 1 for labels in found) >= 3
    assert found == labels_of(dataclasses.replace(skewed, evaluate_on="validation"), 0) != labels_of(skewed, 1)
    assert found != labels_of(dataclasses.replace(skewed, alpha=100.0), 0)


def test_a_split_of_skewed_labels_leaves_the_public_data_and_the_test_set_as_they_are(data):
    data = dataclasses.replace(data, num_test=24, examples_per_class=1)  # all test images
    even, skewed = (load(dataclasses.replace(data, split=s), num_clients=3, seed=0) for s in ("classes", "dirichlet"))
    np.testing.assert_array_equal(even.public.inputs, skewed.public.inputs)
    assert np.bincount(skewed.test.labels).tolist() == np.bincount(even.test.labels).tolist() == [0] * 4 + [8] * 3


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Six fine classes of ten images, two in each of three superclasses; ink where an image has its number."""
    folder = tmp_path_factory.mktemp("families")
    save_images(folder, "dots", "train", *images(0, 10, 4))
    for seed, split in enumerate(("train", "test"), start=1):
        pixels, fine = images(seed, 10, 6)
        save_images(folder, "kinds", split, pixels, fine, coarse_label=fine // 2)
    return folder


def test_superclasses_are_told_apart_and_every_client_knows_one_kind_of_each(families):
    data = Data(
        public="dots",
        private="kinds",
        data_dir=str(families),
        num_public=30,
        split="superclasses",
        private_classes=(2, 0),
        examples_per_class=4,
        num_test=40,
    )
    datasets = load(data, num_clients=4, seed=0)
    assert datasets.num_classes == 4 + 2
    assert [labels.tolist() for _, labels in datasets.private.values()] == [[4] * 4 + [5] * 4] * 4
    assert sorted(datasets.test.labels.tolist()) == [4] * 20 + [5] * 20
    stored, fine = load_images("kinds", "train", data_dir=families)
    rows = [sorted(fine[rows_of(inputs, stored)].tolist()) for inputs, _ in datasets.private.values()]
    assert all(kinds[0] == kinds[3] and kinds[4] == kinds[7] for kinds in rows)
    assert rows[0] == rows[2] != rows[1] == rows[3]
    with pytest.raises(ValueError, match=r"kinds has no examples of the private_classes \[3\], it has \[0, 1, 2\]"):
        load(dataclasses.replace(data, private_classes=(3,)), num_clients=1, seed=0)


def rows_of(inputs, stored):
    """Which of the stored images these are: they differ by one and the same image."""
    flat, inputs = stored.reshape(len(stored), -1) / 255, np.asarray(inputs).reshape(len(inputs), -1)
    contrast = flat[:, None] - flat[None]
    first = next(
        i for i in range(len(flat)) if all(np.abs(contrast[:, i] - (x - inputs[0])).max(1).min() < 1e-5 for x in inputs)
    )
    return [int(np.abs(contrast[:, first] - (x - inputs[0])).max(1).argmin()) for x in inputs]


@pytest.fixture(scope="module")
def leaf(tmp_path_factory):
    """Five writers of capitals and small letters a and b, and of digits; four wrote 8 letters each, the last one 2."""
    folder = tmp_path_factory.mktemp("leaf")
    save_images(folder, "dots", "train", *images(0, 10, 4, size=28))
    labels = np.array([10, 36, 11, 37, 3])  # A, a, B, b, 3
    for split, turns in (("train", 1), ("test", 1)):
        all_labels = np.concatenate([np.tile(labels, turns) for _ in range(4)] + [np.array([10])])
        writers = np.array([f"w{k}" for k in range(4) for _ in range(5 * turns)] + ["w4"])
        pixels, _ = images(len(split), 21, 1, size=28)
        save_images(folder, "leaf/femnist", split, pixels, all_labels, writer=writers)
    return folder


def test_clients_are_writers_and_the_others_are_tested_on(leaf):
    data = Data(
        public="dots",
        private="leaf/femnist",
        data_dir=str(leaf),
        num_public=30,
        split="writers",
        private_classes=(0, 1),
        min_examples=8,
        num_test=10,
    )
    datasets = load(data, num_clients=3, seed=0)
    assert [sorted(labels.tolist()) for _, labels in datasets.private.values()] == [[4] * 4 + [5] * 4] * 3
    assert sorted(datasets.test.labels.tolist()) == [4] * 6 + [5] * 4  # the fourth, and the one who wrote little
    with pytest.raises(ValueError, match="5 clients need as many writers with at least 8 examples"):
        load(data, num_clients=5, seed=0)
