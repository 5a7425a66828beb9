"""FedAvg within each architecture group: clients send the parameters of their networks."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmd_jax.aggregators.mean import scale_weights
from fedmd_jax.algorithms.base import Algorithm, Sizes, Traffic, keep_unless, with_names
from fedmd_jax.algorithms.exchange import no_digest, revisit_alone, revisit_completed
from fedmd_jax.algorithms.fedmd import round_keys
from fedmd_jax.algorithms.participation import complete_participants
from fedmd_jax.algorithms.public_subset import draw_public_subset
from fedmd_jax.client.training import TrainingConfig
from fedmd_jax.mapping.chunking import ClientsPerChunk, all_reduce
from fedmd_jax.mapping.grouped import map_groups, sum_groups
from fedmd_jax.mapping.groups import Groups, group_keys
from fedmd_jax.mapping.sharding import constrain_replicated
from fedmd_jax.transforms.clipping import Transform
from fedmd_jax.types import (
    FederationState,
    Participants,
    Participation,
    PrivateDataset,
    PublicDataset,
    RoundInfo,
    States,
)


class GroupNetwork(NamedTuple):
    """The network of an architecture group that the server holds.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> network = fmd.algorithms.GroupNetwork(params=jnp.ones((4, 3)), model_state={}, exists=jnp.array(True))
      >>> network.params.shape
      (4, 3)
    """

    params: chex.ArrayTree
    model_state: chex.ArrayTree  #: batch statistics; leaves that are not floats stay those of the clients
    exists: chex.Array  #: [], bool: False before the first mean


def fedavg() -> Algorithm:
    """FedAvg: each group of clients with equal networks trains one network.

    Parameters and batch statistics are averaged with the weights of the clients; each client keeps its own optimizer
    state from round to round. A group of one client trains alone. All clients of a group start from one network, which
    the public dataset has trained; clients are evaluated with the network of their group.

    Bytes: parameters and batch statistics, up and down. No public data is needed but for the start.

    References:
      McMahan et al. 2017 (arXiv 1602.05629), Algorithm 1, whose clients begin each round with a fresh optimizer.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((4,), num_classes=3))
      >>> groups = {"small": fmd.ArchitectureGroup(network, (0, 1))}
      >>> fmd.make_federation(groups, fmd.algorithms.fedavg())
      Federation(clients={'small': 2}, algorithm='fedavg')
    """
    return parameters_algorithm("fedavg")


def parameters_algorithm(name: str, **functions: Callable) -> Algorithm:
    """Makes an algorithm whose round is `fedavg_round`.

    Args:
      name: as on the command line.
      **functions: `revisit` or `fuse` of `fedavg_round`.

    Example:
      >>> import fedmd_jax as fmd
      >>> fmd.algorithms.parameters_algorithm("fedavg").common_start
      True
    """
    round_ = partial(fedavg_round, **functions)
    return Algorithm(name=name, round=round_, traffic=_traffic, new_memory=_new_memory, common_start=True)


def fedavg_round(
    states: FederationState,
    public: PublicDataset,
    private: Mapping[str, PrivateDataset],
    key: chex.PRNGKey,
    *,
    groups: Groups,
    subset_size: int,
    digest_training: TrainingConfig,
    revisit_training: TrainingConfig,
    revisit: Callable = revisit_alone,
    fuse: Callable | None = None,
    draw_subset: Callable = draw_public_subset,
    transforms: Sequence[Transform] = (),
    participants: Participants | None = None,
    clients_per_chunk: ClientsPerChunk = "auto",
    mesh: Mesh | None = None,
) -> tuple[FederationState, RoundInfo]:
    """One round: distribute, revisit, communicate, aggregate within each group, distribute.

    A client that does not complete the round, or whose revisit ends in NaN or infinity, is left out of the mean. The
    only collective of the mean is one all-reduce of the parameters of one network per group.

    Args:
      states: clients, and as `memory` the `GroupNetwork` of each group.
      public: the public dataset, for `fuse`.
      private: per group, stacked private datasets [K, N, ...].
      key: key of the round; it is consumed.
      groups: architecture, client ids and weights of each group.
      subset_size: number of public examples of `fuse`.
      digest_training: training of `fuse`.
      revisit_training: the local training.
      revisit: (architecture, state, private, None, key, *, training) -> (state, `TrainingInfo`) of one client.
      fuse: (networks, clients, subset, weights, key, *, training, **over) -> (networks, losses [E] by group), what the
        server does with the means; None if nothing.
      draw_subset: (key, public, size) -> the public subset, for `fuse`.
      transforms: must be empty: they are for scores.
      participants: as in `fedmd_round`.
      clients_per_chunk: as in `fedmd_round`.
      mesh: as in `fedmd_round`.

    Returns:
      The states after the round, and a `RoundInfo`, in which `scores_finite` is about the parameters.

    Raises:
      ValueError: there are transforms.

    References:
      McMahan et al. 2017, Algorithm 1.

    Example:
      >>> from functools import partial
      >>> import jax, jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> groups = {"linear": fmd.ArchitectureGroup(linear, client_ids=(0, 1))}
      >>> public = fmd.public_dataset(np.eye(4))
      >>> private = fmd.stack_private(groups, {0: (np.eye(4)[:3], [0, 1, 1]), 1: (np.eye(4)[2:], [1, 0])})
      >>> federation = fmd.make_federation(groups, fmd.algorithms.fedavg(), subset_size=2)
      >>> states = federation.start(federation.init(jax.random.key(0), public, private), public, jax.random.key(1))
      >>> states, info = federation.round(states, public, private, jax.random.key(2))
      >>> first, second = states.clients["linear"].params  # both have the mean
      >>> bool(jnp.all(first == second))
      True
    """
    if transforms:
        raise ValueError("transforms are for scores, and this algorithm sends parameters, got some")
    over: dict = {"groups": with_names(groups), "mesh": mesh, "clients_per_chunk": clients_per_chunk}
    clients, networks, model = states
    participants = complete_participants(participants, groups, mesh)
    client_ids, weights, available, completed = participants
    keys = round_keys(key)

    # 1. distribute
    load_clients = map_groups(_load, (0, 0, None), **over)
    clients = load_clients(completed, clients, networks)
    # 2. revisit
    revisit_one = partial(revisit_completed, revisit=partial(revisit, training=revisit_training))
    revisit_clients = map_groups(_without_name(revisit_one), (0, 0, 0, None, 0), **over)
    revisit_keys = group_keys(keys.revisit, client_ids)
    clients, losses, finite = revisit_clients(completed, clients, private, (), revisit_keys)
    # 3. communicate, 4. aggregate
    reported = constrain_replicated({name: finite[name] for name in groups}, mesh)
    weights = scale_weights({name: jnp.where(completed[name] & reported[name], weights[name], 0.0) for name in groups})
    sums = sum_groups(_send, (0, None), **over)(weights, clients, networks)
    means = {name: _mean(*sent) for name, sent in all_reduce(sums.total, mesh).items()}
    networks = {name: keep_unless(means[name].exists, means[name], networks[name]) for name in groups}
    digest_losses, digest_finite = no_digest(client_ids, digest_training)
    if fuse is not None:
        subset = draw_subset(keys.subset, public, subset_size)
        how: dict = {"training": digest_training, **over}
        networks, of_groups = fuse(networks, clients, subset, weights, keys.digest, **how)
        digest_losses = {name: digest_losses[name] + of_groups[name] for name in groups}
    networks = constrain_replicated(networks, mesh)
    # 5. distribute
    clients = load_clients(completed, clients, networks)

    exists = jnp.any(jnp.stack([mean.exists for mean in means.values()]))
    participation = Participation(available, completed)  # type: ignore[arg-type]  # the record is complete
    info = RoundInfo(digest_losses, losses, client_ids, exists, participation, sums.finite, digest_finite, finite)
    return FederationState(clients, networks, model), info


def _without_name(fn):
    return lambda named, *arguments: fn(named[1], *arguments)


def _load(named, completed, state, networks):
    """The client with the parameters of its group; unchanged if it does not complete the round or there are none."""
    network = networks[named[0]]
    loaded = completed & network.exists

    def load(own, mean):
        return jnp.where(loaded, mean.astype(own.dtype), own) if _is_float(own) else own

    params, model_state = jax.tree.map(load, (state.params, state.model_state), network[:2])
    return state._replace(params=params, model_state=model_state)


def _send(named, state, networks):
    """The parameters of one client in the place of its group, zeros in those of the others, and 1 as its weight."""

    def send(own, mean):
        return own.astype(mean.dtype) if _is_float(own) else mean

    def of_group(name, network):
        if name != named[0]:
            return jax.tree.map(jnp.zeros_like, network[:2]), jnp.zeros(())
        return jax.tree.map(send, (state.params, state.model_state), network[:2]), jnp.ones(())

    return {name: of_group(name, network) for name, network in networks.items()}


def _mean(total, weight):
    params, model_state = jax.tree.map(lambda leaf: leaf / jnp.where(weight > 0, weight, 1.0), total)
    return GroupNetwork(params, model_state, weight > 0)


def _new_memory(groups: Groups, states: States, public: PublicDataset) -> dict[str, GroupNetwork]:
    """No network yet: zeros."""

    def empty(leaf):  # what is not averaged takes one number, so that sums are of floats only
        return (
            jnp.zeros(leaf.shape[1:], jnp.promote_types(leaf.dtype, jnp.float32)) if _is_float(leaf) else jnp.zeros(())
        )

    def network(state):
        return GroupNetwork(*jax.tree.map(empty, (state.params, state.model_state)), jnp.array(False))

    return {name: network(state) for name, state in states.items()}


def _is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _traffic(sizes: Sizes) -> Traffic:
    return Traffic(sizes.network_bytes, sizes.network_bytes)
