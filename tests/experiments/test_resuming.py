import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from experiments import killing
from experiments.counting import counting
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from fedmd_jax import checkpoint, federation
from fedmd_jax.checkpoint import Checkpoints
from fedmd_jax.cli import main
from fedmd_jax.experiments import EXPERIMENTS, kept, procedure, recorder, resuming, session
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.kept import OnDisk, difference
from fedmd_jax.experiments.prepared import prepare
from fedmd_jax.experiments.progress import Lines
from fedmd_jax.experiments.resuming import settings_from
from fedmd_jax.experiments.settings import Experiment

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
    "local only",
    "pooled upper bound",
)


# Where it goes on that was interrupted in one of them, or later.
WHERE = (
    *("from the beginning",) * 2,
    *("within transfer learning",) * 2,
    *("after transfer learning",) * 3,
    "after round ",
)


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


class Disturbed(Lines):
    """Progress that raises where it is told of a stage."""

    def __init__(self, num_rounds, stage, kind):
        super().__init__(num_rounds)
        self._stage, self._kind, self.told = stage, kind, []

    def phase(self, title):
        self._hear(title)

    def round(self, metrics):
        self._hear(metrics.round)

    def _hear(self, stage):
        self.told.append(stage)
        if stage == self._stage:
            raise self._kind


@functools.cache
def prepared(experiment):
    return counting(prepare(experiment))


@pytest.fixture(scope="module")
def play():
    """Runs the command line with programs that train nothing, up to a stage; what was told, and the exit code."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(session, "prepare", prepared)
        monkeypatch.setattr(recorder, "plot", lambda summary, metrics: repr(metrics).encode())  # takes its time
        yield make_play(monkeypatch)


def make_play(monkeypatch):
    def play_one(*argv, stage=None, kind=KeyboardInterrupt, run=1):
        listening = []

        def make(num_rounds):
            listening.append(Disturbed(num_rounds, stage if len(listening) + 1 == run else None, kind))
            return listening[-1]

        monkeypatch.setattr(session, "make_progress", make)
        code = None
        with contextlib.suppress(Killed):
            code = main(["run", *map(str, argv)])
        return code, [each.told for each in listening]

    return play_one


@pytest.fixture(scope="module")
def whole(play, tmp_path_factory):
    """The directory of a run that nobody interrupts."""
    path = tmp_path_factory.mktemp("resuming") / "whole"
    assert play("--out", path, *TINY) == (0, [list(STAGES)])
    return path


def summary_of(path):
    summary = json.loads((path / files.SUMMARY).read_text())
    summary.pop("seconds")
    return summary


def check_same_run(path, whole):
    assert (path / files.METRICS).read_bytes() == (whole / files.METRICS).read_bytes()
    assert (path / files.PLOT).read_bytes() == (whole / files.PLOT).read_bytes()
    assert summary_of(path) == summary_of(whole)
    expected = {*(file.name for file in whole.iterdir())}
    assert {file.name for file in path.iterdir()} == expected


@pytest.mark.parametrize(
    ("stage", "kind"), [*((stage, Killed) for stage in STAGES), *((stage, KeyboardInterrupt) for stage in STAGES[2::3])]
)
def test_a_run_goes_on_from_every_stage(play, whole, tmp_path, stage, kind, capsys):
    path = tmp_path / "run"
    code, [first] = play("--out", path, *TINY, stage=stage, kind=kind)
    assert code == (130 if kind is KeyboardInterrupt else None)
    if code:
        assert capsys.readouterr().err.splitlines()[-1] == f"to go on: fedmd-jax run --resume {path}"
    assert first == list(STAGES[: STAGES.index(stage) + 1])
    code, [rest] = play("--resume", path)
    assert code == 0
    assert f"{path} goes on {WHERE[min(STAGES.index(stage), len(WHERE) - 1)]}" in capsys.readouterr().out
    rounds = STAGES.index("rounds")
    assert rest == list(STAGES[-len(rest) :]) or stage in STAGES[rounds + 1 : rounds + 5]  # the phase is told again
    assert len(rest) <= len(STAGES) - max(0, STAGES.index(stage) - rounds - 1)  # what is on disk is not done again
    if stage in STAGES[2:rounds]:
        assert rest[0] == stage  # also of the public half, of which every network is kept
    check_same_run(path, whole)


def test_a_run_of_before_networks_were_kept_one_by_one_goes_on(play, whole, tmp_path):
    path = tmp_path / "run"
    play("--out", path, *TINY, stage="transfer learning: private data", kind=Killed)
    pretrained = path / files.CHECKPOINTS / "pretrained"
    (pretrained / "2").rename(pretrained / "0")
    shutil.rmtree(pretrained / "1")
    assert play("--resume", path)[1][0][0] == "transfer learning: private data"
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
        (["--no-pooled"], "local only"),
        (["--no-local", "--no-pooled"], 1),
        (["--num-rounds", "0"], "pooled upper bound"),
        (["--checkpoint-every", "2"], 3),
    ],
)
def test_other_phases_and_intervals(play, tmp_path, options, stage):
    for path, disturbed in ((tmp_path / "whole", None), (tmp_path / "run", stage)):
        play("--out", path, *TINY, *options, stage=disturbed)
    assert not files.is_finished(tmp_path / "run")
    assert play("--resume", tmp_path / "run")[0] == 0
    check_same_run(tmp_path / "run", tmp_path / "whole")


def test_without_checkpoints_a_run_begins_again(play, whole, tmp_path, capsys):
    path = tmp_path / "run"
    play("--out", path, *TINY, "--checkpoint-every", "0", stage=2)
    assert not (path / files.CHECKPOINTS).exists()
    assert play("--resume", path) == (0, [list(STAGES)])
    assert f"{path} goes on from the beginning" in capsys.readouterr().out
    assert (path / files.METRICS).read_bytes() == (whole / files.METRICS).read_bytes()


@pytest.mark.parametrize("stage", ["transfer learning: private data", "rounds", 0])
def test_what_failed_in_transfer_learning_is_told_after_it_was_resumed(play, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(procedure, "undone_clients", lambda *_: {2, 1})
    for path, disturbed in ((tmp_path / "whole", None), (tmp_path / "run", stage)):
        play("--out", path, *TINY, stage=disturbed, kind=Killed)
    assert play("--resume", tmp_path / "run")[0] == 0
    check_same_run(tmp_path / "run", tmp_path / "whole")
    assert (
        b"public training not finite, private training not finite" in (tmp_path / "whole" / files.METRICS).read_bytes()
    )


def test_half_written_things_are_cut_and_removed(play, whole, tmp_path):
    path = tmp_path / "run"
    play("--out", path, *TINY, stage="local only", kind=Killed)
    with (path / files.METRICS).open("ab") as file:
        file.write(b'{"event": "round", "rou')
    (path / f".{files.SUMMARY}.123.tmp").write_text("{")
    (path / files.SUMMARY).write_text('{"interrupted": true}')
    (path / files.CHECKPOINTS / "rounds" / ".4.123.tmp").mkdir()
    (path / files.CHECKPOINTS / "local").mkdir()
    (path / files.CHECKPOINTS / "local" / ".1.123.tmp.orbax-checkpoint-tmp").mkdir()
    assert play("--resume", path)[0] == 0
    check_same_run(path, whole)


def test_a_finished_run_keeps_its_last_rounds_and_the_best(whole, play, capsys):
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    rounds = Checkpoints(whole / files.CHECKPOINTS / "rounds")
    assert rounds.latest == 3
    assert [entry.name for entry in (whole / files.CHECKPOINTS).iterdir()] == ["rounds"]
    assert play("--resume", whole) == (0, [])
    assert capsys.readouterr().out.splitlines()[-1] == f"nothing to do: the run in {whole} is finished"
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*")} == before


def test_seeds_go_on(play, tmp_path, capsys):
    options = [*TINY, "--seeds", "3", "--seed", "4"]
    play("--out", tmp_path / "whole", *options)
    assert play("--out", tmp_path / "run", *options, stage=2, run=2)[0] == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"to go on: fedmd-jax run --resume {tmp_path / 'run'}"
    assert [file.name for file in sorted((tmp_path / "run").glob("seed*"))] == ["seed4", "seed5"]
    code, told = play("--resume", tmp_path / "run")
    assert (code, len(told)) == (0, 2)  # the first seed is not run again
    for seed in (4, 5, 6):
        check_same_run(tmp_path / "run" / f"seed{seed}", tmp_path / "whole" / f"seed{seed}")
    assert summary_of(tmp_path / "run") == summary_of(tmp_path / "whole")
    assert play("--resume", tmp_path / "run") == (0, [])
    assert play("--seeds=4", "--resume", tmp_path / "run")[0] == 0  # one more
    assert summary_of(tmp_path / "run")["seeds"] == [4, 5, 6, 7]


SIDE_BY_SIDE = ["--seeds", "3", "--seed", "4", "--seeds-at-once", "2"]


@pytest.fixture(scope="module")
def whole_seeds(play, tmp_path_factory):
    path = tmp_path_factory.mktemp("resuming") / "whole"
    assert play("--out", path, *TINY, *SIDE_BY_SIDE[:-2])[0] == 0
    return path


def check_same_seeds(path, whole):
    for seed in (4, 5, 6):
        check_same_run(path / f"seed{seed}", whole / f"seed{seed}")
    assert summary_of(path) == summary_of(whole)


def test_seeds_side_by_side_end_as_one_after_the_other(play, whole_seeds, tmp_path, capsys):
    code, told = play("--out", tmp_path / "run", *TINY, *SIDE_BY_SIDE)
    assert (code, told) == (0, [list(STAGES)] * 2)  # two at once, and one
    assert {"seeds 4, 5 side by side", "seed 6"} <= set(capsys.readouterr().out.splitlines())
    check_same_seeds(tmp_path / "run", whole_seeds)


@pytest.mark.parametrize(("stage", "kind"), [*((stage, Killed) for stage in STAGES[2::3]), (2, KeyboardInterrupt)])
def test_seeds_side_by_side_go_on(play, whole_seeds, tmp_path, stage, kind, capsys):
    path = tmp_path / "run"
    assert play("--out", path, *TINY, *SIDE_BY_SIDE, stage=stage, kind=kind)[0] == (None if kind is Killed else 130)
    assert [file.name for file in sorted(path.glob("seed*"))] == ["seed4", "seed5"]
    for phase in ("rounds", "pretrained"):  # the two are not equally far
        shutil.rmtree(path / "seed5" / files.CHECKPOINTS / phase, ignore_errors=True)
    assert play("--resume", path)[0] == 0
    check_same_seeds(path, whole_seeds)


@pytest.mark.parametrize("num_seeds", [1, 4])
def test_seeds_side_by_side_go_on_with_fewer_or_more(play, whole_seeds, tmp_path, num_seeds):
    """As many at once as before, whatever is wanted now, so that those that go on find their own checkpoints."""
    path = tmp_path / "run"
    play("--out", path, *TINY, *SIDE_BY_SIDE, stage=2)
    assert play("--resume", path, "--seeds", num_seeds)[0] == 0
    assert summary_of(path)["seeds"] == [4, 5, 6, 7][:num_seeds]
    assert play("--resume", path)[0] == 0
    for seed in (4, 5, 6):
        check_same_run(path / f"seed{seed}", whole_seeds / f"seed{seed}")


def test_where_one_of_the_seeds_cannot_go_on_nothing_is_done_to_the_others(play, tmp_path, capsys):
    path = tmp_path / "run"
    play("--out", path, *TINY, *SIDE_BY_SIDE, stage=2)
    truncated("transferred")(path / "seed5", None)
    before = {file: file.read_bytes() for file in (path / "seed4").iterdir() if file.is_file()}
    capsys.readouterr()
    assert play("--resume", path)[0] == 2
    assert re.fullmatch("the checkpoint .*seed5/checkpoints/transferred/0 is damaged: .*", complaint(capsys))
    assert {file: file.read_bytes() for file in (path / "seed4").iterdir() if file.is_file()} == before


def test_where_the_data_of_one_seed_cannot_be_read_none_begins(play, tmp_path, monkeypatch):
    first = session.prepare

    def failing(experiment):
        if experiment.seed == 5:
            raise ValueError("no such data")
        return first(experiment)

    monkeypatch.setattr(session, "prepare", failing)
    assert play("--out", tmp_path / "run", *TINY, *SIDE_BY_SIDE)[0] == 2
    assert not (tmp_path / "run").exists()


def test_seeds_that_ran_side_by_side_do_not_go_on_otherwise(play, tmp_path, capsys):
    path = tmp_path / "run"
    play("--out", path, *TINY, *SIDE_BY_SIDE, stage=2)
    for seed in (4, 5):
        set_setting("seeds_at_once", None)(path / f"seed{seed}", None)
    capsys.readouterr()
    assert play("--resume", path)[0] == 2
    assert re.fullmatch(
        "the checkpoint .*/2 is of another run: seeds_at_once is 2 there, 1 here; --elsewhere .*", complaint(capsys)
    )
    assert play("--resume", path, "--elsewhere")[0] == 0


def complaint(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err.removeprefix("fedmd-jax: error: ").rstrip()


@pytest.fixture(scope="module")
def killed(play, tmp_path_factory):
    path = tmp_path_factory.mktemp("resuming") / "run"
    play("--out", path, *TINY, stage="pooled upper bound", kind=Killed)
    return path


@pytest.fixture
def interrupted(killed, tmp_path):
    """A directory of a run that was killed in the last phase."""
    return pathlib.Path(shutil.copytree(killed, tmp_path / "run"))


def edited(name, change):
    def edit(path, monkeypatch):
        content = json.loads((path / name).read_text())
        change(content)
        (path / name).write_text(json.dumps(content))

    return edit


def set_setting(name, value):
    return edited(files.CONFIG, lambda config: config["settings"].update({name: value}))


def elsewhere(monkeypatch, jax_version):
    origin = files.origin()
    monkeypatch.setattr(files, "origin", lambda: {**origin, "versions": {**origin["versions"], "jax": jax_version}})


def of_another_origin(path, monkeypatch):
    elsewhere(monkeypatch, "9.9")


def of_another_format(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)


def other_data(path, monkeypatch):
    rng = np.random.default_rng(0)
    first = session.prepare

    def changed(experiment):
        prepared = first(experiment)
        test = prepared.datasets.test
        noise = rng.normal(size=test.inputs.shape).astype(np.float32)
        return prepared._replace(datasets=prepared.datasets._replace(test=test._replace(inputs=noise)))

    monkeypatch.setattr(session, "prepare", changed)


def largest(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def truncated(phase):
    def truncate(path, monkeypatch):
        for round_ in (path / files.CHECKPOINTS / phase).iterdir():
            file = largest(round_)
            file.write_bytes(file.read_bytes()[:-1])

    return truncate


REFUSED = {
    "a setting is another": (set_setting("head_penalty", 0.5),
        "the checkpoint .*/checkpoints/pretrained/2 is of another run: settings.head_penalty is 0.001 there, 0.5 here"),
    "the grouping is another": (set_setting("networks", ["mlp", "mlp:n1=2", "mlp"]), ".* settings.networks is .*"),
    "other data": (other_data, "the checkpoint .*pretrained/2 is of another run: data is '.*' there, '.*' here"),
    "other versions": (of_another_origin,
        "cannot go on in .*run with the same bits: versions.jax is '.*' there, '9.9' here; --elsewhere .*"),
    "another device": (edited(files.CONFIG, lambda config: config["device"].update(count=99)),
        "cannot go on in .*run with the same bits: device.count is 99 there, [0-9]+ here; --elsewhere .*"),
    "another format": (of_another_format,
        "the checkpoint .*pretrained/2 is of format 1, wanted 2; remove it to do it again"),
    "a truncated checkpoint": (truncated("transferred"),
        "the checkpoint .*transferred/0 is damaged: .*; remove it to do it again"),
    "a missing file": (lambda path, _: largest(path / "checkpoints" / "rounds" / "3").unlink(),
        "the checkpoint .*rounds/3 is damaged: .*; remove it to .*"),
    "lines that are gone": (lambda path, _: (path / files.METRICS).write_text("{}\n"),
        "cannot go on in .*run: metrics.jsonl has 3 bytes, wanted at least [0-9]+"),
    "lines that are damaged": (lambda path, _: (path / files.METRICS).write_text("x" * 99999),
        "cannot read .*metrics.jsonl: .*"),
    "no metrics": (lambda path, _: (path / files.METRICS).unlink(),
        "cannot read .*metrics.jsonl: No such file or directory"),
    "an unknown setting": (set_setting("luck", 1), "cannot read .*config.json: settings.luck is unknown"),
    "a missing setting": (edited(files.CONFIG, lambda config: config["settings"].pop("seed")),
        "cannot read .*config.json: settings.seed is missing"),
    "a setting of another type": (set_setting("local", "yes"),
        "cannot read .*config.json: settings.local must be of type bool, got 'yes'"),
    "a setting out of range": (set_setting("num_rounds", -1),
        "cannot read .*config.json: num_rounds must be an integer of at least 0, got -1"),
    "a damaged config": (lambda path, _: (path / files.CONFIG).write_text("{"), "cannot read .*config.json: .*"),
    "no config": (lambda path, _: (path / files.CONFIG).unlink(), "no run to go on with: .*run has no config.json"),
    "no directory": (lambda path, _: shutil.rmtree(path), "no run to go on with: .*run is not a directory"),
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


def test_elsewhere_a_run_goes_on_if_it_is_told_so(play, whole, interrupted, monkeypatch):
    of_another_origin(interrupted, monkeypatch)
    assert play("--resume", interrupted, "--elsewhere")[0] == 0
    assert (interrupted / files.METRICS).read_bytes() == (whole / files.METRICS).read_bytes()


def test_a_run_that_went_on_elsewhere_says_so(play, whole, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run"
    play("--out", path, *TINY, stage=1, kind=Killed)  # told of round 1 before it is kept
    play("--resume", path, "--elsewhere", stage=2, kind=Killed)  # the same place
    for version, stage in (("9.8", 3), ("9.9", "rounds"), ("9.9", "pooled upper bound"), ("9.9", None)):
        elsewhere(monkeypatch, version)
        capsys.readouterr()
        play("--resume", path, "--elsewhere", stage=stage, kind=Killed)
    continued = summary_of(path)["continued"]
    # Where "9.9" was killed first it had kept nothing, and the last time it was where it was before.
    assert [(place["after_round"], place["versions"]["jax"]) for place in continued] == [(1, "9.8"), (2, "9.9")]
    assert set(continued[0]) == {"after_round", *kept.LOCAL_PARTS}
    assert continued[0]["device"] == files.origin()["device"]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("went on after round ")]
    assert [line.split(":")[0][-3:] for line in told] == ["9.8", "9.9"]
    main(["report", str(path)])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("went on")] == told
    assert (path / files.METRICS).read_bytes() == (whole / files.METRICS).read_bytes()
    assert "continued" not in summary_of(whole)


@pytest.mark.parametrize("stage", ["local only", "pooled upper bound"])
def test_what_failed_in_the_control_is_told_after_it_was_resumed(play, tmp_path, monkeypatch, capsys, stage):
    """Killed in the last round of the control, and behind it."""
    left = []

    def undone(*_):
        if left and left.pop() == "killed":
            raise Killed
        return {2}

    monkeypatch.setattr(federation, "undone_clients", undone)
    play("--out", tmp_path / "whole", *TINY)
    left += ["killed", "first", "second"] if stage == "local only" else []
    play("--out", tmp_path / "run", *TINY, stage=None if stage == "local only" else stage, kind=Killed)
    assert not left
    assert any((tmp_path / "run" / files.CHECKPOINTS / "local").glob("[1-3]"))
    assert play("--resume", tmp_path / "run")[0] == 0
    check_same_run(tmp_path / "run", tmp_path / "whole")
    faults = [client["faults"] for client in summary_of(tmp_path / "whole")["clients"]]
    assert faults == [{}, {}, {"local only not finite": [1, 2, 3]}]
    assert "client 2 (mlp:n1=2): local only not finite in rounds 1, 2, 3" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a setting is another", "other data", "another format", "a truncated checkpoint"])
def test_elsewhere_is_no_excuse_for_another_run(play, interrupted, monkeypatch, capsys, name):
    spoil, message = REFUSED[name]
    spoil(interrupted, monkeypatch)
    assert play("--resume", interrupted, "--elsewhere") == (2, [])
    assert re.fullmatch(message, complaint(capsys))


def test_elsewhere_there_may_be_fewer_devices_and_other_folders(play, tmp_path, interrupted):
    edited(
        files.CONFIG,
        lambda config: config["settings"].update(
            devices=99, pretrained_dir="/nowhere", data={**config["settings"]["data"], "data_dir": "/nowhere"}
        ),
    )(interrupted, None)
    found = resuming.find(["--resume", str(interrupted), "--elsewhere"]).experiment
    assert (found.devices, found.pretrained_dir, found.data.data_dir) == ("all", None, None)
    assert resuming.find(["--resume", str(interrupted)]).experiment.devices == 99


def test_a_damaged_checkpoint_can_be_removed(play, whole, interrupted):
    for phase in ("rounds", "transferred", "local"):
        folder = interrupted / files.CHECKPOINTS / phase
        shutil.rmtree(folder / str(Checkpoints(folder).latest))
    assert play("--resume", interrupted)[0] == 0
    check_same_run(interrupted, whole)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--resume", "run --resume DIR .*wants the directory .*; got --resume"),
        ("--resume a b", "run --resume DIR .*wants .*; got --resume a b"),
        (
            "--resume a --num-rounds 3",
            "run --resume DIR .*wants .*takes all settings from there; got --resume a --num-rou.*",
        ),
        ("quickstart --resume a", "run --resume DIR .*wants .*; got quickstart --resume a"),
        ("--resume a --resume b", "run --resume DIR .*wants .*"),
        ("--resume a --seeds x", "seeds must be an integer of at least 1, got x"),
        ("--resume . --seeds 2", "--seeds is of a directory of several seeds, but . has none"),
        ("--resume /nowhere", "no run to go on with: /nowhere is not a directory"),
    ],
)
def test_options_of_resume(argv, message, capsys):
    assert main(["run", *argv.split()]) == 2
    line = complaint(capsys)
    assert re.fullmatch(message, line), line


def test_two_processes_do_not_write_into_one_directory(play, interrupted, capsys):
    lock = files.lock(interrupted)
    capsys.readouterr()
    assert play("--resume", interrupted)[0] == 2
    assert complaint(capsys) == f"another process is running in {interrupted}"
    lock.close()
    assert play("--resume", interrupted)[0] == 0


def test_nothing_is_read_before_nobody_else_writes(play, interrupted, capsys):
    """What another process is about to write is neither damaged nor of another run."""
    lock = files.lock(interrupted)
    truncated("rounds")(interrupted, None)
    capsys.readouterr()
    assert play("--resume", interrupted)[0] == 2
    assert complaint(capsys) == f"another process is running in {interrupted}"
    lock.close()


def test_nobody_comes_between_the_check_and_the_run(play, interrupted, monkeypatch, capsys):
    check, complaints = OnDisk.check, []

    def checked(*args, **kwargs):
        monkeypatch.setattr(OnDisk, "check", check)
        capsys.readouterr()
        assert play("--resume", interrupted)[0] == 2  # a second process
        complaints.append(complaint(capsys))
        return check(*args, **kwargs)

    monkeypatch.setattr(OnDisk, "check", checked)
    assert play("--resume", interrupted)[0] == 0
    assert complaints == [f"another process is running in {interrupted}"]


def test_a_run_that_another_process_has_finished_meanwhile(play, whole, monkeypatch, capsys):
    monkeypatch.setattr("fedmd_jax.cli.files.is_finished", lambda path: bool(finished.pop()) if finished else True)
    finished = [False]
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert play("--resume", whole)[0] == 2
    assert complaint(capsys) == f"nothing to do: another process has finished the run in {whole}"
    assert {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()} == before


def test_whoever_is_refused_leaves_no_lock(play, interrupted, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(checkpoint, "FORMAT", 2)
        assert play("--resume", interrupted)[0] == 2
    files.lock(interrupted).close()
    assert play("--resume", interrupted)[0] == 0


def test_without_fcntl_there_is_no_lock(tmp_path, monkeypatch):
    (tmp_path / files.CONFIG).touch()
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with contextlib.closing(files.lock(tmp_path)), contextlib.closing(files.lock(tmp_path)):
        pass


def test_a_lock_is_on_a_file_that_can_be_written(tmp_path, monkeypatch):
    """File systems on a network lock no other for one process alone."""
    opened, real = [], os.open
    (tmp_path / files.CONFIG).touch()
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(flags) or real(path, flags))
    files.lock(tmp_path).close()
    assert [flags & os.O_ACCMODE for flags in opened] == [os.O_RDWR]
    monkeypatch.undo()
    with pytest.raises(files.RunDirectoryError, match=r"^cannot open .*config\.json: No such file or directory$"):
        files.lock(tmp_path / "nowhere")


def test_a_full_disk_is_one_line_and_the_run_goes_on(play, whole, tmp_path, monkeypatch, capsys):
    save, saved = ocp.save, []

    def full(path, *args, **kwargs):
        saved.append(path)
        if len(saved) > 3:
            raise ValueError(
                'OUT_OF_RANGE: Error writing "x": Failed to write: No space left on device [os_error_code=1]'
            )
        save(path, *args, **kwargs)

    monkeypatch.setattr(ocp, "save", full)
    path = tmp_path / "run"
    assert play("--out", path, *TINY)[0] == 1
    line = complaint(capsys)
    assert re.fullmatch("cannot write the checkpoint .*: No space left on device", line), line
    monkeypatch.setattr(ocp, "save", save)
    assert play("--resume", path)[0] == 0
    check_same_run(path, whole)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_settings_come_back_from_json(name):
    experiment = EXPERIMENTS[name]
    assert settings_from(Experiment, json.loads(json.dumps(dataclasses.asdict(experiment)))) == experiment


@pytest.mark.parametrize("devices", [None, 3, "all"])
def test_a_setting_of_several_types_comes_back(devices):
    content = {**dataclasses.asdict(EXPERIMENTS["quickstart"]), "devices": devices}
    assert settings_from(Experiment, json.loads(json.dumps(content))).devices == devices
    with pytest.raises(ValueError, match=r"settings\.devices must be of type"):
        settings_from(Experiment, json.loads(json.dumps({**content, "devices": "some"})))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
NAMES = [
    *((field.name,) for field in dataclasses.fields(Experiment)),
    *(("data", field.name) for field in dataclasses.fields(EXPERIMENTS["quickstart"].data)),
    *(("digest", field.name) for field in dataclasses.fields(EXPERIMENTS["quickstart"].digest)),
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), JSON), min_size=1, max_size=2))
def test_settings_of_any_content_are_settings_or_refused_in_a_line(changes):
    content = json.loads(json.dumps(dataclasses.asdict(EXPERIMENTS["quickstart"])))
    for (*folders, name), value in changes:
        place = content
        for folder in folders:
            place = place.get(folder) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[name] = value
    with contextlib.suppress(ValueError):  # and nothing else
        experiment = settings_from(Experiment, content)
        assert json.loads(json.dumps(dataclasses.asdict(experiment))) == content


def test_the_first_difference_is_told():
    assert difference({"a": [1]}, {"a": [1]}) is None
    assert difference({"a": {"b": 1}}, {"a": {}}) == "a.b is known here only"
    assert difference({}, {"c": 1}) == "c is known there only"
    assert difference({"a": 1}, None) == "it is None there, {'a': 1} here"


def test_saves_wait_for_those_of_other_phases(tmp_path, monkeypatch):
    order = []
    write = checkpoint._write

    def slow(path, *args):
        time.sleep(0.05 if path.parent.name == kept.ROUNDS else 0)
        write(path, *args)
        order.append(path.parent.name)

    monkeypatch.setattr(checkpoint, "_write", slow)
    disk = OnDisk(tmp_path, {}, every=1, num_rounds=1, position=dict)
    for phase in (kept.ROUNDS, kept.LOCAL):
        disk.save(phase, 1, {"w": np.zeros(1)})
    disk.close()
    assert order == [kept.ROUNDS, kept.LOCAL]


def test_a_real_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    options = [*TINY, "--networks", *("mlp:n1=4,dropout=0.5",) * 3, "mlp:n1=3", "--clients-per-chunk", "2"]
    assert main(["run", "--out", str(tmp_path / "whole"), *options]) == 0
    path, make = tmp_path / "run", session.make_progress
    for stage in ("transfer learning: public data, network 2 of 2", 1, "pooled upper bound"):
        argv = ["--resume", str(path)] if path.exists() else ["--out", str(path), *options]
        monkeypatch.setattr(
            session, "make_progress", lambda num_rounds, stage=stage: Disturbed(num_rounds, stage, KeyboardInterrupt)
        )
        assert main(["run", *argv]) == 130
    monkeypatch.setattr(session, "make_progress", make)
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
