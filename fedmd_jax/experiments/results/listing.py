"""The finished runs in a folder, one line each."""

import pathlib

from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.results.report import ACCURACIES, TITLES
from fedmd_jax.experiments.results.seeds import brief, format_spread, read_seeds


def list_runs(path: pathlib.Path) -> list[str]:
    """Describes the runs directly in a folder, ordered by name.

    Args:
      path: the folder, such as `runs`.

    Returns:
      A line for each run, each directory of several seeds, and each that is damaged; none if there is no summary.
    """
    children = sorted(path.iterdir()) if path.is_dir() else []
    return [f"{child.name}: {_line(child)}" for child in children if (child / files.SUMMARY).is_file()]


def _line(path: pathlib.Path) -> str:
    try:
        with files.reading(path):
            if (seeds := read_seeds(path)) is None:
                summary, _ = files.read_run(path)
                return f"{summary['experiment']}, {brief(summary)}"
            summary, runs = seeds
            known = {TITLES[key]: summary["mean"][key] for key in ACCURACIES}
            told = [f"{title} {format_spread(spread)}" for title, spread in known.items() if spread is not None]
            return f"{summary['experiment']}, {len(runs)} seeds, mean accuracy: {', '.join(told)}"
    except files.RunDirectoryError as error:
        return str(error)
