"""Communication cost in bytes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedmd_jax.algorithms.base import Sizes
from fedmd_jax.checks import check_count, check_numbers, describe_value
from fedmd_jax.types import ClientState


class CommunicationCost(NamedTuple):
    """Bytes sent by FedMD, and by FedAvg with the same networks.

    Example:
      >>> import fedmd_jax as fmd
      >>> cost = fmd.simulation.CommunicationCost(320_000, 320_000, 25_600_000, 640.0)
      >>> cost.total_bytes / 1e6
      25.6
    """

    upload_bytes_per_client_round: int  #: a client's scores of the public subset
    download_bytes_per_client_round: int  #: the consensus
    total_bytes: int  #: both directions, all clients, all rounds
    #: One direction (FedAvg sends as much down as up): weights and batch statistics, averaged over clients.
    fedavg_bytes_per_client_round: float


def communication_bytes(
    states: Mapping[str, ClientState], *, subset_size: int, num_classes: int, num_rounds: int, dtype: Any = jnp.float32
) -> CommunicationCost:
    """Counts the bytes that a federation sends.

    The public dataset is not counted, since every client has it, and neither is the public subset, which a seed
    determines.

    Args:
      states: per group, stacked clients [K, ...]; arrays or their shapes.
      subset_size: number of public examples per round.
      num_classes: number of scores per example.
      num_rounds: number of rounds of the run.
      dtype: dtype of the scores sent; FedAvg is counted in the dtypes of the networks.

    Returns:
      Exact counts.

    Raises:
      ValueError: an invalid count, an invalid dtype, or no clients.

    References:
      Li and Wang 2019, supplement: the cost "does not scale with the complexity of participating models".

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> clients = fmd.ClientState({"kernel": jnp.zeros((2, 10, 16))}, {}, {}, {})
      >>> cost = fmd.communication_bytes({"a": clients}, subset_size=5000, num_classes=16, num_rounds=20)
      >>> cost.upload_bytes_per_client_round, cost.total_bytes, cost.fedavg_bytes_per_client_round
      (320000, 25600000, 640.0)
    """
    for name, value in {"subset_size": subset_size, "num_classes": num_classes}.items():
        check_count(name, value)
    check_count("num_rounds", num_rounds, minimum=0)
    _check_dtype(dtype)
    if not all(jax.tree.leaves(state.params) for state in states.values()) or not states:
        raise ValueError(f"the parameters of at least one client are needed, and of every group, got {sorted(states)}")
    one_way = subset_size * num_classes * jnp.dtype(dtype).itemsize
    sizes = Sizes(None, states, None, subset_size, num_classes)
    total = 2 * one_way * sizes.num_clients * num_rounds
    return CommunicationCost(one_way, one_way, total, sizes.network_bytes)


def _check_dtype(dtype):
    try:
        scores = jax.ShapeDtypeStruct((), jnp.dtype(dtype))
    except TypeError as error:
        raise ValueError(f"dtype must be one of numbers, got {describe_value(dtype)}") from error
    check_numbers("scores", scores)
