"""Many clients: groups that share an architecture, stacked along a leading axis."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.checks import as_array, as_list, check_examples, check_one_dtype, is_number, told
from fedmd_jax.types import Architecture, PrivateDataset


@dataclasses.dataclass(frozen=True)
class ArchitectureGroup:
    """The clients that share one network shape.

    Attributes:
      architecture: the network.
      client_ids: one integer per client; a client's random numbers hang on it, and on nothing else.
      weights: what each client's scores weigh in the consensus; one each by default.

    Raises:
      ValueError: no client, an id twice or not an integer from 0 on, weights of another length, or neither zero nor
        between 1e-30 and 1e30.
    """

    architecture: Architecture
    client_ids: Sequence[int]
    weights: Sequence[float] | None = None

    def __post_init__(self):
        ids = tuple(as_list("client ids", self.client_ids))
        if not ids:
            raise ValueError("a group needs at least one client, got none")
        if any(not isinstance(i, (int, np.integer)) or isinstance(i, bool) or not 0 <= i < 2**32 for i in ids):
            raise ValueError(f"client ids must be integers from 0 to 2**32 - 1, got {told(list(ids))}")
        check_unique(ids)
        weights = [1.0] * len(ids) if self.weights is None else as_list("consensus weights", self.weights)
        if len(weights) != len(ids):
            raise ValueError(f"one consensus weight per client is needed: {len(ids)} clients, {len(weights)} weights")
        # Far from where float32 overflows, or flushes a reciprocal to zero.
        if not all(is_number(weight) and (weight == 0 or 1e-30 <= weight <= 1e30) for weight in weights):
            raise ValueError(f"consensus weights must be zero or between 1e-30 and 1e30, got {told(weights)}")
        object.__setattr__(self, "client_ids", tuple(int(i) for i in ids))
        object.__setattr__(self, "weights", tuple(map(float, weights)))

    @property
    def num_clients(self) -> int:
        """K."""
        return len(self.client_ids)


Groups = Mapping[str, ArchitectureGroup]


Home = Literal["host", "device"]


def check_home(home: Home) -> None:
    """A `ValueError` where arrays are to live neither on the host nor on the device."""
    if not isinstance(home, str) or home not in get_args(Home):
        raise ValueError(f"home must be host or device, got {told(home)}")


def group_client_ids(groups: Groups) -> dict[str, chex.Array]:
    """The ids of all clients as arrays, [K] each."""
    return {name: jnp.asarray(group.client_ids, dtype=jnp.uint32) for name, group in groups.items()}


def check_unique(client_ids: Sequence[int]) -> None:
    """A `ValueError` that names the client ids which come twice."""
    ids, counts = np.unique(np.asarray(client_ids, dtype=np.int64), return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"every client needs an id of its own, got more than once: {ids[counts > 1].tolist()}")


def check_groups(groups: Groups) -> None:
    """A `ValueError` where there is no group, or where two groups claim the same client."""
    if not groups:
        raise ValueError("at least one architecture group is needed, got none")
    check_unique([client_id for group in groups.values() for client_id in group.client_ids])


def client_keys(key: chex.PRNGKey, client_ids: Sequence[int]) -> chex.PRNGKey:
    """One key per client, [K], from the client's id: neither grouping nor order nor sharding matters.

    That holds for JAX's own keys (threefry). What `rbg` keys give hangs on the place in a batch.

    Raises:
      ValueError: ids that are not integers from 0 to 2**32 - 1, [K].
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, as_client_ids(client_ids))


def as_client_ids(client_ids: Sequence[int] | chex.Array) -> chex.Array:
    """Ids as JAX takes them, [K], uint32; a `ValueError` where one is no integer from 0 to 2**32 - 1."""
    if not isinstance(client_ids, (np.ndarray, jax.Array)):
        client_ids = as_array("client ids", as_list("client ids", client_ids))
    if client_ids.ndim != 1 or client_ids.dtype.kind not in "iu":
        raise ValueError(f"client ids must be integers [K], got {client_ids.dtype} of shape {client_ids.shape}")
    if client_ids.dtype != np.uint32 and not isinstance(client_ids, jax.core.Tracer):
        client_ids = np.asarray(client_ids)
        if client_ids.size and not 0 <= client_ids.min() <= client_ids.max() < 2**32:
            raise ValueError(f"client ids must be integers from 0 to 2**32 - 1, got {told(client_ids.tolist())}")
    return jnp.asarray(client_ids, dtype=jnp.uint32)


def group_keys(key: chex.PRNGKey, client_ids: Mapping[str, chex.Array]) -> dict[str, chex.PRNGKey]:
    """One key per client of each group, [K] each."""
    return {name: client_keys(key, ids) for name, ids in client_ids.items()}


def stack_private(
    groups: Groups, examples: Mapping[int, tuple[Any, Any]], *, home: Home = "device"
) -> dict[str, PrivateDataset]:
    """Every client's private examples, stacked by group and padded to the longest of the group.

    Args:
      groups: who is in which group.
      examples: for each client id its inputs [n, ...] and integer labels [n]; n may differ between clients.
      home: "host" for NumPy arrays, where everybody's examples do not fit on the device.

    Returns:
      Per group, inputs [K, N, ...], labels [K, N] and num_examples [K]. Integer inputs are in int32; float16,
      bfloat16 and float32 keep their dtype, float64 becomes float32. A row of padding repeats the client's last
      example, so that it is finite in every network in which the example is.

    Raises:
      ValueError: a client without examples, examples without a client, lengths that differ between inputs and labels,
        shapes or dtypes that differ between clients, NaN, integers beyond int32, images [N, C, H, W], labels that are
        not integers from 0, an unknown home.
    """
    check_home(home)
    check_groups(groups)
    known = {client_id for group in groups.values() for client_id in group.client_ids}
    missing, unknown = sorted(known - set(examples)), sorted(set(examples) - known, key=str)
    if missing or unknown:
        raise ValueError(
            "private examples are needed for exactly the clients of the groups: "
            f"missing for {missing}, not in any group {told(unknown)}"
        )
    checked = check_private(examples)
    stacked = {
        name: stack_examples([checked[client_id] for client_id in group.client_ids]) for name, group in groups.items()
    }
    return stacked if home == "host" else jax.tree.map(jnp.asarray, stacked)


def check_private(examples: Mapping[int, tuple[Any, Any]]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Inputs and labels of each client as of `check_examples`; a `ValueError` if they are no examples, or do not agree.

    Args:
      examples: for each client id its inputs [n, ...] and integer labels [n].
    """
    for client_id, pair in examples.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"client {client_id}: inputs and labels are needed, got {told(pair)}")
    checked = {client_id: check_examples(f"client {client_id}", *examples[client_id]) for client_id in examples}
    shapes = {inputs.shape[1:] for inputs, _ in checked.values()}
    if len(shapes) > 1:
        raise ValueError(f"the inputs of all clients must have one shape, got {sorted(shapes)}")
    check_one_dtype({f"client {client_id}": inputs.dtype for client_id, (inputs, _) in checked.items()})
    return checked


def stack_examples(examples: Sequence[tuple[np.ndarray, np.ndarray]], num_rows: int | None = None) -> PrivateDataset:
    """Examples of some clients, checked already, as a stack on the host, [K, N, ...]; padding repeats the last example.

    Args:
      examples: inputs and labels of each client.
      num_rows: N; by default that of the longest.
    """
    num_rows = max(len(labels) for _, labels in examples) if num_rows is None else num_rows

    def pad(rows):
        return rows[np.minimum(np.arange(num_rows), len(rows) - 1)]

    return PrivateDataset(
        inputs=np.stack([pad(inputs) for inputs, _ in examples]),
        labels=np.stack([pad(labels) for _, labels in examples]),
        num_examples=np.asarray([len(labels) for _, labels in examples], dtype=np.int32),
    )


def check_per_client(what: str, values: Mapping[str, chex.Array], num_clients: Mapping[str, int]) -> None:
    """A `ValueError` where the groups, or the numbers of their clients, are not those of the values."""
    wanted, found = (
        {name: (k,) for name, k in num_clients.items()},
        {name: getattr(v, "shape", None) for name, v in values.items()},
    )
    if wanted != found:
        raise ValueError(f"one {what} per client is needed, of shapes {wanted}, got {found}")
