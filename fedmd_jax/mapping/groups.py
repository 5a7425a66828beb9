"""Architecture groups: clients that share a network shape, stacked along a leading axis."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.checks import as_array, as_list, check_examples, check_one_dtype, describe_value, is_number
from fedmd_jax.types import Architecture, PrivateDataset


@dataclasses.dataclass(frozen=True)
class ArchitectureGroup:
    """The clients that share one network shape.

    Attributes:
      architecture: the network.
      client_ids: one integer per client, from which the client's random numbers are derived.
      weights: weight of each client's scores in the consensus; 1.0 by default.

    Raises:
      ValueError: no client, an id that occurs twice or is not an integer from 0 to 2**32 - 1, weights of another
        length, or a weight that is neither zero nor between 1e-30 and 1e30.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((8,), num_classes=3))
      >>> group = fmd.ArchitectureGroup(network, client_ids=(0, 1, 7), weights=(1.0, 1.0, 2.0))
      >>> group.num_clients
      3
    """

    architecture: Architecture
    client_ids: Sequence[int]
    weights: Sequence[float] | None = None

    def __post_init__(self):
        ids = tuple(as_list("client ids", self.client_ids))
        if not ids:
            raise ValueError("a group needs at least one client, got none")
        if any(not isinstance(i, (int, np.integer)) or isinstance(i, bool) or not 0 <= i < 2**32 for i in ids):
            raise ValueError(f"client ids must be integers from 0 to 2**32 - 1, got {describe_value(list(ids))}")
        check_unique(ids)
        weights = [1.0] * len(ids) if self.weights is None else as_list("consensus weights", self.weights)
        if len(weights) != len(ids):
            raise ValueError(f"one consensus weight per client is needed: {len(ids)} clients, {len(weights)} weights")
        # Within these bounds float32 neither overflows nor flushes a reciprocal to zero.
        if not all(is_number(weight) and (weight == 0 or 1e-30 <= weight <= 1e30) for weight in weights):
            raise ValueError(f"consensus weights must be zero or between 1e-30 and 1e30, got {describe_value(weights)}")
        object.__setattr__(self, "client_ids", tuple(int(i) for i in ids))
        object.__setattr__(self, "weights", tuple(map(float, weights)))

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.client_ids)


Groups = Mapping[str, ArchitectureGroup]


Storage = Literal["host", "device"]


def check_storage(storage: Storage) -> None:
    """Raises ValueError if the storage is neither "host" nor "device"."""
    if not isinstance(storage, str) or storage not in get_args(Storage):
        raise ValueError(f"storage must be host or device, got {describe_value(storage)}")


def group_client_ids(groups: Groups) -> dict[str, chex.Array]:
    """The ids of all clients as arrays, [K] each."""
    return {name: jnp.asarray(group.client_ids, dtype=jnp.uint32) for name, group in groups.items()}


def check_unique(client_ids: Sequence[int]) -> None:
    """Raises ValueError if a client id occurs twice."""
    ids, counts = np.unique(np.asarray(client_ids, dtype=np.int64), return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"every client needs an id of its own, got more than once: {ids[counts > 1].tolist()}")


def check_groups(groups: Groups) -> None:
    """Raises ValueError if there is no group, or if two groups have the same client id."""
    if not groups:
        raise ValueError("at least one architecture group is needed, got none")
    check_unique([client_id for group in groups.values() for client_id in group.client_ids])


def client_keys(key: chex.PRNGKey, client_ids: Sequence[int]) -> chex.PRNGKey:
    """One key per client, [K], from the client's id: independent of grouping, order and sharding.

    This holds for JAX's default keys (threefry). Numbers drawn from `rbg` keys depend on the position in a batch.

    Raises:
      ValueError: ids that are not integers from 0 to 2**32 - 1, [K].

    Example:
      >>> import jax, fedmd_jax as fmd
      >>> key = jax.random.key(0)
      >>> keys = fmd.mapping.client_keys(key, (7, 3))
      >>> keys.shape, bool(keys[1] == jax.random.fold_in(key, 3))
      ((2,), True)
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, as_client_ids(client_ids))


def as_client_ids(client_ids: Sequence[int] | chex.Array) -> chex.Array:
    """Client ids as a uint32 array, [K]; raises ValueError if one is not an integer from 0 to 2**32 - 1."""
    if not isinstance(client_ids, (np.ndarray, jax.Array)):
        client_ids = as_array("client ids", as_list("client ids", client_ids))
    if client_ids.ndim != 1 or client_ids.dtype.kind not in "iu":
        raise ValueError(f"client ids must be integers [K], got {client_ids.dtype} of shape {client_ids.shape}")
    if client_ids.dtype != np.uint32 and not isinstance(client_ids, jax.core.Tracer):
        client_ids = np.asarray(client_ids)
        if client_ids.size and not 0 <= client_ids.min() <= client_ids.max() < 2**32:
            raise ValueError(
                f"client ids must be integers from 0 to 2**32 - 1, got {describe_value(client_ids.tolist())}"
            )
    return jnp.asarray(client_ids, dtype=jnp.uint32)


def group_keys(key: chex.PRNGKey, client_ids: Mapping[str, chex.Array]) -> dict[str, chex.PRNGKey]:
    """One key per client of each group, [K] each."""
    return {name: client_keys(key, ids) for name, ids in client_ids.items()}


def stack_private(
    groups: Groups, examples: Mapping[int, tuple[Any, Any]], *, storage: Storage = "device"
) -> dict[str, PrivateDataset]:
    """Every client's private examples, stacked by group and padded to the longest of the group.

    Args:
      groups: the architecture groups.
      examples: for each client id its inputs [n, ...] and integer labels [n]; n may differ between clients.
      storage: "host" for NumPy arrays, if the examples of all clients do not fit on the device.

    Returns:
      Per group, inputs [K, N, ...], labels [K, N] and num_examples [K]. Integer inputs are in int32; float16,
      bfloat16 and float32 keep their dtype, float64 becomes float32. A row of padding repeats the client's last
      example, so that it is finite in every network in which the example is.

    Raises:
      ValueError: a client without examples, examples without a client, lengths that differ between inputs and labels,
        shapes or dtypes that differ between clients, NaN, integers beyond int32, images [N, C, H, W], labels that are
        not integers from 0, an unknown storage.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> groups = {"a": fmd.ArchitectureGroup(None, client_ids=(0, 1))}
      >>> examples = {0: (np.zeros((3, 4)), [0, 1, 1]), 1: (np.ones((2, 4)), [1, 0])}
      >>> private = fmd.stack_private(groups, examples)["a"]
      >>> private.inputs.shape, private.labels.tolist(), private.num_examples.tolist()  # one row of padding
      ((2, 3, 4), [[0, 1, 1], [1, 0, 0]], [3, 2])
    """
    check_storage(storage)
    check_groups(groups)
    known = {client_id for group in groups.values() for client_id in group.client_ids}
    missing, unknown = sorted(known - set(examples)), sorted(set(examples) - known, key=str)
    if missing or unknown:
        raise ValueError(
            "private examples are needed for exactly the clients of the groups: "
            f"missing for {missing}, not in any group {describe_value(unknown)}"
        )
    checked = _checked(examples)
    stacked = {name: _stack([checked[client_id] for client_id in group.client_ids]) for name, group in groups.items()}
    return stacked if storage == "host" else jax.tree.map(jnp.asarray, stacked)


def _checked(examples):
    """The examples of each client as arrays; raises ValueError if they are invalid or differ in shape or dtype."""
    for client_id, pair in examples.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"client {client_id}: inputs and labels are needed, got {describe_value(pair)}")
    checked = {client_id: check_examples(f"client {client_id}", *pair) for client_id, pair in examples.items()}
    shapes = {inputs.shape[1:] for inputs, _ in checked.values()}
    if len(shapes) > 1:
        raise ValueError(f"the inputs of all clients must have one shape, got {sorted(shapes)}")
    check_one_dtype({f"client {client_id}": inputs.dtype for client_id, (inputs, _) in checked.items()})
    return checked


def _stack(examples):
    """Examples of some clients, checked already, stacked on the host and padded to the longest."""
    sizes = [len(labels) for _, labels in examples]
    rows = [np.minimum(np.arange(max(sizes)), size - 1) for size in sizes]  # padding repeats the last example
    inputs, labels = (
        np.stack([a[r] for a, r in zip(arrays, rows, strict=True)]) for arrays in zip(*examples, strict=True)
    )
    return PrivateDataset(inputs, labels, np.asarray(sizes, dtype=np.int32))


def per_client(fn: Callable[[Any], Any], in_axes: Sequence[int | None], arguments: Sequence[Any]) -> list[Any]:
    """The arguments, with `fn` applied to those that are per client, whose axis is 0."""
    return [a if axis is None else fn(a) for axis, a in zip(in_axes, arguments, strict=True)]


def check_per_client(what: str, values: Mapping[str, chex.Array], num_clients: Mapping[str, int]) -> None:
    """Raises ValueError if the values have other groups, or are of other numbers of clients."""
    wanted = {name: (k,) for name, k in num_clients.items()}
    found = {name: getattr(value, "shape", None) for name, value in values.items()}
    if wanted != found:
        raise ValueError(f"one {what} per client is needed, of shapes {wanted}, got {found}")
