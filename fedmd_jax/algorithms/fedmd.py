"""FedMD: one round (`fedmd_round`) and its two halves (`report` and `learn`)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmd_jax.aggregators.base import Aggregator
from fedmd_jax.aggregators.mean import weighted_mean
from fedmd_jax.algorithms.participation import complete_participants
from fedmd_jax.algorithms.public_subset import draw_public_subset
from fedmd_jax.client.guards import keep_if_finite
from fedmd_jax.client.losses import at_least_float32, mae
from fedmd_jax.client.phases import digest, revisit
from fedmd_jax.client.scoring import score, scores_size
from fedmd_jax.client.training import TrainingConfig
from fedmd_jax.mapping.chunking import ClientsPerChunk
from fedmd_jax.mapping.grouped import map_groups
from fedmd_jax.mapping.groups import Groups, group_keys
from fedmd_jax.transforms.clipping import Transform
from fedmd_jax.types import (
    Architecture,
    ClientState,
    Participants,
    Participation,
    PrivateDataset,
    PublicDataset,
    RoundInfo,
    States,
    TrainingInfo,
)


class RoundKeys(NamedTuple):
    """The keys of the parts of one round."""

    subset: chex.PRNGKey
    digest: chex.PRNGKey
    revisit: chex.PRNGKey
    transform: chex.PRNGKey


def round_keys(key: chex.PRNGKey) -> RoundKeys:
    """The keys that `fedmd_round` derives from the key of the round."""
    subset, digest_key, revisit_key = jax.random.split(key, 3)
    return RoundKeys(subset, digest_key, revisit_key, jax.random.fold_in(key, 3))


def fedmd_round(
    states: States,
    public: PublicDataset,
    private: Mapping[str, PrivateDataset],
    key: chex.PRNGKey,
    *,
    groups: Groups,
    subset_size: int,
    digest_training: TrainingConfig,
    revisit_training: TrainingConfig,
    distance: Callable = mae,
    draw_subset: Callable = draw_public_subset,
    transforms: Sequence[Transform] = (),
    aggregator: Aggregator = weighted_mean,
    participants: Participants | None = None,
    clients_per_chunk: ClientsPerChunk = "auto",
    mesh: Mesh | None = None,
) -> tuple[States, RoundInfo]:
    """One FedMD round: communicate, aggregate, distribute, digest, revisit.

    A client with non-finite scores is excluded from the consensus, but digests and revisits as usual. A digest or
    revisit that gives NaN or infinity, in the state or in the loss of an epoch, is reverted: the client keeps its state
    from before that phase. The results of all other clients are bitwise those of the same round without that client. If
    all clients are excluded the digests are skipped and the revisits still run.

    Args:
      states: per group, stacked clients [K, ...]; with a mesh, states and `private` should be sharded by
        `shard_clients`.
      public: the public dataset, [P, ...].
      private: per group, stacked private datasets [K, N, ...].
      key: key of the round; it is consumed.
      groups: architecture, client ids and consensus weights of each group.
      subset_size: number of public examples in this round, M.
      digest_training: epochs, batches and optimizer of the digests.
      revisit_training: epochs, batches and optimizer of the revisits.
      distance: distance of scores and consensus, such as `mae` or `kl`: [B, C] x [B, C] -> [B].
      draw_subset: (key, public, size) -> the public subset.
      transforms: functions that each client applies to its scores before it sends them, in this order.
      aggregator: combines the scores of all clients into the consensus, see `aggregators`.
      participants: the clients that `states` and `private` hold, their weights and their participation; may be traced.
        Dropped clients do not change. By default all clients of the groups, all of which complete the round.
      clients_per_chunk: number of clients of a group that run at once on a device, None for all, "auto" for the
        fastest; one setting for all groups or per group.
      mesh: devices along one axis, over which the clients are sharded.

    Returns:
      The clients after the round, and a `RoundInfo`. With a mesh, per-client results are `ShardedClients`.

    Raises:
      ValueError: participants have other groups, or other numbers of clients, than the states.

    References:
      Li and Wang 2019, Algorithm 1.

    Example:
      >>> from functools import partial
      >>> import jax, jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> groups = {"linear": fmd.ArchitectureGroup(linear, client_ids=(0, 1))}
      >>> public = fmd.public_dataset(np.eye(4))
      >>> private = fmd.stack_private(groups, {0: (np.eye(4)[:3], [0, 1, 1]), 1: (np.eye(4)[2:], [1, 0])})
      >>> training = fmd.TrainingConfig(batch_size=4, shuffle=False)
      >>> states = fmd.fedmd(groups).new_states(jax.random.key(0), public.inputs)
      >>> one_round = partial(
      ...     fmd.fedmd_round, groups=groups, subset_size=2, digest_training=training, revisit_training=training)
      >>> states, info = jax.jit(one_round)(states, public, private, jax.random.key(1))
      >>> states["linear"].params.shape, info.digest_loss["linear"].shape, bool(info.digested)
      ((2, 4, 2), (2, 1), True)
    """
    over: dict = {"groups": groups, "mesh": mesh, "clients_per_chunk": clients_per_chunk}
    participants = complete_participants(participants, groups, mesh)
    keys = round_keys(key)
    subset = draw_subset(keys.subset, public, subset_size)

    # 1. communicate: the aggregator calls `report` for every client, 2. aggregate: [M, C]
    aggregate = aggregator(partial(report, transforms=transforms), (0, None, 0), **over)
    own_keys = group_keys(keys.transform, participants.client_ids)
    consensus, exists, finite = aggregate(participants.weights, states, subset.inputs, own_keys)
    # 3. distribute the consensus to `learn`, in which every client does 4. digest and 5. revisit
    how: dict = {"digest_training": digest_training, "revisit_training": revisit_training, "distance": distance}
    states, info = learn(states, subset.inputs, consensus, exists, private, keys, participants, **how, **over)
    return states, info._replace(scores_finite=finite)


def learn(
    states: States,
    inputs: chex.Array,
    consensus: chex.Array,
    exists: chex.Array,
    private: Mapping[str, PrivateDataset],
    keys: RoundKeys,
    participants: Participants,
    *,
    digest_training: TrainingConfig,
    revisit_training: TrainingConfig,
    distance: Callable = mae,
    **over,
) -> tuple[States, RoundInfo]:
    """The half of a round after the aggregation: digest of the consensus, then revisit.

    Args:
      states: per group, stacked clients [K, ...].
      inputs: the public subset of the round, [M, ...].
      consensus: [M, C].
      exists: whether there is a consensus, []; if not, no client digests.
      private: per group, stacked private datasets [K, N, ...].
      keys: keys of the round.
      participants: the complete record, from `complete_participants`.
      digest_training: as in `fedmd_round`.
      revisit_training: as in `fedmd_round`.
      distance: as in `fedmd_round`.
      **over: `groups`, `mesh` and `clients_per_chunk` of `map_groups`.

    Returns:
      The clients, and a `RoundInfo` in which `scores_finite` is True for all clients.
    """
    client_ids, _, available, completed = participants
    digest_one = partial(_digest, training=digest_training, distance=distance)
    digest_clients = map_groups(digest_one, (0, 0, None, None, None, 0), **over)
    revisit_clients = map_groups(partial(_revisit, training=revisit_training), (0, 0, 0, 0), **over)

    # 4. digest
    own_keys = group_keys(keys.digest, client_ids)
    states, digest_loss, digest_finite = digest_clients(completed, states, inputs, consensus, exists, own_keys)
    # 5. revisit
    own_keys = group_keys(keys.revisit, client_ids)
    states, revisit_loss, revisit_finite = revisit_clients(completed, states, private, own_keys)

    scores_finite = {name: jnp.ones(len(ids), bool) for name, ids in client_ids.items()}
    results = scores_finite, digest_finite, revisit_finite, scores_size(consensus)
    participation = Participation(available, completed)  # type: ignore[arg-type]  # the record is complete
    return states, RoundInfo(digest_loss, revisit_loss, client_ids, exists, participation, *results)


def report(
    architecture: Architecture,
    state: ClientState,
    inputs: chex.Array,
    key: chex.PRNGKey,
    *,
    transforms: Sequence[Transform] = (),
) -> chex.Array:
    """The report of one client to the server: its transformed scores on the public subset, [M, C]."""
    scores = score(architecture, state, inputs)
    # Scores of networks of different precision are added, and on a mesh computed in one program.
    scores = at_least_float32(scores)
    for number, transform in enumerate(transforms):
        scores = transform(scores, jax.random.fold_in(key, number))
    return scores


def _digest(architecture, completed, state, inputs, consensus, exists, key, *, training, distance):
    """The digest of one client; without a consensus the client does not change, and its losses are zero."""

    def skip(completed, state, inputs, consensus, key):
        losses = jnp.zeros(training.num_epochs, jnp.promote_types(consensus.dtype, jnp.float32))
        return state, TrainingInfo(losses, jnp.int32(training.num_epochs), jnp.array(True))

    digest_one = partial(keep_if_finite(partial(digest, training=training, distance=distance)), architecture)
    state, info = jax.lax.cond(exists, digest_one, skip, completed, state, inputs, consensus, key)
    return state, info.loss, info.finite


def _revisit(architecture, completed, state, private, key, *, training):
    state, info = keep_if_finite(partial(revisit, training=training))(architecture, completed, state, private, key)
    return state, info.loss, info.finite
