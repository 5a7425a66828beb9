"""What fuzzing has found, one example each, so that it stays found."""

import gzip
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
from fedmd_jax.data import DataError, files, load_column, load_images, save_images, sources
from fedmd_jax.data.catalogue import CATALOGUE, read_original
from fedmd_jax.data.originals import read_leaf_json
from fedmd_jax.experiments import run_directory
from fedmd_jax.experiments.results.seeds import seed_jobs
from fedmd_jax.experiments.settings import Data, Experiment, Phase

KEY = jax.random.key(0)


# Data files.


class Malicious:
    """Its pickle makes a folder where it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def npz(path, **members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header(shape, descr="'|u1'"):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_no_pickle_is_opened(tmp_path):
    trap = np.array([Malicious(tmp_path / "harm")], object)
    content = pickle.dumps(Malicious(tmp_path / "harm"))
    for bad in (npy(trap), content):
        npz(tmp_path / "own" / "train.npz", images=bad, labels=npy(np.zeros(1, int)))
        with pytest.raises(DataError, match=r"train\.npz"):
            load_images("own", "train", data_dir=tmp_path)
    (tmp_path / "own" / "train.npz").write_bytes(content)
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
    pickle.loads(content)  # the trap is one
    assert (tmp_path / "harm").exists()


def test_no_module_is_imported_because_a_file_says_so(tmp_path):
    good = {"pythonClassName": "tensorflow_datasets.core.features.image_feature.Image"}
    sources._check_features({"pythonClassName": good["pythonClassName"], "featuresDict": {"features": {"image": good}}})
    for key in ("pythonClassName", "python_class_name", "type"):
        with pytest.raises(ValueError, match=r"^features\.json names the class 'antigravity\.Image', wanted .*$"):
            sources._check_features({"featuresDict": {"features": [{"image": {key: "antigravity.Image"}}]}})


def test_an_idx_header_that_promises_terabytes(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12 + bytes(10)))
    with pytest.raises(DataError, match=r"promise to become .*, which is no file of images"):
        files.read_idx(path, 3)


def test_an_idx_file_that_unpacks_to_more_than_it_says(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2]) + bytes(10**7)))
    with pytest.raises(DataError, match=r"its header promises \[2\], 2 bytes, got more"):
        files.read_idx(path, 1)


@pytest.mark.parametrize("shape", ["(1099511627776,)", "(4294967296, 4294967296)"])
def test_an_npy_header_that_promises_terabytes(tmp_path, shape):
    path = tmp_path / "a.npz"
    npz(path, a=header(shape), b=npy(np.zeros(1)))
    with pytest.raises(DataError, match=r"a\.npz"):
        files.read_npz(path, ["a", "b"])


def test_a_zip_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LARGE", 2**20)  # is 256 MB, which takes a second to pack
    npz(tmp_path / "a.npz", a=npy(np.zeros(2**22, np.uint8)), b=npy(np.zeros(1)))
    with pytest.raises(DataError, match=r"bytes promise to become 4,194,432, which is no file of images$"):
        files.read_npz(tmp_path / "a.npz", ["a", "b"])


def test_a_member_that_is_no_array(tmp_path):
    npz(tmp_path / "a.npz", a=b"hello", b=npy(np.zeros(1)))
    with pytest.raises(DataError, match=r"its a are no array"):
        files.read_npz(tmp_path / "a.npz", ["a", "b"])


def test_labels_without_rows(tmp_path):
    npz(tmp_path / "own" / "train.npz", labels=npy(np.array(3)), writer=npy(np.array(["a"])))
    with pytest.raises(DataError, match=r"labels must be integers \[N\], got int64 \[\]$"):
        load_column("own", "train", "writer", data_dir=tmp_path)


def tar_of(path, change):
    with tarfile.open(path, "w:gz") as archive:
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt"]:
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = 3073
            content = io.BytesIO(bytes(3073))
            if name == "test_batch.bin":
                change(info)
            archive.addfile(info, content)


def test_an_archive_with_a_sparse_terabyte(tmp_path):
    def sparse(info):
        info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**40), "GNU.sparse.name": info.name}

    tar_of(tmp_path / "cifar-10-binary.tar.gz", sparse)
    with pytest.raises(DataError, match=r"promise to become 1,099,511,627,776"):
        read_original(CATALOGUE["cifar10"], tmp_path, checksums=False)


def test_an_archive_with_a_link(tmp_path):
    def link(info):
        info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0

    tar_of(tmp_path / "cifar-10-binary.tar.gz", link)
    with pytest.raises(DataError, match=r"test_batch\.bin is no file$"):
        read_original(CATALOGUE["cifar10"], tmp_path, checksums=False)


LEAF = {
    "images": np.zeros((2, 28, 28), np.uint8),
    "labels": np.array([0, 10]),
    "writer": np.array([0, 1]),
    "writer_names": np.array(["ann", "bob"]),
    "leaf_test": np.array([False, True]),
}


@pytest.mark.parametrize(
    "strange",
    [
        {"writer": np.array([-1, 0])},  # was bob
        {"writer": np.array([0, 2])},
        {"writer": np.array([0.0, 1.0])},
        {"leaf_test": np.array([0, 1])},  # were rows
        {"leaf_test": np.array([0.0, 1.0])},
        {"images": np.zeros((0,), np.uint8)},
        {"writer_names": np.array([1, 2])},
    ],
)
def test_arrays_of_leaf_that_do_not_fit(tmp_path, strange):
    np.savez(tmp_path / "femnist_leaf105.npz", **{**LEAF, **strange})
    with pytest.raises(DataError, match=r"femnist_leaf105\.npz"):
        read_original(CATALOGUE["leaf/femnist"], tmp_path, checksums=False)


@pytest.mark.parametrize(
    ("pixel", "label"), [(float("nan"), 1), (1.5, 1), (-0.1, 1), ("0.5", 1), (0.5, 1.5), (0.5, True), (0.5, "a")]
)
def test_leaf_json_with_what_is_no_pixel_or_no_label(tmp_path, pixel, label):
    content = {"users": ["ann"], "user_data": {"ann": {"x": [[pixel] + [0.5] * 783], "y": [label]}}}
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"a\.json.*(pixels|labels) of writer 'ann' must be"):
        read_leaf_json([tmp_path / "train", tmp_path / "test"])


@pytest.mark.parametrize(
    "info",
    [
        {"fileFormat": None, "splits": []},
        {"fileFormat": "array_record", "splits": [{"name": 3, "shardLengths": ["1"]}]},
        {"fileFormat": "array_record", "splits": [{"name": "train", "shardLengths": ["-1"]}]},
    ],
)
def test_dataset_info_with_other_types(tmp_path, info):
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"cannot read"):
        sources.records_info(tmp_path)


@pytest.mark.parametrize("column", ["path", "file", "allow_pickle", "a/b", "", "\ud800"])
def test_columns_that_cannot_be_saved(tmp_path, column):
    with pytest.raises(DataError, match=r"a column is named like 'writer'"):
        save_images(tmp_path, "a", "train", np.zeros((1, 1, 1, 1), np.uint8), [0], **{column: np.array(["x"])})


@pytest.mark.parametrize(
    ("name", "folder"),
    [("a" * 5000, "."), ("a", "b" * 5000), ("a", "b\0"), (None, "."), ("a", 3)],
)
def test_names_and_folders_that_no_file_system_has(name, folder):
    with pytest.raises(DataError):
        load_images(name, "train", data_dir=folder)


# Run directories and the command line.


def spoiled(path, name, change):
    if name == run_directory.METRICS:
        lines = [json.loads(line) for line in (path / name).read_text().splitlines()]
        change(lines)
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        content = json.loads((path / name).read_text())
        change(content)
        (path / name).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "config.json"])
def test_brackets_a_hundred_thousand_deep(tmp_path, capsys, name):
    path = tmp_path / "run"
    runs.write(path, runs.experiment(2, 1))
    (path / name).write_text("[" * 10**5 + "]" * 10**5)
    assert main(["report", str(path)]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_no_faults_written_as_null_are_none(tmp_path, capsys):
    path = tmp_path / "run"
    runs.write(path, runs.experiment(2, 1))
    spoiled(path, "summary.json", lambda summary: summary["clients"][0].update(faults=None))
    spoiled(path, "metrics.jsonl", lambda lines: lines[0].update(status=None))
    assert main(["report", str(path)]) == 0


def test_seeds_of_different_clients_are_told_of(tmp_path, capsys):
    for seed, num_clients in ((1, 2), (2, 3)):
        runs.write(tmp_path / f"seed{seed}", runs.experiment(num_clients, 1))
    (tmp_path / "summary.json").write_text('{"seeds": [1, 2]}')
    assert main(["report", str(tmp_path)]) == 2
    assert "its seeds are of different rounds or clients" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["width", "temperature", "num_rounds", "head_penalty"])
def test_integers_beyond_all_floats(setting):
    with pytest.raises(ValueError, match=f"^{setting} must be "):
        Experiment(networks=("mlp",), **{setting: 10**400})
    with pytest.raises(ValueError, match=r"^num_epochs must be below"):
        Phase(num_epochs=10**12, batch_size=1)
    with pytest.raises(ValueError, match=r"^num_epochs must be an integer"):
        Phase(num_epochs=True, batch_size=1)
    with pytest.raises(ValueError, match=r"^private_classes must be integers"):
        Data(private_classes=(10**400,))


def test_a_billion_seeds(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"^seeds must be at most 10000, got 999999999$"):
        seed_jobs(tmp_path, runs.experiment(), 999_999_999)
    assert main(["run", "--num-seeds", "999999999"]) == 2


@pytest.mark.parametrize("argv", [["report"], ["run", "--resume"], ["run", "--out"]])
@pytest.mark.parametrize("path", ["a" * 5000, "a\0b"])
def test_paths_that_no_file_system_has(argv, path, capsys):
    assert main([*argv, path]) == 2
    assert capsys.readouterr().err.startswith("fedmd-jax: error: cannot look for ")


def test_no_complaint_commands_the_terminal(capsys):
    assert main(["run", "\x1b[31m"]) == 2
    assert "\x1b" not in capsys.readouterr().err


# The front door.

GROUPS = {"a": fmd.ArchitectureGroup(None, (0, 1)), "b": fmd.ArchitectureGroup(None, (2,))}
SCORES, WEIGHTS = {"a": jnp.ones((2, 2, 3)), "b": 3 * jnp.ones((1, 2, 3))}, {"a": jnp.ones(2), "b": jnp.ones(1)}


def refused(function, *arguments, **settings):
    """The complaint of a function, in one line."""
    with pytest.raises(ValueError, match=r"^.+$") as caught:
        function(*arguments, **settings)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_unsigned_scores_do_not_wrap():
    small, large = np.array([1], np.uint8), np.array([2], np.uint8)
    for loss in (fmd.mae, fmd.mse, fmd.kl):
        assert "floating" in refused(loss, small, large)


def test_losses_of_nothing():
    for shape in ((), (0,), (2, 0)):
        for loss in (fmd.mae, fmd.mse, fmd.kl):
            refused(loss, np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    for temperature in (0, -1.0, float("nan"), 10**400, 2**64, "x", True):
        refused(fmd.kl, np.zeros(3, np.float32), np.zeros(3, np.float32), temperature=temperature)


def test_scores_of_different_shapes_are_not_broadcast():
    assert "one shape" in refused(fmd.weighted_consensus, {**SCORES, "b": jnp.ones((1, 1, 3))}, WEIGHTS)
    refused(fmd.weighted_consensus, {}, {})
    refused(fmd.weighted_consensus, {**SCORES, "b": np.array(["x"])}, WEIGHTS)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_none_silences_nobody_else(weight):
    weights = {"a": jnp.array([1.0, weight]), "b": jnp.array([1.0])}
    np.testing.assert_array_equal(fmd.weighted_consensus(SCORES, weights), 2 * np.ones((2, 3)))
    sums = fmd.mapping.weighted_sum_clients(lambda own: own, (0,))(weights["a"], jnp.ones(2))
    assert (float(sums.total[0]), float(sums.weight[0])) == (1.0, 1.0)


def test_client_ids_are_not_rounded_or_wrapped():
    for ids in ([1.5], [-1], [2**32], np.array([-1], np.int32), "ab", 3, None, [[1]]):
        refused(fmd.mapping.client_keys, KEY, ids)
        refused(fmd.simulation.draw_participation, KEY, {"a": ids})
    for ids in (None, 3, [True], np.zeros((1, 1))):
        refused(fmd.ArchitectureGroup, None, ids)
    for weights in (3, "ab", [None, 1], [1j, 1], [[1], [1]]):
        refused(fmd.ArchitectureGroup, None, (0, 1), weights)


def test_examples_that_are_none():
    inputs, labels = np.zeros((2, 3)), np.array([0, 1])
    for bad in ([[1, 2], [3]], np.zeros((2, 0)), np.full((2, 3), 1e300), np.zeros((2, 3), "timedelta64[s]"), None, "x"):
        refused(fmd.labelled_dataset, bad, labels)
        refused(fmd.public_dataset, bad)
    for bad in ([[0], [0, 1]], np.zeros(2, "timedelta64[s]"), None, [2**70, 0]):
        refused(fmd.labelled_dataset, inputs, bad)
    refused(fmd.stack_private, GROUPS, {0: 5, 1: (inputs, labels), 2: (inputs, labels)})
    refused(fmd.stack_private, GROUPS, {"x": (inputs, labels), 1: (inputs, labels)})


def test_rows_that_are_none():
    """On the device JAX reads some other row."""
    tree = {"x": np.arange(3), "y": jnp.arange(3)}
    for rows in ([3], [-1], [0.5], [[0]], "a", None):
        for one in tree:
            refused(fmd.simulation.get_rows, {one: tree[one]}, rows)
    refused(fmd.simulation.set_rows, {"x": np.arange(3)}, [0, 0], {"x": np.arange(2)})
    refused(fmd.simulation.set_rows, {"x": np.arange(3)}, [0, 1], {"x": np.array(7)})
    refused(fmd.simulation.set_rows, {"x": np.arange(3)}, [0, 1], {"x": np.array([0.5, 1.5])})


def test_public_labels_of_another_length():
    """JAX took the last one."""
    public = fmd.PublicDataset(jnp.zeros((4, 2)), jnp.zeros(3, jnp.int32))
    for draw in (fmd.draw_public_subset, fmd.draw_stratified_subset, fmd.algorithms.first_examples):
        refused(draw, KEY, public, 2)
        for size in (0, 5, 2.0, "2", None, True):
            refused(draw, KEY, public._replace(labels=jnp.zeros(4, jnp.int32)), size)


def test_counts_that_are_none():
    for count in (True, 1.0, "1", None, 0, 2**40, np.array([1])):
        refused(fmd.TrainingConfig, num_epochs=count)
        refused(fmd.EarlyStopping, patience=count)
        refused(fmd.simulation.cohort_sizes, GROUPS, count)
        refused(fmd.communication_bytes, {}, subset_size=count, num_classes=1, num_rounds=1)
    for count in (True, 1.0, "1", 0, 99):
        refused(fmd.client_mesh, count)
    refused(fmd.simulation.cohort_sizes, GROUPS, {"a": 1, 2: 1})
    refused(fmd.communication_bytes, {}, subset_size=1, num_classes=1, num_rounds=1)
    refused(fmd.TrainingConfig, optimizer="adam")
    refused(fmd.TrainingConfig, early_stopping=3)
    refused(fmd.EarlyStopping, patience=1, min_delta="x")


def test_nothing_to_score():
    """A division by zero."""
    architecture = fmd.Architecture(None, lambda *_, **__: None)
    state = fmd.ClientState({}, {}, {}, {})
    refused(fmd.score, architecture, state, jnp.zeros((0, 2)))
    refused(fmd.score, architecture, state, jnp.zeros((1, 2)), batch_size=0)
    refused(fmd.evaluate, architecture, state, fmd.PrivateDataset(jnp.zeros((2, 2)), jnp.zeros(3, int), jnp.int32(2)))


def test_axes_and_arguments_that_are_none():
    for axes in ((1,), ("a",), (None,), (), 3):
        refused(lambda axes=axes: fmd.mapping.map_clients(jnp.square, axes)(jnp.ones(2)))
    refused(fmd.mapping.map_clients(jnp.square, (0,)), jnp.float32(2))
    refused(fmd.mapping.map_clients(jnp.square, (0,)), jnp.ones(0))
    for tree in ({"a": np.float32(1)}, {"a": {}}, {"a": np.zeros(0)}, {"a": [1.0]}):
        refused(fmd.mapping.shard_clients, tree, fmd.client_mesh(1))
    refused(fmd.mapping.shard_clients, {"a": np.zeros(1)}, fmd.client_mesh(1), costs=3)


def test_probabilities_that_are_none():
    for probability in ("x", None, 1j, float("nan"), {0: "x"}):
        refused(fmd.simulation.draw_participation, KEY, {"a": [0]}, availability=probability)


def test_partitions_of_what_is_none():
    labels, rng = np.zeros(4, int), np.random.default_rng(0)
    for classes in (3, [[0]], [None], ["a"], [0.5]):
        refused(data.split_by_class, labels, num_clients=1, examples_per_class=1, classes=classes, rng=rng)
    refused(data.split_by_class, labels, num_clients=1, examples_per_class=1, rng=None)
    for alpha in ("x", 10**400, None, float("nan")):
        refused(data.split_dirichlet, labels, num_clients=2, alpha=alpha, rng=rng)
    for writers in (np.array([None] * 4), np.zeros(4), [[1], [1, 2]]):
        refused(data.split_by_writer, writers, labels, num_clients=1, min_examples=1, rng=rng)


def test_images_that_are_no_arrays():
    for function in (data.scale, data.center_ink, data.mean_image, data.center, data.merge_case):
        for images in (None, "x", [[1], [1, 2]], np.array([None])):
            refused(function, images)
