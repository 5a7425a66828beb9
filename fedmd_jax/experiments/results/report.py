"""Summaries of runs, and their tables for people."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from fedmd_jax.client.evaluation import class_accuracy
from fedmd_jax.experiments.run_directory import Record, origin
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.simulation.communication import CommunicationCost
from fedmd_jax.simulation.metrics import OK

_LOCAL_FAULT = "local only not finite"  # `local_status` of a round is not ok
# The last one only with `--batch-statistics public`.
ACCURACIES = ("transfer_accuracy", "final_accuracy", "local_accuracy", "pooled_accuracy", "reestimated_accuracy")
# Columns of tables, in this order.
TITLES = {
    "transfer_accuracy": "transfer",
    "local_accuracy": "local",
    "final_accuracy": "final",
    "pooled_accuracy": "pooled",
}


def algorithm_name(*summaries: Record) -> str | None:
    """The algorithm of runs as tables and plots name it; None if they have several.

    >>> algorithm_name({"algorithm": "ds-fl"}), algorithm_name({"experiment": "of an older version"})
    ('ds-fl', 'FedMD')
    """
    names = {summary.get("algorithm", "fedmd") for summary in summaries}
    return None if len(names) != 1 else names.pop().replace("fedmd", "FedMD")


def titles(*summaries: Record) -> dict[str, str]:
    """The columns of tables of runs; that of the final accuracy is named after the algorithm."""
    return {**TITLES, "final_accuracy": algorithm_name(*summaries) or "final"}


def summarize(
    name: str,
    experiment: Experiment,
    metrics: Sequence[Record],
    *,
    pooled: Mapping[int, float | None] | None,
    ensemble: float | None = None,
    communication: CommunicationCost,
    seconds: Mapping[str, float],
    interrupted: bool,
    continued: Sequence[Record] = (),
) -> Record:
    """The content of summary.json.

    Args:
      name: of the experiment.
      experiment: its settings.
      metrics: records of at least round 0, of clients and of the server.
      pooled: the upper bound per client id, if it is known.
      ensemble: accuracy of the ensemble of all clients after the last round, if it is known.
      communication: bytes of the rounds that are done.
      seconds: by phase.
      interrupted: whether the run is not finished.
      continued: where it was resumed with other versions or devices.
    """
    servers = [record for record in metrics if "client_id" not in record]
    metrics = [record for record in metrics if "client_id" in record]
    records = {(record["round"], record["client_id"]): record for record in metrics}
    last, faults = max(round_ for round_, _ in records), find_faults(metrics)
    clients = [
        {
            "client_id": client_id,
            "architecture": records[0, client_id]["architecture"],
            "transfer_accuracy": records[0, client_id]["accuracy"],
            "final_accuracy": records[last, client_id]["accuracy"],
            "local_accuracy": records[last, client_id].get("local_accuracy"),
            "pooled_accuracy": None if pooled is None else pooled[client_id],
            "faults": faults.get(client_id, {}),
            **{key: records[0, client_id][key] for key in ("reestimated_accuracy",) if key in records[0, client_id]},
        }
        for round_, client_id in sorted(records)
        if round_ == 0
    ]
    mean = {key: _mean([client[key] for client in clients]) for key in ACCURACIES if key in clients[0]}
    sizes = [record["consensus_size"] for record in metrics if "consensus_size" in record]
    stoppable = ("public_training", "private_training", "pooled_training")
    return {
        "experiment": name,
        "algorithm": experiment.algorithm,
        "batch_statistics": experiment.batch_statistics,
        "seed": experiment.seed,
        "evaluate_on": experiment.data.evaluate_on,
        "num_clients": len(clients),
        "num_rounds": experiment.num_rounds,
        "num_rounds_done": last,
        "early_stopping": {phase: getattr(experiment, phase).monitored for phase in stoppable},
        "clients": clients,
        "mean": {
            **mean,
            "ensemble_accuracy": ensemble,
            "server_accuracy": servers[-1]["accuracy"] if servers else None,
            "gain_points": _points(mean["final_accuracy"], mean["transfer_accuracy"]),
            "gain_over_local_points": _points(mean["final_accuracy"], mean["local_accuracy"]),
            "gap_to_pooled_points": _points(mean["pooled_accuracy"], mean["final_accuracy"]),
        },
        **({"consensus_size": {"first": sizes[0], "last": sizes[-1]}} if sizes else {}),
        "communication": communication._asdict(),
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "interrupted": interrupted,
        **({"continued": list(continued)} if continued else {}),
        **origin(),
    }


def find_faults(metrics: Sequence[Record]) -> dict[int, dict[str, list[int]]]:
    """What went wrong: client id -> fault, such as "digest not finite" or "dropped" -> the rounds.

    Args:
      metrics: records of metrics.jsonl.

    >>> find_faults([{"round": 2, "client_id": 5, "status": "straggler, scores not finite"}])
    {5: {'straggler': [2], 'scores not finite': [2]}}
    """
    faults: dict[int, dict[str, list[int]]] = {}
    for record in metrics:
        local = [] if record.get("local_status", OK) == OK else [_LOCAL_FAULT]
        for fault in [*record["status"].split(", "), *local]:
            if fault != OK:
                faults.setdefault(record["client_id"], {}).setdefault(fault, []).append(record["round"])
    return faults


def describe(summary: Record) -> str:
    """The table of a run or of several seeds, and remarks on it, as text of several lines."""
    remarks = _remarks_on_seeds(summary) if "seeds" in summary else _remarks_on_run(summary)
    if summary["evaluate_on"] != "test":
        remarks.insert(-2, f"accuracy is on {measured_on(summary)}")
    return "\n".join([*_table(summary), *remarks])


def brief(summary: Record) -> str:
    """A run or several seeds in one line."""
    seeds = f"{len(summary['seeds'])} seeds" if "seeds" in summary else f"seed {summary['seed']}"
    known = {title: summary["mean"][key] for key, title in titles(summary).items() if summary["mean"][key] is not None}
    numbers = ", ".join(f"{title} {format_number(value)}" for title, value in known.items())
    return f"{seeds}, mean accuracy: {numbers}"


def format_number(value: float | Mapping[str, Any] | None, form: str = ".3f") -> str:
    """A number, or mean and standard deviation over seeds, or as much of it as there is.

    >>> format_number({"mean": 8.5, "std": 1.2}, "+.1f")
    '+8.5 ±1.2'
    """
    if isinstance(value, Mapping):
        spread = "" if value["std"] is None else f" ±{format(value['std'], form.removeprefix('+'))}"
        return format(value["mean"], form) + spread
    return "-" if value is None else format(value, form)


def describe_classes(data: Record, records: Sequence[Record]) -> str:
    """A table of the accuracy of each client on each class, and of the class that is most often predicted instead.

    Args:
      data: settings of the data of the run.
      records: of confusion.jsonl.
    """
    counts = np.array([record["confusion"] for record in records])  # [K, C, C]
    num_public = counts.shape[-1] - len(data["private_classes"])
    names = [f"{data['public']} {label}" for label in range(num_public)]
    names += [f"{data['private']} {label}" for label in data["private_classes"]]
    accuracies, total = class_accuracy(counts), counts.sum(axis=0)
    rows = [["class", "examples", *(f"client {record['client_id']}" for record in records), "mean", "mistaken for"]]
    tested = np.flatnonzero(total.any(axis=1))
    for label in tested:
        mistakes = np.where(np.arange(len(names)) == label, 0, total[label])
        other, share = int(np.argmax(mistakes)), mistakes.max() / total[label].sum()
        cells = [format_number(float(value)) for value in (*accuracies[:, label], accuracies[:, label].mean())]
        mistaken = f"{names[other]} ({100 * share:.0f}%)" if share else "-"
        rows.append([names[label], str(counts[0, label].sum()), *cells, mistaken])
    untested = [name for label, name in enumerate(names) if label not in tested]
    header = f"accuracy by class after round {records[0]['round']}, on private {data['evaluate_on']} data"
    missing = [f"no test example of {', '.join(untested)}"] if untested else []
    lines = [line.rstrip() for line in aligned(rows, left=[0, len(rows[0]) - 1])]
    return "\n".join([header, *lines, *missing])


def aligned(rows: Sequence[Sequence[str]], left: Container[int]) -> list[str]:
    """The lines of a table.

    Args:
      rows: cells, as many in each row.
      left: numbers of the columns that are aligned to the left; the others are aligned to the right.

    >>> aligned([["a", "b"], ["long", "c"], ["x", "long"]], left=[0])
    ['a        b', 'long     c', 'x     long']
    """
    columns = []
    for number, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.ljust(width) if number in left else cell.rjust(width) for cell in column])
    return ["  ".join(line) for line in zip(*columns, strict=True)]


def measured_on(summary: Record) -> str:
    """What accuracy is measured on, in words.

    >>> measured_on({"evaluate_on": "validation"})
    'private validation data'
    """
    return f"private {summary['evaluate_on']} data"


def _table(summary: Record) -> list[str]:
    """A row for each client, their mean, their ensemble and the server: accuracies, and of a single run two gains.

    The row "re-estimated" is the mean after transfer learning, with the batch statistics of the public subset.
    """
    several = "seeds" in summary

    def cells(of_client: Record) -> list[str]:
        numbers = [format_number(of_client.get(key)) for key in TITLES]
        starts = [] if several else [of_client.get("transfer_accuracy"), of_client.get("local_accuracy")]
        return numbers + [format_number(_points(of_client["final_accuracy"], start), "+.1f") for start in starts]

    columns = [title.rjust(12 if several else 6) for title in titles(summary).values()]
    header = ["client", "architecture", *columns, *([] if several else ["  gain", "over local"])]
    rows = [[str(client["client_id"]), client["architecture"], *cells(client)] for client in summary["clients"]]
    means = [["mean", "", *cells(summary["mean"])]]
    others = {"re-estimated": "transfer_accuracy", "ensemble": "final_accuracy", "server": "final_accuracy"}
    for name, column in others.items():
        if (accuracy := summary["mean"].get(f"{name.replace('-', '')}_accuracy")) is not None:
            means.append([name, "", *cells({"final_accuracy": None, column: accuracy})])
    lines = aligned([header, *rows, *means], left=[1])
    return [*lines[: -len(means)], "-" * len(lines[0]), *lines[-len(means) :]]


def _remarks_on_run(summary: Record) -> list[str]:
    """What went wrong, where the run was continued, and what it has cost."""
    sent, seconds = summary["communication"], summary["seconds"]
    up, down, fedavg = (_bytes(sent[f"{kind}_bytes_per_client_round"]) for kind in ("upload", "download", "fedavg"))
    faults = [
        f"client {client['client_id']} ({client['architecture']}): {fault} in {_rounds(rounds, summary)}"
        for client in summary["clients"]
        for fault, rounds in client["faults"].items()
    ]
    return [
        *(["", *faults] if faults else []),
        "",
        *map(_describe_continued, summary.get("continued", [])),
        f"sent per client and round: {up} up, {down} down (FedAvg: {fedavg} each way)",
        f"seconds: {', '.join(f'{phase} {value:.0f}' for phase, value in seconds.items())}",
    ]


def _remarks_on_seeds(summary: Record) -> list[str]:
    gains = {"gain_points": "over transfer learning", "gain_over_local_points": "over local only"}
    known = {key: text for key, text in gains.items() if summary["mean"][key] is not None}
    gained = [f"{format_number(summary['mean'][key], '+.1f')} points {text}" for key, text in known.items()]
    seeds = summary["seeds"]
    return [
        "",
        f"{algorithm_name(summary)} gains {', '.join(gained)}",
        f"mean and standard deviation over {len(seeds)} seeds: {', '.join(map(str, seeds))}",
    ]


def _describe_continued(place: Record) -> str:
    after = "before round 0" if place["after_round"] is None else f"after round {place['after_round']}"
    device, versions = place["device"], place["versions"]
    where = f"{device['count']} x {device['kind']}, fedmd_jax {versions['fedmd_jax']}, jax {versions['jax']}"
    return f"continued {after} on {where}: the same but for rounding"


def _rounds(rounds: Sequence[int], summary: Record) -> str:
    if len(rounds) > 8:
        return f"{len(rounds)} of {summary['num_rounds_done']} rounds"
    return f"round{'s' if len(rounds) > 1 else ''} {', '.join(map(str, rounds))}"


def _points(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else 100 * (after - before)


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def _bytes(number: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
