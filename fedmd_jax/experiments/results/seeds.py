"""Several seeds of one experiment: a directory of run directories, with means and standard deviations."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.results.figures import Run, plot_seeds, write_plot
from fedmd_jax.experiments.results.report import ACCURACIES, TITLES, client_table, describe_evaluation
from fedmd_jax.experiments.run_directory import Record
from fedmd_jax.experiments.settings import Experiment

MOST_SEEDS = 10_000


def seed_jobs(path: pathlib.Path, experiment: Experiment, num_seeds: int) -> dict[pathlib.Path, Experiment]:
    """The runs of the experiment's seed and those that follow it, each in the directory of its seed.

    Raises:
      ValueError: a seed beyond the largest, none, or more than `MOST_SEEDS`.
    """
    if num_seeds < 1:
        raise ValueError(f"seeds must be an integer of at least 1, got {num_seeds}")
    if num_seeds > MOST_SEEDS:
        raise ValueError(f"seeds must be at most {MOST_SEEDS}, got {num_seeds}")
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


def read_seeds(path: pathlib.Path) -> tuple[Record, list[Run]] | None:
    """Summary and runs of a directory of several seeds; None if it is not one.

    Raises:
      RunDirectoryError: it is one, but damaged.
    """
    seeds = files.read_seed_list(path)
    if seeds is None:
        return None
    runs = [files.read_run(path / f"seed{seed}") for seed in seeds]
    kinds = {
        (summary["num_rounds_done"], *((client["client_id"], client["architecture"]) for client in summary["clients"]))
        for summary, _ in runs
    }
    if len(kinds) > 1:
        raise files.RunDirectoryError(f"cannot read {path}: its seeds are of different rounds or clients")
    return summarize_seeds([summary for summary, _ in runs], len(runs)), runs


def summarize_seeds(summaries: Sequence[Record], num_seeds: int) -> Record:
    """The content of summary.json, without versions and device: `{mean, std}` wherever a run has a number.

    The standard deviation is that of the sample, over seeds; null for one seed. That of `mean` is of the seeds' means
    over clients.

    Args:
      summaries: of at least one run, all with the same clients.
      num_seeds: how many there are to be.
    """
    first = summaries[0]
    clients = [
        {key: client[key] for key in ("client_id", "architecture")}
        | _spreads([summary["clients"][position] for summary in summaries], ACCURACIES)
        for position, client in enumerate(first["clients"])
    ]
    return {
        "experiment": first["experiment"],
        "seeds": [summary["seed"] for summary in summaries],
        "num_seeds": num_seeds,
        "evaluate_on": first.get("evaluate_on"),
        "num_clients": len(clients),
        "num_rounds": first["num_rounds"],
        "clients": clients,
        "mean": _spreads([summary["mean"] for summary in summaries], list(first["mean"])),
        "communication": first["communication"],
        "seconds": {"total": round(sum(summary["seconds"]["total"] for summary in summaries), 3)},
    }


def describe_seeds(summary: Record) -> str:
    """The table, as text of several lines."""
    titles = [f"{title:>12}" for title in TITLES.values()]
    table = client_table(summary, titles, lambda spreads: [format_spread(spreads[key]) for key in TITLES])
    mean, seeds = summary["mean"], summary["seeds"]
    gains = ("gain_points", "over transfer learning"), ("gain_over_local_points", "over local only")
    gained = [f"{format_spread(mean[key], '+.1f')} points {what}" for key, what in gains if mean.get(key) is not None]
    return "\n".join(
        [
            *table,
            "",
            f"FedMD gains {', '.join(gained)}",
            f"{describe_evaluation(summary)}mean and standard deviation over {len(seeds)} seeds: "
            f"{', '.join(map(str, seeds))}",
        ]
    )


def brief(summary: Record) -> str:
    """One run in one line."""
    known = {title: summary["mean"][key] for key, title in TITLES.items()}
    numbers = ", ".join(f"{title} {value:.3f}" for title, value in known.items() if value is not None)
    return f"seed {summary['seed']}, mean accuracy: {numbers}"


def format_spread(spread: Mapping[str, Any] | None, form: str = ".3f") -> str:
    """Mean and standard deviation, or as much of it as there is.

    >>> format_spread({"mean": 8.5, "std": 1.2}, "+.1f")
    '+8.5 ±1.2'
    """
    if spread is None:
        return "-"
    mean = format(spread["mean"], form)
    return mean if spread["std"] is None else f"{mean} ±{format(spread['std'], form.removeprefix('+'))}"


def _spreads(records: Sequence[Record], keys: Sequence[str]) -> dict[str, dict[str, float | None] | None]:
    return {key: _spread([record.get(key) for record in records]) for key in keys}


def _spread(values: Sequence[float | None]) -> dict[str, float | None] | None:
    if None in values:
        return None
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}
