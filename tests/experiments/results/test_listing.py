from experiments import runs

from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.results.listing import list_runs
from fedmd_jax.experiments.results.seeds import seed_jobs, write_seeds


def test_a_line_for_each_run_that_is_done(tmp_path):
    for name in ("first", "damaged"):
        runs.write(tmp_path / name, runs.experiment())
    (tmp_path / "damaged" / files.SUMMARY).write_text("{")
    (tmp_path / "no-run").mkdir()
    (tmp_path / "file").touch()
    jobs = seed_jobs(tmp_path / "several", runs.experiment(), 2)
    for path, experiment in jobs.items():
        runs.write(path, experiment)
    write_seeds(tmp_path / "several", list(jobs), 2)
    damaged, first, several = list_runs(tmp_path)
    assert damaged.startswith(f"damaged: cannot read {tmp_path / 'damaged' / files.SUMMARY}: ")
    assert first == "first: made-up, seed 7, mean accuracy: transfer 0.110, local 0.050, FedMD 0.114, pooled 0.900"
    assert several.startswith("several: made-up, 2 seeds, mean accuracy: transfer 0.110 ±0.000, ")


def test_no_folder_and_an_empty_one_have_no_runs(tmp_path):
    assert list_runs(tmp_path) == list_runs(tmp_path / "nothing") == []
