"""Dropouts and stragglers: who takes part in a round, and a simulator that draws it with a seed.

An absent client neither scores nor trains. A straggler scores, and is heard, but its training comes to nothing: its
digest and its revisit are lost. Who is there or not is known at run time only, so one compiled round serves any.
"""

from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedmd_jax.checks import is_number, told
from fedmd_jax.clients import Groups, as_client_ids, check_per_client, group_client_ids
from fedmd_jax.mapping import on_every_device
from fedmd_jax.types import Attendance, Participants

ClientIds = Mapping[str, chex.Array]
# (number of the round, per group the ids [K] of those who could take part) -> who does.
AttendancePolicy = Callable[[int, ClientIds], Attendance]
# Of every client, or by client id.
Probability = float | Mapping[int, float]


def attendance_or_everybody(attendance: Attendance | None, client_ids: ClientIds) -> Attendance:
    """The attendance, in which only those who are available complete a round; everybody where there is none.

    Args:
      attendance: per group [K], bool.
      client_ids: per group [K].

    Raises:
      ValueError: an attendance of other groups, or of other numbers of clients.

    >>> present = Attendance({"a": jnp.array([True, False])}, {"a": jnp.array([True, True])})
    >>> attendance_or_everybody(present, {"a": jnp.arange(2)}).completed["a"].tolist()
    [True, False]
    """
    num_clients = {name: len(ids) for name, ids in client_ids.items()}
    if attendance is None:
        everybody = {name: jnp.ones(k, bool) for name, k in num_clients.items()}
        return Attendance(everybody, everybody)
    available, completed = ({name: jnp.asarray(mask, bool) for name, mask in masks.items()} for masks in attendance)
    for what, masks in (("availability", available), ("completion", completed)):
        check_per_client(what, masks, num_clients)
    return Attendance(available, {name: completed[name] & available[name] for name in num_clients})


def all_clients(groups: Groups, attendance: Attendance | None = None) -> Participants:
    """The participants of a whole federation, with the weights of its groups.

    Args:
      groups: the architecture groups.
      attendance: of one round, per group [K]; by default all clients take part to the end.
    """
    weights = {name: jnp.asarray(group.weights, dtype=jnp.float32) for name, group in groups.items()}
    return Participants(group_client_ids(groups), weights, *(attendance or ()))


def complete_participants(participants: Participants | None, groups: Groups, mesh: Mesh | None = None) -> Participants:
    """The record with nothing left out, checked: weights of clients that are not available are zero.

    Args:
      participants: as a caller gives them; None is all clients of the groups.
      groups: the architecture groups.
      mesh: over which clients are sharded; who is available is replicated then.

    Raises:
      ValueError: a part is of other groups, or of other numbers of clients, than the client ids.
    """
    client_ids, weights, *masks = all_clients(groups) if participants is None else participants
    check_per_client("weight", weights, {name: len(ids) for name, ids in client_ids.items()})
    attendance = Attendance(*masks) if all(mask is not None for mask in masks) else None
    available, completed = on_every_device(attendance_or_everybody(attendance, client_ids), mesh)
    weights = {name: jnp.where(available[name], weights[name], 0.0) for name in client_ids}
    return Participants(dict(client_ids), weights, available, completed)


def draw_attendance(
    key: chex.PRNGKey, client_ids: ClientIds, *, availability: Probability = 1.0, completion: Probability = 1.0
) -> Attendance:
    """Draws who takes part in one round; a client's luck hangs on the key and on its id, and on nothing else.

    Args:
      key: the round's; the key is consumed.
      client_ids: per group [K].
      availability: how likely a client is there.
      completion: how likely one that is there completes its training.

    Returns:
      The attendance, per group [K].

    Raises:
      ValueError: a probability that is not between 0 and 1, or none for a client.

    References:
      Not in Li and Wang 2019. Dropouts and stragglers as independent events: Bonawitz et al. 2019, "Towards Federated
      Learning at Scale", section 9 has the rates of a real system.

    >>> client_ids = {"a": jnp.array([3, 1]), "b": jnp.array([2])}
    >>> attendance = draw_attendance(jax.random.key(0), client_ids, completion={1: 0.0, 2: 1.0, 3: 1.0})
    >>> attendance.available["a"].tolist(), attendance.completed["a"].tolist()
    ([True, True], [True, False])
    """
    available, completed = {}, {}
    for name, ids in client_ids.items():
        ids = as_client_ids(ids)
        luck = _luck(key, ids)  # [K, 2], below 1
        available[name] = luck[:, 0] < _of_clients("availability", availability, ids)
        completed[name] = available[name] & (luck[:, 1] < _of_clients("completion", completion, ids))
    return Attendance(available, completed)


def simulate_attendance(
    key: chex.PRNGKey, *, availability: Probability = 1.0, completion: Probability = 1.0
) -> AttendancePolicy:
    """Dropouts and stragglers for `run_federation` and `run_population`: `draw_attendance` for every round anew.

    Args:
      key: of all rounds, and of nothing else; round r uses `fold_in(key, r)`.
      availability: as of `draw_attendance`.
      completion: as of `draw_attendance`.
    """

    def of_round(round_: int, client_ids: ClientIds) -> Attendance:
        key_round = jax.random.fold_in(key, round_)
        return draw_attendance(key_round, client_ids, availability=availability, completion=completion)

    return of_round


@jax.jit
def _luck(key, client_ids):
    return jax.vmap(lambda client_id: jax.random.uniform(jax.random.fold_in(key, client_id), (2,)))(client_ids)


def _of_clients(what: str, probability: Probability, client_ids: chex.Array) -> np.ndarray:
    ids = np.asarray(client_ids).tolist()
    if not isinstance(probability, Mapping):
        probability = dict.fromkeys(ids, probability)
    missing = sorted(set(ids) - set(probability))
    if missing:
        raise ValueError(f"{what} is needed for every client, missing for {missing}")
    values = [probability[client_id] for client_id in ids]
    if not all(is_number(value) and 0 <= value <= 1 for value in values):
        raise ValueError(f"{what} must be between 0 and 1, got {told(values)}")
    return np.asarray(values, np.float32)
