import dataclasses
import json
import pathlib

import numpy as np
import pytest
from experiments import runs

from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.results.report import describe
from fedmd_jax.experiments.results.seeds import list_runs, read_results, seed_jobs, summarize_seeds, write_seeds

LOCAL = (0.05, 0.07, 0.03)


def write(path, num_seeds=3, **changes):
    """Seeds of made-up runs, which differ in what local only reaches."""
    jobs = seed_jobs(path, runs.experiment(), num_seeds)
    for local, (each, experiment) in zip(LOCAL, jobs.items(), strict=False):
        runs.write(each, experiment, **{"local": local, **changes})
    return list(jobs)


def test_the_jobs_are_the_seeds_that_follow():
    experiment, path = runs.experiment(), pathlib.Path("x")
    jobs = seed_jobs(path, experiment, 3)
    assert [str(path) for path in jobs] == ["x/seed7", "x/seed8", "x/seed9"]
    assert list(jobs.values()) == [dataclasses.replace(experiment, seed=seed) for seed in (7, 8, 9)]
    assert seed_jobs(path, experiment, None) == {path: experiment}
    with pytest.raises(ValueError, match="seed must be below"):
        seed_jobs(path, dataclasses.replace(experiment, seed=2**32 - 1), 2)


def test_mean_and_standard_deviation_are_those_of_numpy(tmp_path):
    summaries = [files.read_run(path)[0] for path in write(tmp_path)]
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
    assert "±" not in describe(summary)


def test_what_is_written_is_read_again(tmp_path):
    paths = write(tmp_path)
    written = write_seeds(tmp_path, paths[:2], 3)
    assert (written["seeds"], written["num_seeds"]) == ([7, 8], 3)
    assert json.loads((tmp_path / files.SUMMARY).read_text()) == written
    first = (tmp_path / files.PLOT).read_bytes()
    write_seeds(tmp_path, paths, 3)
    assert (tmp_path / files.PLOT).read_bytes() != first
    summary, found = read_results(tmp_path)
    assert [each["seed"] for each, _ in found] == summary["seeds"] == [7, 8, 9]
    summary, found = read_results(paths[0])
    assert (summary, found) == (files.read_run(paths[0])[0], [files.read_run(paths[0])])


def test_seeds_that_are_missing_or_do_not_belong_together_are_refused(tmp_path):
    (tmp_path / files.SUMMARY).write_text('{"seeds": [7, 8]}')
    write(tmp_path, 1)
    with pytest.raises(files.RunDirectoryError, match=r"no run to report on: .*seed8"):
        read_results(tmp_path)
    runs.write(tmp_path / "seed8", runs.experiment(num_clients=2))
    with pytest.raises(files.RunDirectoryError, match="its seeds are of different rounds or clients"):
        read_results(tmp_path)


def test_the_table(tmp_path):
    lines = describe(write_seeds(tmp_path, write(tmp_path), 3)).splitlines()
    assert lines[0].split() == ["client", "architecture", "transfer", "local", "FedMD", "pooled"]
    numbers = "0.100 ±0.000 0.050 ±0.020 0.104 ±0.000 0.900 ±0.000"
    assert lines[1].split() == ["0", "mlp:n1=1", *numbers.split()]
    assert lines[5].split()[:3] == ["mean", "0.110", "±0.000"]
    assert lines[-2] == "FedMD gains +0.4 ±0.0 points over transfer learning, +6.4 ±2.0 points over local only"
    assert lines[-1] == "mean and standard deviation over 3 seeds: 7, 8, 9"
    assert len({len(line) for line in lines[:6]}) == 1


def test_a_line_for_each_run_in_a_folder(tmp_path):
    for name in ("first", "damaged"):
        runs.write(tmp_path / name, runs.experiment(), pooled=None)
    (tmp_path / "damaged" / files.SUMMARY).write_text("{")
    (tmp_path / "no-run").mkdir()
    (tmp_path / "file").touch()
    write_seeds(tmp_path / "several", write(tmp_path / "several", 2), 2)
    damaged, first, several = list_runs(tmp_path)
    assert damaged.startswith(f"damaged: cannot read {tmp_path / 'damaged' / files.SUMMARY}: ")
    assert first == "first: made-up, seed 7, mean accuracy: transfer 0.110, local 0.050, FedMD 0.114"
    assert several.startswith("several: made-up, 2 seeds, mean accuracy: transfer 0.110 ±0.000, ")
    assert list_runs(tmp_path / "no-run") == list_runs(tmp_path / "nothing") == []
