"""Runs that are interrupted and resumed, through the command line; most of their programs train nothing."""

import gc
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from experiments import killing
from experiments.playing import Disturbed, Killed, playing, prepared
from orbax.checkpoint import v1 as ocp

from fedmd_jax.cli import main
from fedmd_jax.experiments import run_directory as files, train
from fedmd_jax.experiments.checkpoint import difference
from fedmd_jax.simulation import metrics

TINY = shlex.split(
    "--networks mlp mlp mlp:n1=2 --data.num-public 200 --data.num-test 60 --subset-size 50 "
    "--public-training.num-epochs 1 --private-training.num-epochs 1 --pooled-training.num-epochs 1 "
    "--revisit.num-epochs 1 --num-rounds 3"
)
STAGES = (
    "preparing the networks",
    "transfer learning: public data, network 1 of 2",
    "transfer learning: public data, network 2 of 2",
    "transfer learning: private data",
    "rounds",
    *(0, 1, 2, 3),
    "pooled upper bound",
)


@pytest.fixture
def play():
    with playing() as play_one:
        yield play_one


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run that is not interrupted."""
    path = tmp_path_factory.mktemp("resuming") / "whole"
    with playing() as play:
        assert play("--out", path, *TINY) == (0, [list(STAGES)])
    return path


def summary_of(path):
    summary = json.loads((path / files.SUMMARY).read_text())
    summary.pop("seconds")
    return summary


def check_same_run(path, whole):
    assert (path / files.METRICS).read_bytes() == (whole / files.METRICS).read_bytes()
    assert summary_of(path) == summary_of(whole)
    assert {file.name for file in path.iterdir()} == {file.name for file in whole.iterdir()}


@pytest.mark.parametrize(
    ("stage", "kind"), [*((stage, Killed) for stage in STAGES), *((stage, KeyboardInterrupt) for stage in STAGES[2::3])]
)
def test_a_run_is_resumed_from_every_stage(play, whole, tmp_path, stage, kind, capsys):
    path = tmp_path / "run"
    code, [first] = play("--out", path, *TINY, stage=stage, kind=kind)
    assert code == (130 if kind is KeyboardInterrupt else None)
    if code:
        assert capsys.readouterr().err.splitlines()[-1] == f"to resume: fedmd-jax run --resume {path}"
    assert first == list(STAGES[: STAGES.index(stage) + 1])
    code, [rest] = play("--resume", path)
    assert code == 0
    where = re.search(f"{path} is resumed (from the beginning|after round (\\d))", capsys.readouterr().out)
    if stage in STAGES[6:]:  # rounds that end while a checkpoint is written have none, but for the last
        assert int(where[2]) <= STAGES.index(stage) - 6
        assert stage != STAGES[-1] or where[2] == "3"
    else:
        assert where[1] == "from the beginning"
    assert stage not in STAGES[2:4] or STAGES[1] not in rest  # networks that were trained are not trained again
    assert stage != STAGES[3] or rest == list(STAGES[3:])
    check_same_run(path, whole)


def test_a_run_that_is_killed_again_and_again(play, whole, tmp_path):
    path = tmp_path / "run"
    play("--out", path, *TINY, stage=STAGES[0], kind=Killed)
    for stage in STAGES[1:]:
        play("--resume", path, stage=stage, kind=Killed)
    assert not files.is_finished(path)
    assert play("--resume", path)[0] == 0
    check_same_run(path, whole)


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        (["--no-local"], "pooled upper bound"),
        (["--no-local", "--no-pooled"], 1),
        (["--num-rounds", "0"], "pooled upper bound"),
        (["--checkpoint-every", "2"], 3),
        (["--checkpoint-every", "0"], 2),
    ],
)
def test_other_phases_and_intervals(play, tmp_path, options, stage):
    for path, disturbed in ((tmp_path / "whole", None), (tmp_path / "run", stage)):
        play("--out", path, *TINY, *options, stage=disturbed)
    assert not files.is_finished(tmp_path / "run")
    assert play("--resume", tmp_path / "run")[0] == 0
    check_same_run(tmp_path / "run", tmp_path / "whole")


def test_failures_in_transfer_learning_are_in_round_0_after_it_was_resumed(play, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "reverted_clients", lambda *_: {2, 1})
    for path, disturbed in ((tmp_path / "whole", None), (tmp_path / "run", STAGES[3])):
        play("--out", path, *TINY, stage=disturbed, kind=Killed)
    assert play("--resume", tmp_path / "run")[0] == 0
    check_same_run(tmp_path / "run", tmp_path / "whole")
    lines = (tmp_path / "whole" / files.METRICS).read_text().splitlines()
    assert "public training not finite, private training not finite" in lines[1]
    assert summary_of(tmp_path / "whole")["clients"][1]["faults"]["local only not finite"] == [1, 2, 3]


def test_half_written_things_are_cut_and_removed(play, whole, tmp_path):
    path = tmp_path / "run"
    play("--out", path, *TINY, stage="pooled upper bound", kind=Killed)
    with (path / files.METRICS).open("ab") as file:
        file.write(b'{"event": "round", "rou')
    (path / f".{files.SUMMARY}.123.tmp").write_text("{")
    (path / files.SUMMARY).write_text('{"interrupted": true}')
    (path / files.CHECKPOINTS / "rounds" / "4.orbax-checkpoint-tmp").mkdir()
    shutil.rmtree(path / files.CHECKPOINTS / "rounds" / "1", ignore_errors=True)
    (path / files.CHECKPOINTS / "rounds" / "1" / "state").mkdir(parents=True)  # killed while it was deleted
    assert play("--resume", path)[0] == 0
    check_same_run(path, whole)
    assert not (path / files.CHECKPOINTS / "rounds" / "4.orbax-checkpoint-tmp").exists()


def test_a_finished_run_keeps_its_last_rounds_and_the_best(whole, play, capsys):
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    assert [entry.name for entry in (whole / files.CHECKPOINTS).iterdir()] == ["rounds"]
    assert {"3"} < {entry.name for entry in (whole / files.CHECKPOINTS / "rounds").iterdir()}
    assert play("--resume", whole) == (0, [])
    assert capsys.readouterr().out.splitlines()[-1] == f"nothing to do: the run in {whole} is finished"
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*")} == before


SEEDS = [*TINY, "--num-seeds", "3", "--seed", "4"]


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize(
    ("stage", "kind", "batch"), [(STAGES[2], Killed, 1), (2, KeyboardInterrupt, 2), (2, Killed, 1)]
)
def test_seeds_are_resumed(play, tmp_path, at_once, stage, kind, batch):
    options = [*SEEDS, "--vmap-seeds", at_once]
    assert play("--out", tmp_path / "whole", *options) == (0, [list(STAGES)] * (3 if at_once == 1 else 2))
    path = tmp_path / "run"
    assert play("--out", path, *options, stage=stage, kind=kind, batch=batch)[0] == (None if kind is Killed else 130)
    assert not (path / "seed6" / files.SUMMARY).exists() or kind is KeyboardInterrupt
    assert play("--resume", path)[0] == 0
    for seed in (4, 5, 6):
        check_same_run(path / f"seed{seed}", tmp_path / "whole" / f"seed{seed}")
    assert summary_of(path) == summary_of(tmp_path / "whole")
    assert play("--resume", path) == (0, [])


def test_seeds_at_once_end_as_one_after_the_other(play, tmp_path):
    for at_once in (1, 2):
        assert play("--out", tmp_path / str(at_once), *SEEDS, "--vmap-seeds", at_once)[0] == 0
    for seed in (4, 5, 6):
        one, two = (tmp_path / at_once / f"seed{seed}" for at_once in "12")
        assert (one / files.METRICS).read_bytes() == (two / files.METRICS).read_bytes()
        assert summary_of(one) == summary_of(two)


def complaint(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err.removeprefix("fedmd-jax: error: ").rstrip()


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    path = tmp_path_factory.mktemp("resuming") / "run"
    with playing() as play:
        play("--out", path, *TINY, stage="pooled upper bound", kind=Killed)
    return path


@pytest.fixture
def interrupted(killed, tmp_path):
    """A directory of a run that was killed in the last phase."""
    return pathlib.Path(shutil.copytree(killed, tmp_path / "run"))


def edited(change):
    def edit(path, monkeypatch):
        content = json.loads((path / files.CONFIG).read_text())
        change(content)
        (path / files.CONFIG).write_text(json.dumps(content))

    return edit


def set_setting(name, value):
    return edited(lambda config: config["settings"].update({name: value}))


def elsewhere(path, monkeypatch):
    origin = files.origin()
    monkeypatch.setattr(
        "fedmd_jax.experiments.setup.origin", lambda: {**origin, "versions": {**origin["versions"], "jax": "9.9"}}
    )


def other_data(path, monkeypatch):
    def changed(experiments, batched):
        setup = prepared(tuple(experiments), batched)
        return setup._replace(fingerprints=(("other", setup.fingerprints[0][1]),))

    monkeypatch.setattr(train, "prepare", changed)


def largest(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def truncate(path, monkeypatch):
    file = largest(path / "checkpoints" / "rounds" / "3")
    file.write_bytes(file.read_bytes()[:-1])


ANOTHER = r"the checkpoint .*/checkpoints/rounds is of another run: "
REFUSED = {
    "another setting": (set_setting("head_penalty", 0.5), ANOTHER + "settings.head_penalty is 0.001 there, 0.5 here"),
    "another grouping": (set_setting("networks", ["mlp", "mlp:n1=2", "mlp"]), ANOTHER + "settings.networks is .*"),
    "another seed": (set_setting("seed", 7), ANOTHER + r"seeds is \[0\] there, \[7\] here"),
    "other data": (other_data, ANOTHER + r"data is \['.*'\] there, \['other'\] here"),
    "other versions": (elsewhere, ANOTHER + "environment.versions.jax is '.*' there, '9.9' here; --allow-env.*"),
    "a truncated checkpoint": (truncate, "the checkpoint .*rounds/3 is damaged .*; remove it to .*"),
    "a missing file": (lambda path, _: largest(path / "checkpoints" / "rounds" / "3").unlink(),
        "the checkpoint .*rounds/3 is damaged.*; remove it to .*"),
    "lines that are gone": (lambda path, _: (path / files.METRICS).write_text("{}\n"),
        "cannot read .*metrics.jsonl: .*it has 3 bytes, wanted at least [0-9]+.*"),
    "lines that are damaged": (lambda path, _: (path / files.METRICS).write_text("x" * 99999),
        "cannot read .*metrics.jsonl: .*"),
    "no metrics": (lambda path, _: (path / files.METRICS).unlink(),
        "cannot read .*metrics.jsonl: No such file or directory"),
    "an unknown setting": (set_setting("luck", 1), "cannot read the settings of .*: settings.luck is unknown"),
    "a missing setting": (edited(lambda config: config["settings"].pop("networks")),
        "cannot read the settings of .*: settings.networks is missing"),
    "a setting of another type": (set_setting("local", "yes"),
        "cannot read the settings of .*: settings.local must be of type bool, got 'yes'"),
    "a setting out of range": (set_setting("num_rounds", -1),
        "cannot read the settings of .*: num_rounds must be an integer of at least 0, got -1"),
    "a damaged config": (lambda path, _: (path / files.CONFIG).write_text("{"), "cannot read .*config.json: .*"),
    "no config": (lambda path, _: (path / files.CONFIG).unlink(), "no run to resume: .*run has no config.json"),
    "no directory": (lambda path, _: shutil.rmtree(path), "no run to resume: .*run has no config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(play, interrupted, monkeypatch, capsys, name):
    spoil, message = REFUSED[name]
    spoil(interrupted, monkeypatch)
    before = {file: file.read_bytes() for file in interrupted.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert play("--resume", interrupted) == (2, [])
    line = complaint(capsys)
    assert re.fullmatch(message, line), line
    assert {file: file.read_bytes() for file in interrupted.rglob("*") if file.is_file()} == before


def test_in_another_environment_a_run_is_resumed_if_that_is_allowed(play, whole, interrupted, monkeypatch, capsys):
    elsewhere(interrupted, monkeypatch)
    assert play("--resume", interrupted, "--allow-environment-change")[0] == 0
    assert (interrupted / files.METRICS).read_bytes() == (whole / files.METRICS).read_bytes()
    [place] = summary_of(interrupted)["continued"]
    assert (place["after_round"], place["versions"]["jax"]) == (3, "9.9")
    assert "jax 9.9: the same but for rounding" in capsys.readouterr().out
    assert "continued" not in summary_of(whole)


def test_a_damaged_checkpoint_can_be_removed(play, whole, interrupted):
    shutil.rmtree(interrupted / files.CHECKPOINTS / "rounds" / "3")
    assert play("--resume", interrupted)[0] == 0
    check_same_run(interrupted, whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves tasks where it fails
def test_fifty_flipped_bits_are_refused_or_harmless(play, whole, interrupted, tmp_path, capsys):
    rng, codes = random.Random(0), []
    folder = interrupted / files.CHECKPOINTS / "rounds" / "3"
    targets = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
    for _ in range(50):
        path = tmp_path / "flipped"
        shutil.copytree(interrupted, path)
        file = path / rng.choice(targets).relative_to(interrupted)
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        capsys.readouterr()
        codes.append(play("--resume", path)[0])
        if codes[-1] == 0:
            check_same_run(path, whole)
        else:
            assert codes[-1] == 2
            assert complaint(capsys).startswith("the checkpoint ")
        shutil.rmtree(path)
    gc.collect()
    assert codes.count(2) >= 10, codes


@pytest.mark.parametrize("argv", ["--resume a --num-rounds 3", "letters-iid --resume a"])
def test_options_beside_resume_are_refused(argv, capsys):
    assert main(["run", *argv.split()]) == 2
    assert complaint(capsys).startswith("run --resume takes all settings from the directory, got ")


def test_two_processes_do_not_write_one_directory(play, interrupted, capsys):
    with files.locked(interrupted):
        truncate(interrupted, None)  # what another process is about to write is not complained about
        capsys.readouterr()
        assert play("--resume", interrupted)[0] == 2
        assert complaint(capsys) == f"another process is running in {interrupted}"
    shutil.rmtree(interrupted / files.CHECKPOINTS / "rounds" / "3")
    assert play("--resume", interrupted)[0] == 0


def test_a_full_disk_is_one_line_and_the_run_is_resumed(play, whole, tmp_path, monkeypatch, capsys):
    save, saved = ocp.training.Checkpointer.save_async, []

    def full(self, *args, **kwargs):
        saved.append(args)
        if len(saved) > 1:
            raise ValueError(
                'OUT_OF_RANGE: Error writing "x": Failed to write: No space left on device [os_error_code=1]'
            )
        return save(self, *args, **kwargs)

    monkeypatch.setattr(ocp.training.Checkpointer, "save_async", full)
    path = tmp_path / "run"
    assert play("--out", path, *TINY)[0] == 1
    line = complaint(capsys)
    assert re.fullmatch("cannot write the checkpoint .*: No space left on device", line), line
    monkeypatch.undo()
    assert play("--resume", path)[0] == 0
    check_same_run(path, whole)


def test_the_first_difference_is_named():
    assert difference({"a": [1]}, {"a": [1]}) is None
    assert difference({"a": {"b": 1}}, {"a": {}}) == "a.b is known here only"
    assert difference({}, {"c": 1}) == "c is known there only"
    assert difference({"a": 1}, None) == "it is None there, {'a': 1} here"


def test_a_real_run_is_resumed_to_the_bit(tmp_path, monkeypatch):
    options = [*TINY, "--networks", *("mlp:n1=4,dropout=0.5",) * 3, "mlp:n1=3", "--clients-per-chunk", "2"]
    assert main(["run", "--out", str(tmp_path / "whole"), *options]) == 0
    path = tmp_path / "run"
    for stage in ("transfer learning: public data, network 2 of 2", 1, "pooled upper bound"):
        argv = ["--resume", str(path)] if path.exists() else ["--out", str(path), *options]
        with monkeypatch.context() as disturbed:
            disturbed.setattr(train, "make_progress", lambda *_, stage=stage: Disturbed(stage, KeyboardInterrupt))
            assert main(["run", *argv]) == 130
    assert main(["run", "--resume", str(path)]) == 0
    check_same_run(path, tmp_path / "whole")


def test_twenty_random_kills(tmp_path):
    """In another process, since this one has used JAX and cannot be forked."""
    tests = pathlib.Path(killing.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, killing.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
