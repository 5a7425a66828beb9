"""What a run needs, from its settings: data, federation and devices, checked; nothing is trained here."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedmd_jax.algorithms.base import Sizes, join_states, split_states
from fedmd_jax.algorithms.participation import all_clients
from fedmd_jax.client.statistics import estimate_statistics
from fedmd_jax.experiments.checkpoint import PretrainedCache, fingerprint
from fedmd_jax.experiments.datasets import Datasets, hold_out, load, pool
from fedmd_jax.experiments.networks import architecture_from_name
from fedmd_jax.experiments.run_directory import CHECKPOINTS, Record, origin
from fedmd_jax.experiments.settings import Devices, Experiment
from fedmd_jax.mapping import client_costs, client_mesh, gather_clients, stack_private
from fedmd_jax.mapping.groups import ArchitectureGroup, group_client_ids
from fedmd_jax.mapping.sharding import replicate
from fedmd_jax.simulation import CommunicationCost, simulate_participation
from fedmd_jax.simulation.federation import Federation, States, cosine_decay, make_federation, vmap_federation
from fedmd_jax.simulation.trained import Preprocessing
from fedmd_jax.transforms.clipping import clip_scores
from fedmd_jax.types import Architecture, FederationState, Participants, PrivateDataset

T = TypeVar("T")
_MOST_SEEDS_AT_ONCE = 8  # each has its own copy of all data on the device


# Each of these has a key of its own.
_KEYS = ("new_states", "pretrain", "train_private", "round", "train_pooled", "participation", "new_server")


class Setup(NamedTuple):
    """All that a run needs; of several seeds, which differ in seed, data and keys only.

    Attributes:
      experiments: one per seed.
      federation: from `vmap_federation` if seeds are trained at once.
      data: arguments of each program that are data, on the devices.
      validation: validation data of each program that stops early.
      keys: of each program, and of participation.
      num_classes: number of scores per example.
      fingerprints: of the data of each seed: all of it, and what the public half of transfer learning depends on.
      batched: whether arrays, keys and states have a leading [S], also if S = 1.
      preprocess: from images to inputs, per seed.
    """

    experiments: tuple[Experiment, ...]
    federation: Federation
    data: dict[str, Sequence[Any]]
    validation: dict[str, PrivateDataset]
    keys: dict[str, chex.PRNGKey]
    num_classes: int
    fingerprints: tuple[tuple[str, str], ...]
    batched: bool
    preprocess: tuple[Preprocessing, ...]

    @property
    def experiment(self) -> Experiment:
        """The settings; of several seeds those of the first."""
        return self.experiments[0]

    def arguments(self, program: str, round_: int = 1) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a program that follow the states, positional and by name.

        Args:
          program: name of the program.
          round_: number of the round.
        """
        key = self.keys.get(program)
        if program in ("confusion", "evaluate_server"):
            return [*self.data["confusion"]], {}
        if program == "new_server":
            public, _ = self.data["round"]
            return [public, key], {}
        if program == "estimate_statistics":
            public, _ = self.data["round"]
            return [public, self.round_key(1)], {}
        data = self.data[program]
        if program in ("round", "revisit"):
            return [*data, self.round_key(round_)], self._participants(round_) | self._learning_rate_factor(round_)
        validation = {"validation": self.validation[program]} if program in self.validation else {}
        return [key, *data] if program == "new_states" else [*data, key], validation

    def round_key(self, round_: int) -> chex.PRNGKey:
        """The key of a round."""
        fold_in = partial(jax.random.fold_in, data=round_)
        return (jax.vmap(fold_in) if self.batched else fold_in)(self.keys["round"])

    def per_seed(self, tree: T) -> list[T]:
        """Splits what has a leading [S]; otherwise a list of one."""
        if not self.batched:
            return [tree]
        return [jax.tree.map(lambda leaf, s=s: leaf[s], tree) for s in range(len(self.experiments))]

    def put(self, states: States | FederationState) -> States | FederationState:
        """States from the host (on a mesh also shapes): clients on their devices, the server's on all of them."""
        mesh = self.federation.mesh
        if mesh is None:
            return jax.device_put(states)
        clients, *server = split_states(states)
        return join_states(self.federation.shard(clients), *replicate(server, mesh))

    def shapes(self) -> States:
        """Shapes of the clients, on no devices."""
        # Traced, so that a sharded federation needs no array.
        arguments, _ = self.arguments("new_states")
        return gather_clients(jax.eval_shape(self.federation.programs["new_states"], *arguments))

    def start_shapes(self) -> States | FederationState:
        """Shapes of the states of the rounds, on no devices: clients, and the server if it has a state."""
        if not self.federation.has_server_state:
            return self.shapes()
        arguments, _ = self.arguments("new_server")
        return FederationState(self.shapes(), *jax.eval_shape(self.federation.programs["new_server"], *arguments))

    def communication(self, num_rounds: int) -> CommunicationCost:
        """Bytes that this many rounds send, from the shapes of the networks."""
        given = self.shapes(), *self.data["new_states"]
        states, inputs = jax.eval_shape(lambda *arrays: self.per_seed(arrays)[0], *given)
        sizes = Sizes(self.federation.groups, states, inputs, self.experiment.subset_size, self.num_classes)
        up, down = self.federation.algorithm.traffic(sizes)
        return CommunicationCost(up, down, round((up + down) * sizes.num_clients * num_rounds), sizes.network_bytes)

    def inputs(self) -> Record:
        """What `load_run` has to know of the data: number of classes, and preprocessing per seed."""
        return {"num_classes": self.num_classes, "preprocessing": [each.to_record() for each in self.preprocess]}

    def identity(self) -> Record:
        """What decides the bits of a run: settings, data and environment."""
        known = {
            "settings": deciding_settings(self.experiment),
            "seeds": [experiment.seed for experiment in self.experiments],
            "data": [of_all for of_all, _ in self.fingerprints],
            "environment": self._environment(),
        }
        return json.loads(json.dumps(known))

    def pretrained_cache(self, path: pathlib.Path) -> PretrainedCache:
        """The clients after the public half of transfer learning.

        Args:
          path: run directory, of which the cache is a part if the settings have no folder for it.
        """
        settings, mesh = dataclasses.asdict(self.experiment), self.federation.mesh
        known = {
            **{
                name: settings[name]
                for name in ("width", "dtype", "head_penalty", "clients_per_chunk", "public_training")
            },
            "num_classes": self.num_classes,
            "seeds": [[each.seed, data] for each, (_, data) in zip(self.experiments, self.fingerprints, strict=True)],
            "environment": self._environment(),
        }
        if self.federation.algorithm.common_start:
            known |= {"common_start": True}
        if mesh is not None:  # all groups are one program, so that each may change the rounding of the others
            known |= {"networks": self.experiment.networks}
        fingerprints = {
            name: fingerprint(known | {"network": name, "client_ids": group.client_ids})
            for name, group in self.federation.groups.items()
        }
        folder = self.experiment.pretrained_dir or path / CHECKPOINTS / "pretrained"
        return PretrainedCache(pathlib.Path(folder).expanduser(), fingerprints, self.shapes())

    def _environment(self) -> Record:
        """What may change rounding."""
        known, mesh = origin(), self.federation.mesh
        return {
            **{part: known[part] for part in ("versions", "device")},
            "devices": 1 if mesh is None else mesh.size,
            "xla_flags": os.environ.get("XLA_FLAGS"),
            "batched": self.batched,
        }

    def _learning_rate_factor(self, round_: int) -> dict[str, jax.Array]:
        """The argument `learning_rate_factor` of a round; none if learning rates are constant."""
        if self.experiment.learning_rate_decay == "none":
            return {}
        factor = cosine_decay(max(1, self.experiment.num_rounds))(round_)
        return {"learning_rate_factor": jnp.full(len(self.experiments) if self.batched else (), factor, jnp.float32)}

    def _participants(self, round_: int) -> dict[str, Participants]:
        """The argument `participants` of a round; none if all clients complete all rounds."""
        probabilities = self.experiment.probabilities()
        if probabilities is None:
            return {}
        groups, drawn = self.federation.groups, []
        for key in self.per_seed(self.keys["participation"]):
            draw = simulate_participation(key, **probabilities)
            drawn.append(all_clients(groups, draw(round_, group_client_ids(groups))))
        return {"participants": stack(drawn) if self.batched else drawn[0]}


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
    arrays = [_arrays(each, federation, of_seed) for each, of_seed in zip(experiments, datasets, strict=True)]
    fingerprints = tuple(
        (fingerprint(None, (data, validation)), fingerprint(None, (data["pretrain"], validation.get("pretrain"))))
        for data, validation in arrays
    )
    keys = [_keys(each.seed) for each in experiments]
    placed: dict[tuple[int, ...], Any] = {}

    def put(*of_seeds):
        """What all seeds have of one kind, on the devices, where it is once also if several programs take it."""
        key = tuple(map(id, of_seeds))
        if key not in placed:
            placed[key] = jax.device_put(stack(of_seeds)) if batched else federation.put(*of_seeds)
        return placed[key]

    of_programs, held_out = zip(*arrays, strict=True)
    data = {name: tuple(map(put, *(each[name] for each in of_programs))) for name in of_programs[0]}
    validation = {name: put(*(each[name] for each in held_out)) for name in held_out[0]}
    if batched:
        federation, keys = vmap_federation(federation), [jax.tree.map(lambda *each: jnp.stack(each), *keys)]
    preprocess, num_classes = tuple(each.preprocess for each in datasets), datasets[0].num_classes
    shared = federation, data, validation, keys[0], num_classes, fingerprints
    return Setup(tuple(experiments), *shared, batched, preprocess)


def deciding_settings(experiment: Experiment) -> Record:
    """The settings that decide the bits of a run, the seed excepted, as they come back from JSON."""
    settings = dataclasses.asdict(experiment)
    for name in ("checkpoint_every", "pretrained_dir", "seed", "devices", "vmap_seeds"):
        del settings[name]
    del settings["data"]["data_dir"]
    return json.loads(json.dumps(settings))


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
    mesh = choose_mesh(experiment.devices)
    batchable = jax.config.jax_default_prng_impl == "threefry2x32"  # other keys give other numbers in a batch
    alone = mesh is not None or jax.default_backend() == "cpu" or not batchable
    at_once = min(experiment.vmap_seeds or (1 if alone else _MOST_SEEDS_AT_ONCE), num_seeds)
    if at_once > 1 and mesh is not None:
        raise ValueError(f"vmap_seeds must be 1 on several devices, got {at_once} on {mesh.size} devices")
    return at_once


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
      num_classes: number of scores per example.

    Raises:
      ValueError: an unknown network.
    """
    groups, weights = {}, experiment.weights
    for name in dict.fromkeys(experiment.networks):
        client_ids = [client_id for client_id, network in enumerate(experiment.networks) if network == name]
        architecture = _architecture(experiment, name, num_classes)
        groups[name] = ArchitectureGroup(architecture, client_ids, weights and [weights[i] for i in client_ids])
    return groups


def _architecture(experiment: Experiment, name: str, num_classes: int) -> Architecture:
    options = {"head_penalty": experiment.head_penalty, "width": experiment.width, "dtype": experiment.dtype}
    return architecture_from_name(name, num_classes, **options)


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


def _keys(seed: int) -> dict[str, chex.PRNGKey]:
    key = jax.random.key(seed)
    # `split` takes the first five of `fold_in`.
    keys = [*jax.random.split(key, 5), jax.random.fold_in(key, 5), jax.random.fold_in(key, 6)]
    return dict(zip(_KEYS, keys, strict=True))


def _federation(experiment: Experiment, datasets: Datasets) -> Federation:
    groups = group_clients(experiment, datasets.num_classes)
    mesh, bound, server = choose_mesh(experiment.devices), experiment.score_clip, experiment.server_network
    return make_federation(
        groups,
        experiment.make_algorithm(),
        server=None if server is None else _architecture(experiment, server, datasets.num_classes),
        statistics=None if experiment.batch_statistics == "moving" else estimate_statistics,
        keep_statistics=experiment.batch_statistics == "public",
        subset_size=experiment.subset_size,
        public_training=experiment.public_training.training(),
        private_training=experiment.private_training.training(),
        pooled_training=experiment.pooled_training.training(),
        digest_training=experiment.digest.training(),
        revisit_training=experiment.revisit.training(),
        draw_subset=experiment.subset_function(),
        transforms=() if bound is None else (partial(clip_scores, bound=bound),),
        clients_per_chunk=experiment.clients_per_chunk or "auto",
        mesh=mesh,
        costs=None if mesh is None else client_costs(groups, datasets.public.inputs[:1]),
    )


def _arrays(
    experiment: Experiment, federation: Federation, datasets: Datasets
) -> tuple[dict[str, Sequence[Any]], dict[str, PrivateDataset]]:
    """The data of one seed by program, checked, and the validation data, held out of training."""
    public, private = datasets.public, stack_private(federation.groups, datasets.private)
    data = {
        "new_states": (public.inputs[:1],),
        "pretrain": (public,),
        "train_private": (private,),
        "round": (public, private),
        "revisit": (private,),
        "confusion": (datasets.test,),
    }
    phases = {"pretrain": experiment.public_training, "train_private": experiment.private_training}
    if experiment.pooled:
        data["train_pooled"], phases["train_pooled"] = (pool(datasets.private),), experiment.pooled_training
    rng = np.random.default_rng([experiment.seed, 1])  # the data are drawn with another one
    validation = {}
    for program, phase in phases.items():
        if phase.monitored == "validation":
            rest, validation[program] = hold_out(*data[program], experiment.data.validation_share, rng)
            data[program] = (rest,)
        elif phase.monitored == "test":
            validation[program] = datasets.public_test if program == "pretrain" else datasets.test
    federation.check(public, private, datasets.test, *validation.values())
    return data, validation
