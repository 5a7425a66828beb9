"""FedAvg within each architecture group: clients send the parameters of their networks."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

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
from fedmd_jax.client.losses import at_least_float32
from fedmd_jax.client.training import TrainingConfig
from fedmd_jax.mapping.chunking import ClientsPerChunk, all_reduce
from fedmd_jax.mapping.grouped import map_groups, sum_groups
from fedmd_jax.mapping.groups import Groups, group_keys
from fedmd_jax.mapping.sharding import constrain_replicated
from fedmd_jax.transforms.clipping import Transform
from fedmd_jax.types import (
    ClientState,
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

    params: chex.ArrayTree  #: at least float32
    model_state: chex.ArrayTree  #: batch statistics; integers and keys are not averaged, zeros [] take their places
    exists: chex.Array  #: [], bool: False before the first mean


def fedavg() -> Algorithm:
    """FedAvg within each architecture group: clients with equal networks train one network.

    In a round each client loads the network of its group, trains it on its private data, and sends parameters and batch
    statistics; the server averages them with the weights of the clients. A group of one client trains alone: its rounds
    are those of `run_local_only` to the bit.

    Clients of a group have the same network after `init` and `pretrain`. If a private half of transfer learning
    follows, each client begins the first round with its own result of it. After a round, all clients of a group that
    completed it have the network of the group and are evaluated with it. The others do not change; they load the
    network of the group in the next round that they complete.

    Bytes: parameters and batch statistics, up and down. Rounds need no public data.

    References:
      McMahan et al. 2017 (arXiv 1602.05629), Algorithm 1. There a client begins each round with a fresh optimizer; here
      it keeps its own, which is the same for plain SGD. The weights there are the numbers of examples; here they are
      those of the `ArchitectureGroup`.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((4,), num_classes=3))
      >>> groups = {"small": fmd.ArchitectureGroup(network, (0, 1), weights=(500, 200))}
      >>> fmd.make_federation(groups, fmd.algorithms.fedavg())
      Federation(clients={'small': 2}, algorithm='fedavg')
    """
    return parameters_algorithm("fedavg")


def parameters_algorithm(name: str, **functions: Any) -> Algorithm:
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

    A client that does not complete the round does not change. It is left out of the mean, and so is a client whose
    revisit ends in NaN or infinity; that client has the network of its group after the round. If all clients of a group
    are left out, the server keeps the network of the group.

    The mean is streamed over clients. Its only collective is one all-reduce of the networks of all groups, in at least
    float32.

    Args:
      states: clients, and as `memory` the `GroupNetwork` of each group.
      public: the public dataset, for `fuse`.
      private: per group, stacked private datasets [K, N, ...].
      key: key of the round; it is consumed.
      groups: architecture, client ids and weights of each group.
      subset_size: number of public examples of `fuse`.
      digest_training: training of `fuse`.
      revisit_training: the local training.
      revisit: `(architecture, state, private, None, key, *, training) -> (state, TrainingInfo)` of one client; `state`
        has the network of the group.
      fuse: what the server does with the means, such as `fuse_groups`; None if nothing: `(means, weights, clients,
        finite, subset, key, *, training, groups, mesh, clients_per_chunk) -> (means, losses [E], finite [])`, all of
        them per group. Weights [K] are zero for clients that did not complete; `finite` [K] is False for clients that
        were reverted.
      draw_subset: (key, public, size) -> the public subset, for `fuse`.
      transforms: must be empty: they are for scores.
      participants: as in `fedmd_round`.
      clients_per_chunk: as in `fedmd_round`.
      mesh: as in `fedmd_round`.

    Returns:
      The states after the round, and a `RoundInfo`. `scores_finite` is False for clients that were left out of the mean
      since their parameters or their revisit were not finite. Digest losses are those of `fuse`, the same for all
      clients of a group.

    Raises:
      ValueError: there are transforms.

    References:
      McMahan et al. 2017, Algorithm 1.

    Example:
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
        raise ValueError(
            f"transforms are for scores, but this algorithm sends parameters, got {len(transforms)} of them"
        )
    over: dict = {"mesh": mesh, "clients_per_chunk": clients_per_chunk}
    clients, networks, model = states
    participants = complete_participants(participants, groups, mesh)
    client_ids, weights, available, completed = participants
    assert completed is not None  # the record is complete
    weights = {name: jnp.where(completed[name], weights[name], 0.0) for name in groups}
    keys, named = round_keys(key), with_names(groups)

    # 1. distribute
    load_clients = map_groups(_load, (0, 0, None), groups=named, **over)
    clients = load_clients(completed, clients, networks)
    # 2. revisit
    revisit_one = partial(revisit_completed, revisit=partial(revisit, training=revisit_training))
    revisit_clients = map_groups(revisit_one, (0, 0, 0, None, 0), groups=groups, **over)
    revisit_keys = group_keys(keys.revisit, client_ids)
    clients, losses, finite = revisit_clients(completed, clients, private, None, revisit_keys)
    # 3. communicate, 4. aggregate
    sum_networks = sum_groups(_send, (0, 0), groups=groups, by_group=True, **over)
    sums = sum_networks(_within_groups(weights), clients, finite)
    means = {name: _mean(*sent) for name, sent in all_reduce(sums.total, mesh).items()}
    digest_losses, digest_finite = no_digest(client_ids)
    if fuse is not None:
        subset = draw_subset(keys.subset, public, subset_size)
        how: dict = {"training": digest_training, "groups": groups, **over}
        means, *of_groups = fuse(means, weights, clients, finite, subset, keys.digest, **how)
        digest_losses, digest_finite = (_of_clients(each, client_ids) for each in of_groups)
    networks = {name: keep_unless(means[name].exists, means[name], networks[name]) for name in groups}
    networks = constrain_replicated(networks, mesh)
    # 5. distribute
    clients = load_clients(completed, clients, networks)

    exists = jnp.any(jnp.stack([mean.exists for mean in means.values()]))
    participation = Participation(available, completed)  # type: ignore[arg-type]  # the record is complete
    info = RoundInfo(digest_losses, losses, client_ids, exists, participation, sums.finite, digest_finite, finite)
    return FederationState(clients, networks, model), info


def load_network(state: ClientState, network: GroupNetwork, if_taken: chex.Array | bool = True) -> ClientState:
    """The client with the parameters and batch statistics of a network, in its own dtypes, if `if_taken`, []."""

    def load(own, mean):
        return jnp.where(if_taken, mean.astype(own.dtype), own) if _is_averaged(own) else own

    params, model_state = jax.tree.map(load, (state.params, state.model_state), network[:2])
    return state._replace(params=params, model_state=model_state)


def network_of(state: ClientState, exists: chex.Array) -> GroupNetwork:
    """The network of a client, to be averaged."""

    def take(leaf):
        return at_least_float32(leaf) if _is_averaged(leaf) else jnp.zeros(())

    return GroupNetwork(jax.tree.map(take, state.params), jax.tree.map(take, state.model_state), exists)


def _load(named, completed, state, networks):
    """The client with the network of its group; unchanged if it does not complete the round or there is none."""
    network = networks[named[0]]
    return load_network(state, network, completed & network.exists)


def _send(architecture, state, finite):
    """The network of one client, and 1 as its weight: NaN if its revisit was reverted, so that the sum leaves it out.

    The flag is on the device of the client. As a weight, which is replicated, it would have to be gathered.
    """
    return network_of(state, jnp.where(finite, 1.0, jnp.nan))


def _within_groups(weights):
    """Weights scaled in each group; 1 for the only client of a group, whose mean then is its network to the bit."""
    scaled = {name: scale_weights({name: own})[name] for name, own in weights.items()}
    return {name: own if len(own) > 1 else jnp.sign(own) for name, own in scaled.items()}


def _mean(params, model_state, weight):
    params, model_state = jax.tree.map(lambda leaf: leaf / jnp.where(weight > 0, weight, 1.0), (params, model_state))
    return GroupNetwork(params, model_state, weight > 0)


def _of_clients(of_groups, client_ids):
    """[...] per group -> [K, ...]."""
    return {name: jnp.broadcast_to(one, (len(client_ids[name]), *one.shape)) for name, one in of_groups.items()}


def _new_memory(groups: Groups, states: States, public: PublicDataset) -> dict[str, GroupNetwork]:
    """No network yet: zeros."""

    def of_one(state):
        return network_of(jax.tree.map(itemgetter(0), state), jnp.array(False))

    return {name: jax.tree.map(jnp.zeros_like, jax.eval_shape(of_one, state)) for name, state in states.items()}


def _is_averaged(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _traffic(sizes: Sizes) -> Traffic:
    return Traffic(sizes.network_bytes, sizes.network_bytes)
