"""How close does FedMD come to the paper, and what do the baselines reach?

    python benchmarks/paper.py [--experiments letters-iid ...] [--variant paper|released|tuned] [--width 0.25]
                               [--seeds 3] [--devices all] [--pretrained-dir DIR] [--runs-dir DIR] [--table]

Runs the experiments with `fedmd-jax run`, one seed after the other, stores the results in
`benchmarks/results/paper/*.json` with command, commit, date, device and versions, and writes the table and the curves
of all stored results to `benchmarks/README.md`. Data sets are found as by `fedmd-jax` (FEDMD_JAX_DATA). With --runs-dir
the directories of runs are kept, and the same command goes on with a run that was interrupted. With --table nothing is
run.
"""

import argparse
import contextlib
import datetime
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence

import numpy as np
import timing

from fedmd_jax.cli import main as fedmd_jax
from fedmd_jax.experiments.results.figures import new_figure, to_png

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "paper"
CURVES = "curves.png"
README = HERE / "README.md"
BEGIN, END = "<!-- the table of paper.py -->", "<!-- its end -->"
VARIANTS = ("paper", "released", "tuned")
EXPERIMENTS = ("letters-iid", "letters-writers", "cifar-iid", "cifar-superclass")
COLORS = {"paper": "black", "released": "tab:green", "tuned": "tab:orange"}
COLUMNS = ("transfer_accuracy", "local_accuracy", "final_accuracy", "pooled_accuracy")


def run(
    experiment: str, variant: str, width: float, seed: int, *, runs_dir: str | None = None, more: Sequence[str] = ()
) -> None:
    """Runs one seed and writes its file.

    Args:
      experiment: one of `EXPERIMENTS`.
      variant: one of `VARIANTS`.
      width: factor of the filters.
      seed: decides everything that is random.
      runs_dir: where the directory of the run is kept, and continued if it is there.
      more: options that change results by rounding at most.
    """
    name = experiment if variant == "paper" else f"{experiment}-{variant}"
    options = ["--width", str(width), "--seed", str(seed)]
    cpu_seconds = time.process_time()
    with tempfile.TemporaryDirectory() if runs_dir is None else contextlib.nullcontext(runs_dir) as folder:
        path = pathlib.Path(folder) / f"{name}-width{width:g}-seed{seed}"
        is_resumed, begun_at = path.exists(), path.with_name(f"{path.name}.commit")
        if not is_resumed:
            path.parent.mkdir(parents=True, exist_ok=True)
            begun_at.write_text(timing.commit())
        words = ["--resume", str(path)] if is_resumed else [name, *options, *more, "--out", str(path)]
        if fedmd_jax(["run", *words]) != 0:
            raise SystemExit(f"{experiment} with seed {seed} failed")
        summary, config = (json.loads((path / f"{name}.json").read_text()) for name in ("summary", "config"))
        commit = begun_at.read_text() if begun_at.exists() else timing.commit()
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    del summary["environment"]  # contains local folders; `xla_flags` is stored below
    curve = [
        statistics.mean(line["accuracy"] for line in lines if line["round"] == round_)
        for round_ in range(summary["num_rounds_done"] + 1)
    ]
    record = {
        "command": " ".join(["fedmd-jax", "run", name, *options]),
        "variant": variant,
        "width": width,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "pretrained_before": len(config["pretrained_from"]) / len(set(config["settings"]["networks"])),
        "devices": config["settings"]["devices"],
        "xla_flags": config["environment"].get("XLA_FLAGS"),
        "cpu_seconds": None if is_resumed else time.process_time() - cpu_seconds,
        "mean_accuracy_by_round": curve,
        **summary,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{experiment}-{variant}-width{width:g}-seed{seed}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")


def table(records: Iterable[dict]) -> str:
    """Markdown table: mean and standard deviation over the seeds per setting, commit and device, and missing runs."""
    found: dict[tuple, list[dict]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        found.setdefault((*setting(record), device(record), record["commit"]), []).append(record)
    wanted = {(name, variant, width) for variant in VARIANTS for name in EXPERIMENTS for width in (0.25, 1.0)}
    missing = {(*each, "", "") for each in wanted - {key[:3] for key in found}}
    heads = ["experiment", "variant", "width", "seeds", "transfer", "local only", "FedMD", "pooled", "gain"]
    heads += ["over local", "to pooled", "minutes", "device", "commit, date"]
    rows = [heads, ["---"] * len(heads)]
    first_seed = {key: group[0]["seed"] for key, group in found.items()}
    for key in sorted({*found, *missing}, key=lambda key: (*_order(key), first_seed.get(key, 0))):
        results = cells(found[key]) if key in found else ["**not made**", *[""] * (len(heads) - 4)]
        rows.append([key[0], key[1], f"{key[2]:g}", *results])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _order(key: tuple) -> tuple:
    return EXPERIMENTS.index(key[0]), *key[1:3]


def setting(record: dict) -> tuple[str, str, float]:
    """Experiment, variant and width."""
    return record["experiment"].removesuffix(f"-{record['variant']}"), record["variant"], record["width"]


def device(record: dict) -> str:
    """Number and kind of the devices, as in `1 x cpu`."""
    return f"{record['device']['count']} x {record['device']['kind']}"


def cells(records: list[dict]) -> list[str]:
    """The cells of one row after the setting."""

    def over_seeds(values: list[float], digits: int) -> str:
        mean = f"{statistics.mean(values):.{digits}f}"
        return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean

    means = [record["mean"] for record in records]
    points = ("gain_points", "gain_over_local_points", "gap_to_pooled_points")
    last = records[-1]
    accuracies = [over_seeds([mean[column] for mean in means], 3) for column in COLUMNS]
    if all("reestimated_accuracy" in mean for mean in means):
        accuracies[0] += f" ({over_seeds([mean['reestimated_accuracy'] for mean in means], 3)} re-estimated)"
    return [
        ", ".join(str(record["seed"]) for record in records),
        *accuracies,
        *(over_seeds([mean[column] for mean in means], 1) for column in points),
        over_seeds([record["seconds"]["total"] / 60 for record in records], 0) + of_cpu(records) + reused(records),
        device(last),
        f"{last['commit']}, {last['date']}",
    ]


def of_cpu(records: list[dict]) -> str:
    """Mean CPU minutes, which do not depend on other load."""
    if any(record.get("cpu_seconds") is None for record in records):  # resumed, or an older file
        return ""
    return f" ({statistics.mean(record['cpu_seconds'] / 60 for record in records):.0f} of cores)"


def reused(records: list[dict]) -> str:
    """Number of seeds whose public training was reused and is not in the minutes; fractions count single networks."""
    num_reused = sum(record.get("pretrained_before", 0) for record in records)
    return f", without public training of {num_reused:g}" if num_reused else ""


def curves(records: Iterable[dict]) -> bytes:
    """PNG of the mean accuracy after each round: a panel per experiment and width, a colour per variant.

    Lines are means over seeds and bands are from the lowest to the highest seed. Local-only training has the private
    steps of its variant. The pooled bound has one setting for all variants, and is a mean over the seeds of all.
    """
    panels: dict[tuple, dict[str, list[dict]]] = {}
    for record in sorted(records, key=lambda record: _order(setting(record))):
        experiment, variant, width = setting(record)
        panels.setdefault((experiment, width), {}).setdefault(variant, []).append(record)
    figure = new_figure(4.4 * len(panels), 3.8)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    for axes, ((experiment, width), variants) in zip(all_axes, panels.items(), strict=True):
        every = [record for group in variants.values() for record in group]
        _level_line(axes, every, "pooled_accuracy", label="pooled", color="tab:red", linestyle="--")
        for variant, group in variants.items():
            label = f"FedMD, {variant} ({_count(len(group), 'seed')})"
            _band(axes, [record["mean_accuracy_by_round"] for record in group], label=label, color=COLORS[variant])
            _level_line(
                axes, group, "local_accuracy", label=f"local only, {variant}", color=COLORS[variant], linestyle=":"
            )
        axes.set_title(f"{experiment}, width {width:g}", fontsize=10, loc="left")
        axes.set_xlabel("round (0: after transfer learning)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="lower right")
    all_axes[0].set_ylabel("test accuracy, mean of ten clients")
    return to_png(figure)


def _level_line(axes, records: Sequence[dict], column: str, **style) -> None:
    """Draws an accuracy that belongs to no round as a level line, as long as the longest curve."""
    last = max(record["num_rounds_done"] for record in records)
    _band(axes, [[record["mean"][column]] * (last + 1) for record in records], **{"linewidth": 1.2} | style)


def _band(axes, curves_of_seeds: Sequence[Sequence[float]], **style) -> None:
    """Draws the mean of curves of equal length, and a band from the lowest to the highest."""
    values = np.array(curves_of_seeds)
    rounds = np.arange(values.shape[1])
    axes.plot(rounds, values.mean(axis=0), **{"linewidth": 1.8} | style)
    axes.fill_between(rounds, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def write_table() -> None:
    """Replaces the table between the two marks, and the curves."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    before, rest = README.read_text().split(BEGIN)
    _, after = rest.split(END)
    drawn = ""
    if records:
        (RESULTS / CURVES).write_bytes(curves(records))
        drawn = f"![Mean accuracy by round](results/paper/{CURVES})\n\n"
    README.write_text(f"{before}{BEGIN}\n\n{table(records)}\n\n{drawn}{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, help="all by default")
    parser.add_argument("--variant", choices=VARIANTS, default="paper")
    parser.add_argument("--width", type=float, default=1.0, help="of the networks; 0.25 suits a CPU")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--pretrained-dir", help="as in `fedmd-jax run`: reuse public training")
    parser.add_argument("--runs-dir", help="keep the directories of runs, and go on with interrupted ones")
    parser.add_argument("--devices", help="as in `fedmd-jax run`: devices to shard clients over")
    parser.add_argument("--table", action="store_true", help="write the table and run nothing")
    options = parser.parse_args()
    given = {"--pretrained-dir": options.pretrained_dir, "--devices": options.devices}
    more = [word for name, value in given.items() if value is not None for word in (name, value)]
    for experiment in () if options.table else options.experiments or EXPERIMENTS:
        for seed in range(options.seed, options.seed + options.seeds):
            run(experiment, options.variant, options.width, seed, runs_dir=options.runs_dir, more=more)
            write_table()
    write_table()


if __name__ == "__main__":
    main()
