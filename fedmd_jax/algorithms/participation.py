"""Which clients take part in a round, and which complete it, as an argument of a round."""

from collections.abc import Callable, Mapping

import chex
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmd_jax.mapping.groups import Groups, check_per_client, group_client_ids
from fedmd_jax.mapping.sharding import constrain_replicated
from fedmd_jax.types import Participants, Participation

ClientIds = Mapping[str, chex.Array]
# (number of the round, per group the ids [K] of the candidates) -> which of them take part.
ParticipationPolicy = Callable[[int, ClientIds], Participation]


def resolve_participation(participation: Participation | None, client_ids: ClientIds) -> Participation:
    """Validates a participation record; None means that all clients take part and complete the round.

    Args:
      participation: per group [K], bool.
      client_ids: per group [K].

    Returns:
      The record, in which `completed` is True for available clients only.

    Raises:
      ValueError: the record has other groups, or other numbers of clients.

    >>> present = Participation({"a": jnp.array([True, False])}, {"a": jnp.array([True, True])})
    >>> resolve_participation(present, {"a": jnp.arange(2)}).completed["a"].tolist()
    [True, False]
    """
    num_clients = {name: len(ids) for name, ids in client_ids.items()}
    if participation is None:
        all_true = {name: jnp.ones(k, bool) for name, k in num_clients.items()}
        return Participation(all_true, all_true)
    available, completed = ({name: jnp.asarray(mask, bool) for name, mask in masks.items()} for masks in participation)
    for what, masks in (("availability", available), ("completion", completed)):
        check_per_client(what, masks, num_clients)
    return Participation(available, {name: completed[name] & available[name] for name in num_clients})


def all_clients(groups: Groups, participation: Participation | None = None) -> Participants:
    """The participants of a whole federation, with the weights of its groups.

    Args:
      groups: the architecture groups.
      participation: of one round, per group [K]; by default all clients complete the round.

    Example:
      >>> import fedmd_jax as fmd
      >>> groups = {"a": fmd.ArchitectureGroup(None, client_ids=(3, 8), weights=(1.0, 2.0))}
      >>> participants = fmd.algorithms.all_clients(groups)
      >>> participants.client_ids["a"].tolist(), participants.weights["a"].tolist()
      ([3, 8], [1.0, 2.0])
    """
    weights = {name: jnp.asarray(group.weights, dtype=jnp.float32) for name, group in groups.items()}
    return Participants(group_client_ids(groups), weights, *(participation or ()))


def complete_participants(participants: Participants | None, groups: Groups, mesh: Mesh | None = None) -> Participants:
    """Validates the record and fills in its defaults; weights of dropped clients become zero.

    Args:
      participants: the record, possibly without participation; None for all clients of the groups.
      groups: the architecture groups.
      mesh: mesh over which clients are sharded, on which the masks are replicated.

    Raises:
      ValueError: a field has other groups, or other numbers of clients, than the client ids.
    """
    client_ids, weights, available, completed = all_clients(groups) if participants is None else participants
    check_per_client("weight", weights, {name: len(ids) for name, ids in client_ids.items()})
    participation = None if available is None or completed is None else Participation(available, completed)
    available, completed = constrain_replicated(resolve_participation(participation, client_ids), mesh)
    weights = {name: jnp.where(available[name], weights[name], 0.0) for name in client_ids}
    return Participants(dict(client_ids), weights, available, completed)
