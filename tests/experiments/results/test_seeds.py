import dataclasses
import json
import pathlib

import numpy as np
import pytest
from experiments import runs

from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.results.seeds import (
    brief,
    describe_seeds,
    read_seeds,
    seed_jobs,
    summarize_seeds,
    write_seeds,
)

LOCAL = (0.05, 0.07, 0.03)


def write(path, num_seeds=3, **changes):
    """Seeds of made-up runs, which differ in what local only reaches."""
    jobs = seed_jobs(path, runs.experiment(), num_seeds)
    for local, (each, experiment) in zip(LOCAL, jobs.items(), strict=False):
        runs.write(each, experiment, **{"local": local, **changes})
    return list(jobs)


def test_the_jobs_are_the_seeds_that_follow():
    experiment = runs.experiment()
    jobs = seed_jobs(pathlib.Path("x"), experiment, 3)
    assert [str(path) for path in jobs] == ["x/seed7", "x/seed8", "x/seed9"]
    assert list(jobs.values()) == [dataclasses.replace(experiment, seed=seed) for seed in (7, 8, 9)]
    with pytest.raises(ValueError, match="seed must be below"):
        seed_jobs(pathlib.Path("x"), dataclasses.replace(experiment, seed=2**32 - 1), 2)


def test_mean_and_standard_deviation_are_those_of_numpy(tmp_path):
    paths = write(tmp_path)
    summaries = [files.read_run(path)[0] for path in paths]
    summary = summarize_seeds(summaries, 5)
    assert (summary["seeds"], summary["num_seeds"], summary["num_clients"]) == ([7, 8, 9], 5, 3)
    spread = {"mean": pytest.approx(np.mean(LOCAL)), "std": pytest.approx(np.std(LOCAL, ddof=1))}
    assert [client["local_accuracy"] for client in summary["clients"]] == [spread] * 3
    assert summary["mean"]["local_accuracy"] == spread
    gains = [each["mean"]["gain_over_local_points"] for each in summaries]
    assert summary["mean"]["gain_over_local_points"] == {
        "mean": pytest.approx(np.mean(gains)),
        "std": pytest.approx(np.std(gains, ddof=1)),
    }
    assert summary["mean"]["final_accuracy"]["std"] == pytest.approx(0, abs=1e-12)
    assert [client["architecture"] for client in summary["clients"]] == ["mlp:n1=1", "mlp:n1=2", "mlp:n1=1"]


def test_one_seed_has_no_standard_deviation_and_what_is_unknown_stays_so(tmp_path):
    (path,) = write(tmp_path, 1, local=None)
    summary = summarize_seeds([files.read_run(path)[0]], 1)
    assert summary["mean"]["final_accuracy"]["std"] is None
    assert summary["mean"]["local_accuracy"] is None
    assert summary["mean"]["gain_over_local_points"] is None
    assert "±" not in describe_seeds(summary)


def test_what_is_written_is_read_again(tmp_path):
    paths = write(tmp_path)
    written = write_seeds(tmp_path, paths[:2], 3)
    assert (written["seeds"], written["num_seeds"]) == ([7, 8], 3)
    assert json.loads((tmp_path / files.SUMMARY).read_text()) == written
    first = (tmp_path / files.PLOT).read_bytes()
    write_seeds(tmp_path, paths, 3)
    assert (tmp_path / files.PLOT).read_bytes() != first
    summary, found = read_seeds(tmp_path)
    assert [each["seed"] for each, _ in found] == summary["seeds"] == [7, 8, 9]


def test_other_directories_are_not_of_seeds(tmp_path):
    (path,) = write(tmp_path, 1)
    assert read_seeds(path) is None
    assert read_seeds(tmp_path / "nothing") is None
    (tmp_path / files.SUMMARY).write_text('{"seeds": [9]}')
    with pytest.raises(files.RunDirectoryError, match=r"no run to report on: .*seed9 is not a directory"):
        read_seeds(tmp_path)


def test_the_table(tmp_path):
    lines = describe_seeds(write_seeds(tmp_path, write(tmp_path), 3)).splitlines()
    assert lines[0].split() == ["client", "architecture", "transfer", "local", "FedMD", "pooled"]
    assert lines[1].split() == [
        "0",
        "mlp:n1=1",
        "0.100",
        "±0.000",
        "0.050",
        "±0.020",
        "0.104",
        "±0.000",
        "0.900",
        "±0.000",
    ]
    assert lines[5].split()[:3] == ["mean", "0.110", "±0.000"]
    assert lines[-2] == "FedMD gains +0.4 ±0.0 points over transfer learning, +6.4 ±2.0 points over local only"
    assert lines[-1] == "mean and standard deviation over 3 seeds: 7, 8, 9"
    assert len({len(line) for line in lines[:6]}) == 1


def test_a_run_in_one_line(tmp_path):
    (path,) = write(tmp_path, 1, pooled=None)
    line = brief(files.read_run(path)[0])
    assert line == "seed 7, mean accuracy: transfer 0.110, local 0.050, FedMD 0.114"
