"""A run's numbers for people: the summary, the table and the plot, all from what the run directory holds."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedmd_jax.communication import Communication
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.federation import RoundMetrics

Record = dict[str, Any]


def round_records(metrics: RoundMetrics) -> list[Record]:
    """The lines of metrics.jsonl for one round, one per client."""
    return [
        {
            "event": "round",
            "round": metrics.round,
            "client_id": client.client_id,
            "architecture": client.architecture,
            "accuracy": client.accuracy,
            "digest_loss": _finite(client.digest_loss),
            "revisit_loss": _finite(client.revisit_loss),
        }
        for client in metrics.clients
    ]


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
      pooled: the upper bound per client, if it is known.
      communication: bytes of the whole run.
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


def table(summary: Record) -> str:
    """Client, architecture, accuracy after transfer learning, after FedMD, pooled, and the gain in points."""
    width = max(len("architecture"), *(len(client["architecture"]) for client in summary["clients"]))
    header = f"{'client':>6}  {'architecture':<{width}}  {'transfer':>8}  {'FedMD':>6}  {'pooled':>6}  {'gain':>6}"
    rows = [
        _row(
            client["client_id"],
            client["architecture"],
            width,
            client["transfer_accuracy"],
            client["final_accuracy"],
            client["pooled_accuracy"],
        )
        for client in summary["clients"]
    ]
    mean = summary["mean"]
    rows.append("-" * len(header))
    rows.append(_row("mean", "", width, mean["transfer_accuracy"], mean["final_accuracy"], mean["pooled_accuracy"]))
    return "\n".join([header, *rows])


def plot(summary: Record, metrics: Sequence[Record]) -> bytes:
    """Accuracy per round as a PNG: a line per client from its transfer-learning start, with its pooled bound.

    Args:
      summary: the content of summary.json.
      metrics: the records of metrics.jsonl.

    Returns:
      The bytes of the file.
    """
    from matplotlib.figure import Figure  # takes half a second to import, which the help does not need

    figure = Figure(figsize=(8.0, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    architectures = list(dict.fromkeys(client["architecture"] for client in summary["clients"]))
    colours = {name: f"C{i % 10}" for i, name in enumerate(architectures)}
    last = summary["num_rounds_done"]
    for client in summary["clients"]:
        colour, client_id = colours[client["architecture"]], client["client_id"]
        curve = sorted((r["round"], r["accuracy"]) for r in metrics if r["client_id"] == client_id)
        axes.plot(*zip(*curve, strict=True), color=colour, alpha=0.55, linewidth=1.2)
        axes.plot(0, client["transfer_accuracy"], "o", color=colour, markersize=4)
        if client["pooled_accuracy"] is not None:
            axes.plot(
                [last + 0.15, last + 0.55],
                [client["pooled_accuracy"]] * 2,
                color=colour,
                linewidth=2,
                solid_capstyle="butt",
                clip_on=False,
            )
    rounds = range(last + 1)
    mean = [np.mean([r["accuracy"] for r in metrics if r["round"] == round_]) for round_ in rounds]
    axes.plot(rounds, mean, color="black", linewidth=2.4)
    _decorate(axes, summary, colours)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _decorate(axes, summary, colours):
    from matplotlib.lines import Line2D

    mean, last = summary["mean"], summary["num_rounds_done"]
    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    handles.append(Line2D([], [], color="black", linewidth=2.4, label="mean of all clients"))
    handles.append(
        Line2D([], [], color="gray", marker="o", markersize=4, linestyle="none", label="after transfer learning")
    )
    title = (
        f"{summary['experiment']}, seed {summary['seed']}: mean {mean['transfer_accuracy']:.3f} after transfer "
        f"learning, {mean['final_accuracy']:.3f} after {last} rounds"
    )
    if mean["pooled_accuracy"] is not None:
        handles.append(Line2D([], [], color="gray", linewidth=2, label="pooled upper bound"))
        title += f", {mean['pooled_accuracy']:.3f} pooled"
    axes.legend(handles=handles, loc="lower right", fontsize=8, frameon=False)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("round (0: after transfer learning, before any collaboration)")
    axes.set_ylabel("accuracy on private test data")
    axes.set_xlim(-0.3, last + 0.7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _row(client, architecture, width, transfer, final, pooled):
    bound = "-" if pooled is None else f"{pooled:.3f}"
    gain = 100 * (final - transfer)
    return f"{client:>6}  {architecture:<{width}}  {transfer:>8.3f}  {final:>6.3f}  {bound:>6}  {gain:>+6.1f}"


def _by_client(metrics, round_):
    return {record["client_id"]: record for record in metrics if record["round"] == round_}


def _mean(clients, key):
    values = [client[key] for client in clients]
    return None if None in values else float(np.mean(values))


def _finite(value):
    return value if value is None or np.isfinite(value) else None
