"""Everything a run needs, from its settings: data, federation and devices, checked, and nothing computed."""

import pathlib
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fedmd_jax.clients import ArchitectureGroup, Groups, stack_private
from fedmd_jax.communication import Communication, communication_bytes
from fedmd_jax.consensus import bound_scores
from fedmd_jax.devices import client_costs
from fedmd_jax.experiments import together
from fedmd_jax.experiments.datasets import Datasets, hold_out, load, pool
from fedmd_jax.experiments.networks import architecture_from_name
from fedmd_jax.experiments.own_data import of_everybody, take_own
from fedmd_jax.experiments.pretrained import Pretrained, fingerprint, places
from fedmd_jax.experiments.settings import Devices, Experiment
from fedmd_jax.federation import Federation, States, fedmd
from fedmd_jax.mapping import chunk_of, client_mesh
from fedmd_jax.spread import gather_clients, is_spread_over_processes
from fedmd_jax.types import PrivateDataset, PublicDataset


class Prepared(NamedTuple):
    """Everything a run needs, checked, and nothing computed."""

    experiment: Experiment
    federation: Federation
    datasets: Datasets
    private: dict[str, PrivateDataset]  # per group, stacked
    pretraining: PublicDataset  # the public examples of transfer learning
    pooling: PrivateDataset | None  # the private examples of the upper bound, if it is wanted
    validation: dict[str, PrivateDataset]  # per program of the federation that stops early
    pretrained: dict[str, Pretrained]  # per group, where clients are kept after the public half, if they are to be


def prepare(experiment: Experiment) -> Prepared:
    """Loads the data and builds the federation.

    In many processes each loads the private examples of the clients on its own devices. The upper bound trains on
    everybody's: if it is wanted, they are sent from device to device.

    Args:
      experiment: all settings.

    Raises:
      ValueError: data that is missing or damaged, or settings that do not fit it.
    """
    public_test = experiment.public_training.monitored == "test"
    datasets = load(
        experiment.data, num_clients=len(experiment.networks), seed=experiment.seed, public_test=public_test
    )
    groups = group_clients(experiment, datasets.num_classes)
    mesh = choose_mesh(experiment.devices)
    costs = None if mesh is None else client_costs(groups, datasets.public.inputs[:1])
    bound = experiment.score_bound
    federation = fedmd(
        groups,
        subset_size=experiment.subset_size,
        public_training=experiment.public_training.training(),
        private_training=experiment.private_training.training(),
        pooled_training=experiment.pooled_training.training(),
        digest_training=experiment.digest.training(),
        revisit_training=experiment.revisit.training(),
        distance=experiment.distance_function(),
        draw_subset=experiment.subset_function(),
        transforms=() if bound is None else (partial(bound_scores, bound=bound),),
        clients_per_chunk=experiment.clients_per_chunk or "auto",
        mesh=mesh,
        costs=costs,
    )
    datasets, private, pooled = _take_private(experiment, datasets, federation, costs)
    pretraining, pooling, validation = split_validation(experiment, datasets, pooled)
    federation.check(datasets.public, private, datasets.test, *validation.values())
    seen = (pretraining, validation.get("pretrain"))
    pretrained = _pretrained(experiment, groups, mesh, num_classes=datasets.num_classes, data=seen)
    datasets = datasets._replace(public=federation.put(datasets.public), test=federation.put(datasets.test))
    private, pretraining, pooling = map(federation.put, (private, pretraining, pooling))
    validation = {name: federation.put(examples) for name, examples in validation.items()}
    return Prepared(experiment, federation, datasets, private, pretraining, pooling, validation, pretrained)


def _take_private(
    experiment: Experiment, datasets: Datasets, federation: Federation, costs: Mapping[str, float] | None
) -> tuple[Datasets, Mapping[str, PrivateDataset], PrivateDataset | None]:
    """The datasets with the examples of this process's clients, those of each group, and those of all if wanted."""
    groups, mesh = federation.groups, federation.mesh
    if is_spread_over_processes(mesh):
        together.check_same("public and test data", fingerprint(None, (datasets.public, datasets.test)))
        datasets, private = take_own(groups, datasets, mesh, costs=costs)
        return datasets, private, pool(of_everybody(groups, private)) if experiment.pooled else None
    datasets = datasets._replace(private=dict(datasets.private))
    private = stack_private(groups, datasets.private)
    return datasets, private, pool(datasets.private) if experiment.pooled else None


def choose_mesh(devices: Devices) -> Mesh | None:
    """The devices of a run; None where it is one, which needs no mesh.

    Args:
      devices: how many, "all", or None for all accelerators. The cores of a CPU are one device, unless told otherwise.

    Raises:
      ValueError: more devices than there are.
    """
    if devices is None and jax.default_backend() == "cpu":
        return None
    mesh = client_mesh(None if devices == "all" else devices)
    return mesh if mesh.size > 1 else None


_KEYS_OF_THEIR_OWN = "threefry2x32"  # what others give hangs on all keys of a batch
_MOST_SEEDS_AT_ONCE = 8  # each has its own copy of all data on the device


def choose_seeds_at_once(experiment: Experiment, num_seeds: int) -> int:
    """How many of so many seeds run side by side: what is set, or what is thought to be fastest.

    Args:
      experiment: its devices, and what is set.
      num_seeds: how many there are to be.

    Raises:
      ValueError: more than one at once, of one seed, on many devices, or with keys that batches change.
    """
    wanted, mesh = experiment.seeds_at_once, choose_mesh(experiment.devices)
    keys = jax.config.jax_default_prng_impl
    alone = mesh is not None or jax.default_backend() == "cpu" or keys != _KEYS_OF_THEIR_OWN
    if wanted is None:
        wanted = 1 if alone else _MOST_SEEDS_AT_ONCE
    elif wanted > 1 and keys != _KEYS_OF_THEIR_OWN:
        raise ValueError(f"seeds run side by side with {_KEYS_OF_THEIR_OWN} keys only, got {keys}")
    elif wanted > 1 and num_seeds == 1:
        raise ValueError(f"seeds_at_once is of several seeds, got {wanted} for one seed")
    elif wanted > 1 and mesh is not None:
        raise ValueError(
            f"seeds run side by side on one device only, got seeds_at_once {wanted} and {mesh.size} devices"
        )
    return min(wanted, num_seeds)


def _pretrained(
    experiment: Experiment, groups: Groups, mesh: Mesh | None, *, num_classes: int, data: tuple
) -> dict[str, Pretrained]:
    if experiment.pretrained_dir is None:
        return {}
    names = ("width", "head_penalty", "clients_per_chunk", "public_training", "seed")
    settings = {name: getattr(experiment, name) for name in names} | {"num_classes": num_classes}
    # Rounding: on a mesh all groups are one program, and seeds side by side are, too.
    if mesh is not None:
        settings |= {"devices": mesh.size, "networks": experiment.networks}
    if (experiment.seeds_at_once or 1) > 1:
        settings["seeds_at_once"] = experiment.seeds_at_once
    of_groups = {name: settings | {"network": name, "client_ids": group.client_ids} for name, group in groups.items()}
    return places(pathlib.Path(experiment.pretrained_dir).expanduser(), of_groups, data)


def split_validation(
    experiment: Experiment, datasets: Datasets, pooled: PrivateDataset | None
) -> tuple[PublicDataset, PrivateDataset | None, dict[str, PrivateDataset]]:
    """What transfer learning and the upper bound train on, and what their early stopping looks at.

    Only where a phase monitors validation data is anything held out of its training.

    Args:
      experiment: its phases.
      datasets: of the experiment.
      pooled: private examples of all clients together; None where nobody trains on them.

    Returns:
      Public examples, pooled private examples, and by the name of the federation's function one validation set for
      everybody.
    """
    rng = np.random.default_rng([experiment.seed, 1])  # the data are drawn with another, and stay as they are
    phases = {
        "pretrain": (experiment.public_training.monitored, datasets.public, datasets.public_test),
        "personalize": (experiment.private_training.monitored, None, datasets.test),
        "pool": (experiment.pooled_training.monitored if pooled else None, pooled, datasets.test),
    }
    train, validation = {}, {}
    for name, (monitored, examples, test) in phases.items():
        train[name] = examples
        if monitored == "validation":
            train[name], validation[name] = hold_out(examples, experiment.data.validation_share, rng)
        elif monitored == "test":
            validation[name] = test
    return train["pretrain"], train["pool"], validation


def group_clients(experiment: Experiment, num_classes: int) -> dict[str, ArchitectureGroup]:
    """Clients with equal networks share a group, named by the network; a client's id is its place in the settings.

    Args:
      experiment: whose networks, weights and head penalty are used.
      num_classes: C.

    Raises:
      ValueError: a name is not that of a network.
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


def clients_at_once(prepared: Prepared) -> dict[str, int]:
    """How many clients of each group run at once on a device: what was set, or what was chosen."""
    setting, groups = prepared.experiment.clients_per_chunk or "auto", prepared.federation.groups
    states = client_shapes(prepared)
    mesh = prepared.federation.mesh
    chunks = {name: chunk_of(setting, name, states[name].params, mesh) for name in groups}
    of_device = {name: -(-group.num_clients // (mesh.size if mesh else 1)) for name, group in groups.items()}
    return {name: min(chunks[name] or of_device[name], of_device[name]) for name in groups}


def communication(prepared: Prepared, *, num_rounds: int) -> Communication:
    """What so many rounds send, from the shapes of the networks; nothing is computed."""
    return communication_bytes(
        client_shapes(prepared),
        subset_size=prepared.experiment.subset_size,
        num_classes=prepared.datasets.num_classes,
        num_rounds=num_rounds,
    )


def client_shapes(prepared: Prepared) -> States:
    """The clients without their numbers, and on no devices; nothing is computed."""
    inputs = prepared.datasets.public.inputs[:1]
    return gather_clients(jax.eval_shape(prepared.federation.new_states, jax.random.key(0), inputs))
