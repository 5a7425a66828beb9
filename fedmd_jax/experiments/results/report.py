"""A run's numbers for people: the summary and the table, from what the run directory holds."""

from collections.abc import Callable, Container, Mapping, Sequence

import numpy as np

from fedmd_jax.experiments.run_directory import Record, origin
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.simulation.communication import CommunicationCost
from fedmd_jax.simulation.metrics import OK

_LOCAL_FAULT = "local only not finite"  # `local_status` of a round is not ok
ACCURACIES = ("transfer_accuracy", "final_accuracy", "local_accuracy", "pooled_accuracy")
# As they are named in tables, and in that order.
TITLES = {
    "transfer_accuracy": "transfer",
    "local_accuracy": "local",
    "final_accuracy": "FedMD",
    "pooled_accuracy": "pooled",
}


def summarize(
    name: str,
    experiment: Experiment,
    metrics: Sequence[Record],
    *,
    pooled: Mapping[int, float | None] | None,
    communication: CommunicationCost,
    seconds: Mapping[str, float],
    interrupted: bool,
    continued: Sequence[Record] = (),
) -> Record:
    """The content of summary.json.

    Args:
      name: of the experiment.
      experiment: its settings.
      metrics: records of at least round 0.
      pooled: the upper bound per client id, if it is known.
      communication: bytes of the rounds that are done.
      seconds: by phase.
      interrupted: whether the run is not finished.
      continued: where it was resumed with other versions or devices.
    """
    last = max(record["round"] for record in metrics)
    first, final = (
        {record["client_id"]: record for record in metrics if record["round"] == round_} for round_ in (0, last)
    )
    faults = find_faults(metrics)
    clients = [
        {
            "client_id": client_id,
            "architecture": record["architecture"],
            "transfer_accuracy": record["accuracy"],
            "final_accuracy": final[client_id]["accuracy"],
            "local_accuracy": final[client_id].get("local_accuracy"),
            "pooled_accuracy": None if pooled is None else pooled[client_id],
            "faults": faults.get(client_id, {}),
        }
        for client_id, record in sorted(first.items())
    ]
    mean = {key: _mean(clients, key) for key in ACCURACIES}
    return {
        "experiment": name,
        "seed": experiment.seed,
        "evaluate_on": experiment.data.evaluate_on,
        "num_clients": len(clients),
        "num_rounds": experiment.num_rounds,
        "num_rounds_done": last,
        "early_stopping": {
            phase: getattr(experiment, phase).monitored
            for phase in ("public_training", "private_training", "pooled_training")
        },
        "clients": clients,
        "mean": {
            **mean,
            "gain_points": _points(mean["final_accuracy"], mean["transfer_accuracy"]),
            "gain_over_local_points": _points(mean["final_accuracy"], mean["local_accuracy"]),
            "gap_to_pooled_points": _points(mean["pooled_accuracy"], mean["final_accuracy"]),
        },
        "communication": communication._asdict(),
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "interrupted": interrupted,
        **({"continued": list(continued)} if continued else {}),
        **origin(),
    }


def find_faults(metrics: Sequence[Record]) -> dict[int, dict[str, list[int]]]:
    """What went wrong: client id -> what, such as "digest not finite" or "dropped" -> the rounds.

    Args:
      metrics: records of metrics.jsonl.

    >>> find_faults([{"round": 2, "client_id": 5, "status": "straggler, scores not finite"}])
    {5: {'straggler': [2], 'scores not finite': [2]}}
    """
    faults: dict[int, dict[str, list[int]]] = {}
    for record in metrics:
        status = record.get("status") or OK
        local = [] if record.get("local_status", OK) == OK else [_LOCAL_FAULT]
        for what in [*([] if status == OK else status.split(", ")), *local]:
            faults.setdefault(record["client_id"], {}).setdefault(what, []).append(record["round"])
    return faults


def describe(summary: Record) -> str:
    """The table, what went wrong if anything did, and what the run has cost, as text of several lines."""
    sent, seconds = summary["communication"], summary["seconds"]
    up, down, fedavg = (_bytes(sent[f"{kind}_bytes_per_client_round"]) for kind in ("upload", "download", "fedavg"))
    return (
        f"{table(summary)}\n{_describe_faults(summary)}\n"
        f"{describe_evaluation(summary)}{_describe_continued(summary)}"
        f"sent per client and round: {up} up, {down} down (FedAvg: {fedavg} each way)\n"
        f"seconds: {', '.join(f'{phase} {value:.0f}' for phase, value in seconds.items())}"
    )


def table(summary: Record) -> str:
    """Client, architecture, accuracy after transfer learning, local only, FedMD and pooled, and FedMD's two gains."""
    titles = [*(f"{title:>6}" for title in TITLES.values()), "  gain", "over local"]
    return "\n".join(client_table(summary, titles, _cells))


def client_table(summary: Record, titles: Sequence[str], cells: Callable[[Record], Sequence[str]]) -> list[str]:
    """The lines of a table: a header, a row for each client, and the mean of all clients.

    Args:
      summary: of one run, or of several seeds.
      titles: of the columns that follow client and architecture.
      cells: the cells in these columns for a client of the summary, or for its mean.
    """
    rows = [[str(client["client_id"]), client["architecture"], *cells(client)] for client in summary["clients"]]
    rows = [["client", "architecture", *titles], *rows, ["mean", "", *cells(summary["mean"])]]
    *lines, mean = aligned(rows, left=[1])
    return [*lines, "-" * len(mean), mean]


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
    """What accuracy is measured on, in words; a summary of an older version may not tell.

    >>> measured_on({"evaluate_on": "validation"})
    'private validation data'
    """
    return f"private {summary.get('evaluate_on') or 'test'} data"


def describe_evaluation(summary: Record) -> str:
    """A line where accuracy is not of the test set."""
    return "" if summary.get("evaluate_on") in (None, "test") else f"accuracy is on {measured_on(summary)}\n"


def _describe_continued(summary: Record) -> str:
    """A line for each time that the run went on elsewhere."""
    lines = []
    for place in summary.get("continued", []):
        after = "before round 0" if place["after_round"] is None else f"after round {place['after_round']}"
        device, versions = place["device"], place["versions"]
        where = f"{device['count']} x {device['kind']}, fedmd_jax {versions['fedmd_jax']}, jax {versions['jax']}"
        lines.append(f"went on {after} on {where}: the same but for rounding\n")
    return "".join(lines)


def _describe_faults(summary: Record) -> str:
    """A line for each client and each of its faults; empty if there are none."""
    lines = [
        f"client {client['client_id']} ({client['architecture']}): {what} in {_rounds(rounds, summary)}\n"
        for client in summary["clients"]
        for what, rounds in (client.get("faults") or {}).items()
    ]
    return "".join(["\n", *lines] if lines else [])


def _rounds(rounds: Sequence[int], summary: Record) -> str:
    if len(rounds) > 8:
        return f"{len(rounds)} of {summary['num_rounds_done']} rounds"
    return f"round{'s' if len(rounds) > 1 else ''} {', '.join(map(str, rounds))}"


def _cells(accuracies: Record) -> list[str]:
    # A run of an older version has no local-only baseline.
    transfer, local, final, pooled = (accuracies.get(key) for key in TITLES)
    gains = [_points(final, before) for before in (transfer, local)]
    shown = [(value, ".3f") for value in (transfer, local, final, pooled)] + [(gain, "+.1f") for gain in gains]
    return ["-" if value is None else format(value, form) for value, form in shown]


def _points(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else 100 * (after - before)


def _mean(clients: Sequence[Record], key: str) -> float | None:
    values = [client[key] for client in clients]
    return None if None in values else float(np.mean(values))


def _bytes(number: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
