"""Runs of the command line, loaded again: their clients have the accuracies that the runs recorded."""

import json
import shlex
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

import fedmd_jax as fmd
from fedmd_jax.cli import main
from fedmd_jax.data import load_images
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.checkpoint import CheckpointError
from fedmd_jax.simulation import mean_probabilities


@pytest.fixture(scope="module")
def run(data_folder, tmp_path_factory):
    """Makes a run, and gives its directory."""
    folder = tmp_path_factory.mktemp("runs")
    options = shlex.split(
        f"--data.data-dir {data_folder} --data.public dots --data.private marks --data.num-public 30 "
        "--data.private-classes 4 1 2 --data.num-test 20 --networks mlp:n1=3 mlp mlp:n1=3 --subset-size 10 "
        "--public-training.num-epochs 3 --private-training.num-epochs 1 --pooled-training.num-epochs 1 "
        "--revisit.num-epochs 1 --num-rounds 2 --width 1.3"
    )

    def make(name, more=""):
        if not (folder / name).exists():
            assert main(["run", "--out", str(folder / name), *options, *shlex.split(more)]) == 0
        return folder / name

    return make


def num_right(model, inputs, labels):
    return int(np.sum(np.asarray(model.predict(inputs)) == np.asarray(labels)))


def check(path, seed=0):
    """All clients, and their ensemble, are right as often as the accuracies in the summary say."""
    loaded = fmd.load_run(path)
    inputs, labels, num_examples = loaded.test_data()
    assert len(inputs) == num_examples == 20
    assert (loaded.round, loaded.summary["seed"]) == (2, seed)
    for client, recorded in zip(loaded.clients.values(), loaded.summary["clients"], strict=True):
        assert (client.client_id, client.name) == (recorded["client_id"], recorded["architecture"])
        assert num_right(client, inputs, labels) == round(20 * recorded["final_accuracy"], 4)
    together = num_right(loaded.ensemble(), inputs, labels)
    assert together == round(20 * loaded.summary["mean"]["ensemble_accuracy"], 4)
    return loaded


def test_a_run(run, capsys):
    path = run("run")
    assert "ensemble" in capsys.readouterr().out
    loaded = check(path)
    assert repr(loaded) == f"TrainedRun({str(path)!r}, clients=3, round=2)"
    assert loaded.config == json.loads((path / files.CONFIG).read_text())
    assert loaded.summary == json.loads((path / files.SUMMARY).read_text())
    assert loaded.history == [json.loads(line) for line in (path / files.METRICS).read_text().splitlines()]
    assert isinstance(loaded.plot(), Figure)
    inputs = loaded.test_data().inputs
    logits = np.stack([loaded.client(i).logits(inputs) for i in (0, 2)])
    np.testing.assert_allclose(loaded.ensemble([0, 2]).scores(inputs), logits.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert loaded.ensemble().predict(inputs, combine=mean_probabilities).shape == (20,)
    with pytest.raises(ValueError, match=r"client_id must be one of \[0, 1, 2\], got 3"):
        loaded.client(3)


def test_images_become_the_inputs_of_the_test_set(run, data_folder):
    loaded = fmd.load_run(run("run"))
    images, _ = load_images("marks", "test", data_dir=data_folder)
    inputs = {image.tobytes() for image in loaded.client(1).preprocess(images)}
    assert {np.asarray(image).tobytes() for image in loaded.test_data().inputs} <= inputs
    with pytest.raises(ValueError, match=r"takes inputs float32.*, got int32.*; `preprocess` makes inputs of images"):
        loaded.client(1).predict(images)


def test_clients_are_there_without_the_data(run, tmp_path, data_folder):
    path = shutil.copytree(run("run"), tmp_path / "moved")
    config = json.loads((path / files.CONFIG).read_text())
    config["settings"]["data"]["data_dir"] = str(tmp_path / "nowhere")
    (path / files.CONFIG).write_text(json.dumps(config))
    images, _ = load_images("marks", "test", data_dir=data_folder)
    client, same = fmd.load_run(path).client(2), fmd.load_run(run("run")).client(2)
    np.testing.assert_array_equal(client.predict(client.preprocess(images)), same.predict(same.preprocess(images)))
    with pytest.raises(ValueError, match=r"marks|dots"):
        fmd.load_run(path).test_data()


def test_a_run_in_bfloat16_on_many_devices_without_checkpoints_in_between(run):
    path = run("devices", "--devices 2 --checkpoint-every 0 --no-pooled --no-local --dtype bfloat16")
    loaded = check(path)
    client = loaded.client(0)
    assert loaded.config["settings"]["dtype"] == "bfloat16"
    score = partial(fmd.score, client.architecture)
    assert "bf16" in str(jax.make_jaxpr(score)(client.state, client.inputs))
    assert [each.name for each in (path / files.CHECKPOINTS / "rounds").iterdir()] == ["2"]


def test_seeds_that_are_trained_at_once(run):
    path = run("seeds", "--num-seeds 2 --vmap-seeds 2 --no-pooled")
    clients = [check(path / f"seed{seed}", seed).client(0) for seed in range(2)]
    assert len({client.params["head"]["bias"].tobytes() for client in clients}) == 2
    summary = json.loads((path / files.SUMMARY).read_text())
    assert summary["mean"]["ensemble_accuracy"]["std"] is not None
    with pytest.raises(files.RunDirectoryError, match=r"has several seeds, load one of them: load_run\('.*/seed0'\)"):
        fmd.load_run(path)


def test_a_run_that_was_told_to_keep_nothing(run):
    loaded = fmd.load_run(run("nothing", "--checkpoint-every None --no-pooled --no-local --num-rounds 1"))
    assert (loaded.round, loaded.summary["num_rounds_done"]) == (None, 1)
    with pytest.raises(CheckpointError, match="has no checkpoint: no round is done, or checkpoint_every is None"):
        loaded.client(0)


def test_a_run_that_was_killed_has_the_clients_of_its_latest_checkpoint(run, tmp_path):
    path = shutil.copytree(run("run"), tmp_path / "killed")
    (path / files.SUMMARY).unlink()
    shutil.rmtree(path / files.CHECKPOINTS / "rounds" / "2")
    loaded = fmd.load_run(path)
    rounds = [int(each.name) for each in (path / files.CHECKPOINTS / "rounds").iterdir()]
    assert (loaded.round, loaded.summary) == (max(rounds), None)
    inputs, labels, _ = loaded.test_data()
    recorded = [record for record in loaded.history if record["round"] == loaded.round]
    for client, record in zip(loaded.clients.values(), recorded, strict=True):
        assert num_right(client, inputs, labels) == round(20 * record["accuracy"], 4)
    with pytest.raises(files.RunDirectoryError, match=r"is unfinished, it has no summary.json"):
        loaded.plot()


def test_a_run_of_other_versions(run, tmp_path):
    """With a setting less, a setting more, and the versions of then."""
    path = shutil.copytree(run("run"), tmp_path / "old")
    config = json.loads((path / files.CONFIG).read_text())
    config["versions"] = dict.fromkeys(config["versions"], "0.0.1")
    del config["settings"]["score_clip"], config["settings"]["data"]["validation_share"]
    config["settings"]["forgotten"] = 3
    (path / files.CONFIG).write_text(json.dumps(config))
    check(path)


def test_a_checkpoint_of_other_clients_is_refused(run, tmp_path):
    path = shutil.copytree(run("run"), tmp_path / "other")
    config = json.loads((path / files.CONFIG).read_text())
    config["settings"]["networks"] = ["mlp:n1=3", "mlp", "mlp:n1=4"]
    (path / files.CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is damaged or of other clients"):
        fmd.load_run(path).client(0)


def test_what_is_no_run(tmp_path):
    with pytest.raises(files.RunDirectoryError, match=r"cannot read .*/nothing/config.json: No such file"):
        fmd.load_run(tmp_path / "nothing")
    (tmp_path / files.CONFIG).write_text(json.dumps({"experiment": "x", "settings": {"networks": 3}, "command": "y"}))
    with pytest.raises(files.RunDirectoryError, match="it may be damaged"):
        fmd.load_run(tmp_path)


def test_an_exported_client_of_a_run(run, tmp_path):
    client = fmd.load_run(run("run")).client(1)
    again = fmd.import_client(fmd.export_client(client, tmp_path / "client1"), client.architecture)
    inputs = fmd.load_run(run("run")).test_data().inputs
    np.testing.assert_array_equal(again.logits(inputs), client.logits(inputs))
    np.testing.assert_array_equal(again.preprocess.mean, client.preprocess.mean)


def test_clients_of_another_run_beside_it_are_not_taken(run, tmp_path):
    shutil.copytree(run("run"), tmp_path / "seed-a")
    path = shutil.copytree(run("run"), tmp_path / "seed-b")
    shutil.rmtree(path / files.CHECKPOINTS)
    assert fmd.load_run(path).round is None
