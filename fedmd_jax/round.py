"""One round of FedMD, on one screen."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmd_jax.attendance import attendance_or_everybody
from fedmd_jax.clients import Groups, group_client_ids, group_keys
from fedmd_jax.consensus import bound_scores, check_per_client, mean_of_sums, scale_weights
from fedmd_jax.devices import map_groups, sum_groups
from fedmd_jax.isolation import unless_broken
from fedmd_jax.local import Training, digest, revisit, score
from fedmd_jax.losses import mae
from fedmd_jax.mapping import ClientsPerChunk, on_every_device
from fedmd_jax.subset import draw_public_subset
from fedmd_jax.types import (
    Architecture,
    Attendance,
    ClientState,
    PrivateDataset,
    PublicDataset,
    RoundInfo,
    TrainingInfo,
)


class RoundKeys(NamedTuple):
    """What the random numbers of one round come from."""

    subset: chex.PRNGKey
    digest: chex.PRNGKey
    revisit: chex.PRNGKey


def round_keys(key: chex.PRNGKey) -> RoundKeys:
    """The keys that `fedmd_round` makes of its own, for whoever repeats a part of a round."""
    return RoundKeys(*jax.random.split(key, 3))


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
    client_ids: Mapping[str, chex.Array] | None = None,
    weights: Mapping[str, chex.Array] | None = None,
    attendance: Attendance | None = None,
    score_bound: float | None = None,
    clients_per_chunk: ClientsPerChunk = "auto",
    mesh: Mesh | None = None,
) -> tuple[Mapping[str, ClientState], RoundInfo]:
    """One FedMD round: communicate, aggregate, distribute, digest, revisit.

    A client that sends what is not finite is not heard, and one whose digest or revisit ends in what is not finite
    stays as it was before: everybody else goes through the same round as without it, to the bit. Where nobody is heard
    nobody digests, and the revisits go on.

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
      client_ids: per group, [K]: whose states and private datasets these are; by default all clients of the groups.
        With `weights` it may come at run time: one compiled round for any cohort of this size.
      weights: per group, [K]; by default those of the groups.
      attendance: who scores, and whose training is kept; may come at run time. Those absent stay as they are, to the
        bit. By default everybody, to the end.
      score_bound: scores are clipped to this size before they are averaged; None leaves them as they are.
      clients_per_chunk: how many clients of a group run at once on a device, None is all, "auto" what is fastest; one
        setting for all groups or per group.
      mesh: devices along one axis, over which the clients are spread.

    Returns:
      The clients after the round, and what the round tells about itself; with a mesh what is per client is a `Spread`.

    Raises:
      ValueError: weights or attendance of other groups, or of other numbers of clients, than could take part.

    References:
      Li and Wang 2019, Algorithm 1.
    """
    keys = round_keys(key)
    subset = draw_subset(keys.subset, public, subset_size)
    client_ids = group_client_ids(groups) if client_ids is None else client_ids
    weights = consensus_weights(groups) if weights is None else weights
    check_per_client("weight", weights, {name: len(ids) for name, ids in client_ids.items()})
    attendance = on_every_device(attendance_or_everybody(attendance, client_ids), mesh)
    weights = scale_weights({name: jnp.where(attendance.available[name], weights[name], 0.0) for name in groups})
    everybody = {"groups": groups, "mesh": mesh, "clients_per_chunk": clients_per_chunk}
    sum_scores = sum_groups(partial(_score, bound=score_bound), (0, None), **everybody)
    digest_one = partial(_digest, training=digest_training, distance=distance)
    digest_clients = map_groups(digest_one, (0, 0, None, None, None, 0), **everybody)
    revisit_clients = map_groups(partial(_revisit, training=revisit_training), (0, 0, 0, 0), **everybody)

    # 1. communicate: every client scores the public subset; what is kept is a sum, [devices, M, C]
    sums = sum_scores(weights, states, subset.inputs)
    # 2. aggregate [M, C]; where there is nobody there is nothing to digest
    consensus, anybody = mean_of_sums([sums], mesh)
    # 3. distribute, 4. digest
    own_keys = group_keys(keys.digest, client_ids)
    states, digest_loss, digest_finite = digest_clients(
        attendance.completed, states, subset.inputs, consensus, anybody, own_keys
    )
    # 5. revisit
    own_keys = group_keys(keys.revisit, client_ids)
    states, revisit_loss, revisit_finite = revisit_clients(attendance.completed, states, private, own_keys)

    finite = sums.finite, digest_finite, revisit_finite
    return states, RoundInfo(digest_loss, revisit_loss, dict(client_ids), anybody, attendance, *finite)


def consensus_weights(groups: Groups) -> dict[str, chex.Array]:
    """The weights of the groups as arrays, [K] each."""
    return {name: jnp.asarray(group.weights, dtype=jnp.float32) for name, group in groups.items()}


def _score(architecture: Architecture, state: ClientState, inputs: chex.Array, *, bound: float | None) -> chex.Array:
    scores = score(architecture, state, inputs)
    # Networks of several precisions meet in one sum, and on a mesh in one program.
    return bound_scores(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), bound)


def _digest(architecture, completed, state, inputs, consensus, anybody, key, *, training, distance):
    """One client's digest; where there is no consensus it stays as it is, with a loss of zero in every epoch."""

    def skip(completed, state, inputs, consensus, key):
        losses = jnp.zeros(training.num_epochs, jnp.promote_types(consensus.dtype, jnp.float32))
        return state, TrainingInfo(losses, jnp.int32(training.num_epochs), jnp.array(True))

    digest_one = unless_broken(partial(digest, architecture, training=training, distance=distance))
    state, info = jax.lax.cond(anybody, digest_one, skip, completed, state, inputs, consensus, key)
    return state, info.loss, info.finite


def _revisit(architecture, completed, state, private, key, *, training):
    state, info = unless_broken(partial(revisit, architecture, training=training))(completed, state, private, key)
    return state, info.loss, info.finite
