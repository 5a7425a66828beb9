"""Which method of the family reaches which accuracy with how many bytes?

    python benchmarks/methods.py [--splits 0.1 1 iid] [--methods fedmd ds-fl ...] [--seeds 5] [--out DIR] [--table]
                                 [--experiment NAME] [--smoke] [--settings "--num-rounds 4"] [--pretrained-dir DIR]

Runs every method on every split with the train loop of `fedmd-jax run`. Methods are paired: with one seed they have the
same images, split, public subsets, numbers of private steps, and, if they digest, numbers of digest steps. They also
have the same networks after the public half of transfer learning, except that algorithms which average weights start
with one network per group. A split is the alpha of `--data.split dirichlet`, or iid. By default six clients with two
small networks have MNIST digits as public and 60 EMNIST letters each as private images; `--experiment` takes a preset
instead, and `--settings` changes it. Data sets are found as by `fedmd-jax` (FEDMD_JAX_DATA).

Each finished run is a line in `DIR/methods.jsonl` and is not repeated, so an interrupted command can be given again.
After each method the table of all lines is written to `DIR/methods.md` and the plot to `DIR/methods.png`; with --table
nothing is run. Accuracy is that after the last round, on the test set that all clients share. The baselines come with
the run of FedMD: its networks trained on the labelled public set only (0 if it has no private class), after
transfer learning, without digests (local only), and trained on the private images of all clients (pooled).

Several processes may share DIR, each with methods of its own. Seconds per round are then those of a shared machine.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import shlex
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import timing
import tyro
from matplotlib import colormaps
from scipy import stats

from fedmd_jax.experiments import EXPERIMENTS, Experiment, smoke
from fedmd_jax.experiments.algorithms import ALGORITHMS, AlgorithmOptions
from fedmd_jax.experiments.results.figures import new_figure, to_png
from fedmd_jax.experiments.run_directory import read_run
from fedmd_jax.experiments.settings import Phase, StoppablePhase
from fedmd_jax.experiments.setup import cache_compiled_programs, prepare
from fedmd_jax.experiments.train import Command, Signals, run_all

HERE = pathlib.Path(__file__).parent
TABLE, PLOT, LINES = "methods.md", "methods.png", "methods.jsonl"
OPTIONS: dict[str, dict[str, Any]] = {  # of methods that are not named as their algorithm
    "fedmd": {},
    "fedmd-kl": {"distance": "kl"},
    "plain mean": {"algorithm": "ds-fl", "algorithm_options": AlgorithmOptions(temperature=None)},
}
METHODS = tuple(dict.fromkeys((*OPTIONS, *ALGORITHMS)))
BASELINES = ("public only", "transfer", "local only", "pooled")
SPLITS = ("0.1", "1", "iid")
MARKERS = "osD^vPX*<>hpd"
SMALL = dataclasses.replace(
    EXPERIMENTS["letters-dirichlet"],
    # Prototypes have 24 features: the filters of conv3, averaged over the map, and the 216 hidden units pooled.
    networks=("3conv:n1=8,n2=16,n3=24,dropout=0",) * 3 + ("mlp:n1=216",) * 3,
    data=dataclasses.replace(EXPERIMENTS["letters-dirichlet"].data, num_public=2000, num_test=1200),
    public_training=StoppablePhase(num_epochs=5, batch_size=64),
    private_training=StoppablePhase(num_epochs=10, batch_size=10),
    pooled_training=StoppablePhase(num_epochs=25, batch_size=20),
    num_rounds=8,
    subset_size=500,
    digest=Phase(num_epochs=2, batch_size=50),
    revisit=Phase(num_epochs=4, batch_size=10),
)

Record = dict[str, Any]


def experiment_of(base: Experiment, split: str, method: str) -> Experiment:
    """The experiment of a method on a split; the baselines are trained with FedMD only."""
    how = {"split": "classes"} if split == "iid" else {"split": "dirichlet", "alpha": float(split)}
    own = OPTIONS.get(method, {"algorithm": method})
    baselines = dict.fromkeys(("local", "pooled"), method == "fedmd")
    data = dataclasses.replace(base.data, **how)
    return dataclasses.replace(base, data=data, checkpoint_every=None, **baselines, **own)


def run(experiment: Experiment, method: str, seeds: Iterable[int], done: Callable[[Record], Any]) -> None:
    """Trains all seeds with one set of compiled programs; `done` is called with each line of `records`."""

    def read(path: pathlib.Path, summary: Record) -> None:
        if not summary["interrupted"]:
            for record in records(path, method, jobs[path]):
                done(record)

    config = {"command": shlex.join(["benchmarks/methods.py", *sys.argv[1:]]), "num_seeds": None, "log": None}
    with tempfile.TemporaryDirectory() as folder, Signals() as signals:
        jobs = {pathlib.Path(folder) / f"seed{seed}": dataclasses.replace(experiment, seed=seed) for seed in seeds}
        run_all(jobs, Command(method, config, "none", signals), done=read)


def records(path: pathlib.Path, method: str, experiment: Experiment) -> list[Record]:
    """The results of a finished run: a line of each baseline if the method is FedMD, and one of the method."""
    summary, metrics = read_run(path)
    sent, num_rounds = summary["communication"], summary["num_rounds_done"]
    of_rounds = [[line["accuracy"] for line in metrics if line["round"] == r] for r in range(num_rounds + 1)]
    own = {
        "curve": list(map(statistics.mean, of_rounds)),
        "up": sent["upload_bytes_per_client_round"],
        "down": sent["download_bytes_per_client_round"],
        "seconds_per_round": summary["seconds"]["rounds"] / max(num_rounds, 1),
        "seconds": summary["seconds"],
    }
    columns, found = {method: "final_accuracy"}, {}
    if method == "fedmd":
        found = {"public only": public_only(experiment, path)}
        columns = {
            "transfer": "transfer_accuracy",
            "local only": "local_accuracy",
            "pooled": "pooled_accuracy",
        } | columns
    found |= {name: [client[column] for client in summary["clients"]] for name, column in columns.items()}
    means = {name: {"accuracy": statistics.mean(each), "worst": min(each)} for name, each in found.items()}
    return [
        {
            "method": name,
            "seed": experiment.seed,
            **means[name],
            "accuracies": found[name],
            **(own if name == method else {}),
        }
        for name in found
    ]


def public_only(experiment: Experiment, path: pathlib.Path) -> list[float]:
    """Accuracy of each client after the public half of transfer learning, which the run has stored."""
    setup = prepare([experiment])
    cache, federation = setup.pretrained_cache(path), setup.federation
    states = setup.put({name: cache.load(name)[0] for name in federation.groups})
    (test,) = setup.data["confusion"]
    return [accuracy for each in federation.evaluate(states, test).values() for accuracy in each.accuracy.tolist()]


def compare(base: Experiment, options: argparse.Namespace) -> bool:
    """Runs what is missing; whether nothing failed."""
    settings = {"experiment": options.experiment, "settings": options.settings, "smoke": options.smoke}
    file, complete = options.out / LINES, True
    lines = read_lines(file)
    if any({name: line[name] for name in settings} != settings for line in lines):
        raise SystemExit(f"{file} has results of other settings: choose another --out")
    known = {(line["split"], line["method"], line["seed"]) for line in lines}
    for split, method in itertools.product(options.splits, options.methods):
        missing = [seed for seed in range(options.seeds) if (split, method, seed) not in known]
        if not missing:
            continue
        print(f"{title(split)}, {method}, seeds {missing}", flush=True)
        about = {**settings, "split": split}
        try:
            experiment = experiment_of(base, split, method)
            run(experiment, method, missing, lambda record, about=about: timing.append_json(file, about | record))
        except Exception:  # does not stop the others
            traceback.print_exc()
            complete = False
        write_results(options.out)
    return complete


def read_lines(path: pathlib.Path) -> list[Record]:
    """The lines of all finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_results(out: pathlib.Path) -> None:
    """Writes table and plot of all lines."""
    if lines := read_lines(out / LINES):
        (out / TABLE).write_text(table(lines) + "\n")
        (out / PLOT).write_bytes(plot(lines))


def grouped(lines: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """The lines by split and method, in the order of this file, and by seed."""
    methods = (*BASELINES[:-1], *METHODS, BASELINES[-1])
    groups = {key: [] for key in itertools.product(SPLITS, methods)}
    for line in sorted(lines, key=lambda line: line["seed"]):
        groups[line["split"], line["method"]].append(line)
    return {key: group for key, group in groups.items() if group}


def table(lines: Iterable[Record]) -> str:
    """Markdown: a row for each method on each split, with means and standard deviations over its seeds."""
    groups = grouped(lines)
    heads = ["split", "method", "seeds", "accuracy", "worst client", "minus FedMD, points [95 %]"]
    heads += ["bytes up", "bytes down", "s/round"]
    rows = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2)]
    for (split, method), group in groups.items():
        fedmd = {line["seed"]: line["accuracy"] for line in groups.get((split, "fedmd"), [])}
        differences = [100 * (line["accuracy"] - fedmd[line["seed"]]) for line in group if line["seed"] in fedmd]
        cells = [title(split), f"*{method}*" if method in BASELINES else method, str(len(group))]
        cells += [spread([line[key] for line in group]) for key in ("accuracy", "worst")]
        cells.append("" if method == "fedmd" or not differences else interval(differences))
        if method not in BASELINES:
            cells += [f"{group[0][way]:,.0f}" for way in ("up", "down")]
            cells.append(f"{statistics.median(line['seconds_per_round'] for line in group):.2f}")
        rows.append(cells + [""] * (len(heads) - len(cells)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def title(split: str) -> str:
    """A split in words."""
    return split if split == "iid" else f"alpha {split}"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def interval(differences: Sequence[float]) -> str:
    """Mean of paired differences, and its 95 % interval from Student's t."""
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.1f}"
    error = stats.sem(differences) * stats.t.ppf(0.975, len(differences) - 1)
    return f"{mean:+.1f} [{mean - error:+.1f}, {mean + error:+.1f}]"


def plot(lines: Iterable[Record]) -> bytes:
    """PNG: accuracy after each round against the bytes that a client has sent and received, a panel per split."""
    groups = grouped(lines)
    splits = dict.fromkeys(split for split, _ in groups)
    figure, handles = new_figure(4.2 * len(splits) + 1.8, 4.4), {}
    panels = dict(zip(splits, figure.subplots(1, len(splits), squeeze=False, sharey=True)[0], strict=True))
    for (split, method), group in groups.items():
        axes = panels[split]
        if method in BASELINES:
            accuracy = statistics.mean(line["accuracy"] for line in group)
            axes.axhline(accuracy, color="gray", linewidth=1, linestyle=":")
            axes.annotate(method, (0.01, accuracy), xycoords=("axes fraction", "data"), fontsize=7, color="gray")
            continue
        number = METHODS.index(method)
        curve = list(map(statistics.mean, zip(*(line["curve"][1:] for line in group), strict=True)))
        sent = [r * (group[0]["up"] + group[0]["down"]) for r in range(1, len(curve) + 1)]
        style = {
            "color": colormaps["tab20"](number % 20),
            "marker": MARKERS[number % len(MARKERS)],
            "markevery": [len(curve) - 1],
        }
        (handles[method],) = axes.plot(sent, curve, linewidth=1, **style)
    for split, axes in panels.items():
        axes.set_title(title(split), fontsize=9, loc="left")
        axes.set_xscale("log")
        axes.set_xlabel("bytes of a client, up and down")
        axes.grid(alpha=0.25)
    figure.supylabel("accuracy, mean over clients and seeds", fontsize=9)
    figure.legend(handles.values(), handles, loc="outside right center", fontsize=8, frameon=False)
    return to_png(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, help="default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results" / "methods", help="lines, table, plot")
    parser.add_argument("--experiment", choices=EXPERIMENTS, help="a preset instead of the small experiment")
    parser.add_argument("--smoke", action="store_true", help="as in `fedmd-jax run`: tiny, accuracies mean nothing")
    parser.add_argument("--settings", default="", help="options of `fedmd-jax run` that change the experiment, quoted")
    parser.add_argument("--pretrained-dir", default="runs/pretrained", help="as in `fedmd-jax run`, for all methods")
    parser.add_argument("--table", action="store_true", help="write table and plot, run nothing")
    options = parser.parse_args(argv)
    base = EXPERIMENTS.get(options.experiment, SMALL)
    base = tyro.cli(Experiment, default=smoke(base) if options.smoke else base, args=shlex.split(options.settings))
    base = dataclasses.replace(base, pretrained_dir=options.pretrained_dir)
    options.out.mkdir(parents=True, exist_ok=True)
    cache_compiled_programs()
    complete = options.table or compare(base, options)
    write_results(options.out)
    print((options.out / TABLE).read_text() if (options.out / TABLE).exists() else "no results")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
