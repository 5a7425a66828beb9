"""Plots of runs, from what their directories hold."""

import contextlib
import io
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedmd_jax.checks import one_line
from fedmd_jax.experiments.results.report import find_faults, measured_on
from fedmd_jax.experiments.run_directory import Record, replace_file

Run = tuple[Record, Sequence[Record]]  # the content of summary.json, and the records of metrics.jsonl


class Curve(NamedTuple):
    """One client, or the mean of all, in every run."""

    accuracy: np.ndarray  #: [S, R + 1]: round 0 to the last
    local: np.ndarray | None  #: [S]: without digests
    pooled: np.ndarray | None  #: [S]: the upper bound
    faults: np.ndarray  #: [R + 1], bool: whether anything went wrong in this round of any run


def write_plot(path: pathlib.Path, draw: Callable[..., bytes], *arguments: Any) -> None:
    """Writes a plot, or prints a warning if it cannot be drawn: the numbers of a run do not depend on it.

    Args:
      path: the file to write or replace.
      draw: such as `plot`, whose arguments follow.
      *arguments: of `draw`.

    Raises:
      WriteError: the file cannot be written.
    """
    try:
        content = draw(*arguments)
    except Exception as error:  # matplotlib may be missing, broken, or configured in a way that it does not accept
        reason = one_line(f"{type(error).__name__}: {error}", longest=300)
        print(f"fedmd-jax: warning: cannot draw {path.name}: {reason}", file=sys.stderr)
        return
    replace_file(path, content)


def plot(summary: Record, metrics: Sequence[Record]) -> bytes:
    """Accuracy per round as a PNG: a line per client from its transfer-learning start, with what it is compared with.

    Args:
      summary: the content of summary.json.
      metrics: the records of metrics.jsonl.

    Returns:
      The bytes of the file.
    """
    return plot_seeds([(summary, metrics)])


def plot_seeds(runs: Sequence[Run]) -> bytes:
    """The same of runs that differ in their seeds only: means over seeds, in bands of one standard deviation.

    Args:
      runs: at least one, all of the same number of rounds.
    """
    summary = runs[0][0]
    clients = summary["clients"]
    _import_matplotlib()
    colours = _colours([client["architecture"] for client in clients])
    curves = [_curve(runs, position) for position in range(len(clients))]
    mean = _mean(curves)

    # The legend stands beside the axes: a row per architecture, as wide as the longest name.
    width, height = 7.4 + 0.075 * max(map(len, [_MEAN, *colours])), 1.6 + 0.16 * len(colours)
    axes = new_axes(width, max(4.8, height), _title(runs, mean))
    for client, curve in zip(clients, curves, strict=True):
        _draw(axes, curve, color=colours[client["architecture"]], linewidth=1.2, markersize=4, alpha=0.65)
    if len(clients) > 1:
        _draw(axes, mean, color="black", linewidth=2.4, markersize=6, alpha=1.0)
    local = [_local_curve(*run) for run in runs]
    if None not in local:
        axes.plot(np.mean(local, axis=0), "--", color="black", linewidth=1.2, label=_LOCAL)
    _decorate(axes, summary["num_rounds_done"], measured_on(summary))
    faulty = any(curve.faults.any() for curve in curves)
    _add_legend(axes.figure, mean, colours, several=len(clients) > 1, faulty=faulty)
    return to_png(axes.figure)


def new_axes(width: float, height: float, title: str) -> Any:
    """The axes of a figure that has no others; its size is in inches."""
    axes = new_figure(width, height).subplots()
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, that is drawn by Agg whatever backend is set."""
    _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _import_matplotlib() -> None:
    """Takes half a second, which the help does not need; works if MPLBACKEND names a backend that is not there.

    Programs that are started from Jupyter or Colab inherit the name of a backend of their kernels, and an import that
    has failed cannot be repeated.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # as its import does it: others may show figures later


def to_png(figure: Any) -> bytes:
    """The content of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


_MEAN, _LOCAL = "mean of all clients", "mean of local only (no digest)"
_FAULT = {"marker": "x", "markeredgewidth": 1.5}


def _curve(runs: Sequence[Run], position: int) -> Curve:
    """The client at this place of the summaries."""
    clients = [summary["clients"][position] for summary, _ in runs]
    accuracy = [
        _by_round(metrics, client["client_id"], summary["num_rounds_done"])
        for client, (summary, metrics) in zip(clients, runs, strict=True)
    ]
    # A run of an older version has no control.
    local, pooled = ([client.get(key) for client in clients] for key in ("local_accuracy", "pooled_accuracy"))
    bounds = (None if None in values else np.array(values) for values in (local, pooled))
    return Curve(np.array(accuracy), *bounds, np.any([_faults(*run, position) for run in runs], axis=0))


def _local_curve(summary: Record, metrics: Sequence[Record]) -> list[float] | None:
    """Mean accuracy of the local-only baseline in each round; None if there is none."""
    accuracies = [[] for _ in range(summary["num_rounds_done"] + 1)]
    for record in metrics:
        if record["round"] < len(accuracies) and record.get("local_accuracy") is not None:
            accuracies[record["round"]].append(record["local_accuracy"])
    return [float(np.mean(of_round)) for of_round in accuracies] if all(accuracies) else None


def _faults(summary: Record, metrics: Sequence[Record], position: int) -> np.ndarray:
    """In which rounds, [R + 1], something went wrong with the client at this place of the summary."""
    of_client = find_faults(metrics).get(summary["clients"][position]["client_id"], {})
    rounds = {round_ for rounds in of_client.values() for round_ in rounds}
    return np.isin(np.arange(summary["num_rounds_done"] + 1), list(rounds))


def _by_round(metrics: Sequence[Record], client_id: int, last: int) -> list[float]:
    """A client's accuracy in rounds 0 to `last`."""
    accuracy = {record["round"]: record["accuracy"] for record in metrics if record["client_id"] == client_id}
    return [accuracy[round_] for round_ in range(last + 1)]


def _mean(curves: Sequence[Curve]) -> Curve:
    """Over clients; what not every client has nobody has. Faults are of clients, not of their mean."""
    *columns, faults = zip(*curves, strict=True)
    means = (None if any(part is None for part in parts) else np.mean(parts, axis=0) for parts in columns)
    return Curve(*means, np.zeros_like(faults[0]))


def _colours(architectures: Sequence[str]) -> dict[str, Any]:
    """A colour for each different architecture, easy to tell apart for up to twenty."""
    from matplotlib import colormaps

    names = list(dict.fromkeys(architectures))
    if len(names) <= 20:
        palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
        return {name: palette(i) for i, name in enumerate(names)}
    return {name: colormaps["turbo"](i / (len(names) - 1)) for i, name in enumerate(names)}


def _draw(axes: Any, curve: Curve, *, markersize: float, alpha: float, **style: Any) -> None:
    """A line over the rounds with a dot at its start; in the margin behind the last round what it is compared with."""
    centre, spread = curve.accuracy.mean(axis=0), _spread(curve.accuracy)
    last, colour = len(centre) - 1, style["color"]
    axes.plot(range(last + 1), centre, alpha=alpha, **style)
    axes.plot(0, centre[0], "o", color=colour, markersize=markersize)
    if curve.faults.any():
        (rounds,) = np.nonzero(curve.faults)
        axes.plot(rounds, centre[rounds], linestyle="none", color=colour, markersize=markersize + 2, **_FAULT)
    if spread is not None:
        axes.fill_between(
            range(last + 1), centre - spread, centre + spread, color=colour, alpha=0.15 * alpha, linewidth=0
        )
    bars = {"color": colour, "elinewidth": 0.8, "markersize": markersize}
    if curve.local is not None:
        place = last + 0.3 * _margin(last)
        axes.errorbar(place, curve.local.mean(), _spread(curve.local), marker="^", **bars)
    if curve.pooled is not None:
        ends = [last + part * _margin(last) for part in (0.55, 0.95)]
        axes.plot(ends, [curve.pooled.mean()] * 2, color=colour, linewidth=max(2.0, style["linewidth"]))
        axes.errorbar(np.mean(ends), curve.pooled.mean(), _spread(curve.pooled), **bars)


def _spread(values: np.ndarray) -> np.ndarray | None:
    """The standard deviation of the sample over runs; None for one run."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else None


def _margin(last: int) -> float:
    return max(0.5, 0.08 * last)


def _decorate(axes: Any, last: int, measured: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(integer=True).tick_values(0, max(last, 1))
    axes.set_xticks([tick for tick in ticks if 0 <= tick <= last])
    axes.set_xlim(-_margin(last), last + _margin(last))
    low, high = axes.dataLim.intervaly
    axes.set_ylim(max(low - 0.04, -0.01), min(high + 0.04, 1.01))
    axes.set_xlabel("round (0: after transfer learning, before any collaboration)")
    axes.set_ylabel(f"accuracy on {measured}")


def _title(runs: Sequence[Run], mean: Curve) -> str:
    summary, last = runs[0][0], runs[0][0]["num_rounds_done"]
    seeds = ", ".join(str(summary["seed"]) for summary, _ in runs)
    seeds = f"seeds {seeds} (band: one standard deviation)" if len(runs) > 1 else f"seed {seeds}"
    rounds = f"{last} round" if last == 1 else f"{last} rounds"
    compared = (("local only", mean.local), ("pooled", mean.pooled))
    return (
        f"{summary['experiment']}, {seeds}; mean accuracy:\n"
        f"{mean.accuracy[:, 0].mean():.3f} after transfer learning, "
        f"{mean.accuracy[:, -1].mean():.3f} after {rounds} of FedMD"
        + "".join(f", {values.mean():.3f} {name}" for name, values in compared if values is not None)
    )


def _add_legend(figure: Any, mean: Curve, colours: Mapping[str, Any], *, several: bool, faulty: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    if several:
        handles.append(Line2D([], [], color="black", linewidth=2.4, label=_MEAN))
    style = {"color": "gray", "linestyle": "none"}
    handles.append(Line2D([], [], marker="o", markersize=4, label="after transfer learning", **style))
    if mean.local is not None:
        handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1.2, label=_LOCAL))
        handles.append(Line2D([], [], marker="^", markersize=5, label="local only (no digest)", **style))
    if mean.pooled is not None:
        handles.append(Line2D([], [], marker="_", markersize=10, mew=2, label="pooled upper bound", **style))
    if faulty:
        handles.append(Line2D([], [], markersize=6, label="dropped or failed", **_FAULT, **style))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
