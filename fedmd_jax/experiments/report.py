"""A run's numbers for people: the summary, the table and the plot, all from what the run directory holds."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedmd_jax.communication import Communication
from fedmd_jax.experiments.run_directory import Record
from fedmd_jax.experiments.settings import Experiment


def summarize(
    name: str,
    experiment: Experiment,
    metrics: Sequence[Record],
    pooled: Mapping[int, float] | None,
    communication: Communication,
    seconds: Mapping[str, float],
) -> Record:
    """The content of summary.json, without versions and device.

    Args:
      name: of the experiment.
      experiment: its settings.
      metrics: records of at least round 0.
      pooled: the upper bound per client id, if it is known.
      communication: bytes of the rounds that are done.
      seconds: by phase.
    """
    last = max(record["round"] for record in metrics)
    first, final = (_by_client(metrics, round_) for round_ in (0, last))
    clients = [
        {
            "client_id": client_id,
            "architecture": record["architecture"],
            "transfer_accuracy": record["accuracy"],
            "final_accuracy": final[client_id]["accuracy"],
            "pooled_accuracy": None if pooled is None else pooled[client_id],
        }
        for client_id, record in sorted(first.items())
    ]
    transfer, end, bound = (_mean(clients, f"{kind}_accuracy") for kind in ("transfer", "final", "pooled"))
    return {
        "experiment": name,
        "seed": experiment.seed,
        "num_clients": len(clients),
        "num_rounds": experiment.num_rounds,
        "num_rounds_done": last,
        "clients": clients,
        "mean": {
            "transfer_accuracy": transfer,
            "final_accuracy": end,
            "pooled_accuracy": bound,
            "gain_points": 100 * (end - transfer),
            "gap_to_pooled_points": None if bound is None else 100 * (bound - end),
        },
        "communication": communication._asdict(),
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
    }


def describe(summary: Record) -> str:
    """The table, and what the run has cost, as text of several lines."""
    sent, seconds = summary["communication"], summary["seconds"]
    up, down, fedavg = (_bytes(sent[f"{kind}_bytes_per_client_round"]) for kind in ("upload", "download", "fedavg"))
    return (
        f"{table(summary)}\n\n"
        f"sent per client and round: {up} up, {down} down (FedAvg: {fedavg} each way)\n"
        f"seconds: {', '.join(f'{phase} {value:.0f}' for phase, value in seconds.items())}"
    )


def table(summary: Record) -> str:
    """Client, architecture, accuracy after transfer learning, after FedMD, pooled, and the gain in points."""
    width = max(len("architecture"), *(len(client["architecture"]) for client in summary["clients"]))
    header = f"{'client':>6}  {'architecture':<{width}}  {'transfer':>8}  {'FedMD':>6}  {'pooled':>6}  {'gain':>6}"
    rows = [_row(client["client_id"], client["architecture"], client, width) for client in summary["clients"]]
    return "\n".join([header, *rows, "-" * len(header), _row("mean", "", summary["mean"], width)])


def _row(client: Any, architecture: str, accuracies: Record, width: int) -> str:
    transfer, final, pooled = (accuracies[f"{kind}_accuracy"] for kind in ("transfer", "final", "pooled"))
    bound = "-" if pooled is None else f"{pooled:.3f}"
    gain = 100 * (final - transfer)
    return f"{client:>6}  {architecture:<{width}}  {transfer:>8.3f}  {final:>6.3f}  {bound:>6}  {gain:>+6.1f}"


def plot(summary: Record, metrics: Sequence[Record]) -> bytes:
    """Accuracy per round as a PNG: a line per client from its transfer-learning start, with its pooled bound.

    Args:
      summary: the content of summary.json.
      metrics: the records of metrics.jsonl.

    Returns:
      The bytes of the file.
    """
    from matplotlib.figure import Figure  # takes half a second to import, which the help does not need

    clients, last = summary["clients"], summary["num_rounds_done"]
    colours = _colours([client["architecture"] for client in clients])
    # The legend stands beside the axes: a row per architecture, as wide as the longest name.
    width, height = 7.4 + 0.075 * max(map(len, [_MEAN, *colours])), 1.6 + 0.16 * len(colours)
    figure = Figure(figsize=(width, max(4.8, height)), dpi=150, layout="constrained")
    axes = figure.subplots()
    accuracies = np.array([_by_round(metrics, client["client_id"], last) for client in clients])
    for client, accuracy in zip(clients, accuracies, strict=True):
        colour = colours[client["architecture"]]
        _draw(axes, accuracy, client["pooled_accuracy"], color=colour, linewidth=1.2, markersize=4, alpha=0.65)
    if len(clients) > 1:
        pooled = summary["mean"]["pooled_accuracy"]
        _draw(axes, accuracies.mean(axis=0), pooled, color="black", linewidth=2.4, markersize=6)
    _decorate(axes, last)
    axes.set_title(_title(summary), fontsize=9, loc="left")
    _add_legend(figure, summary, colours)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


_MEAN = "mean of all clients"


def _colours(architectures: Sequence[str]) -> dict[str, Any]:
    """A colour for each different architecture, easy to tell apart for up to twenty."""
    from matplotlib import colormaps

    names = list(dict.fromkeys(architectures))
    if len(names) <= 20:
        palette = colormaps["tab10" if len(names) <= 10 else "tab20"]
        return {name: palette(i) for i, name in enumerate(names)}
    return {name: colormaps["turbo"](i / (len(names) - 1)) for i, name in enumerate(names)}


def _draw(axes: Any, accuracy: Sequence[float], pooled: float | None, *, markersize: float, **style: Any) -> None:
    """A line over the rounds, a dot at its start, and a dash for its bound in the margin behind the last round."""
    last = len(accuracy) - 1
    axes.plot(range(last + 1), accuracy, **style)
    axes.plot(0, accuracy[0], "o", color=style["color"], markersize=markersize)
    if pooled is not None:
        ends = [last + part * _margin(last) for part in (0.3, 0.9)]
        axes.plot(ends, [pooled, pooled], color=style["color"], linewidth=max(2.0, style["linewidth"]))


def _margin(last: int) -> float:
    return max(0.5, 0.05 * last)


def _decorate(axes: Any, last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(integer=True).tick_values(0, max(last, 1))
    axes.set_xticks([tick for tick in ticks if 0 <= tick <= last])
    axes.set_xlim(-_margin(last), last + _margin(last))
    low, high = axes.dataLim.intervaly
    axes.set_ylim(max(low - 0.04, -0.01), min(high + 0.04, 1.01))
    axes.set_xlabel("round (0: after transfer learning, before any collaboration)")
    axes.set_ylabel("accuracy on private test data")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _title(summary: Record) -> str:
    mean, last = summary["mean"], summary["num_rounds_done"]
    rounds = f"{last} round" if last == 1 else f"{last} rounds"
    pooled = "" if mean["pooled_accuracy"] is None else f", {mean['pooled_accuracy']:.3f} pooled"
    return (
        f"{summary['experiment']}, seed {summary['seed']}; mean accuracy:\n"
        f"{mean['transfer_accuracy']:.3f} after transfer learning, "
        f"{mean['final_accuracy']:.3f} after {rounds} of FedMD{pooled}"
    )


def _add_legend(figure: Any, summary: Record, colours: Mapping[str, Any]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    if len(summary["clients"]) > 1:
        handles.append(Line2D([], [], color="black", linewidth=2.4, label=_MEAN))
    style = {"color": "gray", "linestyle": "none"}
    handles.append(Line2D([], [], marker="o", markersize=4, label="after transfer learning", **style))
    if summary["mean"]["pooled_accuracy"] is not None:
        handles.append(Line2D([], [], marker="_", markersize=10, mew=2, label="pooled upper bound", **style))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)


def _by_client(metrics: Sequence[Record], round_: int) -> dict[int, Record]:
    return {record["client_id"]: record for record in metrics if record["round"] == round_}


def _by_round(metrics: Sequence[Record], client_id: int, last: int) -> list[float]:
    """A client's accuracy in rounds 0 to `last`."""
    accuracy = {record["round"]: record["accuracy"] for record in metrics if record["client_id"] == client_id}
    return [accuracy[round_] for round_ in range(last + 1)]


def _mean(clients: Sequence[Record], key: str) -> float | None:
    values = [client[key] for client in clients]
    return None if None in values else float(np.mean(values))


def _bytes(number: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
