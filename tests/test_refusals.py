"""Plausible mistakes are refused in one line that names the value, and files are never executed."""

import io
import json
import os
import pickle
import tarfile
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import runs

import fedmd_jax as fmd
from fedmd_jax import data
from fedmd_jax.cli import main
from fedmd_jax.data import DataError, load_images, save_images
from fedmd_jax.data.catalogue import CATALOGUE, read_original
from fedmd_jax.data.originals import read_leaf_json

KEY, RNG = jax.random.key(0), np.random.default_rng(0)
GROUPS = {"a": fmd.ArchitectureGroup(None, (0, 1)), "b": fmd.ArchitectureGroup(None, (2,))}
SCORES, WEIGHTS = {"a": jnp.ones((2, 2, 3)), "b": 3 * jnp.ones((1, 2, 3))}, {"a": jnp.ones(2), "b": jnp.ones(1)}
INPUTS, LABELS = np.zeros((4, 3)), np.arange(4)
PUBLIC = fmd.PublicDataset(jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32))
SHORT = PUBLIC._replace(labels=jnp.zeros(3, jnp.int32))
STATE = fmd.ClientState({}, {}, {}, {})
ARCHITECTURE = fmd.Architecture(None, lambda *_, **__: None)
ROWS = {"x": np.arange(3)}


@pytest.mark.parametrize(
    ("function", "arguments", "settings", "message"),
    [
        # Unsigned integers would wrap; shapes would broadcast.
        *((loss, [np.uint8([1]), np.uint8([2])], {}, "floating") for loss in (fmd.mae, fmd.mse, fmd.kl)),
        *((loss, [np.ones((2, 3)), np.ones(3)], {}, "one shape") for loss in (fmd.mae, fmd.mse, fmd.kl)),
        (fmd.weighted_consensus, [SCORES | {"b": jnp.ones((1, 1, 3))}, WEIGHTS], {}, "one shape"),
        (fmd.weighted_consensus, [SCORES, {"a": jnp.ones(2)}], {}, "one weight per client"),
        *(
            (fmd.kl, [np.ones(3), np.ones(3)], {"temperature": bad}, "temperature must be positive")
            for bad in (0, -1.0, np.nan)
        ),
        # Ids would be rounded or wrapped.
        *((fmd.mapping.client_keys, [KEY, ids], {}, "client ids must be") for ids in ([1.5], [-1], [2**32], 3)),
        *((fmd.ArchitectureGroup, [None, ids], {}, "client ids must be") for ids in ([True], 3, [-1])),
        *((fmd.ArchitectureGroup, [None, (0, 1), w], {}, "weights must be") for w in (3, [1, -1], [[1], [1]])),
        # JAX would read another row.
        *((fmd.simulation.get_rows, [ROWS, rows], {}, "rows must be") for rows in ([3], [-1], [0.5])),
        (fmd.simulation.set_rows, [ROWS, [0, 0], {"x": np.arange(2)}], {}, "no row may come twice"),
        (fmd.simulation.set_rows, [ROWS, [0, 1], {"x": np.array([0.5, 1.5])}], {}, "dtype int64"),
        *(
            (draw, [KEY, dataset, size], {}, message)
            for draw in (fmd.draw_public_subset, fmd.draw_stratified_subset, fmd.algorithms.first_examples)
            for dataset, size, message in ((SHORT, 2, "as many labels"), (PUBLIC, 5, "between 1"), (PUBLIC, 2.0, "2.0"))
        ),
        # Examples that are not arrays of finite numbers.
        *((fmd.labelled_dataset, [bad, LABELS], {}, "inputs must") for bad in ([[1, 2], [3]], INPUTS + 1e300, None)),
        *((fmd.labelled_dataset, [INPUTS, bad], {}, "labels must") for bad in ([0, 1, -1, 2], LABELS / 2, np.eye(4))),
        (fmd.stack_private, [GROUPS, {0: 5, 1: (INPUTS, LABELS), 2: (INPUTS, LABELS)}], {}, "client 0: inputs and"),
        # Counts and settings.
        *((fmd.TrainingConfig, [], {"num_epochs": bad}, "num_epochs must be an integer") for bad in (0, 1.0, True)),
        (fmd.TrainingConfig, [], {"optimizer": "adam"}, "optimizer must be one of optax"),
        (fmd.TrainingConfig, [], {"early_stopping": 3}, "early_stopping must be"),
        (fmd.EarlyStopping, [], {"patience": 0}, "patience must be"),
        (fmd.client_mesh, [99], {}, "num_devices must be from 1 to 4"),
        (fmd.simulation.cohort_sizes, [GROUPS, 9], {}, "at most all 3 clients"),
        (fmd.simulation.cohort_sizes, [GROUPS, {"a": 1, "c": 1}], {}, "for the groups"),
        (fmd.simulation.draw_participation, [KEY, {"a": [0]}], {"availability": 2}, "between 0 and 1"),
        (fmd.simulation.draw_participation, [KEY, {"a": [0]}], {"availability": {1: 0.5}}, r"missing for \[0\]"),
        (fmd.score, [ARCHITECTURE, STATE, jnp.zeros((0, 2))], {}, "M at least 1"),
        (fmd.evaluate, [ARCHITECTURE, STATE, fmd.PrivateDataset(*SHORT, jnp.int32(2))], {}, "as many labels"),
        # Partitions and images.
        (data.split_by_class, [LABELS], {"num_clients": 1, "examples_per_class": 1, "rng": 0}, "rng must be a numpy"),
        (data.split_dirichlet, [LABELS], {"num_clients": 2, "alpha": 0, "rng": RNG}, "alpha must be"),
        (
            data.split_by_writer,
            [LABELS[:3], LABELS],
            {"num_clients": 1, "min_examples": 1, "rng": RNG},
            "writers must be",
        ),
        (data.scale, [INPUTS], {}, "images must be uint8"),
        (data.merge_case, [[99]], {}, "from 0 to 61"),
    ],
)
def test_mistakes_are_refused_in_one_line(function, arguments, settings, message):
    with pytest.raises(ValueError, match=rf"^.*{message}.*$") as caught:
        function(*arguments, **settings)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("axes", [(1,), (None,)])
def test_axes_that_map_no_client_are_refused(axes):
    with pytest.raises(ValueError, match=r"^(in_axes|at least one argument) must be"):
        fmd.mapping.map_clients(jnp.square, axes)(jnp.ones(2))


@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0])
def test_a_client_with_an_invalid_weight_is_excluded(weight):
    weights = {"a": jnp.array([1.0, weight]), "b": jnp.array([1.0])}
    np.testing.assert_array_equal(fmd.weighted_consensus(SCORES, weights), 2 * np.ones((2, 3)))
    sums = fmd.mapping.weighted_sum_clients(lambda own: own, (0,))(weights["a"], jnp.ones(2))
    assert (float(sums.total[0]), float(sums.weight[0])) == (1.0, 1.0)


# Files.


class Malicious:
    """Unpickling it creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_no_pickle_is_loaded(tmp_path):
    content = pickle.dumps(Malicious(tmp_path / "harm"))
    path = tmp_path / "own" / "train.npz"
    path.parent.mkdir()
    for images in (npy(np.array([Malicious(tmp_path / "harm")], object)), content):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", images)
            archive.writestr("labels.npy", npy(np.zeros(1, int)))
        with pytest.raises(DataError, match=r"train\.npz"):
            load_images("own", "train", data_dir=tmp_path)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.npz"):
        load_images("own", "train", data_dir=tmp_path)
    # CIFAR's "python version", which is pickled, is not read at all.
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz"):
        read_original(CATALOGUE["cifar10"], tmp_path, checksums=False)
    assert not (tmp_path / "harm").exists()
    pickle.loads(content)  # the trap works
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("column", ["path", "file", "a/b"])
def test_columns_that_cannot_be_saved_are_refused(tmp_path, column):
    with pytest.raises(DataError, match="a column is named like 'writer'"):
        save_images(tmp_path, "a", "train", np.zeros((1, 1, 1, 1), np.uint8), [0], **{column: np.array(["x"])})


def test_arrays_of_leaf_that_do_not_fit_are_refused(tmp_path):
    arrays = {
        "images": np.zeros((2, 28, 28), np.uint8),
        "labels": np.array([0, 10]),
        "writer": np.array([0, 2]),  # there are two
        "writer_names": np.array(["ann", "bob"]),
        "leaf_test": np.array([False, True]),
    }
    np.savez(tmp_path / "femnist_leaf105.npz", **arrays)
    with pytest.raises(DataError, match=r"femnist_leaf105\.npz"):
        read_original(CATALOGUE["leaf/femnist"], tmp_path, checksums=False)


@pytest.mark.parametrize(("pixel", "label"), [(255, 1), (float("nan"), 1), (-0.1, 1)])
def test_leaf_json_with_other_pixels_or_labels_is_refused(tmp_path, pixel, label):
    content = {"users": ["ann"], "user_data": {"ann": {"x": [[pixel] + [0.5] * 783], "y": [label]}}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"a\.json.*(pixels|labels) of writer 'ann' must be"):
        read_leaf_json([tmp_path])


def test_seeds_of_different_clients_are_refused(tmp_path, capsys):
    for seed, num_clients in ((1, 2), (2, 3)):
        runs.write(tmp_path / f"seed{seed}", runs.experiment(num_clients, 1))
    (tmp_path / "summary.json").write_text('{"seeds": [1, 2]}')
    assert main(["report", str(tmp_path)]) == 2
    assert "its seeds are of different rounds or clients" in capsys.readouterr().err
