"""What decides the accuracy after transfer learning, before any round?

    python benchmarks/transfer.py --settings "--width 0.25" "--width 0.25 --public-training.patience 3"
                                  [--networks 0 5 8] [--seeds 3] [--all "--pretrained-dir DIR"] [--json FILE]

Some networks of `letters-iid` after transfer learning, on private validation images:

* `transfer`: the clients of a run.
* `re-estimated`: the same clients with the batch statistics of a public subset.
* `own mean`: clients whose private images are centred by the mean image of their own source, as in the authors' code,
  instead of the public one.
"""

import argparse
import copy
import pathlib

import jax.numpy as jnp
import timing
from ablation import experiment_of
from gap import Clients

import fedmd_jax as fmd
from fedmd_jax import data as sources
from fedmd_jax.algorithms.fedmd import round_keys
from fedmd_jax.experiments.setup import Setup, cache_compiled_programs, prepare
from fedmd_jax.simulation.federation import States


def with_own_mean(clients: Clients, setup: Setup) -> Clients:
    """The same clients; private and test images are centred by the mean of all training images of their source."""
    data = setup.experiment.data
    images, _ = sources.load_images(data.private, "train", data_dir=data.data_dir)
    shift = setup.preprocess[0].mean - sources.mean_image(sources.scale(images))

    def centred(dataset: fmd.PrivateDataset) -> fmd.PrivateDataset:
        return dataset._replace(inputs=dataset.inputs + jnp.broadcast_to(shift, dataset.inputs.shape))

    others = copy.copy(clients)
    others.private = {name: centred(each) for name, each in clients.private.items()}
    others.test = centred(clients.test)
    return others


def accuracies(clients: Clients, states: States) -> list[float]:
    """One per client."""
    right = jnp.argmax(clients.scores(states, clients.test.inputs), axis=-1) == clients.test.labels[None]
    return [round(float(each), 4) for each in jnp.mean(right, axis=-1)]


def measure(experiment: str, words: str, client_ids: list[int]) -> dict[str, list[float]]:
    """Accuracies of the clients with one of the settings, in the order of `client_ids`."""
    setup = prepare([experiment_of(experiment, words)])
    clients = Clients(setup, client_ids)
    states = clients.start()
    found = {"transfer": accuracies(clients, states)}
    draw_subset, key = setup.experiment.subset_function(), round_keys(setup.round_key(1)).subset
    subset = draw_subset(key, clients.public, setup.experiment.subset_size)
    found["re-estimated"] = accuracies(clients, clients.estimate(states, subset.inputs))
    others = with_own_mean(clients, setup)
    return found | {"own mean": accuracies(others, others.start())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=[""], help="options of `fedmd-jax run`, one string each")
    parser.add_argument("--all", default="", help="options that all settings share")
    parser.add_argument("--networks", nargs="+", type=int, default=[0, 5, 8], help="of Table 1")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--json", type=pathlib.Path, help="append a line for each seed and settings to this file")
    options = parser.parse_args()
    cache_compiled_programs()
    for words in options.settings:
        for seed in range(options.seed, options.seed + options.seeds):
            found = measure("letters-iid", f"{options.all} {words} --seed {seed}", options.networks)
            for name, values in found.items():
                print(f"seed {seed} {words}, {name}: {' '.join(f'{value:.3f}' for value in values)}", flush=True)
            record = {"benchmark": "transfer", "settings": words, "seed": seed, "networks": options.networks, **found}
            timing.append_json(options.json, record)


if __name__ == "__main__":
    main()
