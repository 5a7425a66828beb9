"""Runs of two processes with two devices each, see `many`."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from experiments import many

from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.team import LOST_CODE

LOST = "fedmd-jax: process {} of 2 has ended without a word; to go on, .*: fedmd-jax run --resume {} --coordinator .*"


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
    """But for rounding: sums are added in another order. What nobody has sent anywhere is the same to the bit."""
    assert (told["one"], told["two"]) == (0, [0, 0])
    one, two = metrics(folder / "one"), metrics(folder / "two")
    assert len(one) == len(two) == 6 * (many.NUM_ROUNDS + 1)
    assert one[:6] == two[:6]
    for ours, theirs in zip(one, two, strict=True):
        losses = {name: (ours.pop(name), theirs.pop(name)) for name in ("digest_loss", "revisit_loss")}
        for first, second in losses.values():
            assert second == (first if first is None else pytest.approx(first, rel=1e-3))
        assert theirs.pop("accuracy") == pytest.approx(ours.pop("accuracy"), abs=0.1)
        assert ours == theirs


def test_each_process_takes_the_images_of_its_own_clients_only(folder):
    whole, *parts = (json.loads((folder / f"{name}.taken").read_text()) for name in ("one", "process0", "process1"))
    num_clients = len(metrics(folder / "one")) // (many.NUM_ROUNDS + 1)
    assert sorted(whole) == sorted(parts[0] + parts[1])
    assert len(set(whole)) == len(whole)
    # Of five alike, two on each of the first devices and padding at the end; the other is on the first.
    assert list(map(len, parts)) == [len(whole) // num_clients * k for k in (5, 1)]


def test_results_are_written_once_and_by_the_first(folder):
    assert {file.name for file in (folder / "two").iterdir()} == {file.name for file in (folder / "one").iterdir()}
    assert json.loads((folder / "two" / files.CONFIG).read_text())["device"]["processes"] == 2
    lines = [(record["round"], record["client_id"]) for record in metrics(folder / "two")]
    assert lines == [(round_, client_id) for round_ in range(many.NUM_ROUNDS + 1) for client_id in range(6)]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_is_killed_ends_the_other_within_seconds_and_a_line_says_so(folder, told, dead):
    killed, survivor = told[f"killed {dead}"], 1 - dead
    assert killed["ends"][dead] == -9
    assert killed["ends"][survivor] == LOST_CODE
    assert killed["seconds"] < 5
    assert re.fullmatch(LOST.format(dead, folder / "run"), killed["said"][survivor]), killed["said"]
    assert killed["lines"] < 6 * (many.NUM_ROUNDS + 1)


def test_what_the_first_complains_of_ends_the_other_with_its_reason(folder, told):
    """Only process 0 looks at the run directory."""
    message = f"the output directory must be new, but {folder / 'one'} exists"
    assert told["refused"] == [2, LOST_CODE]
    assert told["refused said"] == [f"fedmd-jax: error: {message}", f"fedmd-jax: process 0 of 2 has failed: {message}"]


def test_sigterm_of_any_process_stops_all_with_its_code(told):
    assert told["terminated 1"]["ends"] == [143, 143]
    assert told["terminated 1"]["said"][0].startswith("to go on: fedmd-jax run --resume ")
    assert "process 0 of 2 was interrupted; to go on" in told["terminated 1"]["said"][1]


def test_killed_and_resumed_it_ends_with_the_same_bits(folder, told):
    assert told["resumed"] == [0, 0]
    assert (folder / "run" / files.METRICS).read_bytes() == (folder / "two" / files.METRICS).read_bytes()
    assert (folder / "run" / files.PLOT).read_bytes() == (folder / "two" / files.PLOT).read_bytes()
    assert summary(folder / "run") == summary(folder / "two")
    assert {file.name for file in (folder / "run").iterdir()} == {file.name for file in (folder / "two").iterdir()}
