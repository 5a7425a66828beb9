"""What a run needs, from its settings: data, federation and devices, checked; nothing is trained here."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedmd_jax.algorithms.participation import all_clients
from fedmd_jax.experiments.checkpoint import PretrainedCache, fingerprint
from fedmd_jax.experiments.datasets import Datasets, hold_out, load, pool
from fedmd_jax.experiments.networks import architecture_from_name
from fedmd_jax.experiments.run_directory import CHECKPOINTS, Record, origin
from fedmd_jax.experiments.settings import Devices, Experiment
from fedmd_jax.mapping.chunking import chunk_of
from fedmd_jax.mapping.grouped import client_costs
from fedmd_jax.mapping.groups import ArchitectureGroup, group_client_ids, stack_private
from fedmd_jax.mapping.sharding import client_mesh, gather_clients
from fedmd_jax.simulation.communication import CommunicationCost, communication_bytes
from fedmd_jax.simulation.federation import Federation, States, fedmd, vmap_federation
from fedmd_jax.simulation.participation import simulate_participation
from fedmd_jax.transforms.clipping import clip_scores
from fedmd_jax.types import Participants, PrivateDataset, PublicDataset

T = TypeVar("T")
_MOST_SEEDS_AT_ONCE = 8  # each has its own copy of all data on the device


class Arrays(NamedTuple):
    """The data of a run, on its devices; a leading [S] where seeds are trained at once."""

    public: PublicDataset
    private: dict[str, PrivateDataset]  #: per group, stacked
    test: PrivateDataset  #: unstacked
    pretraining: PublicDataset  #: public examples of transfer learning
    pooling: PrivateDataset | None  #: private examples of the pooled bound, if it is wanted
    validation: dict[str, PrivateDataset]  #: per program that stops early


class Keys(NamedTuple):
    """The keys of the phases of a run; with a leading [S] where seeds are trained at once."""

    init: chex.PRNGKey
    public: chex.PRNGKey
    private: chex.PRNGKey
    rounds: chex.PRNGKey
    pooled: chex.PRNGKey
    participation: chex.PRNGKey


class Setup(NamedTuple):
    """All that a run needs; of several seeds, which differ in seed, data and keys only.

    Attributes:
      experiments: one per seed.
      federation: from `vmap_federation` where seeds are trained at once.
      data: on the devices.
      keys: of the phases.
      num_classes: C.
      fingerprints: of the data of each seed: all of it, and what the public half of transfer learning depends on.
      batched: whether arrays, keys and states have a leading [S], also where S = 1.
    """

    experiments: tuple[Experiment, ...]
    federation: Federation
    data: Arrays
    keys: Keys
    num_classes: int
    fingerprints: tuple[tuple[str, str], ...]
    batched: bool

    @property
    def experiment(self) -> Experiment:
        """The settings; of several seeds those of the first."""
        return self.experiments[0]

    @property
    def first_input(self) -> chex.Array:
        """One public input, [1, ...]."""
        return self.data.public.inputs[:, :1] if self.batched else self.data.public.inputs[:1]

    def round_key(self, round_: int) -> chex.PRNGKey:
        """The key of a round."""
        fold_in = partial(jax.random.fold_in, data=round_)
        return jax.vmap(fold_in)(self.keys.rounds) if self.batched else fold_in(self.keys.rounds)

    def participants(self, round_: int) -> dict[str, Participants]:
        """The argument `participants` of a round; none if all clients complete all rounds."""
        probabilities = self.experiment.probabilities()
        if probabilities is None:
            return {}
        client_ids = group_client_ids(self.federation.groups)
        keys = self.keys.participation if self.batched else [self.keys.participation]
        policies = [simulate_participation(key, **probabilities) for key in keys]
        drawn = [all_clients(self.federation.groups, policy(round_, client_ids)) for policy in policies]
        return {"participants": stack(drawn) if self.batched else drawn[0]}

    def validation(self, program: str) -> list[PrivateDataset]:
        """The last argument of a program that stops early."""
        return [self.data.validation[program]] if program in self.data.validation else []

    def per_seed(self, tree: T) -> list[T]:
        """Splits what has a leading [S]; otherwise a list of one."""
        if not self.batched:
            return [tree]
        return [jax.tree.map(lambda leaf, s=s: leaf[s], tree) for s in range(len(self.experiments))]

    def put(self, states: States) -> States:
        """States from the host, on the devices of their clients."""
        return jax.device_put(states) if self.federation.mesh is None else self.federation.put(states)

    def shapes(self) -> States:
        """Shapes of the states, on no devices."""
        # Traced, so that a sharded federation needs no array.
        new_states = self.federation.programs["new_states"]
        return gather_clients(jax.eval_shape(new_states, self.keys.init, self.first_input))

    def clients_at_once(self) -> dict[str, int]:
        """How many clients of each group run at once on a device."""
        setting, states = self.experiment.clients_per_chunk or "auto", self._one_seed()
        groups, mesh = self.federation.groups, self.federation.mesh
        chunks = {name: chunk_of(setting, name, states[name].params, mesh) for name in groups}
        of_device = {name: -(-group.num_clients // (mesh.size if mesh else 1)) for name, group in groups.items()}
        return {name: min(chunks[name] or of_device[name], of_device[name]) for name in groups}

    def communication(self, num_rounds: int) -> CommunicationCost:
        """Bytes that this many rounds send, from the shapes of the networks."""
        return communication_bytes(
            self._one_seed(),
            subset_size=self.experiment.subset_size,
            num_classes=self.num_classes,
            num_rounds=num_rounds,
        )

    def identity(self) -> Record:
        """What decides the bits of a run: settings, data and environment."""
        settings = dataclasses.asdict(self.experiment)
        for name in ("checkpoint_every", "pretrained_dir", "seed", "devices", "vmap_seeds"):
            del settings[name]
        del settings["data"]["data_dir"]
        known = {
            "settings": settings,
            "seeds": [experiment.seed for experiment in self.experiments],
            "data": [of_all for of_all, _ in self.fingerprints],
            "environment": {
                **{part: origin()[part] for part in ("versions", "device")},
                "devices": self.experiment.devices,
                "xla_flags": os.environ.get("XLA_FLAGS"),
                "clients_at_once": self.clients_at_once(),
                "batched": self.batched,
            },
        }
        return json.loads(json.dumps(known))

    def pretrained_cache(self, path: pathlib.Path) -> PretrainedCache:
        """The clients after the public half of transfer learning.

        Args:
          path: run directory, of which the cache is a part if the settings have no folder for it.
        """
        names = ("width", "head_penalty", "clients_per_chunk", "public_training")
        settings = dataclasses.asdict(self.experiment)
        known = {name: settings[name] for name in names} | {
            "num_classes": self.num_classes,
            "seeds": [[each.seed, data] for each, (_, data) in zip(self.experiments, self.fingerprints, strict=True)],
            "batched": self.batched,
            **{part: origin()[part] for part in ("versions", "device")},
        }
        groups, mesh = self.federation.groups, self.federation.mesh
        if mesh is not None:  # all groups are one program, so that each may change the rounding of the others
            known |= {"devices": mesh.size, "networks": self.experiment.networks}
        fingerprints = {
            name: fingerprint(known | {"network": name, "client_ids": group.client_ids})
            for name, group in groups.items()
        }
        own = path / CHECKPOINTS / "pretrained"
        shared = self.experiment.pretrained_dir
        return PretrainedCache(pathlib.Path(shared).expanduser() if shared else own, fingerprints, self.shapes())

    def _one_seed(self) -> States:
        """Shapes of the states of one seed."""
        shapes = self.shapes()
        return jax.eval_shape(lambda tree: self.per_seed(tree)[0], shapes)


def prepare(experiments: Sequence[Experiment], *, batched: bool = False) -> Setup:
    """Loads the data and builds the federation.

    Args:
      experiments: settings that differ in their seeds only.
      batched: whether the seeds are trained at once. If not, there is one.

    Raises:
      ValueError: data that is missing or damaged, or settings that do not fit it.
    """
    first, *_ = experiments
    public_test = first.public_training.monitored == "test"
    datasets = [
        load(each.data, num_clients=len(each.networks), seed=each.seed, public_test=public_test) for each in experiments
    ]
    federation = _federation(first, datasets[0])
    arrays = [_arrays(each, federation, data) for each, data in zip(experiments, datasets, strict=True)]
    fingerprints = tuple(
        (fingerprint(None, tuple(each)), fingerprint(None, (each.pretraining, each.validation.get("pretrain"))))
        for each in arrays
    )
    keys = [_keys(each.seed) for each in experiments]
    if batched:
        federation, data = vmap_federation(federation), jax.device_put(stack(arrays))
        keys = jax.tree.map(lambda *each: jnp.stack(each), *keys)
    else:
        *examples, validation = arrays[0]
        data = Arrays(*map(federation.put, examples), {name: federation.put(each) for name, each in validation.items()})
        keys = keys[0]
    return Setup(tuple(experiments), federation, data, keys, datasets[0].num_classes, fingerprints, batched)


def choose_mesh(devices: Devices) -> Mesh | None:
    """The devices of a run; None for one device, which needs no mesh.

    Args:
      devices: how many, "all", or None for all accelerators. The cores of a CPU are one device, unless set otherwise.

    Raises:
      ValueError: more devices than there are.
    """
    if devices is None and jax.default_backend() == "cpu":
        return None
    mesh = client_mesh(None if devices == "all" else devices)
    return mesh if mesh.size > 1 else None


def choose_seeds_at_once(experiment: Experiment, num_seeds: int) -> int:
    """How many seeds are trained at once: the setting, or what is thought to be fastest.

    Args:
      experiment: its devices, and its `vmap_seeds`.
      num_seeds: number of seeds.

    Raises:
      ValueError: several seeds at once on many devices.
    """
    wanted, mesh = experiment.vmap_seeds, choose_mesh(experiment.devices)
    if wanted is None:
        batchable = jax.config.jax_default_prng_impl == "threefry2x32"  # other keys give other numbers in a batch
        alone = mesh is not None or jax.default_backend() == "cpu" or not batchable
        wanted = 1 if alone else _MOST_SEEDS_AT_ONCE
    elif wanted > 1 and mesh is not None:
        raise ValueError(f"vmap_seeds must be 1 on several devices, got {wanted} on {mesh.size} devices")
    return min(wanted, num_seeds)


def stack(trees: Sequence[T]) -> T:
    """Stacks trees of arrays, [S, ...], padded with zeros to the largest: datasets may have different numbers of rows.

    >>> stack([np.zeros(2), np.zeros(3)]).shape
    (2, 3)
    """

    def stack_leaves(*leaves):
        size = np.max([leaf.shape for leaf in leaves], axis=0).astype(int)
        stacked = np.zeros((len(leaves), *size), leaves[0].dtype)
        for s, leaf in enumerate(leaves):
            stacked[s, *map(slice, leaf.shape)] = leaf
        return stacked

    return jax.tree.map(stack_leaves, *trees)


def group_clients(experiment: Experiment, num_classes: int) -> dict[str, ArchitectureGroup]:
    """Groups clients with equal networks, named by the network; a client's id is its position in the settings.

    Args:
      experiment: whose networks, weights and head penalty are used.
      num_classes: C.

    Raises:
      ValueError: an unknown network.
    """
    members: dict[str, list[int]] = {}
    for client_id, name in enumerate(experiment.networks):
        members.setdefault(name, []).append(client_id)
    return {
        name: ArchitectureGroup(
            architecture_from_name(name, num_classes, head_penalty=experiment.head_penalty, width=experiment.width),
            client_ids,
            None if experiment.weights is None else [experiment.weights[i] for i in client_ids],
        )
        for name, client_ids in members.items()
    }


def cache_compiled_programs() -> None:
    """Lets JAX keep compiled programs on disk, unless the user has chosen a folder, or none.

    They go to `$XDG_CACHE_HOME/fedmd_jax` (`~/.cache/fedmd_jax`), readable by the user alone, since programs are code.
    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. If the folder
    cannot be made, nothing is kept.
    """
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    with contextlib.suppress(OSError, RuntimeError):
        folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "fedmd_jax"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Small programs count: there are dozens of them, and each took longer to compile than to read.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _keys(seed: int) -> Keys:
    key = jax.random.key(seed)
    return Keys(*jax.random.split(key, 5), jax.random.fold_in(key, 5))  # `split` takes the first five of `fold_in`


def _federation(experiment: Experiment, datasets: Datasets) -> Federation:
    groups = group_clients(experiment, datasets.num_classes)
    mesh, bound = choose_mesh(experiment.devices), experiment.score_clip
    return fedmd(
        groups,
        subset_size=experiment.subset_size,
        public_training=experiment.public_training.training(),
        private_training=experiment.private_training.training(),
        pooled_training=experiment.pooled_training.training(),
        digest_training=experiment.digest.training(),
        revisit_training=experiment.revisit.training(),
        distance=experiment.distance_function(),
        draw_subset=experiment.subset_function(),
        transforms=() if bound is None else (partial(clip_scores, bound=bound),),
        clients_per_chunk=experiment.clients_per_chunk or "auto",
        mesh=mesh,
        costs=None if mesh is None else client_costs(groups, datasets.public.inputs[:1]),
    )


def _arrays(experiment: Experiment, federation: Federation, datasets: Datasets) -> Arrays:
    """The data of one seed, checked, with the validation data held out of training."""
    private = stack_private(federation.groups, datasets.private)
    pooled = pool(datasets.private) if experiment.pooled else None
    rng = np.random.default_rng([experiment.seed, 1])  # the data are drawn with another one
    phases = {
        "pretrain": (experiment.public_training.monitored, datasets.public, datasets.public_test),
        "train_private": (experiment.private_training.monitored, None, datasets.test),
        "train_pooled": (experiment.pooled_training.monitored if pooled else None, pooled, datasets.test),
    }
    train, validation = {}, {}
    for name, (monitored, examples, test) in phases.items():
        train[name] = examples
        if monitored == "validation":
            train[name], validation[name] = hold_out(examples, experiment.data.validation_share, rng)
        elif monitored == "test":
            validation[name] = test
    federation.check(datasets.public, private, datasets.test, *validation.values())
    return Arrays(datasets.public, private, datasets.test, train["pretrain"], train["train_pooled"], validation)
