"""Experiments over a grid of settings: which there are, and the table and the plot of what came out."""

import csv
import io
import itertools
import re
from collections.abc import Mapping, Sequence

from fedmd_jax.experiments.errors import UsageError
from fedmd_jax.experiments.results.figures import new_axes, to_png
from fedmd_jax.experiments.results.report import TITLES, aligned, measured_on
from fedmd_jax.experiments.results.seeds import format_spread
from fedmd_jax.experiments.run_directory import Record

TABLE, PLOT = "sweep.csv", "sweep.png"
# Numbers of every combination, each as mean and standard deviation over seeds.
_NUMBERS = (*TITLES, "gain_points", "gain_over_local_points", "gap_to_pooled_points")

Combination = dict[str, str]  # setting -> value, both as on the command line


def grid(overs: Sequence[str], known: Sequence[str]) -> list[Combination]:
    """All combinations of the values of all settings, the last setting changing fastest.

    Args:
      overs: `SETTING=VALUE,VALUE,...` each; semicolons instead of commas where values have commas.
      known: the settings that there are, such as `digest.num-epochs`; underscores may be written for hyphens.

    Raises:
      UsageError: no setting, one that is unknown or comes twice, no value or one that comes twice.

    >>> grid(["distance=mae,kl", "weights=1 1;1 0"], ["distance", "weights"])[1]
    {'distance': 'mae', 'weights': '1 0'}
    """
    if not overs:
        raise UsageError("a sweep needs at least one --over SETTING=VALUE,VALUE,...")
    settings: dict[str, list[str]] = {}
    for over in overs:
        name, equals, text = over.partition("=")
        name = name.strip().removeprefix("--").replace("_", "-")
        values = [value.strip() for value in text.split(";" if ";" in text else ",")]
        if name not in known:
            raise UsageError(f"unknown setting {name!r}, known are {', '.join(known)}")
        if not equals or "" in values:
            raise UsageError(f"--over is written SETTING=VALUE,VALUE,..., got {over!r}")
        if name in settings or len(set(values)) < len(values):
            raise UsageError(f"--over must have every setting and every value once, got {over!r} again")
        settings[name] = values
    return [dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())]


def options(combination: Mapping[str, str], flags: Sequence[str]) -> list[str]:
    """The command line's options for a combination.

    Args:
      combination: setting -> value; the values of a list stand apart, as on the command line.
      flags: the settings that are on or off, true or false.

    Raises:
      UsageError: a flag that is neither.
    """
    words = []
    for name, value in combination.items():
        if name not in flags:
            words += [f"--{name}", *value.split()]
        elif value.lower() in ("true", "false"):
            words += [f"--{name}" if value.lower() == "true" else f"--no-{name}"]
        else:
            raise UsageError(f"{name} must be true or false, got {value!r}")
    return words


def label(combination: Mapping[str, str]) -> str:
    """`distance=kl subset-size=1000`."""
    return " ".join(f"{name}={value}" for name, value in combination.items())


def directory(number: int, combination: Mapping[str, str]) -> str:
    """The name of the directory of a combination: its number, and as much of its settings as a file name can hold."""
    return f"{number:03d}-" + re.sub(r"[^\w.=-]+", "_", label(combination))[:80]


def row(combination: Combination, place: str, summary: Record | None, error: str | None) -> Record:
    """A combination in the table.

    Args:
      combination: its settings.
      place: its directory.
      summary: of its seeds, if any of them is done.
      error: what went wrong, if anything.
    """
    return {
        "settings": combination,
        "num_seeds": len(summary["seeds"]) if summary else 0,
        **{key: summary["mean"][key] if summary else None for key in _NUMBERS},
        "measured_on": measured_on(summary) if summary else None,
        "directory": place,
        "error": error,
    }


def to_csv(rows: Sequence[Record]) -> bytes:
    """The table as a file: a column per setting, mean and standard deviation of every number, empty where unknown."""
    parts = ("mean", "std")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(rows[0]["settings"])
    writer.writerow(
        [*names, "num_seeds", *(f"{key}_{part}" for key in _NUMBERS for part in parts), "directory", "error"]
    )
    for record in rows:
        numbers = [record[key][part] if record[key] else None for key in _NUMBERS for part in parts]
        cells = [*record["settings"].values(), record["num_seeds"], *numbers, record["directory"], record["error"]]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue().encode()


def describe_sweep(rows: Sequence[Record]) -> str:
    """The table as text of several lines."""
    names = list(rows[0]["settings"])
    cells = [[*names, "seeds", *TITLES.values(), "gain", "over local"]]
    for record in rows:
        numbers = [format_spread(record[key]) for key in TITLES]
        numbers += [format_spread(record[key], "+.1f") for key in ("gain_points", "gain_over_local_points")]
        cells.append([*record["settings"].values(), str(record["num_seeds"]), *numbers])
    failed = [f"failed: {label(record['settings'])}: {record['error']}" for record in rows if record["error"]]
    return "\n".join([*aligned(cells, left=range(len(names))), *failed])


def plot_sweep(rows: Sequence[Record], title: str) -> bytes:
    """Mean accuracies of every combination as a PNG: a row each, from the first on top to the last.

    Args:
      rows: as in the table; those that failed have an empty row.
      title: of the plot.
    """
    labels = [label(record["settings"]) + (" (failed)" if record["error"] else "") for record in rows]
    axes = new_axes(6.5 + 0.07 * max(map(len, labels)), 1.6 + 0.32 * len(rows), title)
    kinds = {
        "transfer_accuracy": ("after transfer learning", {"marker": "o", "color": "gray"}),
        "local_accuracy": ("local only (no digest)", {"marker": "^", "color": "tab:blue"}),
        "final_accuracy": ("FedMD", {"marker": "D", "color": "black"}),
        "pooled_accuracy": ("pooled upper bound", {"marker": "|", "color": "tab:red", "markersize": 12, "mew": 2.5}),
    }
    for key, (name, style) in kinds.items():
        known = [(place, record[key]) for place, record in enumerate(rows) if record[key] is not None]
        if known:
            places, spreads = zip(*known, strict=True)
            bars = [spread["std"] or 0.0 for spread in spreads]
            means = [spread["mean"] for spread in spreads]
            axes.errorbar(means, places, xerr=bars, linestyle="none", elinewidth=1, capsize=2, label=name, **style)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    measured = dict.fromkeys(f" on {record['measured_on']}" for record in rows if record["measured_on"])
    axes.set_xlabel(f"accuracy{' or'.join(measured)}, mean of all clients (bar: one standard deviation over seeds)")
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return to_png(axes.figure)


def failure(error: Exception) -> str:
    """An exception in a line of the table."""
    words = " ".join(str(error).split())
    return words if isinstance(error, UsageError) else f"{type(error).__name__}: {words}"[:300]
