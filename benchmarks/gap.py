"""What brings FedMD nearer to the pooled bound? Variants of a round, on the same clients and on validation images.

    python benchmarks/gap.py [--variants base warped ...] [--seeds 0 1 2] [--clients 5 6 7 8 9] [--rounds 7]
                             [--all "--width 0.25 --pretrained-dir DIR"] [--json FILE]

The clients are those of `letters-iid-tuned`, by default the five with three convolutions, which are faster than the
others. Accuracy is measured on private validation images, never on the test set: the mean of the clients, their
*ensemble*, the mean over classes of the distance to the pooled bound of the same clients, and the clients with the mean
of their weights after the later half of the rounds. `base` has the settings of the experiment, but the public images as
they are and constant learning rates; each other variant changes `base`, and sends as many bytes in a round.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import timing
from ablation import experiment_of, pretrained

import fedmd_jax as fmd
from fedmd_jax.algorithms import Augmentation, cut_images, draw_augmented_subset, warp_images
from fedmd_jax.algorithms.fedmd import round_keys
from fedmd_jax.client.scoring import scores_size
from fedmd_jax.client.training import scale_learning_rate
from fedmd_jax.experiments.setup import Setup, cache_compiled_programs, prepare
from fedmd_jax.mapping.grouped import map_groups
from fedmd_jax.mapping.groups import group_client_ids, group_keys
from fedmd_jax.simulation.federation import States, cosine_decay

NUM_DIGITS = 10  # the classes of the public dataset, which come first


def mean_scores(scores: chex.Array) -> chex.Array:
    """The consensus of FedMD: [K, M, C] -> [M, C]."""
    return jnp.mean(scores, axis=0)


def by_confidence(scores: chex.Array) -> chex.Array:
    """The mean with weights per client and example, the largest probabilities."""
    weights = jnp.max(jax.nn.softmax(scores), axis=-1, keepdims=True)
    return jnp.sum(weights * scores, axis=0) / jnp.sum(weights, axis=0)


def of_equal_size(scores: chex.Array) -> chex.Array:
    """The mean, multiplied so that it is as large as the scores of a client."""
    mean = mean_scores(scores)
    return mean * jnp.mean(jax.vmap(scores_size)(scores)) / scores_size(mean)


def mixed(key: chex.PRNGKey, inputs: chex.Array) -> chex.Array:
    """Means of pairs of images, with random weights."""
    keys = jax.random.split(key)
    shares = jax.random.uniform(keys[0], (len(inputs), 1, 1, 1))
    return shares * inputs + (1 - shares) * jax.random.permutation(keys[1], inputs)


def turned(key: chex.PRNGKey, inputs: chex.Array) -> chex.Array:
    """Images, each turned by 0, 90, 180 or 270 degrees and perhaps mirrored."""
    coins = jax.random.bernoulli(key, shape=(3, len(inputs), 1, 1, 1))
    changes = (lambda x: jnp.swapaxes(x, 1, 2), lambda x: x[:, ::-1], lambda x: x[:, :, ::-1])
    for coin, change in zip(coins, changes, strict=True):
        inputs = jnp.where(coin, change(inputs), inputs)
    return inputs


def private_classes(logits: chex.Array, targets: chex.Array) -> chex.Array:
    """MAE of the scores of the letters, without those of the digits."""
    return fmd.mae(logits[..., NUM_DIGITS:], targets[..., NUM_DIGITS:])


class Variant(NamedTuple):
    """How a round differs from that of `base`."""

    augmentations: tuple[Augmentation, ...] = ()  #: changes of the images of a subset
    consensus: Callable = mean_scores
    distance: Callable = fmd.mae
    num_subsets: int = 1  #: digests of a round, each on a fresh subset of so much smaller size
    num_passes: int = 1  #: digests and revisits by turns in a round, all towards the same consensus
    hard_share: float = 0.0  #: of a subset: the examples of the last one on which the clients disagreed most
    digest_epochs: int = 1
    revisit_epochs: int = 16
    decays: bool = False  #: learning rates fall by half a cosine over the rounds


VARIANTS = {
    "base": Variant(),
    "decay": Variant(decays=True),
    "long": Variant(digest_epochs=3),
    "subsets": Variant(num_subsets=4),
    "passes": Variant(num_passes=3, revisit_epochs=6),
    "letters": Variant(distance=private_classes),
    "confidence": Variant(consensus=by_confidence),
    "size": Variant(consensus=of_equal_size),
    "mixed": Variant(augmentations=(mixed,)),
    "cut": Variant(augmentations=(cut_images,)),
    "turned": Variant(augmentations=(turned,)),
    "turned_and_cut": Variant(augmentations=(turned, cut_images)),
    "warped": Variant(augmentations=(warp_images,)),
    "warped_and_cut": Variant(augmentations=(warp_images, cut_images)),
    "hard": Variant(hard_share=0.5),
    "short": Variant(revisit_epochs=4),
    "medium": Variant(revisit_epochs=8),
    "longer": Variant(revisit_epochs=32),
}


def variant_of(names: str) -> Variant:
    """One of `VARIANTS`, or what several of them change, as in "turned+decay"."""
    changes: dict = {}
    for name in names.split("+"):
        more = {key: value for key, value in VARIANTS[name]._asdict().items() if value != getattr(Variant(), key)}
        if changes.keys() & more.keys():
            raise SystemExit(f"{names}: two of these change the same")
        changes |= more
    return Variant(**changes)


class Clients:
    """Some clients of an experiment, and what is done with them; each method is one program."""

    def __init__(self, setup: Setup, client_ids: list[int]):
        """Trains the clients on the public dataset, or reads them if there is a folder of pretrained clients."""
        of_groups = setup.federation.groups
        self.groups = {name: group for name, group in of_groups.items() if set(group.client_ids) <= set(client_ids)}
        found = [client_id for group in self.groups.values() for client_id in group.client_ids]
        if found != client_ids:
            raise SystemExit(f"clients must be those of whole groups, in their order, got {client_ids}, found {found}")
        self.client_ids = group_client_ids(self.groups)
        self.public, private = setup.data["round"]
        self.private = {name: private[name] for name in self.groups}
        (self.test,) = setup.data["confusion"]
        self.pretrained = pretrained(setup, list(self.groups))
        self._federation, self._setup = setup.federation, setup
        self._score = jax.jit(self._map(fmd.score, 0, None))
        self._estimate = jax.jit(self._map(fmd.client.estimate_statistics, 0, None))

    def _map(self, fn, *axes):
        return map_groups(fn, axes, groups=self.groups, clients_per_chunk="auto")

    def start(self) -> States:
        """The clients after transfer learning."""
        key = self._setup.keys["train_private"]
        states = jax.tree.map(jnp.array, self.pretrained)
        return self._federation.train_private(states, self.private, key)[0]

    def pooled_accuracy(self) -> float:
        """Mean accuracy of the clients after training on the private images of all of them."""
        images = [data.inputs.reshape(-1, *data.inputs.shape[2:]) for data in self.private.values()]
        labels = [data.labels.reshape(-1) for data in self.private.values()]
        pooled = fmd.labelled_dataset(jnp.concatenate(images), jnp.concatenate(labels))
        states, _ = self._federation.train_pooled(self.pretrained, pooled, self._setup.keys["train_pooled"])
        return self.accuracy(states)["mean"]

    def scores(self, states: States, inputs: chex.Array) -> chex.Array:
        """Scores of all clients, [K, M, C], in the order of `groups`."""
        scores = self._score(states, inputs)  # jit sorts by name
        return jnp.concatenate([scores[name] for name in self.groups])

    def estimate(self, states: States, inputs: chex.Array) -> States:
        """The clients with the batch statistics of these inputs."""
        return self._estimate(states, inputs)

    def accuracy(self, states: States) -> dict[str, float]:
        """Mean of the clients, and their ensemble."""
        scores = self.scores(states, self.test.inputs)
        logits = {"mean": scores, "ensemble": mean_scores(scores)[None]}
        return {name: float(jnp.mean(jnp.argmax(each, -1) == self.test.labels[None])) for name, each in logits.items()}

    def phases(self, variant: Variant) -> tuple[Callable, Callable]:
        """Digest and revisit with a traced factor of the learning rate."""
        settings = self._setup.experiment
        digesting = dataclasses.replace(settings.digest, num_epochs=variant.digest_epochs).training()
        revisiting = dataclasses.replace(settings.revisit, num_epochs=variant.revisit_epochs).training()

        @partial(jax.jit, donate_argnums=0)
        def digest(states, inputs, consensus, key, factor):
            one = partial(fmd.digest, training=scale_learning_rate(digesting, factor), distance=variant.distance)
            return self._map(one, 0, None, None, 0)(states, inputs, consensus, group_keys(key, self.client_ids))[0]

        @partial(jax.jit, donate_argnums=0)
        def revisit(states, key, factor):
            one = partial(fmd.revisit, training=scale_learning_rate(revisiting, factor))
            return self._map(one, 0, 0, 0)(states, self.private, group_keys(key, self.client_ids))[0]

        return digest, revisit


def nth(key: chex.PRNGKey, index: int) -> chex.PRNGKey:
    """One of several keys in a round; the first is that of a run."""
    return jax.random.fold_in(key, index) if index else key


def rounds(clients: Clients, setup: Setup, variant: Variant, num_rounds: int) -> Iterator[dict]:
    """Yields the accuracies after each round; round 0 is transfer learning."""
    digest, revisit = clients.phases(variant)
    size, draw = setup.experiment.subset_size // variant.num_subsets, fmd.draw_public_subset
    if variant.augmentations:
        draw = partial(draw_augmented_subset, augmentations=variant.augmentations)
    states, kept, hardest = clients.start(), [], None
    yield {"round": 0, **clients.accuracy(states)}
    for round_ in range(1, num_rounds + 1):
        factor = jnp.float32(cosine_decay(num_rounds)(round_) if variant.decays else 1.0)
        keys = round_keys(setup.round_key(round_))
        for part in range(variant.num_subsets):
            inputs = draw(nth(keys.subset, part), clients.public, size).inputs
            if hardest is not None:
                inputs = jnp.concatenate([hardest, inputs[len(hardest) :]])
            states = clients.estimate(states, inputs)
            scores = clients.scores(states, inputs)
            if variant.hard_share:
                disagreement = jnp.mean(jnp.std(scores, axis=0), axis=-1)
                hardest = inputs[jnp.argsort(-disagreement)[: int(variant.hard_share * size)]]
            consensus = variant.consensus(scores)
            for again in range(variant.num_passes):
                index = part * variant.num_passes + again
                states = digest(states, inputs, consensus, nth(keys.digest, index), factor)
                if part == variant.num_subsets - 1:
                    after_digest = clients.accuracy(states)["mean"]
                    states = revisit(states, nth(keys.revisit, again), factor)
        found = {"round": round_, "digest": after_digest, **clients.accuracy(states)}
        if round_ > num_rounds // 2:
            kept.append(jax.device_get(states))
            mean = jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), axis=0).astype(leaves[0].dtype), *kept)
            found["averaged"] = clients.accuracy(clients.estimate(mean, inputs))["mean"]
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), help=f"such as decay+long: {' '.join(VARIANTS)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--clients", nargs="+", type=int, default=[5, 6, 7, 8, 9])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--all", default="--width 0.25", help="options of `fedmd-jax run`, such as --pretrained-dir")
    parser.add_argument("--json", type=pathlib.Path, help="append a line per variant and seed to this file")
    options = parser.parse_args()
    if unknown := {part for name in options.variants for part in name.split("+")} - {*VARIANTS}:
        parser.error(f"unknown variants: {', '.join(sorted(unknown))}")
    cache_compiled_programs()
    for seed in options.seeds:
        setup = prepare([experiment_of("letters-iid-tuned", f"{options.all} --seed {seed}")])
        clients = Clients(setup, options.clients)
        pooled = clients.pooled_accuracy()
        print(f"seed {seed}: pooled {pooled:.3f}")
        for name in options.variants:
            found = []
            for accuracy in rounds(clients, setup, variant_of(name), options.rounds):
                found.append(accuracy)
                columns = "  ".join(f"{key} {value:.3f}" for key, value in accuracy.items() if key != "round")
                print(f"  {name:24} round {accuracy['round']:2}  {columns}", flush=True)
            record = {"benchmark": "gap", "variant": name, "seed": seed, "clients": options.clients, "pooled": pooled}
            timing.append_json(options.json, record | {"all": options.all, "accuracy": found})


if __name__ == "__main__":
    main()
