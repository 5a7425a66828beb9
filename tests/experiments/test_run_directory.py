import dataclasses
import errno
import json
import math
import resource
import shutil

import pytest
from experiments import runs

from fedmd_jax.cli import main
from fedmd_jax.experiments import run_directory as files


def fail(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_new_directory_comes_with_its_files(tmp_path):
    path = files.create(tmp_path / "a" / "b", {"one": b"1", "two": b""})
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {"one": b"1", "two": b""}
    assert [file.name for file in path.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_exists_is_left_alone(tmp_path, kind):
    path = tmp_path / "run"
    {"directory": path.mkdir, "file": path.touch, "link": lambda: path.symlink_to("nowhere")}[kind]()
    with pytest.raises(files.RunDirectoryError, match=r"the output directory must be new, but .*run exists"):
        files.create(path, {"one": b"1"})
    assert list(tmp_path.iterdir()) == [path]


def test_another_run_was_faster(tmp_path, monkeypatch):
    path, check = tmp_path / "run", files.check_new
    monkeypatch.setattr(files, "check_new", lambda _: (monkeypatch.setattr(files, "check_new", check), other()))

    def other():
        path.mkdir()
        (path / "config.json").touch()

    with pytest.raises(files.RunDirectoryError, match="must be new"):
        files.create(path, {"one": b"1"})
    assert [file.name for file in path.iterdir()] == ["config.json"]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(files.RunDirectoryError, match=r"cannot make the output directory .*: Not a directory"):
        files.create(tmp_path / "file" / "run", {})
    with pytest.raises(files.RunDirectoryError, match=r"cannot make the output directory .*: File name too long"):
        files.create(tmp_path / ("x" * 300), {})


def test_a_directory_that_fails_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_bytes", fail)
    with pytest.raises(files.RunDirectoryError, match="No space left on device"):
        files.create(tmp_path / "run", {"one": b"1"})
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_path(tmp_path):
    stem = tmp_path / "run-seed0"
    for name in ("run-seed0", "run-seed0-2", "run-seed0-3"):
        path = files.fresh_path(stem)
        assert path.name == name
        path.mkdir()


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "file"
    files.replace_file(path, b"old")
    files.replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("function", "error", "raised"),
    [
        ("os.fsync", OSError(errno.ENOSPC, "No space left on device"), files.WriteError),
        ("pathlib.Path.replace", OSError(errno.ENOSPC, "No space left on device"), files.WriteError),
        ("os.fsync", KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, function, error, raised):
    def fail(*_, **__):
        raise error

    path = tmp_path / "file"
    files.replace_file(path, b"old")
    monkeypatch.setattr(function, fail)
    with pytest.raises(raised):
        files.replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_lines_are_appended(tmp_path):
    path = tmp_path / "lines"
    files.append_lines(path, [{"a": 1}, {"a": None}])
    files.append_lines(path, [])
    files.append_lines(path, [{"a": 2}])
    assert path.read_text() == '{"a": 1}\n{"a": null}\n{"a": 2}\n'


def test_lines_that_do_not_all_fit_are_not_appended(tmp_path):
    path = tmp_path / "lines"
    files.append_lines(path, [{"a": 1}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))  # as on a full disk, the first 20 bytes go through
    try:
        with pytest.raises(files.WriteError, match=r"cannot write .*lines: "):
            files.append_lines(path, [{"a": 2}] * 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == '{"a": 1}\n'


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.to_json({"a": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.append_lines(tmp_path / "lines", [{"a": float("inf")}])
    assert list(tmp_path.iterdir()) == []


def test_the_origin(monkeypatch):
    monkeypatch.setenv("FEDMD_JAX_DATA", "/somewhere")
    origin = files.origin()
    assert {"python", "fedmd_jax", "jax", "jaxlib", "flax", "optax", "numpy"} <= set(origin["versions"])
    assert set(origin["device"]) == {"platform", "kind", "count"}
    assert origin["environment"]["FEDMD_JAX_DATA"] == "/somewhere"


def test_what_was_written_is_read(tmp_path):
    experiment = runs.experiment()
    written = runs.write(tmp_path / "run", experiment)
    summary, metrics = files.read_run(tmp_path / "run")
    assert summary == written
    found = [(record["round"], record["client_id"]) for record in metrics]
    assert found == [(round_, client_id) for round_ in range(3) for client_id in range(3)]


def test_other_events_are_passed_over(tmp_path):
    runs.write(tmp_path / "run", runs.experiment())
    files.append_lines(tmp_path / "run" / files.METRICS, [{"event": "checkpoint"}])
    assert len(files.read_run(tmp_path / "run")[1]) == 9


def damaged(name, change):
    """How to spoil a file of a run: JSON content through `change`, text as it is."""

    def damage(path):
        file = path / name
        file.write_text(change if isinstance(change, str) else json.dumps(change(json.loads(file.read_text()))))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / files.SUMMARY).unlink(), "no run to report on: .* is unfinished, it has no summary.json"),
        (lambda path: shutil.rmtree(path), "no run to report on: .* is not there, it has no summary.json"),
        (lambda path: (path / files.METRICS).unlink(), "cannot read .*metrics.jsonl: No such file or directory"),
        (damaged(files.SUMMARY, "{"), "cannot read .*summary.json: .*"),
        (damaged(files.SUMMARY, "[]"), "cannot read .*summary.json: .* wanted a JSON object, got list.*"),
        (damaged(files.SUMMARY, "{}"), "cannot read .*summary.json: it may be damaged .*"),
        (damaged(files.METRICS, '{"event": "round"'), "cannot read .*metrics.jsonl: .*"),
        (damaged(files.METRICS, "1\n"), "cannot read .*metrics.jsonl: it may be damaged .*"),
        (damaged(files.METRICS, ""), "cannot read .*run: metrics.jsonl has no round 0 of all clients"),
        (lambda path: (path / files.METRICS).write_bytes(b"\xff\xfe"), "cannot read .*metrics.jsonl: .*"),
    ],
)
def test_a_damaged_run(tmp_path, damage, message):
    path = tmp_path / "run"
    runs.write(path, runs.experiment())
    damage(path)
    with pytest.raises(files.RunDirectoryError, match=f"^{message}$"):
        files.read_run(path)


def test_a_report_of_damaged_results_is_one_line(tmp_path, capsys):
    runs.write(tmp_path / "run", runs.experiment())
    damaged(files.SUMMARY, lambda summary: {**summary, "mean": {"transfer_accuracy": "good"}})(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(f"fedmd-jax: error: cannot read {tmp_path / 'run'}: it may be damaged")


def test_before_the_first_result_there_is_the_config_and_no_metrics(tmp_path):
    experiment = runs.experiment()
    writer = files.Writer.create(tmp_path / "run", "made-up", experiment, command="fedmd-jax run made-up")
    assert {file.name: file.stat().st_size > 0 for file in (tmp_path / "run").iterdir()} == {
        files.CONFIG: True,
        files.METRICS: False,
    }
    assert (writer.num_rounds_done, writer.num_bytes) == (None, 0)
    config = json.loads((tmp_path / "run" / files.CONFIG).read_text())
    assert config["experiment"] == "made-up"
    assert config["seed"] == config["settings"]["seed"] == 7
    assert config["settings"] == json.loads(json.dumps(dataclasses.asdict(experiment)))
    assert config["command"] == "fedmd-jax run made-up"
    assert {"versions", "device", "environment"} <= set(config)


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_loss_that_is_not_finite_is_null(loss):
    metrics = runs.round_metrics(runs.experiment(), 1, digest_loss=loss)
    assert [record["digest_loss"] for record in files.round_records(metrics)] == [None] * 3


def test_the_summary(tmp_path):
    status = {2: {0: "dropped", 1: "scores not finite, digest not finite"}, 4: {1: "digest not finite"}}
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=5), status=status, failed={1: [3]})
    assert json.loads((tmp_path / "run" / files.SUMMARY).read_text()) == summary
    names = ("experiment", "seed", "num_clients", "num_rounds", "num_rounds_done", "interrupted")
    assert [summary[key] for key in names] == ["made-up", 7, 3, 5, 5, False]
    assert summary["clients"][1] == {
        "client_id": 1,
        "architecture": "mlp:n1=2",
        "transfer_accuracy": pytest.approx(0.11),
        "final_accuracy": pytest.approx(0.12),
        "local_accuracy": 0.05,
        "pooled_accuracy": 0.9,
        "faults": {"scores not finite": [2], "digest not finite": [2, 4], "local only not finite": [3]},
    }
    assert summary["mean"] == {
        "transfer_accuracy": pytest.approx(0.11),
        "final_accuracy": pytest.approx(0.12),
        "local_accuracy": pytest.approx(0.05),
        "pooled_accuracy": pytest.approx(0.9),
        "ensemble_accuracy": None,
        "server_accuracy": None,
        "gain_points": pytest.approx(1.0),
        "gain_over_local_points": pytest.approx(7.0),
        "gap_to_pooled_points": pytest.approx(78.0),
    }
    assert summary["early_stopping"] == dict.fromkeys(("public_training", "private_training", "pooled_training"))
    assert summary["communication"] == runs.SENT._asdict()
    assert summary["seconds"] == runs.SECONDS
    assert {"versions", "device"} <= set(summary)


def test_the_summary_of_an_interrupted_run_without_baselines(tmp_path):
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=5), num_done=1, local=None, pooled=None)
    assert (summary["num_rounds"], summary["num_rounds_done"], summary["interrupted"]) == (5, 1, True)
    assert summary["clients"][0]["final_accuracy"] == pytest.approx(0.102)
    for key in ("local_accuracy", "pooled_accuracy", "gain_over_local_points", "gap_to_pooled_points"):
        assert summary["mean"][key] is None
        assert summary["clients"][0].get(key) is None
