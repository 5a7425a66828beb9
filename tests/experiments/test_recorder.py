import dataclasses
import json
import math

import pytest
from experiments import runs

from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.recorder import Recorder


def read_lines(path):
    return [json.loads(line) for line in (path / files.METRICS).read_text().splitlines()]


def test_before_the_first_result_there_is_the_config_and_no_metrics(tmp_path):
    experiment = runs.experiment()
    recorder = Recorder(tmp_path / "run", "made-up", experiment, command="fedmd-jax run made-up")
    assert {file.name: file.stat().st_size > 0 for file in (tmp_path / "run").iterdir()} == {
        files.CONFIG: True,
        files.METRICS: False,
    }
    assert recorder.num_rounds_done is None
    config = json.loads((tmp_path / "run" / files.CONFIG).read_text())
    assert config["experiment"] == "made-up"
    assert config["seed"] == config["settings"]["seed"] == 7
    assert config["settings"] == json.loads(json.dumps(dataclasses.asdict(experiment)))
    assert config["command"] == "fedmd-jax run made-up"
    assert {"versions", "device", "environment"} <= set(config)


def test_every_round_is_on_disk_when_it_is_told(tmp_path):
    experiment = runs.experiment(num_clients=2)
    recorder = Recorder(tmp_path / "run", "made-up", experiment, command="")
    for round_ in range(3):
        recorder.round(runs.round_metrics(experiment, round_))
        lines = read_lines(tmp_path / "run")
        assert len(lines) == 2 * (round_ + 1)
        assert recorder.num_rounds_done == lines[-1]["round"] == round_
    assert lines[0] == {
        "event": "round",
        "round": 0,
        "client_id": 0,
        "architecture": "mlp:n1=1",
        "accuracy": 0.1,
        "digest_loss": None,
        "revisit_loss": None,
        "status": "ok",
    }
    assert (lines[-1]["digest_loss"], lines[-1]["revisit_loss"]) == (0.5, 0.25)


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_loss_that_is_not_finite_is_null(tmp_path, loss):
    experiment = runs.experiment()
    recorder = Recorder(tmp_path / "run", "made-up", experiment, command="")
    recorder.round(runs.round_metrics(experiment, 1, digest_loss=loss))
    assert [line["digest_loss"] for line in read_lines(tmp_path / "run")] == [None] * 3


def test_a_round_that_cannot_be_written_is_not_done(tmp_path, monkeypatch):
    experiment = runs.experiment()
    recorder = Recorder(tmp_path / "run", "made-up", experiment, command="")
    recorder.round(runs.round_metrics(experiment, 0))

    def fail(*_):
        raise files.WriteError("full")

    monkeypatch.setattr(files, "append_lines", fail)
    with pytest.raises(files.WriteError):
        recorder.round(runs.round_metrics(experiment, 1))
    assert recorder.num_rounds_done == 0
    assert recorder.finish(runs.SENT, runs.SECONDS, interrupted=True)["num_rounds_done"] == 0


def test_the_summary(tmp_path):
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=5), pooled=0.9)
    assert json.loads((tmp_path / "run" / files.SUMMARY).read_text()) == summary
    assert [summary[key] for key in ("experiment", "seed", "num_clients", "num_rounds", "num_rounds_done")] == [
        "made-up",
        7,
        3,
        5,
        5,
    ]
    assert summary["clients"][1] == {
        "client_id": 1,
        "architecture": "mlp:n1=2",
        "transfer_accuracy": pytest.approx(0.11),
        "final_accuracy": pytest.approx(0.12),
        "local_accuracy": 0.05,
        "pooled_accuracy": 0.9,
        "faults": {},
    }
    assert summary["mean"] == {
        "transfer_accuracy": pytest.approx(0.11),
        "final_accuracy": pytest.approx(0.12),
        "local_accuracy": pytest.approx(0.05),
        "pooled_accuracy": pytest.approx(0.9),
        "gain_points": pytest.approx(1.0),
        "gain_over_local_points": pytest.approx(7.0),
        "gap_to_pooled_points": pytest.approx(78.0),
    }
    assert summary["early_stopping"] == dict.fromkeys(("public_training", "private_training", "pooled_training"))
    assert summary["communication"] == runs.SENT._asdict()
    assert summary["seconds"] == runs.SECONDS
    assert summary["interrupted"] is False
    assert {"versions", "device"} <= set(summary)


def test_the_summary_of_an_interrupted_run(tmp_path):
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=5), num_done=1, local=None, pooled=None)
    assert (summary["num_rounds"], summary["num_rounds_done"], summary["interrupted"]) == (5, 1, True)
    assert summary["clients"][0]["final_accuracy"] == pytest.approx(0.102)
    assert summary["clients"][0]["pooled_accuracy"] is None
    assert summary["clients"][0]["local_accuracy"] is None
    for key in ("local_accuracy", "pooled_accuracy", "gain_over_local_points", "gap_to_pooled_points"):
        assert summary["mean"][key] is None


def test_what_went_wrong_is_in_the_lines_and_in_the_summary(tmp_path):
    status = {2: {0: "absent", 1: "scores not finite, digest not finite"}, 4: {1: "digest not finite"}}
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=5), status=status)
    lines = {(line["round"], line["client_id"]): line["status"] for line in read_lines(tmp_path / "run")}
    assert {place: told for place, told in lines.items() if told != "ok"} == {
        (2, 0): "absent",
        (2, 1): "scores not finite, digest not finite",
        (4, 1): "digest not finite",
    }
    assert [client["faults"] for client in summary["clients"]] == [
        {"absent": [2]},
        {"scores not finite": [2], "digest not finite": [2, 4]},
        {},
    ]
    assert files.read_run(tmp_path / "run")[0] == summary


@pytest.mark.parametrize("damage", [{"absent": 3}, {"absent": ["x"]}, [3]])
def test_damaged_faults_are_refused(tmp_path, damage):
    summary = runs.write(tmp_path / "run", runs.experiment())
    summary["clients"][1]["faults"] = damage
    (tmp_path / "run" / files.SUMMARY).write_bytes(files.to_json(summary))
    with pytest.raises(files.RunDirectoryError, match=r"faults.* is damaged or missing"):
        files.read_run(tmp_path / "run")
