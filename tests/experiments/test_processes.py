"""Runs of two processes with two devices each, see `many`."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from experiments import many

from fedmd_jax.experiments import run_directory as files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, tests = tmp_path_factory.mktemp("many"), pathlib.Path(many.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, many.__file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=3 * many.SECONDS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])},
    )
    said = "".join(f"\n{path.name}:\n{path.read_text()}" for path in folder.glob("*.err"))
    assert done.returncode == 0, done.stdout + done.stderr + said
    return folder


@pytest.fixture(scope="module")
def told(folder):
    return json.loads((folder / "told.json").read_text())


def metrics(path):
    return [json.loads(line) for line in (path / files.METRICS).read_text().splitlines()]


def summary(path):
    found = json.loads((path / files.SUMMARY).read_text())
    del found["seconds"]
    return found


def test_two_processes_do_what_one_does_with_as_many_devices(folder, told):
    """But for rounding: sums are added in another order. Before anything is sent they are equal to the bit."""
    assert (told["one"], told["two"]) == (0, [0, 0])
    one, two = metrics(folder / "one"), metrics(folder / "two")
    assert len(one) == len(two) == 6 * (many.NUM_ROUNDS + 1)
    assert one[:6] == two[:6]
    for ours, theirs in zip(one, two, strict=True):
        for name in ("digest_loss", "revisit_loss", "consensus_size"):
            first, second = ours.pop(name, None), theirs.pop(name, None)
            assert second == (first if first is None else pytest.approx(first, rel=1e-3))
        for name in ("accuracy", "local_accuracy"):
            assert theirs.pop(name) == pytest.approx(ours.pop(name), abs=0.1)
        assert ours == theirs


def test_results_are_written_once_and_by_the_first(folder):
    assert {file.name for file in (folder / "two").iterdir()} == {file.name for file in (folder / "one").iterdir()}
    assert json.loads((folder / "two" / files.CONFIG).read_text())["device"]["processes"] == 2
    lines = [(record["round"], record["client_id"]) for record in metrics(folder / "two")]
    assert lines == [(round_, client_id) for round_ in range(many.NUM_ROUNDS + 1) for client_id in range(6)]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_is_killed_ends_the_other_which_says_how_to_resume(folder, told, dead):
    killed, survivor = told[f"killed {dead}"], 1 - dead
    assert killed["ends"][dead] == -9
    assert killed["ends"][survivor] not in (0, 130, 143)
    assert killed["seconds"] < 60
    assert f"to resume: fedmd-jax run --resume {folder / 'run'} --coordinator " in killed["said"][survivor]
    assert f" --num-processes 2 --process-id {survivor}\n" in killed["said"][survivor]
    assert killed["lines"] < 6 * (many.NUM_ROUNDS + 1)


def test_sigterm_of_any_process_stops_all_after_the_round(folder, told):
    stopped = told["terminated 1"]
    assert stopped["ends"] == [143, 143]
    assert "interrupted after round" in stopped["said"][0]
    for said in stopped["said"]:
        assert said.splitlines()[-1].startswith(f"to resume: fedmd-jax run --resume {folder / 'run'} ")


def test_killed_and_resumed_it_ends_with_the_same_bits(folder, told):
    assert told["resumed"] == [0, 0]
    assert (folder / "run" / files.METRICS).read_bytes() == (folder / "two" / files.METRICS).read_bytes()
    assert summary(folder / "run") == summary(folder / "two")
    assert {file.name for file in (folder / "run").iterdir()} == {file.name for file in (folder / "two").iterdir()}


def test_processes_with_other_settings_are_refused(folder, told):
    assert told["differ"] == [2, 2]
    for said in told["differ said"]:
        assert said.splitlines()[-1] == (
            "fedmd-jax: error: settings, data and versions must be the same in all processes"
        )
    assert not (folder / "differ").exists()
