"""Experiments over a grid of settings: the combinations, and table and plot of their results."""

import csv
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedmd_jax.experiments.errors import UsageError
from fedmd_jax.experiments.results.figures import new_axes, to_png
from fedmd_jax.experiments.results.report import TITLES, algorithm_name, aligned, format_number, measured_on, titles
from fedmd_jax.experiments.run_directory import Record
from fedmd_jax.plot import LABELS

TABLE, PLOT = "sweep.csv", "sweep.png"
# Numbers of every combination, each as mean and standard deviation over seeds.
_NUMBERS = (*TITLES, "gain_points", "gain_over_local_points", "gap_to_pooled_points")
_MARKERS = {
    "transfer_accuracy": {"marker": "o", "color": "gray"},
    "local_accuracy": {"marker": "^", "color": "tab:blue"},
    "final_accuracy": {"marker": "D", "color": "black"},
    "pooled_accuracy": {"marker": "|", "color": "tab:red", "markersize": 12, "mew": 2.5},
}

Combination = dict[str, str]  # setting -> value, both as on the command line


class Row(NamedTuple):
    """A combination in the table."""

    settings: Combination
    directory: str  #: name of its directory
    summary: Record | None  #: of its seeds, if any of them is done
    error: str | None  #: what went wrong, if anything

    @property
    def num_seeds(self) -> int:
        """Number of seeds that are done."""
        return len(self.summary["seeds"]) if self.summary else 0

    def number(self, key: str) -> Mapping[str, Any] | None:
        """Mean and standard deviation over seeds, if they are known."""
        return self.summary["mean"][key] if self.summary else None


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


def to_csv(rows: Sequence[Row]) -> bytes:
    """The table as a file: a column per setting, mean and standard deviation of every number, empty if unknown."""
    parts = ("mean", "std")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    numbers = [f"{key}_{part}" for key in _NUMBERS for part in parts]
    writer.writerow([*rows[0].settings, "num_seeds", *numbers, "directory", "error"])
    for row in rows:
        spreads = [row.number(key) or dict.fromkeys(parts) for key in _NUMBERS]
        numbers = [spread[part] for spread in spreads for part in parts]
        writer.writerow([*row.settings.values(), row.num_seeds, *numbers, row.directory, row.error])
    return text.getvalue().encode()


def describe_sweep(rows: Sequence[Row]) -> str:
    """The table as text of several lines."""
    names, gains = list(rows[0].settings), ("gain_points", "gain_over_local_points")
    cells = [[*names, "seeds", *titles(*_summaries(rows)).values(), "gain", "over local"]]
    for row in rows:
        numbers = [format_number(row.number(key)) for key in TITLES]
        numbers += [format_number(row.number(key), "+.1f") for key in gains]
        cells.append([*row.settings.values(), str(row.num_seeds), *numbers])
    failed = [f"failed: {label(row.settings)}: {row.error}" for row in rows if row.error]
    return "\n".join([*aligned(cells, left=range(len(names))), *failed])


def _summaries(rows: Sequence[Row]) -> list[Record]:
    return [row.summary for row in rows if row.summary]


def plot_sweep(rows: Sequence[Row], title: str) -> bytes:
    """Mean accuracies of every combination as a PNG: a row each, from the first on top to the last.

    Args:
      rows: as in the table; those that failed have an empty row.
      title: of the plot.
    """
    labels = [label(row.settings) + (" (failed)" if row.error else "") for row in rows]
    axes = new_axes(6.5 + 0.07 * max(map(len, labels)), 1.6 + 0.32 * len(rows), title)
    names = {**LABELS, "final_accuracy": algorithm_name(*_summaries(rows)) or "after the last round"}
    for key, style in _MARKERS.items():
        known = {place: row.number(key) for place, row in enumerate(rows) if row.number(key)}
        if known:
            means, bars = zip(*((spread["mean"], spread["std"] or 0.0) for spread in known.values()), strict=True)
            axes.errorbar(means, list(known), xerr=bars, linestyle="none", capsize=2, label=names[key], **style)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    measured = dict.fromkeys(f" on {measured_on(row.summary)}" for row in rows if row.summary)
    axes.set_xlabel(f"accuracy{' or'.join(measured)}, mean of all clients (bar: one standard deviation over seeds)")
    if measured:
        axes.figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return to_png(axes.figure)


def failure(error: Exception) -> str:
    """An exception in a line of the table."""
    words = " ".join(str(error).split())
    return words if isinstance(error, UsageError) else f"{type(error).__name__}: {words}"[:300]
