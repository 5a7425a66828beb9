"""What do a round's digest and its revisit each gain, with which settings?

    python benchmarks/ablation.py --settings "" "--digest.batch-size 64 --revisit.num-epochs 16" [--rounds 4]
                                  [--all "--width 0.25 --pretrained-dir DIR"] [--experiment letters-iid] [--json FILE]

Each setting runs its own transfer learning; all use the same public subsets. Accuracy is measured on private validation
images, never on the test set: the mean of the clients, and the accuracy of their *ensemble*, which is the consensus on
these images. The ensemble after a revisit is what the clients know together; the mean after the next digest is how much
of it was distilled through the public images. `size` is the mean absolute distance of the digested consensus from its
mean over classes. Training diverges if it grows from round to round.
"""

import argparse
import pathlib
import shlex
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import timing
import tyro

import fedmd_jax as fmd
from fedmd_jax.algorithms.fedmd import round_keys
from fedmd_jax.client.scoring import scores_size
from fedmd_jax.experiments import EXPERIMENTS, Experiment, smoke
from fedmd_jax.experiments.setup import Setup, cache_compiled_programs, prepare
from fedmd_jax.mapping.grouped import map_groups
from fedmd_jax.mapping.groups import group_keys
from fedmd_jax.simulation.federation import States
from fedmd_jax.transforms.clipping import clip_scores

Accuracy = dict[str, float]  # "mean" of the clients, "ensemble"; after a digest also the "size" of its consensus


def experiment_of(name: str, words: str) -> Experiment:
    """The experiment with these options, on validation data and without baselines."""
    needed = "--data.evaluate-on validation --no-local --no-pooled --num-rounds 0"
    given = shlex.split(f"--data.num-test 1500 {words} {needed}")
    preset = smoke(EXPERIMENTS[name]) if "--smoke" in given else EXPERIMENTS[name]
    experiment = tyro.cli(Experiment, default=preset, args=[word for word in given if word != "--smoke"])
    if experiment.probabilities() is not None:
        raise SystemExit("all clients take part here: leave out --availability and --completion")
    return experiment


def rounds(setup: Setup, num_rounds: int) -> Iterator[tuple[int, str, Accuracy]]:
    """Yields round, finished phase and accuracy, equal to those of a run; round 0 is transfer learning."""
    experiment, federation, data = setup.experiment, setup.federation, setup.data
    if federation.mesh is not None:
        raise SystemExit("this benchmark runs on one device: --devices 1")
    if experiment.batch_statistics != "moving" or experiment.learning_rate_decay != "none":
        raise SystemExit("rounds are those of --batch-statistics moving --learning-rate-decay none here")
    on_all = {"groups": federation.groups, "clients_per_chunk": experiment.clients_per_chunk or "auto"}
    score_clients = jax.jit(map_groups(fmd.score, (0, None), **on_all))
    digest_one = partial(fmd.digest, training=experiment.digest.training(), distance=experiment.distance_function())
    digest_clients = jax.jit(map_groups(digest_one, (0, None, None, 0), **on_all))
    client_ids, weights, *_ = fmd.algorithms.all_clients(federation.groups)
    bound = experiment.score_clip
    draw_subset, (test,), (public, private) = experiment.subset_function(), data["confusion"], data["round"]

    def consensus(scores: dict[str, jax.Array]) -> jax.Array:
        bounded = scores if bound is None else {name: clip_scores(each, bound=bound) for name, each in scores.items()}
        return fmd.weighted_consensus(bounded, weights)

    def accuracy(states: States) -> Accuracy:
        scores = score_clients(states, test.inputs)
        logits = {"mean": jnp.concatenate(list(scores.values())), "ensemble": consensus(scores)[None]}  # [., N, C]
        return {name: float(jnp.mean(jnp.argmax(each, axis=-1) == test.labels[None])) for name, each in logits.items()}

    states = transferred(setup)
    yield 0, "transfer", accuracy(states)
    for round_ in range(1, num_rounds + 1):
        key = setup.round_key(round_)
        keys = round_keys(key)
        subset = draw_subset(keys.subset, public, experiment.subset_size)
        target = consensus(score_clients(states, subset.inputs))
        states, _ = digest_clients(states, subset.inputs, target, group_keys(keys.digest, client_ids))
        yield round_, "digest", {**accuracy(states), "size": float(scores_size(target))}
        states, _ = federation.revisit(states, private, key)
        yield round_, "revisit", accuracy(states)


def transferred(setup: Setup) -> States:
    """The clients after transfer learning, as in a run."""
    arguments, named = setup.arguments("train_private")
    states, _ = setup.federation.programs["train_private"](pretrained(setup), *arguments, **named)
    return states


def pretrained(setup: Setup, names: Sequence[str] | None = None) -> States:
    """The clients after the public half of transfer learning, of all groups or of some.

    As in a run, groups are trained one after the other, and kept in the folder of pretrained clients, if there is one.
    """
    cache, programs = setup.pretrained_cache(pathlib.Path()), setup.federation.programs
    names, found = setup.federation.groups if names is None else names, cache.found()
    states = {name: jax.device_put(cache.load(name)[0]) for name in names if name in found}
    missing = [name for name in names if name not in found]
    if missing:
        arguments, named = setup.arguments("new_states")
        fresh = programs["new_states"](*arguments, **named)
        arguments, named = setup.arguments("pretrain")
        for name in missing:
            trained, info = programs["pretrain"]({name: fresh[name]}, *arguments, **named)
            if setup.experiment.pretrained_dir is not None and info[name].finite.all():
                cache.save(name, trained[name], {"failed": [[]]})
            states |= trained
    return {name: states[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings", nargs="+", default=[""], help="options of `fedmd-jax run`, one quoted string for each setting"
    )
    parser.add_argument("--all", default="--width 0.25", help="options that all settings share")
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
            columns = "  ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
            print(f"  round {round_:2} {phase:8}  {columns}", flush=True)
        record = {"experiment": options.experiment, "all": options.all, "settings": words, "accuracy": found}
        timing.append_json(options.json, record)


if __name__ == "__main__":
    main()
