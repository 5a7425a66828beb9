"""How fast are other libraries for federated learning, run as their users run them, beside ours?

    python benchmarks/field.py htfllib --checkout HtFLlib --python ENV/bin/python [--method fedproto fd] [--clients 8]
                               [--networks published small]
    python benchmarks/field.py fedjax --checkout fedjax --python ENV/bin/python
    python benchmarks/field.py fl-bench --checkout FL-bench --python ENV/bin/python
    python benchmarks/field.py --plot

A library is run from a checkout with the Python of an environment of its own. Each run of it is followed by one of ours
with the same images, split, networks, numbers of steps and batch sizes; the first round, which compiles, is counted
apart. Images are MNIST's and EMNIST's, found as by `fedmd-jax` (FEDMD_JAX_DATA). Each run of a contender is a line of
`--json`, by default results/field.jsonl; --plot writes the table and the plot of all lines. What is equal and what is
not is in docs/guides/how_fast.md.
"""

import argparse
import gzip
import json
import os
import pathlib
import pickle
import re
import shlex
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import timing

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "field.jsonl"
Examples = tuple[np.ndarray, np.ndarray]


class Work(NamedTuple):
    """What both contenders of a comparison do."""

    peer: str
    method: str
    networks: str
    train: list[Examples]  # of each client
    test: list[Examples]
    public: np.ndarray | None
    num_epochs: int
    batch_size: int
    subset_size: int = 1
    shuffle: bool = True  # of private images


class Run(NamedTuple):
    """One run of a contender."""

    first: float | None  # seconds of the first round, if reported
    round: list[float]  # seconds of each further round, without evaluation
    evaluate: list[float]  # seconds of an evaluation
    accuracy: dict[int, float]  # number of rounds -> mean accuracy of the clients on their test images
    about: Mapping[str, Any] = MappingProxyType({})


# ---- ours


class Ours:
    """A federation of fedmd_jax with the work of a peer."""

    def __init__(self, work: Work):
        import jax
        import optax
        from field_networks import FAMILIES

        import fedmd_jax as fmd

        self._jax, num_clients = jax, len(work.train)
        family = FAMILIES[work.networks]
        groups = {
            str(number): fmd.ArchitectureGroup(
                fmd.architecture_from_linen(module), tuple(range(number, num_clients, len(family)))
            )
            for number, module in enumerate(family)
        }
        methods = {
            "fedproto": fmd.algorithms.fedproto,
            "fd": fmd.algorithms.fd,
            "fedavg": fmd.algorithms.fedavg,
            "fedmd": lambda: fmd.algorithms.fedmd(distance=fmd.mse),
        }
        how = {"batch_size": work.batch_size, "optimizer": optax.sgd(0.01), "shuffle": False}
        private = fmd.TrainingConfig(num_epochs=work.num_epochs, **{**how, "shuffle": work.shuffle})
        public = np.zeros_like(work.train[0][0][:1]) if work.public is None else work.public
        self.federation = fmd.make_federation(
            groups,
            methods[work.method](),
            subset_size=work.subset_size,
            digest_training=fmd.TrainingConfig(**how),
            **dict.fromkeys(("private_training", "pooled_training", "revisit_training"), private),
        )
        self.public = fmd.public_dataset(public)
        self.private = fmd.stack_private(groups, dict(enumerate(work.train)))
        self.test = fmd.stack_private(groups, dict(enumerate(work.test)))
        states = self.federation.init(jax.random.key(0), self.public, self.private)
        # As in the peers, clients with the same network begin with the same weights.
        states = jax.tree.map(lambda leaf: jax.numpy.repeat(leaf[:1], len(leaf), axis=0), states)
        self.states = self.federation.start(states, self.public, jax.random.key(1))
        self._keys = iter(jax.random.split(jax.random.key(2), 1000))

    def round(self) -> None:
        """Runs one round and waits for it."""
        run = self.federation.round(self.states, self.public, self.private, next(self._keys))
        self.states, _ = self._jax.block_until_ready(run)

    def evaluate(self) -> float:
        """Mean accuracy of the clients."""
        found = self.federation.evaluate(self.states, self.test)
        return float(np.mean(np.concatenate([each.accuracy for each in found.values()])))


def run_ours(work: Work, num_rounds: int) -> Run:
    """Rounds and evaluations by turns, in a process of their own."""
    contender = timing.Contender(Ours, work)
    try:
        rounds, evaluations = [], []
        for _ in range(num_rounds):
            rounds.append(contender("round")[0])
            evaluations.append(contender("evaluate"))
        accuracy = {number: found for number, (_, found) in enumerate(evaluations, start=1)}
        seconds = [seconds for seconds, _ in evaluations[1:]]
        return Run(rounds[0], rounds[1:], seconds, accuracy, contender("versions")[1])
    finally:
        contender.close()


# ---- HtFLlib


def htfllib_work(options: argparse.Namespace) -> Iterable[Work]:
    """FedProto and FD; its families of networks for images take 32x32 pixels of three colours."""
    for method in options.method:
        for networks in options.networks:
            sets = [mnist_clients(options, split) for split in ("train", "test")]
            if networks == "published":
                sets = [[(np.repeat(pad(x), 3, axis=-1), y) for x, y in each] for each in sets]
            yield Work("HtFLlib", method, f"htfllib {networks}", *sets, None, 1, 10, shuffle=False)


HTFLLIB = {"fedproto": "FedProto", "fd": "FD"}  # our names and its names
# The list in its main.py that `--networks small` replaces by its class `CNN`, which no list of its own has.
PUBLISHED = r"(HtFE-img-2\":\s+args\.models = \[)[^\]]*(\])"
SMALL = [f"CNN(num_cov={n}, hidden_dims={hidden})" for n in (1, 2) for hidden in ("[]", "[256]")]


def run_htfllib(work: Work, num_rounds: int, options: argparse.Namespace) -> Run:
    """Runs its main.py, in a copy, with the command line of its total.sh; every second round is evaluated."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        system = root / "system"
        shutil.copytree(options.checkout / "system", system)
        if work.networks.endswith("small"):
            main = (system / "main.py").read_text()
            main, count = re.subn(PUBLISHED, lambda found: found[1] + ", ".join(map(repr, SMALL)) + found[2], main)
            assert count == 1, "main.py has no family HtFE-img-2"
            (system / "main.py").write_text(main)
        for split, clients in (("train", work.train), ("test", work.test)):
            (root / "dataset" / "field" / split).mkdir(parents=True)
            for number, (images, labels) in enumerate(clients):
                data = {"x": images.transpose(0, 3, 1, 2), "y": labels}
                np.savez(root / "dataset" / "field" / split / f"{number}.npz", data=data)
        command = f"main.py -lr 0.01 -jr 1 -lbs {work.batch_size} -ls {work.num_epochs} -nc {len(work.train)} -ncl 10"
        command += f" -data field -m HtFE-img-2 -fd 512 -dev cpu -algo {HTFLLIB[work.method]} -lam 1"
        command += f" -gr {num_rounds - 1} -eg 2 -sfn kept"
        output = run_peer(options, shlex.split(command), cwd=system)
        seconds = [float(found) for found in re.findall(r"^-{50} (\S+)$", output, re.M)]
        accuracy = [float(found) for found in re.findall(r"^Averaged Test Accuracy: (\S+)$", output, re.M)]
        by_scores = json.loads(run_peer(options, [HERE / "field_peers.py", "htfllib", "kept", "field"], cwd=system))
    plain, evaluated = seconds[1::2], seconds[2::2]
    return Run(
        seconds[0],
        plain,
        [max(0.0, each - statistics.median(plain)) for each in evaluated],
        {**dict(zip(range(0, num_rounds, 2), accuracy, strict=True)), num_rounds: by_scores["accuracy"]},
        {**by_scores["versions"], "command": f"python {command}"},
    )


# ---- FedJAX


def fedjax_work(options: argparse.Namespace) -> Iterable[Work]:
    """FedAvg of the convolutional network of its EMNIST example."""
    sets = [mnist_clients(options, split) for split in ("train", "test")]
    yield Work("FedJAX", "fedavg", "fedjax", *sets, None, 1, 20)


def run_fedjax(work: Work, num_rounds: int, options: argparse.Namespace) -> Run:
    """Runs a script with its API, as its examples/emnist_fed_avg.py."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "data.npz"
        stack = {
            f"{split}_{name}": np.stack([client[place] for client in clients])
            for split, clients in (("train", work.train), ("test", work.test))
            for place, name in enumerate("xy")
        }
        np.savez(path, **stack)
        command = ["fedjax", path, num_rounds, work.num_epochs, work.batch_size]
        found = json.loads(run_peer(options, [HERE / "field_peers.py", *command]).splitlines()[-1])
    accuracy = dict(enumerate(found["accuracy"], start=1))
    return Run(found["round"][0], found["round"][1:], found["evaluate"][1:], accuracy, found["versions"])


# ---- FL-bench


def fl_bench_work(options: argparse.Namespace) -> Iterable[Work]:
    """FedMD with its data set EMNIST, letters, and MNIST as public images."""
    import fedmd_jax as fmd

    write_raw(options, "mnist", "mnist", "MNIST/raw")
    write_raw(options, "emnist_letters", "emnist", "EMNIST/raw")

    def load(name, column):
        return np.concatenate(
            [getattr(fmd.data.load_images(name, s, data_dir=options.data_dir), column) for s in SPLITS]
        )

    labels = load("emnist/letters", "labels") + 1
    sizes = np.cumsum([options.examples, options.test] * options.clients)
    rows = np.split(np.random.default_rng(0).permutation(len(labels))[: sizes[-1]], sizes[:-1])
    write_partition(options.checkout / "data" / "emnist", rows[::2], rows[1::2])
    # Pixels are 0 or 1, since it normalises pixels as if they were from 0 to 1. Letters stay transposed.
    images = (load("emnist/letters", "images").transpose(0, 2, 1, 3) // 128 - np.float32(0.1736)) / np.float32(0.3248)
    public = (load("mnist", "images") // 128 - np.float32(0.1736)) / np.float32(0.3248)
    sets = [[(images[own], labels[own]) for own in of_clients] for of_clients in (rows[::2], rows[1::2])]
    yield Work("FL-bench", "fedmd", "fl-bench", *sets, public, 5, 32, subset_size=160)


def write_partition(folder: pathlib.Path, train: Sequence[np.ndarray], test: Sequence[np.ndarray]) -> None:
    """Writes the files of its generate_data.py, which cannot make clients of so few images."""
    clients = list(range(len(train)))
    rows = [{"train": own.tolist(), "val": [], "test": tests.tolist()} for own, tests in zip(train, test, strict=True)]
    separation = {"train": clients, "val": clients, "test": clients, "total": len(clients)}
    (folder / "partition.pkl").write_bytes(pickle.dumps({"separation": separation, "data_indices": rows}))
    (folder / "args.json").write_text(json.dumps({"emnist_split": "letters", "split": "sample"}))


SPLITS = ("train", "test")


def write_raw(options: argparse.Namespace, ours: str, theirs: str, folder: str) -> None:
    """Unpacks the published files to where torchvision looks for them, images with pixels 0 and 1."""
    source = options.data_dir or os.environ.get("FEDMD_JAX_DATA")
    if not source:
        raise SystemExit("fl-bench needs --data-dir or FEDMD_JAX_DATA")
    paths = sorted((pathlib.Path(source) / ours).glob("*.gz"))
    if len(paths) < 4:
        raise SystemExit(f"{pathlib.Path(source) / ours} needs the 4 published *.gz files, and has {len(paths)}")
    target = options.checkout / "data" / theirs / folder
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        content = gzip.decompress(path.read_bytes())
        if "images" in path.name:
            header, pixels = content[:16], np.frombuffer(content[16:], np.uint8)
            content = header + (pixels // 128).tobytes()
        (target / path.stem).write_bytes(content)


def run_fl_bench(work: Work, num_rounds: int, options: argparse.Namespace) -> Run:
    """Runs its main.py, which reports the mean seconds of a round only, and evaluates after the last round."""
    command = (
        f"main.py method=fedmd dataset.name=emnist model.name=lenet5 common.join_ratio=1"
        f" common.global_epoch={num_rounds} common.local_epoch={work.num_epochs} common.batch_size={work.batch_size}"
        f" common.use_cuda=false common.client_side_evaluation=false common.test.client.interval={num_rounds}"
        " common.save_learning_curve_plot=false common.save_metrics=false"
    )
    output = run_peer(options, shlex.split(command), cwd=options.checkout)
    minutes, seconds = re.search(r"each global epoch:\s+(\d+) min ([\d.]+) sec", output).groups()
    (accuracy,) = re.search(r"\(test\) before fine-tuning: ([\d.]+)%", output).groups()
    mean = 60 * int(minutes) + float(seconds)
    return Run(None, [mean], [], {num_rounds: float(accuracy) / 100}, {"command": f"python {command}"})


# ---- both sides


def run_peer(options: argparse.Namespace, arguments: Sequence[Any], cwd: pathlib.Path | None = None) -> str:
    """The output of a script in the environment of the peer."""
    env = {**os.environ, "PYTHONPATH": str(cwd or options.checkout)}
    command = [str(options.python), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def mnist_clients(options: argparse.Namespace, split: str) -> list[Examples]:
    """Images of MNIST from -1 to 1 for each client, drawn at random, and labels."""
    import fedmd_jax as fmd

    images, labels = fmd.data.load_images("mnist", split, data_dir=options.data_dir)[:2]
    size = options.examples if split == "train" else options.test
    rows = np.random.default_rng(0).permutation(len(images))[: options.clients * size]
    images, labels = images[rows].astype(np.float32) / 127.5 - 1, labels[rows].astype(np.int64)
    return list(zip(np.split(images, options.clients), np.split(labels, options.clients), strict=True))


def pad(images: np.ndarray) -> np.ndarray:
    """28x28 pixels to 32x32."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1)


PEERS = {
    "htfllib": (htfllib_work, run_htfllib),
    "fedjax": (fedjax_work, run_fedjax),
    "fl-bench": (fl_bench_work, run_fl_bench),
}


def compare(options: argparse.Namespace, command: str) -> None:
    """Runs the peer and ours by turns, and appends a line with `command` for each run."""
    make_work, run_peer_once = PEERS[options.peer]
    describe = ["git", "log", "-1", "--format=%H"]
    commit = subprocess.run(describe, cwd=options.checkout, capture_output=True, text=True, check=False).stdout.strip()
    for work in make_work(options):
        about = {
            "benchmark": "field",
            "peer": work.peer,
            "peer_commit": commit,
            "method": work.method,
            "networks": work.networks,
            "clients": len(work.train),
            "examples": len(work.train[0][0]),
            "test_examples": len(work.test[0][0]),
            "num_epochs": work.num_epochs,
            "batch_size": work.batch_size,
            "rounds": options.rounds,
            "benchmark_command": command,
        }
        for _ in range(options.repeats):
            for contender in (work.peer, "fedmd_jax"):
                if contender == "fedmd_jax":
                    run = run_ours(work, options.rounds)
                else:
                    run = run_peer_once(work, options.rounds, options)
                # The versions of this process, which `append_json` adds, are not those of the contender.
                found = {**dict.fromkeys(("jax", "flax")), **run._asdict(), **run.about}
                del found["about"]
                timing.append_json(options.json, {**about, "contender": contender, **found})
                print(f"{work.peer}, {work.method}, {work.networks}, {len(work.train)} clients, {contender}: {run}")


# ---- table and plot


# Accuracies of networks that are NaN or do not learn: the table has the mark of a note below it instead.
MARKS = {("HtFLlib", "fd"): "(2)", ("FL-bench", "fedmd"): "(1)"}


def summarize(path: pathlib.Path) -> dict[tuple, dict[str, dict[str, float | None]]]:
    """(peer, method and networks, clients, rounds) -> contender -> medians of all rounds, last accuracy."""
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        # Only HtFLlib was run with two families of networks.
        methods = ", ".join([line["method"], *line["networks"].split()[1:]])
        key = line["peer"], methods, line["clients"], line["rounds"]
        groups.setdefault(key, {}).setdefault(line["contender"], []).append(line)
    return {key: {name: _medians(lines) for name, lines in group.items()} for key, group in sorted(groups.items())}


def _medians(lines):
    found = {
        column: statistics.median([seconds for line in lines for seconds in line[column]] or [0.0])
        for column in ("round", "evaluate")
    }
    accuracy = lines[-1]["accuracy"]
    found["accuracy"] = accuracy[max(accuracy, key=int)]
    firsts = [line["first"] for line in lines if line["first"] is not None]
    return {**found, "first": statistics.median(firsts) if firsts else None}


def table(summary: dict) -> str:
    """Markdown: a row for each comparison."""
    rows = [["", "clients", "rounds", "s per round", "ours", "ratio", "s per evaluation", "ours"]]
    rows[0] += ["first round", "ours", "accuracy", "ours"]
    rows.append(["---"] + ["---:"] * (len(rows[0]) - 1))
    for (peer, methods, clients, rounds), found in summary.items():
        theirs, ours = found[peer], found["fedmd_jax"]
        cells = [f"{peer}, {methods}", str(clients), str(rounds)]
        cells += [f"{seconds:.2f}" for seconds in (theirs["round"], ours["round"])]
        cells.append(f"{theirs['round'] / ours['round']:.1f}")  # one or two runs each
        pairs = [each[column] for column in ("evaluate", "first") for each in (theirs, ours)]
        cells += [f"{seconds:.2f}" if seconds else "" for seconds in pairs]  # some are not reported
        mark = MARKS.get((peer, methods.split(",")[0]))
        cells += [mark or f"{theirs['accuracy']:.3f}", f"{ours['accuracy']:.3f}"]
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(summary: dict) -> bytes:
    """PNG: seconds of a round and of an evaluation, a pair of bars for each comparison."""
    from fedmd_jax.experiments.results.figures import new_figure, to_png

    figure = new_figure(7.5, 0.8 * len(summary) + 1.2)
    axes = figure.subplots()
    for place, ((peer, *_), found) in enumerate(summary.items()):
        for contender, color, offset in ((peer, "C1", -0.2), ("fedmd_jax", "C0", 0.2)):
            seconds = found[contender]
            how = {"height": 0.36, "color": color}
            axes.barh(place + offset, seconds["round"], **how)
            axes.barh(place + offset, seconds["evaluate"], left=seconds["round"], alpha=0.5, **how)
    labels = [f"{peer}, {clients} clients,\n{methods}, {rounds} rounds" for peer, methods, clients, rounds in summary]
    axes.set_yticks(range(len(summary)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per round; pale: per evaluation. Orange: the other library, blue: fedmd_jax", fontsize=8)
    axes.grid(axis="x", alpha=0.25)
    return to_png(figure)


def command_line(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The options that are not the defaults, with the names of paths only, and without those of data and results."""
    words = ["benchmarks/field.py", options.peer]
    for name, value in vars(options).items():
        if name not in ("peer", "data_dir", "json", "plot") and value != parser.get_default(name):
            values = value if isinstance(value, list) else [value]
            texts = (each.name if isinstance(each, pathlib.Path) else str(each) for each in values)
            words += [f"--{name}", *texts]
    return shlex.join(words)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", nargs="?", choices=PEERS)
    parser.add_argument("--checkout", type=pathlib.Path, help="of the peer")
    parser.add_argument("--python", type=pathlib.Path, help="of the environment of the peer")
    parser.add_argument(
        "--method", nargs="+", choices=("fedproto", "fd"), default=["fedproto", "fd"], help="of HtFLlib"
    )
    parser.add_argument("--networks", nargs="+", choices=("published", "small"), default=["published", "small"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--examples", type=int, default=300, help="private images of a client")
    parser.add_argument("--test", type=int, default=100, help="test images of a client")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--data-dir", help="as of fedmd-jax")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--plot", action="store_true", help="table and plot of all lines")
    options = parser.parse_args(argv)
    if options.peer:
        for name in ("checkout", "python"):
            path = getattr(options, name)
            if path is None or not path.exists():
                parser.error(f"{options.peer} needs --{name} PATH of something that exists, got {path}")
        # Peers run in other folders. A link to Python is not resolved: it tells Python its environment.
        options.checkout, options.python = options.checkout.resolve(), options.python.absolute()
        compare(options, command_line(parser, options))
    if options.plot:
        summary = summarize(options.json)
        print(table(summary))
        options.json.with_suffix(".png").write_bytes(plot(summary))


if __name__ == "__main__":
    main()
