import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import events
import numpy as np
import pytest
from experiments import runs
from experiments.playing import playing

import fedmd_jax
from fedmd_jax.cli import main
from fedmd_jax.data import save_images
from fedmd_jax.experiments import EXPERIMENTS, run_directory as files, train
from fedmd_jax.experiments.results import figures

TINY = shlex.split(
    "--networks mlp mlp --data.num-public 200 --data.num-test 60 --subset-size 50 --public-training.num-epochs 1 "
    "--private-training.num-epochs 1 --pooled-training.num-epochs 1 --revisit.num-epochs 1"
)
FILES = {files.CONFIG, files.METRICS, files.CONFUSION, files.SUMMARY, files.PLOT}


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
        "pooled upper bound ...",
    ):
        assert part in printed
    lines = printed.splitlines()
    start = lines.index("  client  architecture  transfer   local   FedMD  pooled    gain  over local")
    assert [line.split()[:2] for line in lines[start + 1 : start + 3]] == [["0", "mlp"], ["1", "mlp"]]
    assert lines[start + 4].split()[0] == "mean"
    assert "sent per client and round: 3.2 kB up, 3.2 kB down" in printed
    assert lines[-1] == f"results in {path}"


def test_a_run_writes_its_files_and_nothing_else(finished):
    _, path, _, _ = finished
    assert {file.name for file in path.iterdir()} == {*FILES, files.CHECKPOINTS}
    assert [file.name for file in path.parent.iterdir()] == ["run"]
    assert (path / files.PLOT).read_bytes().startswith(b"\x89PNG")


def test_the_metrics_have_every_round_of_every_client(finished):
    _, path, _, _ = finished
    records = [json.loads(line) for line in (path / files.METRICS).read_text().splitlines()]
    assert [(r["event"], r["round"], r["client_id"]) for r in records] == [
        ("round", round_, client_id) for round_ in range(3) for client_id in range(2)
    ]
    assert {r["architecture"] for r in records} == {"mlp"}
    names = "event round client_id architecture accuracy digest_loss revisit_loss status local_accuracy local_status"
    for record in records:
        assert sorted(record) == sorted(names.split() + ["consensus_size"] * (record["round"] > 0))
        assert (record["status"], record["local_status"]) == ("ok", "ok")
        assert record["round"] > 0 or record["local_accuracy"] == record["accuracy"]
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
        assert client["local_accuracy"] == metrics[-2 + client["client_id"]]["local_accuracy"]
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


def test_report_prints_accuracies_by_class(finished, capsys):
    _, path, _, _ = finished
    summary, counts = read(path, files.SUMMARY), files.read_confusion(path)
    for client, record in zip(summary["clients"], counts, strict=True):
        assert (record["round"], record["client_id"]) == (2, client["client_id"])
        of_classes = np.array(record["confusion"])
        assert of_classes.shape == (16, 16)
        assert of_classes.sum() == 60
        assert np.trace(of_classes) / 60 == pytest.approx(client["final_accuracy"])
    assert main(["report", str(path), "--per-class"]) == 0
    title, header, *rows, missing = capsys.readouterr().out.splitlines()
    assert title == "accuracy by class after round 2, on private test data"
    assert header.split("  ")[0] == "class"
    assert [row[:18] for row in rows] == [f"embedded/letters {label}" for label in range(6)]
    first, second = (np.array(record["confusion"])[10] for record in counts)
    assert rows[0].split()[2:5] == [
        str(first.sum()),
        f"{first[10] / first.sum():.3f}",
        f"{second[10] / second.sum():.3f}",
    ]
    assert missing == f"no test example of {', '.join(f'embedded/digits {label}' for label in range(10))}"


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
def play():
    """The command line with programs that train nothing."""
    with playing() as play_one:
        yield play_one


def test_a_config_is_the_default_and_options_win(finished, play, tmp_path, capsys):
    _, path, _, _ = finished
    config = str(path / files.CONFIG)
    assert play("--config", config, "--out", tmp_path / "again", "--num-rounds", "1")[0] == 0
    settings = read(path, files.CONFIG)["settings"]
    assert read(tmp_path / "again", files.CONFIG)["settings"] == {**settings, "num_rounds": 1}
    assert play("--config", tmp_path / "nothing.json")[0] == 2
    assert "cannot read" in capsys.readouterr().err


def test_without_out_the_directory_has_a_name_of_its_own(play, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert play(*TINY, "--seed", "3")[0] == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"quickstart-seed3", "quickstart-seed3-2"}
    assert capsys.readouterr().out.splitlines()[-1] == "results in runs/quickstart-seed3-2"


def test_a_smoke_run_is_marked(play, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    note = "a smoke run: its settings are tiny, its accuracies mean nothing\n"
    for command, options, place in (
        ("run", [], "quickstart-smoke-seed0"),
        ("run", ["--num-seeds", "2"], "quickstart-smoke-seed0-2seeds"),
        ("sweep", ["--over", "num-rounds=1"], "quickstart-smoke-sweep"),
    ):
        for smoke in ([], ["--smoke"]):
            assert play(*options, *TINY, *smoke, command=command)[0] == 0
            assert (note in capsys.readouterr().out) == bool(smoke)
        assert (tmp_path / "runs" / place).is_dir()
        if command == "run":
            assert main(["report", f"runs/{place}"]) == 0
            assert capsys.readouterr().out.startswith(note)
    assert main(["report", "runs"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        *("quickstart-seed0", "quickstart-seed0-2seeds", "quickstart-smoke-seed0", "quickstart-smoke-seed0-2seeds"),
    ]


def test_seeds_have_directories_of_their_own_and_a_summary_of_all(play, tmp_path, capsys):
    path = tmp_path / "run"
    assert play("--out", path, *TINY, "--num-rounds", "1", "--seed", "4", "--num-seeds", "2")[0] == 0
    assert {file.name for file in path.iterdir()} == {"seed4", "seed5", files.SUMMARY, files.PLOT}
    for seed in (4, 5):
        assert {file.name for file in (path / f"seed{seed}").iterdir()} == {*FILES, files.CHECKPOINTS}
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


def test_an_interrupted_seed_is_not_in_the_summary_of_all(play, tmp_path):
    path = tmp_path / "run"
    assert play("--out", path, *TINY, "--num-rounds", "2", "--num-seeds", "3", stage=1, batch=2)[0] == 130
    assert {file.name for file in path.iterdir()} == {"seed0", "seed1", files.SUMMARY, files.PLOT}
    summary = read(path, files.SUMMARY)
    assert (summary["seeds"], summary["num_seeds"]) == ([0], 3)
    assert read(path / "seed1", files.SUMMARY)["interrupted"] is True


SWEEP = ["--over", "num_rounds=0,1", "--over", "temperature=1,2", *TINY]


def test_a_sweep_continues_after_settings_that_do_not_go_together(play, tmp_path, capsys):
    path = tmp_path / "sweep"
    assert play("--out", path, *SWEEP, "--num-seeds", "2", command="sweep")[0] == 1
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


def test_a_sweep_continues_after_a_crash(play, tmp_path, capsys):
    path = tmp_path / "sweep"
    argv = ["--out", path, "--over", "num-rounds=1,0", *TINY]
    assert play(*argv, command="sweep", stage=1, kind=RuntimeError("out of memory"))[0] == 1
    failed, fine = (path / "sweep.csv").read_text().splitlines()[1:]
    assert failed.endswith("RuntimeError: out of memory")
    assert fine.startswith("0,1,0.")
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupted_sweep_keeps_its_table(play, tmp_path):
    path = tmp_path / "sweep"
    assert play("--out", path, "--over", "num-rounds=0,1,2", *TINY, command="sweep", stage=1, batch=2)[0] == 130
    assert [line.split(",")[:2] for line in (path / "sweep.csv").read_text().splitlines()[1:]] == [
        ["0", "1"],
        ["1", "0"],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "a sweep needs at least one --over SETTING=VALUE,VALUE,..."),
        ("--over distanse=mae", "unknown setting 'distanse', known are networks, .*digest.num-epochs.*seed"),
        ("--over temperature=2,3", "temperature is of distance kl, but distance is mae, got 2.0"),
        ("--over seed=1,2 --num-seeds 0", "seeds must be from 1 to 10000, got 0"),
    ],
)
def test_a_sweep_that_cannot_be(play, tmp_path, capsys, options, message):
    assert play("--out", tmp_path / "sweep", *TINY, *shlex.split(options), command="sweep")[0] == 2
    check_complaint(capsys, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stage", "num_done"), [(1, 1), ("pooled upper bound", 2)])
def test_an_interrupted_run_keeps_what_is_done(play, tmp_path, capsys, stage, num_done):
    path = tmp_path / "run"
    assert play("--out", path, *TINY, "--num-rounds", "2", stage=stage)[0] == 130
    out, err = capsys.readouterr()
    assert err == (
        f"\ninterrupted after round {num_done} of 2: results so far are kept\n"
        f"to resume: fedmd-jax run --resume {path}\n"
    )
    assert out.splitlines()[-1] == f"results in {path}"
    summary, metrics = files.read_run(path)
    assert len(metrics) == 2 * (num_done + 1)
    assert (summary["num_rounds"], summary["num_rounds_done"], summary["interrupted"]) == (2, num_done, True)
    assert summary["communication"]["total_bytes"] == num_done * 2 * 2 * 50 * 16 * 4
    assert summary["clients"][0]["pooled_accuracy"] is None
    assert summary["clients"][0]["local_accuracy"] is not None
    assert main(["report", str(path)]) == 0


def test_interrupted_before_the_first_result(play, tmp_path, capsys):
    path = tmp_path / "run"
    assert play("--out", path, *TINY, stage="preparing the networks")[0] == 130
    err = capsys.readouterr().err
    assert err == (f"\ninterrupted before the first result of {path}\nto resume: fedmd-jax run --resume {path}\n")
    assert (path / files.METRICS).read_bytes() == b""
    assert main(["report", str(path)]) == 2
    assert "is unfinished" in capsys.readouterr().err


def test_interrupted_while_the_data_is_read(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "prepare", interrupt)
    assert main(["run", "--out", str(tmp_path / "run"), *TINY]) == 130
    assert capsys.readouterr().err == "\nfedmd-jax: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_in_a_process(tmp_path, number, code):
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
    assert err.splitlines()[-1] == f"to resume: fedmd-jax run --resume {path}"
    assert "results so far are kept" in err
    assert {file.name for file in path.iterdir()} == {*FILES, files.CHECKPOINTS}
    summary, metrics = files.read_run(path)
    assert len(metrics) == 2 * (summary["num_rounds_done"] + 1)


def test_a_full_disk_is_one_line(play, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    path, fsync = tmp_path / "run", os.fsync
    monkeypatch.setattr(files.os, "fsync", fail)
    assert play("--out", path, *TINY)[0] == 1
    err = capsys.readouterr().err
    assert err == f"fedmd-jax: error: cannot write {path / files.CONFUSION}: No space left on device\n"
    monkeypatch.setattr(files.os, "fsync", fsync)
    assert play("--resume", path)[0] == 0


@pytest.mark.parametrize("kind", [ValueError, OSError, RuntimeError])
def test_a_bug_keeps_its_traceback(play, tmp_path, kind):
    with pytest.raises(kind, match="a bug"):
        play("--out", tmp_path / "run", *TINY, stage=0, kind=kind("a bug"))


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-seeds 0", "seeds must be from 1 to 10000, got 0"),
        ("--num-seeds 2 --seed 4294967295", r"seed must be below 2\*\*32, got 4294967296"),
        ("--algorithm fd --batch-statistics public", "clients of fd do not score a public subset, .*"),
        ("--algorithm fd --subset-augmentation warp", "clients of fd use no public subset, so .* be empty, got warp"),
        ("--networks mlp mlp --weights 1 nan", "weights must be finite and not negative, got nan"),
        ("--networks mlp mlp --weights 1", "weights must be 2 numbers for 2 clients, got 1"),
        ("--data.num-public 8001", "the public dataset embedded/digits has 8000 examples, num_public wants 8001"),
        ("--data.num-test 2401", "the test part of embedded/letters has 2400 examples, num_test wants 2401"),
        (f"{NETWORKS} --data.examples-per-class 101", "3 clients with 101 examples per class need 303 of each, but .*"),
        ("--data.private-classes 0 6", r"embedded/letters has no examples of the private_classes \[6\], it has .*"),
        ("--data.public embedded/mnist", "the embedded data sets are embedded/digits and embedded/letters, got .*"),
        ("--networks cnn", "network 'cnn': the kind must be one of 2conv, 3conv, .*, got 'cnn'"),
        ("--networks mlp:n1=8,width=2", r"network 'mlp:n1=8,width=2': .* must be n1, n2, .*, got n1, width"),
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
    ("argv", "words"),
    [
        ("rum", "Available subcommands: run, sweep, report, list, data"),
        ("report", "The run directory"),
        ("run --num-roundz 3", "Perhaps you meant: --num-rounds"),
        ("run --data.pubic=x", "Perhaps you meant: --data.public"),
        ("run quickstart quickstart", "quickstart"),
        ("run --pooled yes", "yes"),
        ("run --num-rounds x", "Error parsing --num-rounds: invalid literal for int() with base 10: 'x'"),
        ("run --weights a b", "--weights"),
        ("run --subset first", "Expected one of ('random', 'stratified')"),
        ("run --digest.num-epochs 0", "digest: num_epochs must be an integer of at least 1, got 0"),
        ("run --digest.patience 1", "--digest.patience"),
        ("sweep --over num-rounds=1,x", "--num-rounds"),
    ],
)
def test_what_tyro_refuses(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in " ".join(err.replace("│", " ").replace("─", " ").split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("run quick", "unknown experiment 'quick', .*quickstart"),
        ("report /nowhere", "no run to report on: the run in /nowhere is not there, it has no summary.json"),
        ("report /nowhere --per-class", "accuracies by class are of one run: /nowhere has no confusion.jsonl"),
        ("run --distributed --out /nowhere/run", "the processes do not find each other: .*"),
        ("run --coordinator a:1", "processes started by hand need all of --coordinator, .*"),
    ],
)
def test_what_is_refused_in_one_line(argv, message, capsys):
    assert main(argv.split()) == 2
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
def test_an_output_directory_that_cannot_be(play, tmp_path, capsys, out, message):
    (tmp_path / "exists").mkdir()
    (tmp_path / "file").touch()
    assert play("--out", str(tmp_path / out) if out else "", *TINY)[0] == 2
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
def test_the_help_names_the_commands(capsys, argv):
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("run", "sweep", "report", "data"))
    assert main(["report", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: fedmd-jax report")


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_the_help_of_a_command_is_short_and_in_order(capsys, command):
    assert main([command, "letters-iid", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 80
    sections = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    wanted = ["experiment:", "algorithm:", "rounds:", "data:", "training:", "output:", "hardware:", "many processes:"]
    assert sections == (wanted if command == "run" else wanted[:-1])
    text = " ".join(" ".join(lines).split())
    assert all(name in text for name in EXPERIMENTS)
    assert "--num-rounds Collaboration rounds (20)" in text


def test_every_option_is_in_the_whole_help_and_in_the_short_one_only_options(capsys):
    assert main(["run", "--help-all"]) == 0
    whole = capsys.readouterr().out
    assert main(["run", "--help"]) == 0
    options = re.findall(r"--[a-z.-]+", capsys.readouterr().out)
    assert len(options) > 40
    for option in {*options, "--availability", "--public-training.patience"} - {"--help-all"}:
        assert option in whole


def test_shell_completion_knows_experiments_and_options(capsys):
    assert main(["--tyro-print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("letters-iid-released", "--num-rounds", "--num-seeds", "report"))


def test_python_m(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fedmd_jax", "report", str(tmp_path / "nothing")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fedmd-jax: error: no run to report on: ")
    assert done.stderr.count("\n") == 1


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
    save("emnist/letters", 3120, 26, (28, 28, 1))
    save("leaf/femnist", 620, 62, (28, 28, 1), writer=lambda labels: np.arange(len(labels)) // 155)
    save("cifar10", 240, 10, (32, 32, 3))
    save("cifar100", 4000, 100, (32, 32, 3), coarse_label=lambda labels: labels // 5)
    return folder


@pytest.mark.parametrize(
    "experiment",
    ["letters-iid", "letters-dirichlet", "letters-writers-released", "cifar-iid", "cifar-superclass-released"],
)
def test_every_experiment_runs_from_a_data_folder(experiment, paper_data, tmp_path):
    """With small networks: those of the presets take long to compile."""
    options = ["--smoke", "--data.data-dir", str(paper_data), "--networks", "mlp:n1=64", "mlp:n1=64"]
    assert main(["run", experiment, *options, "--out", str(tmp_path / "run")]) == 0
    summary = read(tmp_path / "run", files.SUMMARY)
    assert summary["experiment"] == experiment
    assert [key for key, value in summary["mean"].items() if value is None] == ["server_accuracy"]  # there is no server


def test_a_plot_that_cannot_be_drawn_costs_a_warning(play, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no font\nof this name")

    monkeypatch.setattr(train, "plot", figures.plot)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    warning = "fedmd-jax: warning: cannot draw {}: RuntimeError: no font of this name\n"
    commands = {"run": ["run"], "seeds": ["run", "--num-seeds", "1"], "sweep": ["sweep", "--over", "distance=mae"]}
    plots = {"run": [files.PLOT], "seeds": [files.PLOT] * 2, "sweep": [files.PLOT, files.PLOT, "sweep.png"]}
    for name, argv in commands.items():
        assert main([*argv, "--out", str(tmp_path / name), "--num-rounds", "1", *TINY]) == 0
        out, err = capsys.readouterr()
        assert err == "".join(map(warning.format, plots[name]))
        assert f"results in {tmp_path / name}\n" in out
        assert not list((tmp_path / name).rglob("*.png"))
        assert (tmp_path / name / ("sweep.csv" if name == "sweep" else files.SUMMARY)).exists()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err == warning.format(files.PLOT)


@pytest.mark.parametrize("num_seeds", [None, 2])
def test_metrics_are_logged_and_a_resumed_run_logs_what_follows(play, tmp_path, num_seeds):
    pytest.importorskip("tensorboardX")
    path, seeds = tmp_path / "run", [] if num_seeds is None else ["--num-seeds", num_seeds]
    options = [*TINY, "--num-rounds", 3, "--log", "tensorboard", *seeds]
    assert play("--out", path, *options, stage=2)[0] == 130
    assert play("--resume", path)[0] == 0
    places = [path] if num_seeds is None else [path / "seed0", path / "seed1"]
    for place in places:
        found, (_, metrics) = events.scalars(place / "tensorboard"), files.read_run(place)
        assert found["accuracy/client_1"] == {r["round"]: r["accuracy"] for r in metrics if r["client_id"] == 1}
        assert found["local_accuracy/mean"].keys() == {0, 1, 2, 3}
    assert len(list((places[0] / "tensorboard").iterdir())) == 2


def test_a_logger_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["run", "--out", str(tmp_path / "run"), "--smoke", "--log", "wandb"]) == 2
    check_complaint(capsys, r"WandB needs wandb: pip install 'fedmd_jax\[wandb\]'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["run --smoke letters-iid", "sweep --over distance=mae,kl --num-seeds 1 cifar-iid"])
def test_the_experiment_comes_first(command, tmp_path, capsys, monkeypatch):
    """Behind other options its settings would not be taken."""
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    assert "the experiment comes first: fedmd-jax" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
