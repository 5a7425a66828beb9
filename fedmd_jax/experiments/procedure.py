"""The whole procedure of the paper, from images to the last round."""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.clients import ArchitectureGroup, stack_private
from fedmd_jax.communication import Communication, communication_bytes
from fedmd_jax.data import center, load_images, scale, split_by_class
from fedmd_jax.experiments.networks import architecture_from_name
from fedmd_jax.experiments.settings import Data, Experiment
from fedmd_jax.experiments.stopwatch import Stopwatch
from fedmd_jax.federation import (
    Federation,
    RoundMetrics,
    fedmd,
    labelled_dataset,
    public_dataset,
    round_metrics,
    run_federation,
)
from fedmd_jax.subset import draw_public_subset, draw_stratified_subset
from fedmd_jax.types import PrivateDataset, PublicDataset


class Observer(Protocol):
    """What a run tells while it goes on."""

    def phase(self, title: str) -> None:
        """Something begins that may take a while."""

    def round(self, metrics: RoundMetrics) -> None:
        """A round is over; round 0 is the end of transfer learning."""

    def pooled(self, accuracy: dict[int, float]) -> None:
        """The upper bound is known, per client."""


class Images(NamedTuple):
    """An experiment's data on the device, and how many outputs a network needs for it."""

    public: PublicDataset
    private: dict[int, tuple[np.ndarray, np.ndarray]]  # client id -> inputs [n, ...], labels [n]
    pooled: PrivateDataset  # all private examples
    test: PrivateDataset
    num_classes: int


class Prepared(NamedTuple):
    """Everything a run needs, checked and nothing computed."""

    federation: Federation
    images: Images
    private: dict[str, PrivateDataset]  # per group, stacked


def prepare(experiment: Experiment) -> Prepared:
    """Loads the data and builds the federation.

    Args:
      experiment: all settings.

    Raises:
      ValueError: data that is missing or damaged, or settings that do not fit it.
    """
    images = load(experiment.data, num_clients=len(experiment.networks), seed=experiment.seed)
    groups = group_clients(experiment, images.num_classes)
    federation = fedmd(
        groups,
        subset_size=experiment.subset_size,
        public_training=experiment.public_training.training(),
        private_training=experiment.private_training.training(),
        pooled_training=experiment.pooled_training.training(),
        digest_training=experiment.digest.training(),
        revisit_training=experiment.revisit.training(),
        distance=experiment.distance_function(),
        draw_subset=draw_public_subset if experiment.subset == "random" else draw_stratified_subset,
    )
    private = stack_private(groups, images.private)
    federation.check(images.public, private)
    return Prepared(federation, images, private)


def group_clients(experiment: Experiment, num_classes: int) -> dict[str, ArchitectureGroup]:
    """Clients with equal networks share a group, named by the network; a client's id is its place in the settings."""
    weights = experiment.weights or (1.0,) * len(experiment.networks)
    members = {
        name: [i for i, other in enumerate(experiment.networks) if other == name] for name in experiment.networks
    }
    return {
        name: ArchitectureGroup(
            architecture_from_name(name, num_classes, head_penalty=experiment.head_penalty),
            client_ids,
            [weights[i] for i in client_ids],
        )
        for name, client_ids in members.items()
    }


def load(data: Data, *, num_clients: int, seed: int) -> Images:
    """Reads, selects, splits and centres the images.

    Labels are renumbered: public classes first, then the private ones in the order of `data.private_classes`, all in
    one head, as in the released code (10 + 6 = 16).

    Args:
      data: which images.
      num_clients: how many share the private ones.
      seed: of the selection and of the split.

    Raises:
      ValueError: data that is missing or damaged, or not enough of it.
    """
    rng = np.random.default_rng(seed)
    public = load_images(data.public, "train", data_dir=data.data_dir)
    private, test = (load_images(data.private, split, data_dir=data.data_dir) for split in ("train", "test"))
    if public.images.shape[1:] != private.images.shape[1:]:
        raise ValueError(
            f"public and private images must have one shape, got {public.images.shape[1:]} for "
            f"{data.public} and {private.images.shape[1:]} for {data.private}"
        )
    num_public_classes = int(public.labels.max()) + 1
    missing = sorted(set(data.private_classes) - set(private.labels.tolist()))
    if missing:
        raise ValueError(
            f"{data.private} has no example of the classes {missing}, it has {sorted(set(private.labels.tolist()))}"
        )
    position = {label: num_public_classes + i for i, label in enumerate(data.private_classes)}

    def renumber(labels):
        return np.array([position[label] for label in labels.tolist()], np.int32)

    rows = _choose(f"num_public: {data.public}", len(public.labels), data.num_public, rng)
    parts = split_by_class(
        private.labels,
        num_clients=num_clients,
        examples_per_class=data.examples_per_class,
        classes=data.private_classes,
        rng=rng,
    )
    candidates = np.flatnonzero(np.isin(test.labels, data.private_classes))
    test_rows = candidates[_choose(f"num_test: {data.private} (test)", len(candidates), data.num_test, rng)]
    everything = np.concatenate(parts)
    public_inputs, private_inputs, test_inputs = center(
        scale(public.images[rows]), scale(private.images[everything]), scale(test.images[test_rows])
    )
    private_labels = renumber(private.labels[everything])
    ends = np.cumsum([len(part) for part in parts])[:-1]
    shares = zip(np.split(private_inputs, ends), np.split(private_labels, ends), strict=True)
    return Images(
        public=public_dataset(public_inputs, public.labels[rows]),
        private=dict(enumerate(shares)),
        pooled=labelled_dataset(private_inputs, private_labels),
        test=labelled_dataset(test_inputs, renumber(test.labels[test_rows])),
        num_classes=num_public_classes + len(data.private_classes),
    )


def _choose(what: str, num_rows: int, num_wanted: int, rng: np.random.Generator) -> np.ndarray:
    if num_wanted > num_rows:
        raise ValueError(f"{what} has {num_rows} examples, wanted {num_wanted}")
    return rng.permutation(num_rows)[:num_wanted]


def run(prepared: Prepared, experiment: Experiment, observer: Observer, watch: Stopwatch) -> None:
    """Transfer learning, the rounds, and the pooled upper bound; the observer hears of every result as it is known.

    The upper bound comes last, so that the first accuracies are seen soon.

    Args:
      prepared: from `prepare`.
      experiment: the same settings.
      observer: is told of phases, rounds and results.
      watch: measures the phases.
    """
    federation, images, private = clocked(prepared.federation, watch), prepared.images, prepared.private
    key_init, key_public, key_private, key_rounds, key_pooled = jax.random.split(jax.random.key(experiment.seed), 5)

    observer.phase("preparing the networks")
    states = federation.init(key_init, images.public, private)
    observer.phase("transfer learning: public data")
    states, _ = federation.pretrain(states, images.public, key_public)
    # The upper bound starts from here, and donation consumes the clients.
    pretrained = jax.tree.map(jnp.copy, states) if experiment.pooled else None
    observer.phase("transfer learning: private data")
    states, _ = federation.personalize(states, private, key_private)
    observer.phase("rounds")
    run_federation(
        federation,
        states,
        images.public,
        private,
        key_rounds,
        num_rounds=experiment.num_rounds,
        test=images.test,
        callback=lambda metrics, _: observer.round(metrics),
    )
    if experiment.pooled:
        observer.phase("pooled upper bound")
        states, _ = federation.pool(pretrained, images.pooled, key_pooled)
        final = round_metrics(federation.groups, 0, federation.evaluate(states, images.test), None)
        observer.pooled({client.client_id: client.accuracy for client in final.clients})


def clocked(federation: Federation, watch: Stopwatch) -> Federation:
    """The same federation, its functions blocking until their result is there, and timed by phase."""
    phases = {
        "init": "transfer",
        "pretrain": "transfer",
        "personalize": "transfer",
        "round": "rounds",
        "pool": "pooled",
        "evaluate": "evaluate",
    }

    def clock(phase, fn):
        def clocked_fn(*args):
            with watch(phase):
                return jax.block_until_ready(fn(*args))

        return clocked_fn

    return dataclasses.replace(
        federation, **{name: clock(phase, getattr(federation, name)) for name, phase in phases.items()}
    )


def communication(prepared: Prepared, experiment: Experiment) -> Communication:
    """What the run sends, from the shapes of its networks; nothing is computed."""
    states = jax.eval_shape(prepared.federation.new_states, jax.random.key(0), prepared.images.public.inputs[:1])
    return communication_bytes(
        states,
        subset_size=experiment.subset_size,
        num_classes=prepared.images.num_classes,
        num_rounds=experiment.num_rounds,
    )
