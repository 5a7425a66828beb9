"""Does a round of a cohort cost the same in a large population as in a small one, and does the large one fit in memory?

    python benchmarks/population.py [--clients 10000 1000] [--cohort 100] [--storage host|device] [--folder DIR]
        [--json FILE]

Half of the clients have one small CNN with three convolutions, half another; each has 18 of the embedded letters, and
both Adam states of every client persist. There is no transfer learning. Every population has its own process and so
its own peak memory; their rounds are interleaved. A round draws the cohort, gathers it, scores 250 digits, digests,
revisits, evaluates on 120 letters and writes the cohort back. "Moved" is the same without training: the part of a
round that could grow with the population.
"""

import argparse
import contextlib
import pathlib
import shutil
import tempfile

import jax
import numpy as np
from timing import Contender, append_json, interleave

import fedmd_jax as fmd
from fedmd_jax.data import load_images
from fedmd_jax.models import CNN, architecture_from_linen

NUM_OUTPUTS, SUBSET_SIZE, EXAMPLES_PER_CLASS, NUM_TEST = 16, 250, 3, 120
NETWORKS = {"8-16-32": (8, 16, 32), "8-16-16": (8, 16, 16)}


def letters(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels; labels start after the ten of the digits."""
    images, labels = load_images("embedded/letters", split)
    return images.astype(np.float32) / 255, labels.astype(np.int64) + 10


def draw_private(num_clients: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Letters of every class for every client; clients may share images."""
    (images, labels), rng = letters("train"), np.random.default_rng(0)
    of_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    rows = np.concatenate([rng.choice(of, (num_clients, EXAMPLES_PER_CLASS)) for of in of_class], axis=1)
    return dict(enumerate(zip(images[rows], labels[rows], strict=True)))  # views of one array, freed at once


class Crowd:
    """A population; each method runs one operation and waits for it."""

    def __init__(
        self, num_clients: int, cohort_size: int, storage: str, clients_per_chunk: int | None, folder: str | None
    ):
        shares = np.array_split(np.arange(num_clients), len(NETWORKS))
        groups = {
            name: fmd.ArchitectureGroup(architecture_from_linen(CNN(filters, NUM_OUTPUTS)), share.tolist())
            for (name, filters), share in zip(NETWORKS.items(), shares, strict=True)
        }
        self._federation = fmd.fedmd(
            groups,
            subset_size=SUBSET_SIZE,
            digest_training=fmd.TrainingConfig(num_epochs=1, batch_size=125),
            revisit_training=fmd.TrainingConfig(num_epochs=2, batch_size=5),
            clients_per_chunk=clients_per_chunk,
        )
        images, labels = load_images("embedded/digits", "train")
        self._public = fmd.public_dataset(images / 255, labels)
        self._private = fmd.stack_private(groups, draw_private(num_clients), storage=storage)
        rows = np.random.default_rng(1).permutation(len(letters("test")[0]))[:NUM_TEST]
        self._test = fmd.labelled_dataset(*(each[rows] for each in letters("test")))
        self._cohort_size, self._storage = cohort_size, storage
        self._folder = folder and tempfile.mkdtemp(dir=folder)
        self._round, self._key = 0, jax.random.key(0)

    def init(self) -> dict[str, int]:
        """Initializes all clients; returns the bytes of states and private data."""
        self._population = jax.block_until_ready(
            fmd.simulation.init_population(
                self._federation,
                self._key,
                self._public,
                self._private,
                cohort_size=self._cohort_size,
                storage=self._storage,
                folder=self._folder,
            )
        )
        sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in self._population[:2]]
        return dict(zip(("state_bytes", "private_bytes"), sizes, strict=True))

    def round(self) -> float:
        """Runs one round; the mean accuracy of its cohort."""
        self._round += 1
        self._population, metrics = fmd.simulation.population_round(
            self._federation,
            self._population,
            self._public,
            self._key,
            self._round,
            cohort_size=self._cohort_size,
            test=self._test,
        )
        jax.block_until_ready(self._population)
        return metrics.mean_accuracy

    def move(self) -> None:
        """Draws a cohort, gathers it and writes it back unchanged."""
        groups = self._federation.groups
        cohort = fmd.simulation.draw_cohort(jax.random.fold_in(self._key, self._round), groups, self._cohort_size)
        for name, rows in cohort.rows.items():
            states, _ = (fmd.simulation.get_rows(tree[name], rows) for tree in self._population[:2])
            self._population.states[name] = fmd.simulation.set_rows(self._population.states[name], rows, states)
        jax.block_until_ready(self._population)

    def close(self) -> None:
        """Removes the files of the states."""
        if self._folder:
            shutil.rmtree(self._folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[10_000, 1_000], help="populations, the large one first"
    )
    parser.add_argument("--cohort", type=int, default=100, help="clients that take part in a round")
    parser.add_argument("--storage", choices=("host", "device"), default="host")
    parser.add_argument("--folder", help="for files that hold the states of populations larger than memory")
    parser.add_argument("--clients-per-chunk", type=int, default=10, help="of a group, at once: bounds memory")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are timed, after one that compiles")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()

    crowds: dict[int, Contender] = {}
    with contextlib.ExitStack() as stack:
        for n in options.clients:
            crowds[n] = Contender(Crowd, n, options.cohort, options.storage, options.clients_per_chunk, options.folder)
            stack.callback(crowds[n].close)
        inits = {n: crowd("init") for n, crowd in crowds.items()}  # one after the other, so that they do not compete
        first = {n: crowd("round")[0] for n, crowd in crowds.items()}
        peaks = {n: crowd("peak_bytes")[1] for n, crowd in crowds.items()}  # `interleave` resets the peaks
        rounds = interleave(crowds, ["round", "move"], repeats=options.repeats)
        peaks = {n: max(peaks[n], crowd("peak_bytes")[1]) for n, crowd in crowds.items()}
    print(f"a cohort of {options.cohort}, stored on the {options.storage}, {jax.devices()[0].device_kind}")
    print(
        "clients      init   states  private     peak   first round        a round (lowest to highest)  ratio    moved"
    )
    for n, peak in peaks.items():
        (init_seconds, bytes_), sample = inits[n], rounds[n]["round"]
        ratio = sample.median / rounds[min(crowds)]["round"].median
        gigabytes = [size / 1e9 for size in (bytes_["state_bytes"], bytes_["private_bytes"], peak)]
        columns = [f"{n:>7} {init_seconds:>7.1f} s", *(f"{size:>5.2f} GB" for size in gigabytes)]
        spread = f"({sample.low:.2f} to {sample.high:.2f} s)"
        print(*columns, f"{first[n]:>11.1f} s {sample.median:>11.2f} s {spread:<20} {ratio:>6.2f}", end=" ")
        moved = rounds[n]["move"].median
        print(f"{1e3 * moved:>5.0f} ms")
        record = {
            "benchmark": "population",
            "clients": n,
            "cohort": options.cohort,
            "home": "files" if options.folder else options.storage,
        }
        record |= {"clients_per_chunk": options.clients_per_chunk, **bytes_, "peak_bytes": peak, "ratio": ratio}
        append_json(
            options.json,
            {**record, "init_seconds": init_seconds, "moved": moved, **sample._asdict(), "first": first[n]},
        )


if __name__ == "__main__":
    main()
