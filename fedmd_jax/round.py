"""One round of FedMD, on one screen."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmd_jax.attendance import complete_participants
from fedmd_jax.clients import Groups, group_keys
from fedmd_jax.consensus import Aggregator, weighted_mean
from fedmd_jax.devices import map_groups
from fedmd_jax.isolation import unless_broken
from fedmd_jax.local import Training, digest, revisit, score
from fedmd_jax.losses import mae
from fedmd_jax.mapping import ClientsPerChunk
from fedmd_jax.subset import draw_public_subset
from fedmd_jax.types import (
    Architecture,
    Attendance,
    ClientState,
    Participants,
    PrivateDataset,
    PublicDataset,
    RoundInfo,
    TrainingInfo,
)

# (scores [M, C], key) -> scores [M, C]: what a client does to its scores before they leave it.
Transform = Callable[[chex.Array, chex.PRNGKey], chex.Array]


class RoundKeys(NamedTuple):
    """The keys of the parts of one round."""

    subset: chex.PRNGKey
    digest: chex.PRNGKey
    revisit: chex.PRNGKey
    transform: chex.PRNGKey


def round_keys(key: chex.PRNGKey) -> RoundKeys:
    """The keys that `fedmd_round` derives from its own, for programs that repeat a part of a round."""
    return RoundKeys(*jax.random.split(key, 3), jax.random.fold_in(key, 3))


def fedmd_round(
    states: Mapping[str, ClientState],
    public: PublicDataset,
    private: Mapping[str, PrivateDataset],
    key: chex.PRNGKey,
    *,
    groups: Groups,
    subset_size: int,
    digest_training: Training,
    revisit_training: Training,
    distance: Callable = mae,
    draw_subset: Callable = draw_public_subset,
    transforms: Sequence[Transform] = (),
    aggregator: Aggregator = weighted_mean,
    participants: Participants | None = None,
    clients_per_chunk: ClientsPerChunk = "auto",
    mesh: Mesh | None = None,
) -> tuple[Mapping[str, ClientState], RoundInfo]:
    """One FedMD round: communicate, aggregate, distribute, digest, revisit.

    A client with non-finite scores is excluded from the aggregation. A client whose digest or revisit ends in NaN or
    infinity is reverted. The results of all other clients are bitwise those of the same round without that client. If
    every client is excluded no client digests, and the revisits take place.

    Args:
      states: per group, stacked clients [K, ...]; with a mesh best as `spread_clients` gives them, as is `private`.
      public: the public dataset, [P, ...].
      private: per group, stacked private datasets [K, N, ...].
      key: the round's; the key is consumed.
      groups: architecture, client ids and consensus weights of each group.
      subset_size: M, public examples in this round.
      digest_training: epochs, batches and optimizer towards the consensus.
      revisit_training: the same towards the private labels.
      distance: of scores and consensus, `mae` or `kl` or the caller's own, [B, C] x [B, C] -> [B].
      draw_subset: (key, public, size) -> the public subset.
      transforms: what each client does to its scores before they leave it, in this order.
      aggregator: how the scores of all clients become the consensus.
      participants: whose states and private data these are, their weights, and how far they get; may come at run time.
        Absent clients stay as they are, to the bit. By default all clients of the groups, to the end.
      clients_per_chunk: how many clients of a group run at once on a device, None is all, "auto" what is fastest; one
        setting for all groups or per group.
      mesh: devices along one axis, over which the clients are spread.

    Returns:
      The clients after the round, and what the round tells about itself; with a mesh what is per client is a `Spread`.

    Raises:
      ValueError: participants of other groups, or of other numbers of clients, than the states.

    References:
      Li and Wang 2019, Algorithm 1.
    """
    over = {"groups": groups, "mesh": mesh, "clients_per_chunk": clients_per_chunk}
    participants = complete_participants(participants, groups, mesh)
    keys = round_keys(key)
    subset = draw_subset(keys.subset, public, subset_size)

    # 1. communicate: every client scores the public subset, 2. aggregate: [M, C]
    aggregate = aggregator(partial(report, transforms=transforms), (0, None, 0), **over)
    own_keys = group_keys(keys.transform, participants.client_ids)
    consensus, exists, finite = aggregate(participants.weights, states, subset.inputs, own_keys)
    # 3. distribute, 4. digest, 5. revisit
    how = {"digest_training": digest_training, "revisit_training": revisit_training, "distance": distance}
    states, info = learn(states, subset.inputs, consensus, exists, private, keys, participants, **how, **over)
    return states, info._replace(scores_finite=finite)


def learn(
    states: Mapping[str, ClientState],
    inputs: chex.Array,
    consensus: chex.Array,
    exists: chex.Array,
    private: Mapping[str, PrivateDataset],
    keys: RoundKeys,
    participants: Participants,
    *,
    digest_training: Training,
    revisit_training: Training,
    distance: Callable = mae,
    **over,
) -> tuple[Mapping[str, ClientState], RoundInfo]:
    """The clients' half of a round after the server: digest of the consensus, then revisit.

    Args:
      states: per group, stacked clients [K, ...].
      inputs: the public subset of the round, [M, ...].
      consensus: [M, C].
      exists: whether there is a consensus, []; if not, no client digests.
      private: per group, stacked private datasets [K, N, ...].
      keys: of the round.
      participants: complete, from `complete_participants`.
      digest_training: as of `fedmd_round`.
      revisit_training: as of `fedmd_round`.
      distance: as of `fedmd_round`.
      **over: `groups`, `mesh` and `clients_per_chunk` of `map_groups`.

    Returns:
      The clients, and the info of the round, in which `scores_finite` is True for all clients.
    """
    client_ids, _, available, completed = participants
    digest_one = partial(_digest, training=digest_training, distance=distance)
    digest_clients = map_groups(digest_one, (0, 0, None, None, None, 0), **over)
    revisit_clients = map_groups(partial(_revisit, training=revisit_training), (0, 0, 0, 0), **over)

    own_keys = group_keys(keys.digest, client_ids)
    states, digest_loss, digest_finite = digest_clients(completed, states, inputs, consensus, exists, own_keys)
    own_keys = group_keys(keys.revisit, client_ids)
    states, revisit_loss, revisit_finite = revisit_clients(completed, states, private, own_keys)

    scores_finite = {name: jnp.ones(len(ids), bool) for name, ids in client_ids.items()}
    finite = scores_finite, digest_finite, revisit_finite
    return states, RoundInfo(digest_loss, revisit_loss, client_ids, exists, Attendance(available, completed), *finite)


def report(
    architecture: Architecture,
    state: ClientState,
    inputs: chex.Array,
    key: chex.PRNGKey,
    *,
    transforms: Sequence[Transform] = (),
) -> chex.Array:
    """What one client sends to the server: its scores of the public subset [M, C], transformed."""
    scores = score(architecture, state, inputs)
    # Networks of several precisions meet in one sum, and on a mesh in one program.
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    for number, transform in enumerate(transforms):
        scores = transform(scores, jax.random.fold_in(key, number))
    return scores


def _digest(architecture, completed, state, inputs, consensus, exists, key, *, training, distance):
    """One client's digest; if there is no consensus it stays as it is, with a loss of zero in every epoch."""

    def skip(completed, state, inputs, consensus, key):
        losses = jnp.zeros(training.num_epochs, jnp.promote_types(consensus.dtype, jnp.float32))
        return state, TrainingInfo(losses, jnp.int32(training.num_epochs), jnp.array(True))

    digest_one = unless_broken(partial(digest, architecture, training=training, distance=distance))
    state, info = jax.lax.cond(exists, digest_one, skip, completed, state, inputs, consensus, key)
    return state, info.loss, info.finite


def _revisit(architecture, completed, state, private, key, *, training):
    state, info = unless_broken(partial(revisit, architecture, training=training))(completed, state, private, key)
    return state, info.loss, info.finite
