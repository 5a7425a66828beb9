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

import fedmd_jax as fmd
from fedmd_jax.clients import group_client_ids, group_keys
from fedmd_jax.consensus import bound_scores
from fedmd_jax.devices import map_groups
from fedmd_jax.experiments import Experiment
from fedmd_jax.experiments.compilation_cache import keep_compiled_programs
from fedmd_jax.experiments.kept import TRANSFERRED, InMemory
from fedmd_jax.experiments.observer import Observer
from fedmd_jax.experiments.prepared import Prepared, client_shapes, prepare
from fedmd_jax.experiments.procedure import compiled_once, keys_of
from fedmd_jax.experiments.stopwatch import Stopwatch
from fedmd_jax.federation import States
from fedmd_jax.options import parse
from fedmd_jax.round import round_keys

Accuracy = dict[str, float]  # "mean" of the clients, "ensemble"; after a digest also the "size" of its consensus


def experiment_of(name: str, words: str) -> Experiment:
    """The experiment with these options, on validation data, and without what it is compared with."""
    needed = "--data.evaluate-on validation --no-local --no-pooled --num-rounds 0"
    experiment = parse(name, shlex.split(f"--data.num-test 1500 {words} {needed}")).experiment
    if experiment.probabilities() is not None:
        raise SystemExit("everybody takes part here, without --availability and --completion")
    return experiment


def rounds(prepared: Prepared, num_rounds: int) -> Iterator[tuple[int, str, Accuracy]]:
    """Round, what is over, and how good the clients are then, as they are in a run; round 0 is transfer learning."""
    experiment, federation = prepared.experiment, prepared.federation
    if federation.mesh is not None:
        raise SystemExit("one device is enough here: --devices 1")
    on_all = {"groups": federation.groups, "clients_per_chunk": experiment.clients_per_chunk or "auto"}
    score_clients = jax.jit(map_groups(fmd.score, (0, None), **on_all))
    digest_one = partial(fmd.digest, training=experiment.digest.training(), distance=experiment.distance_function())
    digest_clients = jax.jit(map_groups(digest_one, (0, None, None, 0), **on_all))
    bound, client_ids, weights = (
        experiment.score_bound,
        group_client_ids(federation.groups),
        fmd.all_clients(federation.groups).weights,
    )
    draw_subset, test = experiment.subset_function(), prepared.datasets.test

    def consensus(scores: dict[str, jax.Array]) -> jax.Array:
        bounded = scores if bound is None else {name: bound_scores(each, bound=bound) for name, each in scores.items()}
        return fmd.weighted_consensus(bounded, weights)

    def accuracy(states: States) -> Accuracy:
        scores = score_clients(states, test.inputs)
        told = {"mean": jnp.concatenate(list(scores.values())), "ensemble": consensus(scores)[None]}  # [., N, C]
        return {name: float(jnp.mean(jnp.argmax(each, axis=-1) == test.labels[None])) for name, each in told.items()}

    states = transferred(prepared)
    yield 0, "transfer", accuracy(states)
    for round_ in range(1, num_rounds + 1):
        key = jax.random.fold_in(keys_of(experiment.seed).rounds, round_)
        keys = round_keys(key)
        subset = draw_subset(keys.subset, prepared.datasets.public, experiment.subset_size)
        target = consensus(score_clients(states, subset.inputs))
        states, _ = digest_clients(states, subset.inputs, target, group_keys(keys.digest, client_ids))
        size = float(jnp.mean(jnp.abs(target - jnp.mean(target, axis=-1, keepdims=True))))
        yield round_, "digest", {**accuracy(states), "size": size}
        states, _ = federation.revisit(states, prepared.private, key)
        yield round_, "revisit", accuracy(states)


def transferred(prepared: Prepared) -> States:
    """The clients after transfer learning."""
    kept = InMemory([TRANSFERRED])
    with compiled_once(prepared, Stopwatch()) as run:
        run(prepared, Observer(), kept)
    return kept.load(TRANSFERRED, client_shapes(prepared))


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
    keep_compiled_programs()
    for words in options.settings:
        print(f"{options.experiment} {options.all} {words}")
        experiment = experiment_of(options.experiment, f"{options.all} {words}")
        found = []
        for round_, phase, accuracy in rounds(prepare(experiment), options.rounds):
            found.append({"round": round_, "after": phase, **accuracy})
            told = "  ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
            print(f"  round {round_:2} {phase:8}  {told}", flush=True)
        record = {"experiment": options.experiment, "all": options.all, "settings": words, "accuracy": found}
        timing.append_json(options.json, record)


if __name__ == "__main__":
    main()
