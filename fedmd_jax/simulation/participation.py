"""Dropouts and stragglers: draws with a seed which clients take part in a round and which complete it.

A dropped client neither scores nor trains. A straggler scores, and its scores enter the consensus, but its digest and
its revisit are discarded. Participation is known at run time only, so that one compiled round serves every case.
"""

from collections.abc import Mapping

import chex
import jax
import numpy as np

from fedmd_jax.algorithms.participation import ClientIds, ParticipationPolicy
from fedmd_jax.checks import describe_value, is_number
from fedmd_jax.mapping.groups import as_client_ids
from fedmd_jax.types import Participation

# One probability for all clients, or one per client id.
Probability = float | Mapping[int, float]


def draw_participation(
    key: chex.PRNGKey, client_ids: ClientIds, *, availability: Probability = 1.0, completion: Probability = 1.0
) -> Participation:
    """Draws which clients take part in one round. The result for a client depends only on the key and its id.

    Args:
      key: key of the round; it is consumed.
      client_ids: per group [K].
      availability: probability that a client takes part.
      completion: probability that a client that takes part completes its training.

    Returns:
      The participation record, per group [K].

    Raises:
      ValueError: a probability is not between 0 and 1, or is missing for a client.

    References:
      Not in Li and Wang 2019. Dropouts and stragglers as independent events: Bonawitz et al. 2019, "Towards Federated
      Learning at Scale", section 9 has the rates of a real system.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> client_ids = {"a": jnp.array([3, 1]), "b": jnp.array([2])}
      >>> completion = {1: 0.0, 2: 1.0, 3: 1.0}  # client 1 is a straggler in every round
      >>> participation = fmd.simulation.draw_participation(jax.random.key(0), client_ids, completion=completion)
      >>> participation.available["a"].tolist(), participation.completed["a"].tolist()
      ([True, True], [True, False])
    """
    available, completed = {}, {}
    for name, ids in client_ids.items():
        ids = as_client_ids(ids)
        uniform = _uniform_per_client(key, ids)  # [K, 2], below 1
        available[name] = uniform[:, 0] < _of_clients("availability", availability, ids)
        completed[name] = available[name] & (uniform[:, 1] < _of_clients("completion", completion, ids))
    return Participation(available, completed)


def simulate_participation(
    key: chex.PRNGKey, *, availability: Probability = 1.0, completion: Probability = 1.0
) -> ParticipationPolicy:
    """A participation policy for `run_federation` and `run_population` that calls `draw_participation` in each round.

    Args:
      key: key of all rounds, used for nothing else; round r uses `fold_in(key, r)`.
      availability: as in `draw_participation`.
      completion: as in `draw_participation`.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> policy = fmd.simulate_participation(jax.random.key(0), availability={0: 1.0, 1: 0.0}, completion=0.9)
      >>> policy(1, {"a": jnp.array([0, 1])}).available["a"].tolist()  # run_federation(..., participation=policy)
      [True, False]
    """

    def of_round(round_: int, client_ids: ClientIds) -> Participation:
        key_round = jax.random.fold_in(key, round_)
        return draw_participation(key_round, client_ids, availability=availability, completion=completion)

    return of_round


@jax.jit
def _uniform_per_client(key, client_ids):
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
        raise ValueError(f"{what} must be between 0 and 1, got {describe_value(values)}")
    return np.asarray(values, np.float32)
