"""Figures of what clients have learned, as matplotlib's Axes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import chex
import numpy as np

from fedmd_jax.checks import as_array, as_list
from fedmd_jax.client.evaluation import class_accuracy
from fedmd_jax.simulation.metrics import OK, RoundMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metrics = Iterable[RoundMetrics] | Iterable[Mapping[str, Any]]
_FAULT = {"marker": "x", "markeredgewidth": 1.5, "linestyle": "none"}
# As legends name them.
LABELS = {
    "transfer_accuracy": "after transfer learning",
    "local_accuracy": "local only (no digest)",
    "final_accuracy": "FedMD",
    "pooled_accuracy": "pooled upper bound",
}
_MEAN, _LOCAL = "mean of all clients", "mean of local only (no digest)"
_SERVER = -1  # in the place of a client id: records of the server's network
_MOST_IN_CELLS = 20  # classes with which the cells of a confusion matrix are large enough for numbers


def accuracy(
    history: Metrics | Sequence[Metrics],
    *,
    local: Metrics | Sequence[Metrics] | None = None,
    pooled: Mapping[int, Any] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Accuracy per round: a line for each client in the colour of its architecture, and the mean of all clients.

    A network of the server is a dotted line. A dot marks the first round, a cross a round in which a client was dropped
    or failed.

    Args:
      history: from `run_federation`, or the records of a run's `metrics.jsonl`. A list of several histories, which
        differ in their seeds only, is drawn as means over seeds, in bands of one standard deviation.
      local: history of `run_local_only` with the same rounds, whose mean over clients is a dashed line; of several
        histories a list of as many. The records of a run have it already.
      pooled: client id -> accuracy of the pooled upper bound, or a list of accuracies, one per seed; drawn behind the
        last round.
      ax: where to draw; by default in a new figure of pyplot.

    Returns:
      The axes. The label of each line is its client, such as "client 3".

    Raises:
      ValueError: no rounds, or histories of different clients or rounds.

    Example:
      >>> import fedmd_jax as fmd
      >>> from fedmd_jax.simulation import ClientMetrics, History, RoundMetrics
      >>> def after(round_, accuracies):
      ...     clients = (ClientMetrics(i, "cnn", a, None, None) for i, a in enumerate(accuracies))
      ...     return RoundMetrics(round_, tuple(clients), digested=True)
      >>> ax = fmd.plot.accuracy(History([after(0, [0.5, 0.6]), after(1, [0.7, 0.9])]), pooled={0: 0.8, 1: 0.9})
      >>> [line.get_label() for line in ax.get_lines() if not line.get_label().startswith("_")]
      ['client 0', 'client 1', 'mean of all clients']
    """
    runs = _read_runs(history, local)
    first = {client_id: next(iter(rounds.values())) for client_id, rounds in runs[0].items()}
    clients = {client_id: record["architecture"] for client_id, record in first.items() if client_id != _SERVER}
    curves = {client_id: _curve(runs, client_id, pooled) for client_id in clients}
    mean = _mean(list(curves.values()))
    colours = _colours(list(clients.values()))
    last = max(int(curve.rounds[-1]) for curve in curves.values())
    ax = _new_axes() if ax is None else ax
    for client_id, curve in curves.items():
        style = {"color": colours[clients[client_id]], "label": f"client {client_id}"}
        _draw(ax, curve, last, linewidth=1.2, markersize=4, alpha=0.65, **style)
    if len(clients) > 1:
        _draw(ax, mean, last, color="black", linewidth=2.4, markersize=6, alpha=1.0, label=_MEAN)
    if _is_known(mean.local):
        ax.plot(mean.rounds, mean.local.mean(axis=0), "--", color="black", linewidth=1.2, label=_LOCAL)
    if has_server := all(_SERVER in run for run in runs):
        server = _curve(runs, _SERVER, None)
        ax.plot(server.rounds, server.accuracy.mean(axis=0), ":", color="black", linewidth=1.8, label="server")
    _decorate(ax, int(mean.rounds[0]), last)
    faulty = any(curve.is_faulty.any() for curve in curves.values())
    handles = _legend(mean, colours, several=len(clients) > 1, has_server=has_server, faulty=faulty)
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    return ax


def confusion_matrix(confusion: chex.Array, *, labels: Sequence[Any] | None = None, ax: "Axes | None" = None) -> "Axes":
    """Which classes are mistaken for which: the share of the examples of each class (row) by predicted class (column).

    Classes that have no example and are never predicted are left out.

    Args:
      confusion: counts by label and predicted class, [C, C]: `confusion[k]` of what
        `federation.evaluate(states, test, confusion=True)` gives for a group, or a sum over clients.
      labels: names of the C classes; by default their numbers.
      ax: where to draw; by default in a new figure of pyplot.

    Returns:
      The axes.

    Raises:
      ValueError: counts of another shape or of no examples, or another number of labels.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> counts = np.array([[9, 1, 0], [5, 5, 0], [0, 0, 0]])
      >>> ax = fmd.plot.confusion_matrix(counts, labels=["cat", "dog", "owl"])
      >>> [text.get_text() for text in ax.texts]  # half of the dogs are taken for cats
      ['90', '10', '50', '50']
      >>> [label.get_text() for label in ax.get_yticklabels()]
      ['cat 0.90', 'dog 0.50']
    """
    counts = as_array("confusion", confusion)
    shares = class_accuracy(counts)
    if counts.ndim != 2 or not counts.any():
        raise ValueError(f"confusion counts [C, C] of at least one example are needed, got shape {counts.shape}")
    labels = list(range(len(counts))) if labels is None else as_list("labels", labels)
    if len(labels) != len(counts):
        raise ValueError(f"a label for each of the {len(counts)} classes is needed, got {len(labels)}")
    rows = np.flatnonzero(counts.any(axis=1))
    columns = np.flatnonzero(counts.any(axis=0) | counts.any(axis=1))
    percent = 100 * counts[rows][:, columns] / counts[rows].sum(axis=1, keepdims=True)
    ax = _new_axes() if ax is None else ax
    ax.imshow(percent, vmin=0, vmax=100, cmap="Blues")
    ax.set_xticks(range(len(columns)), [str(labels[i]) for i in columns], rotation=90)
    ax.set_yticks(range(len(rows)), [f"{labels[i]} {shares[i]:.2f}" for i in rows])
    ax.set_xlabel("predicted class")
    ax.set_ylabel("class, and accuracy on its examples")
    for (row, column), value in np.ndenumerate(percent) if len(columns) <= _MOST_IN_CELLS else ():
        if value > 0:
            colour = "white" if value > 50 else "black"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    return ax


class _Curve(NamedTuple):
    """One client, or the mean of all, in S runs and T rounds; NaN if unknown."""

    rounds: np.ndarray  #: [T]
    accuracy: np.ndarray  #: [S, T]
    local: np.ndarray  #: [S, T]: without digests
    pooled: np.ndarray  #: [S]: the upper bound
    is_faulty: np.ndarray  #: [T], bool: whether anything went wrong in this round of any run


_Run = dict[int, dict[int, dict[str, Any]]]  # client id -> round -> record


def _read_runs(history: Metrics | Sequence[Metrics], local: Metrics | Sequence[Metrics] | None) -> list[_Run]:
    """The records of each run, to which those of the local-only baseline are added."""
    runs, baselines = _by_client("history", history), [] if local is None else _by_client("local", local)
    rounds, of_local = [_rounds_of(run) for run in runs], [_rounds_of(run) for run in baselines]
    if not rounds or not all(rounds) or rounds != rounds[:1] * len(rounds):
        raise ValueError("histories of at least one round are needed, all with the same clients and rounds")
    if local is not None and of_local != rounds:
        raise ValueError("local must have one history for each of history, with the same clients and rounds")
    for run, baseline in zip(runs, baselines, strict=False):
        for client_id, round_ in rounds[0]:
            run[client_id][round_]["local_accuracy"] = baseline[client_id][round_]["accuracy"]
    return runs


def _rounds_of(run: _Run) -> list[tuple[int, int]]:
    return [
        (client_id, round_) for client_id in sorted(run) if client_id != _SERVER for round_ in sorted(run[client_id])
    ]


def _by_client(name: str, history: Metrics | Sequence[Metrics]) -> list[_Run]:
    """The records of one history or of several, which are lists of histories."""
    histories = as_list(name, history)
    if histories and isinstance(histories[0], (RoundMetrics, Mapping)):
        histories = [histories]
    runs: list[_Run] = [{} for _ in histories]
    for run, metrics in zip(runs, histories, strict=True):
        for each in metrics:
            for record in each.to_dicts() + each.server_dicts() if isinstance(each, RoundMetrics) else [each]:
                run.setdefault(record.get("client_id", _SERVER), {})[record["round"]] = dict(record)
    return runs


def _curve(runs: Sequence[_Run], client_id: int, pooled: Mapping[int, Any] | None) -> _Curve:
    rounds = sorted(runs[0][client_id])
    records = [[run[client_id][round_] for round_ in rounds] for run in runs]

    def values(key: str) -> np.ndarray:
        return np.array([[record.get(key) for record in of_run] for of_run in records], float)

    faults = [[{each.get("status"), each.get("local_status")} - {OK, None} for each in of_run] for of_run in records]
    bound = np.broadcast_to(np.array(np.nan if pooled is None else pooled[client_id], float), len(runs))
    return _Curve(np.array(rounds), values("accuracy"), values("local_accuracy"), bound, np.any(faults, axis=0))


def _mean(curves: Sequence[_Curve]) -> _Curve:
    """Over the clients of each round; unknown if it is unknown for one of them. Faults are of clients only."""
    rounds = np.unique(np.concatenate([curve.rounds for curve in curves]))
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for round_ in rounds:
        present = [(curve, np.searchsorted(curve.rounds, round_)) for curve in curves if round_ in curve.rounds]
        found.append(np.mean([(curve.accuracy[:, i], curve.local[:, i]) for curve, i in present], axis=0))
    accuracies, local = np.moveaxis(found, 0, -1)
    bound = np.mean([curve.pooled for curve in curves], axis=0)
    return _Curve(rounds, accuracies, local, bound, np.zeros(len(rounds), bool))


def _is_known(values: np.ndarray) -> bool:
    return not np.isnan(values).any()


def _new_axes() -> "Axes":
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(8.0, 4.8), layout="constrained")[1]


def _colours(architectures: Iterable[str]) -> dict[str, Any]:
    """A colour for each different architecture."""
    from matplotlib import colormaps

    names = list(dict.fromkeys(architectures))
    palette = colormaps["tab10"] if len(names) <= 10 else colormaps["turbo"].resampled(len(names))
    return {name: palette(i) for i, name in enumerate(names)}


def _draw(ax: "Axes", curve: _Curve, last: int, *, color: Any, markersize: float, **style: Any) -> None:
    """A line over the rounds with a dot at its start; in the margin behind the last round its upper bound."""
    centre, spread = curve.accuracy.mean(axis=0), _spread(curve.accuracy)
    ax.plot(curve.rounds, centre, color=color, marker="o", markevery=[0], markersize=markersize, **style)
    faulty = curve.is_faulty
    ax.plot(curve.rounds[faulty], centre[faulty], color=color, markersize=markersize + 2, **_FAULT)
    if spread is not None:
        band = (centre - spread, centre + spread)
        ax.fill_between(curve.rounds, *band, color=color, alpha=0.15 * style["alpha"], linewidth=0)
    bars = {"color": color, "elinewidth": 0.8, "markersize": markersize}
    ends = [last + part * _margin(last) for part in (0.55, 0.95)]
    ax.plot(ends, [curve.pooled.mean()] * 2, color=color, linewidth=max(2.0, style["linewidth"]))
    ax.errorbar(np.mean(ends), curve.pooled.mean(), _spread(curve.pooled), **bars)


def _spread(values: np.ndarray) -> np.ndarray | None:
    """The standard deviation of the sample over runs; None for one run."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else None


def _margin(last: int) -> float:
    return max(0.5, 0.08 * last)


def _decorate(ax: "Axes", first: int, last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(integer=True).tick_values(first, max(last, first + 1))
    ax.set_xticks([tick for tick in ticks if first <= tick <= last])
    ax.set_xlim(first - _margin(last), last + _margin(last))
    low, high = ax.dataLim.intervaly
    ax.set_ylim(max(low - 0.04, -0.01), min(high + 0.04, 1.01))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    start = " (0: after transfer learning, before any collaboration)" if first == 0 else ""
    ax.set_xlabel(f"round{start}")
    ax.set_ylabel("accuracy")


def _legend(mean: _Curve, colours: Mapping[str, Any], *, several: bool, has_server: bool, faulty: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    entries = [{"color": colour, "label": name} for name, colour in colours.items()]
    if several:
        entries.append({"color": "black", "linewidth": 2.4, "label": _MEAN})
    style = {"color": "gray", "linestyle": "none"}
    if mean.rounds[0] == 0:
        entries.append({**style, "marker": "o", "markersize": 4, "label": LABELS["transfer_accuracy"]})
    if _is_known(mean.local):
        entries.append({"color": "black", "linestyle": "--", "linewidth": 1.2, "label": _LOCAL})
    if has_server:
        entries.append({"color": "black", "linestyle": ":", "linewidth": 1.8, "label": "network of the server"})
    if _is_known(mean.pooled):
        entries.append({**style, "marker": "_", "markersize": 10, "mew": 2, "label": LABELS["pooled_accuracy"]})
    if faulty:
        entries.append({**style, **_FAULT, "markersize": 6, "label": "dropped or failed"})
    return [Line2D([], [], **entry) for entry in entries]
