"""Several seeds of one experiment: a directory of run directories, with means and standard deviations."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from fedmd_jax.checks import one_line
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.results.figures import Run, plot_seeds, write_plot
from fedmd_jax.experiments.results.report import ACCURACIES, brief
from fedmd_jax.experiments.run_directory import Record
from fedmd_jax.experiments.settings import Experiment

MOST_SEEDS = 10_000


def seed_jobs(path: pathlib.Path, experiment: Experiment, num_seeds: int | None) -> dict[pathlib.Path, Experiment]:
    """The runs of the experiment's seed and those that follow it, each in the directory of its seed.

    Args:
      path: the directory of all.
      experiment: with the first seed.
      num_seeds: how many there are; None for one run, in `path` itself.

    Raises:
      ValueError: a seed beyond the largest, none, or more than `MOST_SEEDS`.
    """
    if num_seeds is None:
        return {path: experiment}
    if not 1 <= num_seeds <= MOST_SEEDS:
        raise ValueError(f"seeds must be from 1 to {MOST_SEEDS}, got {num_seeds}")
    seeds = range(experiment.seed, experiment.seed + num_seeds)
    return {path / f"seed{seed}": dataclasses.replace(experiment, seed=seed) for seed in seeds}


def write_seeds(path: pathlib.Path, paths: Sequence[pathlib.Path], num_seeds: int) -> Record:
    """Writes summary and plot of the runs that are done.

    Args:
      path: the directory of all.
      paths: directories of at least one run, inside it.
      num_seeds: how many there are to be.

    Returns:
      The summary.

    Raises:
      RunDirectoryError: a run is unfinished or damaged.
      WriteError: a file cannot be written.
    """
    runs = [files.read_run(each) for each in paths]
    summary = {**summarize_seeds([summary for summary, _ in runs], num_seeds), **files.origin()}
    files.replace_file(path / files.SUMMARY, files.to_json(summary))
    write_plot(path / files.PLOT, plot_seeds, runs)
    return summary


def read_results(path: pathlib.Path) -> tuple[Record, list[Run]]:
    """The summary of a directory of one run or of several seeds, and all its runs.

    Raises:
      RunDirectoryError: it is unfinished or damaged.
    """
    summary = files.read_summary(path)
    if "seeds" not in summary:
        return summary, [files.read_run(path)]
    with files.reading(path):
        runs = [files.read_run(path / f"seed{seed}") for seed in summary["seeds"]]
        return summarize_seeds([each for each, _ in runs], len(runs)), runs


def list_runs(path: pathlib.Path) -> list[str]:
    """Describes the runs directly in a folder, ordered by name.

    Args:
      path: the folder, such as `runs`.

    Returns:
      A line for each run, each directory of several seeds, and each that is damaged; none if there is no summary.
    """
    lines = []
    for child in sorted(path.iterdir()) if os.path.isdir(path) else []:
        if (child / files.SUMMARY).is_file():
            try:
                summary, _ = read_results(child)
                with files.reading(child):
                    lines.append(f"{child.name}: {summary['experiment']}, {brief(summary)}")
            except files.RunDirectoryError as error:
                lines.append(one_line(f"{child.name}: {error}"))
    return lines


def summarize_seeds(summaries: Sequence[Record], num_seeds: int) -> Record:
    """The content of summary.json, without versions and device: `{mean, std}` for each number of a run.

    The standard deviation is that of the sample, over seeds; null for one seed. That of `mean` is of the seeds' means
    over clients.

    Args:
      summaries: of at least one run, all with the same clients.
      num_seeds: how many there are to be.

    Raises:
      ValueError: the runs differ in their clients or rounds.
    """
    first, *_ = summaries
    names = ("client_id", "architecture")
    kinds = [(each["num_rounds_done"], [[c[name] for name in names] for c in each["clients"]]) for each in summaries]
    if kinds != kinds[:1] * len(kinds):
        raise ValueError("its seeds are of different rounds or clients")
    known = [key for key in ACCURACIES if key in first["mean"]]
    sizes = [summary.get("consensus_size") for summary in summaries]
    clients = [
        {name: of_seeds[0][name] for name in names} | _spreads(of_seeds, known)
        for of_seeds in zip(*(summary["clients"] for summary in summaries), strict=True)
    ]
    return {
        "experiment": first["experiment"],
        "algorithm": first.get("algorithm", "fedmd"),
        "batch_statistics": first.get("batch_statistics", "moving"),
        "seeds": [summary["seed"] for summary in summaries],
        "num_seeds": num_seeds,
        "evaluate_on": first["evaluate_on"],
        "num_clients": len(clients),
        "num_rounds": first["num_rounds"],
        "clients": clients,
        "mean": _spreads([summary["mean"] for summary in summaries], first["mean"]),
        **({} if None in sizes else {"consensus_size": _spreads(sizes, sizes[0])}),
        "communication": first["communication"],
        "seconds": {"total": round(sum(summary["seconds"]["total"] for summary in summaries), 3)},
    }


def _spreads(records: Sequence[Record], keys: Sequence[str]) -> dict[str, dict[str, float | None] | None]:
    """Mean and standard deviation of each number; None if a record does not have it."""
    spreads = {}
    for key in keys:
        values = [record[key] for record in records]
        std = float(np.std(values, ddof=1)) if len(values) > 1 and None not in values else None
        spreads[key] = None if None in values else {"mean": float(np.mean(values)), "std": std}
    return spreads
