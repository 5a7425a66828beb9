"""What do a round's digest and its revisit each gain, with which settings?

    python benchmarks/ablation.py --settings "" "--digest.batch-size 64 --revisit.num-epochs 16" [--rounds 4]
                                  [--all "--width 0.25 --pretrained-dir DIR"] [--experiment letters-iid] [--json FILE]

All settings begin with transfer learning as they have it, and go through the same public subsets. Accuracy is on
private validation images, never on the test set: the mean of the clients, and that of their *ensemble*, the consensus
on these images. After a round's revisit the ensemble has what the clients know together; after the next round's digest
the mean has what of it has passed through the public images. `size` is that of the consensus that was digested: how far
a class's score is from the mean of all classes, on average. Where it grows from round to round the rounds run away.
"""

import argparse
import pathlib
import shlex
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import timing
import tyro

import fedmd_jax as fmd
from fedmd_jax.algorithms.fedmd import round_keys
from fedmd_jax.experiments import EXPERIMENTS, Experiment, smoke
from fedmd_jax.experiments.setup import Setup, cache_compiled_programs, prepare
from fedmd_jax.mapping.grouped import map_groups
from fedmd_jax.mapping.groups import group_keys
from fedmd_jax.simulation.federation import States
from fedmd_jax.transforms.clipping import clip_scores

Accuracy = dict[str, float]  # "mean" of the clients, "ensemble"; after a digest also the "size" of its consensus


def experiment_of(name: str, words: str) -> Experiment:
    """The experiment with these options, on validation data, and without what it is compared with."""
    needed = "--data.evaluate-on validation --no-local --no-pooled --num-rounds 0"
    given = shlex.split(f"--data.num-test 1500 {words} {needed}")
    preset = smoke(EXPERIMENTS[name]) if "--smoke" in given else EXPERIMENTS[name]
    experiment = tyro.cli(Experiment, default=preset, args=[word for word in given if word != "--smoke"])
    if experiment.probabilities() is not None:
        raise SystemExit("everybody takes part here, without --availability and --completion")
    return experiment


def rounds(setup: Setup, num_rounds: int) -> Iterator[tuple[int, str, Accuracy]]:
    """Round, what is over, and how good the clients are then, as they are in a run; round 0 is transfer learning."""
    experiment, federation, data = setup.experiment, setup.federation, setup.data
    if federation.mesh is not None:
        raise SystemExit("one device is enough here: --devices 1")
    on_all = {"groups": federation.groups, "clients_per_chunk": experiment.clients_per_chunk or "auto"}
    score_clients = jax.jit(map_groups(fmd.score, (0, None), **on_all))
    digest_one = partial(fmd.digest, training=experiment.digest.training(), distance=experiment.distance_function())
    digest_clients = jax.jit(map_groups(digest_one, (0, None, None, 0), **on_all))
    client_ids, weights, *_ = fmd.algorithms.all_clients(federation.groups)
    bound = experiment.score_clip
    draw_subset, test = experiment.subset_function(), data.test

    def consensus(scores: dict[str, jax.Array]) -> jax.Array:
        bounded = scores if bound is None else {name: clip_scores(each, bound=bound) for name, each in scores.items()}
        return fmd.weighted_consensus(bounded, weights)

    def accuracy(states: States) -> Accuracy:
        scores = score_clients(states, test.inputs)
        told = {"mean": jnp.concatenate(list(scores.values())), "ensemble": consensus(scores)[None]}  # [., N, C]
        return {name: float(jnp.mean(jnp.argmax(each, axis=-1) == test.labels[None])) for name, each in told.items()}

    states = transferred(setup)
    yield 0, "transfer", accuracy(states)
    for round_ in range(1, num_rounds + 1):
        key = setup.round_key(round_)
        keys = round_keys(key)
        subset = draw_subset(keys.subset, data.public, experiment.subset_size)
        target = consensus(score_clients(states, subset.inputs))
        states, _ = digest_clients(states, subset.inputs, target, group_keys(keys.digest, client_ids))
        size = float(jnp.mean(jnp.abs(target - jnp.mean(target, axis=-1, keepdims=True))))
        yield round_, "digest", {**accuracy(states), "size": size}
        states, _ = federation.revisit(states, data.private, key)
        yield round_, "revisit", accuracy(states)


def transferred(setup: Setup) -> States:
    """The clients after transfer learning, network by network as in a run."""
    federation, data, keys = setup.federation, setup.data, setup.keys
    states = federation.new_states(keys.init, setup.first_input)
    for name in federation.groups:
        some = {name: states[name]}
        trained, _ = federation.pretrain(some, data.pretraining, keys.public, *setup.validation("pretrain"))
        states = {**states, **trained}
    states, _ = federation.train_private(states, data.private, keys.private, *setup.validation("train_private"))
    return states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings", nargs="+", default=[""], help="options of `fedmd-jax run`, in quotes and with spaces, for each"
    )
    parser.add_argument("--all", default="--width 0.25", help="the same of all settings")
    parser.add_argument("--experiment", default="letters-iid")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=pathlib.Path, help="append a line for each of the settings to this file")
    options = parser.parse_args()
    cache_compiled_programs()
    for words in options.settings:
        print(f"{options.experiment} {options.all} {words}")
        experiment = experiment_of(options.experiment, f"{options.all} {words}")
        found = []
        for round_, phase, accuracy in rounds(prepare([experiment]), options.rounds):
            found.append({"round": round_, "after": phase, **accuracy})
            told = "  ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
            print(f"  round {round_:2} {phase:8}  {told}", flush=True)
        record = {"experiment": options.experiment, "all": options.all, "settings": words, "accuracy": found}
        timing.append_json(options.json, record)


if __name__ == "__main__":
    main()
