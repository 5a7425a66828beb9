import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
from experiments import runs

import fedmd_jax
from fedmd_jax.cli import main
from fedmd_jax.data import save_images
from fedmd_jax.experiments import EXPERIMENTS, recorder, session
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.progress import Lines
from fedmd_jax.options import parse

TINY = shlex.split(
    "--networks mlp mlp --data.num-public 200 --data.num-test 60 --subset-size 50 --public-training.num-epochs 1 "
    "--private-training.num-epochs 1 --pooled-training.num-epochs 1 --revisit.num-epochs 1"
)
FILES = {files.CONFIG, files.METRICS, files.SUMMARY, files.PLOT}


def read(path, name):
    return json.loads((path / name).read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two rounds: exit code, directory, what it printed, arguments."""
    path = tmp_path_factory.mktemp("cli") / "new" / "run"
    argv = ["run", "quickstart", "--out", str(path), *TINY, "--num-rounds", "2", "--seed", "3"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(argv)
    return code, path, printed.getvalue(), argv


def test_a_run_prints_its_progress_and_a_table(finished):
    code, path, printed, _ = finished
    assert code == 0
    for part in (
        "preparing the networks ...",
        "round 0/2  accuracy",
        "round 2/2  accuracy",
        "local only ...",
        "pooled upper bound ...",
    ):
        assert part in printed
    lines = printed.splitlines()
    start = lines.index("client  architecture  transfer   local   FedMD  pooled    gain  over local")
    assert [line.split()[:2] for line in lines[start + 1 : start + 3]] == [["0", "mlp"], ["1", "mlp"]]
    assert lines[start + 4].split()[0] == "mean"
    assert "sent per client and round: 3.2 kB up, 3.2 kB down" in printed
    assert lines[-1] == f"results in {path}"


def test_a_run_writes_its_files_and_nothing_else(finished):
    _, path, _, _ = finished
    assert {file.name for file in path.iterdir()} == {*FILES, files.CHECKPOINTS}
    assert [file.name for file in path.parent.iterdir()] == ["run"]
    assert (path / files.PLOT).read_bytes().startswith(b"\x89PNG")


def test_the_config_is_enough_to_run_again(finished):
    _, path, _, argv = finished
    config = read(path, files.CONFIG)
    assert (config["experiment"], config["seed"]) == ("quickstart", 3)
    assert {"jax", "flax", "numpy", "python", "fedmd_jax"} <= set(config["versions"])
    assert {"platform", "kind", "count"} == set(config["device"])
    program, command, name, *options = shlex.split(config["command"])
    assert [program, command, name, *options] == ["fedmd-jax", *argv]
    again = dataclasses.asdict(parse(name, options).experiment)
    assert json.loads(json.dumps(again)) == config["settings"]


def test_the_metrics_have_every_round_of_every_client(finished):
    _, path, _, _ = finished
    records = [json.loads(line) for line in (path / files.METRICS).read_text().splitlines()]
    assert [(r["event"], r["round"], r["client_id"]) for r in records] == [
        ("round", round_, client_id) for round_ in range(3) for client_id in range(2)
    ]
    assert {r["architecture"] for r in records} == {"mlp"}
    for record in records:
        assert set(record) == {
            "event",
            "round",
            "client_id",
            "architecture",
            "accuracy",
            "digest_loss",
            "revisit_loss",
            "status",
        }
        assert record["status"] == "ok"
        assert 0 <= record["accuracy"] <= 1
        losses = [record["digest_loss"], record["revisit_loss"]]
        assert losses == [None, None] if record["round"] == 0 else all(loss > 0 for loss in losses)


def test_the_summary_agrees_with_the_metrics(finished):
    _, path, _, _ = finished
    summary, metrics = files.read_run(path)
    assert [summary[key] for key in ("experiment", "seed", "num_clients", "num_rounds")] == ["quickstart", 3, 2, 2]
    assert summary["interrupted"] is False
    for client in summary["clients"]:
        own = [record["accuracy"] for record in metrics if record["client_id"] == client["client_id"]]
        assert (client["transfer_accuracy"], client["final_accuracy"]) == (own[0], own[-1])
        assert 0 <= client["local_accuracy"] <= 1
        assert 0 <= client["pooled_accuracy"] <= 1
    mean = summary["mean"]
    for key in ("transfer_accuracy", "final_accuracy", "local_accuracy", "pooled_accuracy"):
        assert mean[key] == pytest.approx(np.mean([client[key] for client in summary["clients"]]))
    assert mean["gain_points"] == pytest.approx(100 * (mean["final_accuracy"] - mean["transfer_accuracy"]))
    assert mean["gain_over_local_points"] == pytest.approx(100 * (mean["final_accuracy"] - mean["local_accuracy"]))
    assert mean["gap_to_pooled_points"] == pytest.approx(100 * (mean["pooled_accuracy"] - mean["final_accuracy"]))
    sent = summary["communication"]
    assert sent["upload_bytes_per_client_round"] == sent["download_bytes_per_client_round"] == 50 * 16 * 4
    assert sent["total_bytes"] == 2 * 2 * 2 * 50 * 16 * 4
    assert set(summary["seconds"]) == {"compile", "transfer", "pooled", "local", "rounds", "evaluate", "total"}


def test_report_prints_the_same_table_and_redraws_the_plot(finished, capsys):
    _, path, printed, _ = finished
    before = (path / files.PLOT).read_bytes()
    (path / files.PLOT).unlink()
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out.strip() in printed
    assert (path / files.PLOT).read_bytes() == before


def test_no_rounds_and_no_bound(finished, tmp_path, capsys):
    argv = ["run", "--out", str(tmp_path / "run"), *TINY, "--num-rounds", "0", "--no-pooled", "--seed", "3"]
    assert main(argv) == 0
    assert "pooled upper bound" not in capsys.readouterr().out
    summary, metrics = files.read_run(tmp_path / "run")
    assert len(metrics) == 2
    assert summary["mean"]["gain_points"] == summary["mean"]["gain_over_local_points"] == 0
    assert summary["mean"]["pooled_accuracy"] is None
    assert [client["pooled_accuracy"] for client in summary["clients"]] == [None] * 2
    first = [client["transfer_accuracy"] for client in files.read_run(finished[1])[0]["clients"]]
    assert [client["transfer_accuracy"] for client in summary["clients"]] == first  # the same up to here


@pytest.fixture
def played(monkeypatch):
    """`run` without training: the results of `runs`, and in between whatever a test puts in."""

    def play(disturb=lambda stage: None):
        def run(prepared, observer, kept):
            observer.phase("transfer learning")
            disturb("transfer")
            for round_ in range(prepared.experiment.num_rounds + 1):
                observer.round(runs.round_metrics(prepared.experiment, round_))
                disturb(round_)
            observer.phase("local only")
            disturb("local")
            observer.local(dict.fromkeys(range(len(prepared.experiment.networks)), 0.5), {})
            observer.phase("pooled upper bound")
            disturb("pooled")
            observer.pooled(dict.fromkeys(range(len(prepared.experiment.networks)), 0.9))

        monkeypatch.setattr(session, "compiled_once", lambda *_: contextlib.nullcontext(run))
        monkeypatch.setattr(recorder, "plot", lambda *_: b"a plot")  # takes its time

    return play


def interrupt_at(wanted):
    def disturb(stage):
        if stage == wanted:
            raise KeyboardInterrupt

    return disturb


def test_without_out_the_directory_has_a_name_of_its_own(played, tmp_path, monkeypatch, capsys):
    played()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["run", *TINY, "--seed", "3"]) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"quickstart-seed3", "quickstart-seed3-2"}
    assert capsys.readouterr().out.splitlines()[-1] == "results in runs/quickstart-seed3-2"


def test_a_smoke_run_is_told_as_one(played, tmp_path, monkeypatch, capsys):
    played()
    monkeypatch.chdir(tmp_path)
    note = "a smoke run: its settings are tiny, its accuracies mean nothing\n"
    for options, place in (
        (["run"], "quickstart-smoke-seed0"),
        (["run", "--seeds", "2"], "quickstart-smoke-seed0-2seeds"),
        (["sweep", "--over", "num-rounds=1"], "quickstart-smoke-sweep"),
    ):
        for smoke in ([], ["--smoke"]):
            assert main([*options, *TINY, *smoke]) == 0
            assert (note in capsys.readouterr().out) == bool(smoke)
        if options[0] == "run":
            assert main(["report", f"runs/{place}"]) == 0
            assert capsys.readouterr().out.startswith(note)
            assert main(["report", f"runs/{place.replace('-smoke', '')}"]) == 0
            assert note not in capsys.readouterr().out
        else:
            assert (tmp_path / "runs" / place / "sweep.csv").exists()
    assert main(["report", "runs"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        *("quickstart-seed0", "quickstart-seed0-2seeds", "quickstart-smoke-seed0", "quickstart-smoke-seed0-2seeds"),
    ]


def test_seeds_have_directories_of_their_own_and_a_summary_of_all(played, tmp_path, capsys):
    played()
    path = tmp_path / "run"
    assert main(["run", "--out", str(path), *TINY, "--num-rounds", "1", "--seed", "4", "--seeds", "2"]) == 0
    assert {file.name for file in path.iterdir()} == {"seed4", "seed5", files.SUMMARY, files.PLOT}
    for seed in (4, 5):
        assert {file.name for file in (path / f"seed{seed}").iterdir()} == FILES
        assert read(path / f"seed{seed}", files.CONFIG)["settings"]["seed"] == seed
    assert read(path, files.SUMMARY)["seeds"] == [4, 5]
    out = capsys.readouterr().out
    assert "seed 5, mean accuracy: transfer" in out
    assert out.splitlines()[-1] == f"results in {path}"
    before = (path / files.PLOT).read_bytes()
    (path / files.PLOT).unlink()
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out.strip() in out
    assert (path / files.PLOT).read_bytes() == before


def test_an_interrupted_seed_is_not_in_the_summary_of_all(played, tmp_path, capsys):
    stages = []

    def disturb(stage):
        stages.append(stage)
        if stages.count(1) == 2:
            raise KeyboardInterrupt

    played(disturb)
    path = tmp_path / "run"
    assert main(["run", "--out", str(path), *TINY, "--num-rounds", "1", "--seeds", "3"]) == 130
    assert {file.name for file in path.iterdir()} == {"seed0", "seed1", files.SUMMARY, files.PLOT}
    summary = read(path, files.SUMMARY)
    assert (summary["seeds"], summary["num_seeds"]) == ([0], 3)
    assert read(path / "seed1", files.SUMMARY)["interrupted"] is True


SWEEP = ["--over", "num_rounds=0,1", "--over", "temperature=1,2", *TINY]


def test_a_sweep_of_what_cannot_be_side_by_side_is_refused(tmp_path, capsys):
    assert main(["sweep", "--out", str(tmp_path / "sweep"), *SWEEP, "--seeds-at-once", "2"]) == 2
    assert capsys.readouterr().err == "fedmd-jax: error: seeds_at_once is of several seeds, got 2 for one seed\n"
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_goes_on_where_settings_do_not_go_together(played, tmp_path, capsys):
    played()
    path = tmp_path / "sweep"
    assert main(["sweep", "--out", str(path), *SWEEP, "--seeds", "2"]) == 1
    lines = (path / "sweep.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in lines[1:]] == [
        ["0", "1", "2"],
        ["0", "2", "0"],
        ["1", "1", "2"],
        ["1", "2", "0"],
    ]
    assert (path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (path / "002-num-rounds=1_temperature=1" / "seed1" / files.SUMMARY).exists()
    out, err = capsys.readouterr()
    assert "temperature is of distance kl" in err
    assert out.splitlines()[-1] == f"results in {path}"


def test_a_sweep_goes_on_after_a_crash(played, tmp_path, capsys):
    def disturb(stage):
        if stage == 1:
            raise RuntimeError("out of memory")

    played(disturb)
    path = tmp_path / "sweep"
    assert main(["sweep", "--out", str(path), "--over", "num-rounds=1,0", *TINY]) == 1
    failed, fine = (path / "sweep.csv").read_text().splitlines()[1:]
    assert failed.endswith("RuntimeError: out of memory")
    assert fine.startswith("0,1,0.1")
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupted_sweep_keeps_its_table(played, tmp_path):
    played(interrupt_at(1))
    path = tmp_path / "sweep"
    assert main(["sweep", "--out", str(path), "--over", "num-rounds=0,1,2", *TINY]) == 130
    assert [line.split(",")[:2] for line in (path / "sweep.csv").read_text().splitlines()[1:]] == [
        ["0", "1"],
        ["1", "0"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "a sweep needs at least one --over SETTING=VALUE,VALUE,..."),
        ("--over distanse=mae", "unknown setting 'distanse', known are networks, .*digest.num-epochs.*seed"),
        ("--over num-rounds=1,x", r"--num-rounds: wanted an integer, got 'x' .*"),
        ("--over digest.num-epochs=1,0", r"digest: num_epochs must be an integer of at least 1, got 0 .*"),
        ("--over temperature=2,3", "temperature is of distance kl, but distance is mae, got 2.0"),
        ("--over seed=1,2 --seeds 0", "seeds must be an integer of at least 1, got 0"),
    ],
)
def test_a_sweep_that_cannot_be(played, tmp_path, capsys, options, message):
    played()
    assert main(["sweep", "--out", str(tmp_path / "sweep"), *TINY, *shlex.split(options)]) == 2
    check_complaint(capsys, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stage", "num_done"), [(0, 0), (1, 1), ("local", 2), ("pooled", 2)])
def test_an_interrupted_run_keeps_what_is_done(played, tmp_path, capsys, stage, num_done):
    played(interrupt_at(stage))
    path = tmp_path / "run"
    assert main(["run", "--out", str(path), *TINY, "--num-rounds", "2"]) == 130
    out, err = capsys.readouterr()
    assert err == (
        f"\ninterrupted after round {num_done} of 2: what is done so far is kept\n"
        f"to go on: fedmd-jax run --resume {path}\n"
    )
    assert out.splitlines()[-1] == f"results in {path}"
    summary, metrics = files.read_run(path)
    assert {file.name for file in path.iterdir()} == FILES
    assert len(metrics) == 2 * (num_done + 1)
    assert (summary["num_rounds"], summary["num_rounds_done"], summary["interrupted"]) == (2, num_done, True)
    assert summary["communication"]["total_bytes"] == num_done * 2 * 2 * 50 * 16 * 4
    assert summary["clients"][0]["pooled_accuracy"] is None
    assert main(["report", str(path)]) == 0


def test_interrupted_before_the_first_result(played, tmp_path, capsys):
    played(interrupt_at("transfer"))
    path = tmp_path / "run"
    assert main(["run", "--out", str(path), *TINY]) == 130
    assert (
        capsys.readouterr().err
        == f"\ninterrupted before the first result: {path} has config.json and an empty metrics.jsonl\n"
        f"to go on: fedmd-jax run --resume {path}\n"
    )
    assert {file.name: file.stat().st_size > 0 for file in path.iterdir()} == {files.CONFIG: True, files.METRICS: False}
    assert main(["report", str(path)]) == 2
    assert "is unfinished" in capsys.readouterr().err


def test_interrupted_while_the_data_is_read(tmp_path, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "prepare", interrupt)
    assert main(["run", "--out", str(tmp_path / "run"), *TINY]) == 130
    assert capsys.readouterr().err == "\nfedmd-jax: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_in_a_process(finished, tmp_path, number, code):
    path = tmp_path / "run"
    # A test run in the background ignores SIGINT, and so would this process.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from fedmd_jax.cli import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "run", "--out", str(path), *TINY, "--num-rounds", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4"},
    )
    for line in process.stdout:
        if line.startswith("round "):
            break
    while process.poll() is None:  # again and again, also while it writes
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
    _, err = process.communicate()
    assert process.returncode == code, err
    assert err.splitlines()[-1] == f"to go on: fedmd-jax run --resume {path}"
    assert "what is done so far is kept" in err
    assert "Traceback" not in err
    assert {file.name for file in path.iterdir()} == {*FILES, files.CHECKPOINTS}
    summary, metrics = files.read_run(path)
    assert len(metrics) == 2 * (summary["num_rounds_done"] + 1)


def test_a_full_disk_is_one_line(played, tmp_path, monkeypatch, capsys):
    played()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    path = tmp_path / "run"
    assert main(["run", "--out", str(path), *TINY]) == 1
    err = capsys.readouterr().err
    assert err == f"fedmd-jax: error: cannot write {path / files.PLOT}: No space left on device\n"
    assert {file.name for file in path.iterdir()} == {files.CONFIG, files.METRICS}


@pytest.mark.parametrize("kind", [ValueError, OSError, RuntimeError])
def test_a_bug_keeps_its_traceback(played, tmp_path, kind):
    def disturb(stage):
        raise kind("a bug")

    played(disturb)
    with pytest.raises(kind, match="a bug"):
        main(["run", "--out", str(tmp_path / "run"), *TINY])


def test_the_progress_is_closed_whatever_happens(played, tmp_path, monkeypatch):
    closed = []

    class Watched(Lines):
        def close(self):
            closed.append(True)

    monkeypatch.setattr(session, "make_progress", Watched)
    played(interrupt_at(0))
    main(["run", "--out", str(tmp_path / "run"), *TINY])
    assert closed == [True]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    labels = np.arange(40) % 4
    for name, size in (("small", 4), ("large", 28)):
        save_images(folder, name, "train", np.zeros((40, size, size, 1), np.uint8), labels)
        save_images(folder, name, "test", np.zeros((40, size, size, 1), np.uint8), labels)
    (folder / "truncated").mkdir()
    content = (folder / "large" / "train.npz").read_bytes()
    (folder / "truncated" / "train.npz").write_bytes(content[: len(content) // 2])
    (folder / "unequal").mkdir()
    np.savez(folder / "unequal" / "train.npz", images=np.zeros((3, 28, 28, 1), np.uint8), labels=np.zeros(2, int))
    return folder


NETWORKS = "--networks mlp mlp mlp:n1=3"
SMALL = (
    "--data.private small --data.private-classes 0 1 --data.examples-per-class 2 "
    "--data.num-test 5 --data.num-public 40 --subset-size 9"
)
HELP = r"\(see fedmd-jax run quickstart --help\)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-roundz 3", f"unknown option '--num-roundz', perhaps you meant --num-rounds {HELP}"),
        ("--data.pubic=x", f"unknown option '--data.pubic', perhaps you meant --data.public .*{HELP}"),
        ("--seeds 0", "seeds must be an integer of at least 1, got 0"),
        ("--seeds 2 --seed 4294967295", r"seed must be below 2\*\*32, got 4294967296"),
        ("--zzz", f"unknown option '--zzz' {HELP}"),
        ("quickstart", f"unexpected argument 'quickstart'; the experiment stands right after run, .* {HELP}"),
        ("--pooled yes", f"unexpected argument 'yes'; .* {HELP}"),
        ("--num-rounds x", f"--num-rounds: wanted an integer, got 'x' {HELP}"),
        ("--head-penalty x", f"--head-penalty: wanted a number, got 'x' {HELP}"),
        ("--num-rounds", f"Missing value for argument '--num-rounds'. .*{HELP}"),
        ("--weights a b", f"--weights: .*{HELP}"),
        ("--subset first", f"invalid choice 'first' for argument '--subset'. .*random.*stratified.* {HELP}"),
        ("--digest.num-epochs 0", f"digest: num_epochs must be an integer of at least 1, got 0 {HELP}"),
        ("--num-rounds -3", "num_rounds must be an integer of at least 0, got -3"),
        ("--distance kl --temperature 0", "temperature must be positive and finite, got 0.0"),
        ("--networks mlp mlp --weights 1 nan", "weights must be finite and not negative, got 1.0, nan"),
        ("--networks mlp mlp --weights 1 -1", "weights must be finite and not negative, got 1.0, -1.0"),
        ("--networks mlp mlp --weights 1", "weights must be one per client, 2, or None, got 1"),
        ("--networks", "networks must be a list of names, one per client, got 'none'"),
        ("--subset-size 300 --data.num-public 200", "subset_size must be at most the public dataset, .* got 300"),
        ("--data.num-public 8001", "the public dataset embedded/digits has 8000 examples, num_public wants 8001"),
        ("--data.num-test 2401", "the test part of embedded/letters has 2400 examples, num_test wants 2401"),
        (f"{NETWORKS} --data.examples-per-class 101", "3 clients with 101 examples per class need 303 of each, but .*"),
        ("--data.private-classes 0 6", r"embedded/letters has no examples of the private_classes \[6\], it has .*"),
        ("--data.public embedded/mnist", "the embedded data sets are embedded/digits and embedded/letters, got .*"),
        ("--networks cnn", "network 'cnn': the kind must be one of 2conv, 3conv, .*, got 'cnn'"),
        ("--networks mlp:n1=8,width=2", r"network 'mlp:n1=8,width=2': .* n2 is missing, width is unknown"),
        ("--networks mlp:n1=eight", "network 'mlp:n1=eight': n1 must be an integer, got 'eight'"),
        ("--data.public mnist --data.data-dir /nowhere", "no data set 'mnist' with split 'train' in /nowhere .*"),
        (f"--data.public truncated {NETWORKS}", "cannot read .*truncated/train.npz, it may be missing or damaged: .*"),
        (f"--data.public unequal {NETWORKS}", ".*unequal/train.npz: 3 images but 2 labels"),
        (f"--data.public small {SMALL} {NETWORKS} 3conv:n1=2,n2=2,n3=2", "a CNN of 3 convolutions wants .* 12x12, .*"),
        (f"--data.public large {SMALL} {NETWORKS}", r"public and private images must have one shape, got \(28, .*"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(data_folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setenv("FEDMD_JAX_DATA", str(data_folder))
    assert main(["run", "--out", str(tmp_path / "run"), *shlex.split(options)]) == 2
    check_complaint(capsys, message)
    assert list(tmp_path.iterdir()) == []


def check_complaint(capsys, message):
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert re.fullmatch(f"fedmd-jax: error: {message}", line), line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rum"], "unknown command 'rum', perhaps you meant run"),
        (["train"], "unknown command 'train', known are run, sweep, report, data"),
        (["--verbose"], "unknown command '--verbose', known are run, sweep, report, data"),
        (["run", "quick"], "unknown experiment 'quick', .*quickstart"),
        (["report"], "report wants one directory of a finished run: fedmd-jax report DIR"),
        (["report", "a", "b"], "report wants one directory of a finished run: fedmd-jax report DIR"),
        (["report", "--out"], "report wants one directory of a finished run: fedmd-jax report DIR"),
        (["report", "/nowhere"], "no run to report on: /nowhere is not a directory"),
    ],
)
def test_a_command_that_is_none(capsys, argv, message):
    assert main(argv) == 2
    check_complaint(capsys, message)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("exists", "the output directory must be new, but .*exists exists"),
        ("file", "the output directory must be new, but .*file exists"),
        ("file/run", "cannot make the output directory .*file/run: Not a directory"),
        ("/proc/run", "cannot make the output directory /proc/run: No such file or directory"),
        ("", "the output directory must be new, but . exists"),
    ],
)
def test_an_output_directory_that_cannot_be(played, tmp_path, capsys, out, message):
    played()
    (tmp_path / "exists").mkdir()
    (tmp_path / "file").touch()
    assert main(["run", "--out", str(tmp_path / out) if out else "", *TINY]) == 2
    check_complaint(capsys, message)
    assert {path.name for path in tmp_path.iterdir()} == {"exists", "file"}
    assert list((tmp_path / "exists").iterdir()) == []


def test_a_damaged_run_is_one_line(tmp_path, capsys):
    runs.write(tmp_path / "run", runs.experiment())
    plot = (tmp_path / "run" / files.PLOT).read_bytes()
    (tmp_path / "run" / files.SUMMARY).write_text("{")
    assert main(["report", str(tmp_path / "run")]) == 2
    check_complaint(capsys, "cannot read .*summary.json: .*")
    assert (tmp_path / "run" / files.PLOT).read_bytes() == plot


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedmd-jax {fedmd_jax.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_help_names_commands_and_experiments(capsys, argv):
    assert main(argv) == 0
    out = capsys.readouterr().out
    for word in ("fedmd-jax run", "fedmd-jax report DIR", "--version", *EXPERIMENTS):
        assert word in out


def test_the_help_of_report(capsys):
    assert main(["report", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: fedmd-jax report DIR")


def test_python_m(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fedmd_jax", "report", str(tmp_path / "nothing")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"fedmd-jax: error: no run to report on: {tmp_path / 'nothing'} is not a directory\n"


@pytest.fixture(scope="module")
def paper_data(tmp_path_factory):
    """Noise in the shapes of the paper's data sets."""
    folder, rng = tmp_path_factory.mktemp("paper"), np.random.default_rng(0)

    def save(name, num_images, num_classes, shape, **columns):
        labels = np.arange(num_images) % num_classes
        for split in ("train", "test"):
            pixels = rng.integers(0, 256, (num_images, *shape), dtype=np.uint8)
            save_images(folder, name, split, pixels, labels, **{k: make(labels) for k, make in columns.items()})

    save("mnist", 240, 10, (28, 28, 1))
    save("emnist/letters", 260, 26, (28, 28, 1))
    save("leaf/femnist", 620, 62, (28, 28, 1), writer=lambda labels: np.arange(len(labels)) // 155)
    save("cifar10", 240, 10, (32, 32, 3))
    save("cifar100", 4000, 100, (32, 32, 3), coarse_label=lambda labels: labels // 5)
    return folder


# The paper's own networks take long to compile: one preset has them, for the others it is the data that differs.
@pytest.mark.parametrize(
    ("experiment", "variant", "networks"),
    [
        ("letters-iid", "paper", []),
        *[(name, "paper", ["mlp:n1=64"] * 2) for name in ("letters-writers", "cifar-iid", "cifar-superclass")],
        *[(name, "released", ["mlp:n1=64"] * 2) for name in ("letters-iid", "cifar-superclass")],
        ("letters-iid", "tuned", ["mlp:n1=64"] * 2),
    ],
)
def test_every_experiment_runs_from_a_data_folder(experiment, variant, networks, paper_data, tmp_path):
    options = ["--variant", variant, "--smoke", "--data.data-dir", str(paper_data), "--out", str(tmp_path / "run")]
    if networks:
        options += ["--networks", *networks]
    assert main(["run", experiment, *options]) == 0
    summary = read(tmp_path / "run", files.SUMMARY)
    assert summary["experiment"] == (experiment if variant == "paper" else f"{experiment}-{variant}")
    assert None not in summary["mean"].values()
    at_once = read(tmp_path / "run", files.CONFIG)["clients_at_once"]
    assert list(at_once.values()) == ([2] if networks else [1])
