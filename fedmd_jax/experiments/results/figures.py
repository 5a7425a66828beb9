"""Plots of runs, from what their directories hold."""

import io
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedmd_jax.checks import one_line
from fedmd_jax.experiments.results.report import algorithm_name, measured_on
from fedmd_jax.experiments.run_directory import Record, replace_file
from fedmd_jax.plot import accuracy

Run = tuple[Record, Sequence[Record]]  # the content of summary.json, and the records of metrics.jsonl


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
    """The same of runs that differ in their seeds only: means over seeds, in bands of one standard deviation."""
    return to_png(draw_seeds(runs))


def draw_seeds(runs: Sequence[Run]) -> Any:
    """The matplotlib figure of `plot_seeds`, or of `plot` for one run.

    Args:
      runs: at least one, all of the same number of rounds.
    """
    summary = runs[0][0]
    # The legend stands beside the axes: a row per architecture, as wide as the longest name.
    names = {client["architecture"] for client in summary["clients"]}
    width, height = 7.4 + 0.075 * max(20, *map(len, names)), 1.6 + 0.16 * len(names)
    bounds = zip(*([client["pooled_accuracy"] for client in each["clients"]] for each, _ in runs), strict=True)
    pooled = dict(zip([client["client_id"] for client in summary["clients"]], bounds, strict=True))
    axes = new_axes(width, max(4.8, height), _title(runs))
    accuracy([metrics for _, metrics in runs], pooled=pooled, ax=axes)
    axes.set_ylabel(f"accuracy on {measured_on(summary)}")
    return axes.figure


def new_axes(width: float, height: float, title: str) -> Any:
    """The axes of a figure that has no others; its size is in inches."""
    axes = new_figure(width, height).subplots()
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches. It belongs to no backend: saving as PNG takes Agg."""
    from matplotlib.figure import Figure  # takes half a second, which the help does not need

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def to_png(figure: Any) -> bytes:
    """The content of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _title(runs: Sequence[Run]) -> str:
    summary, last = runs[0][0], runs[0][0]["num_rounds_done"]
    seeds = ", ".join(str(summary["seed"]) for summary, _ in runs)
    seeds = f"seeds {seeds} (band: one standard deviation)" if len(runs) > 1 else f"seed {seeds}"
    named = {
        "transfer_accuracy": "after transfer learning",
        "final_accuracy": f"after {last} round{'s' * (last != 1)} of {algorithm_name(summary)}",
        "local_accuracy": "local only",
        "pooled_accuracy": "pooled",
    }
    means = {name: [summary["mean"][key] for summary, _ in runs] for key, name in named.items()}
    known = [f"{np.mean(values):.3f} {name}" for name, values in means.items() if None not in values]
    return f"{summary['experiment']}, {seeds}; mean accuracy:\n{', '.join(known)}"
