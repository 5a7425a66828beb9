"""Many clients: groups that share an architecture, stacked along a leading axis and mapped over it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedmd_jax.checks import check_examples
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
        ids = tuple(self.client_ids)
        if not ids:
            raise ValueError("a group needs at least one client, got none")
        if any(not isinstance(i, (int, np.integer)) or isinstance(i, bool) or not 0 <= i < 2**32 for i in ids):
            raise ValueError(f"client ids must be integers from 0 to 2**32 - 1, got {list(ids)}")
        check_unique(ids)
        weights = tuple(map(float, (1.0,) * len(ids) if self.weights is None else self.weights))
        if len(weights) != len(ids):
            raise ValueError(f"one consensus weight per client is needed: {len(ids)} clients, {len(weights)} weights")
        # Far from where float32 overflows, or flushes a reciprocal to zero.
        if not all(weight == 0 or 1e-30 <= weight <= 1e30 for weight in weights):
            raise ValueError(f"consensus weights must be zero or between 1e-30 and 1e30, got {list(weights)}")
        object.__setattr__(self, "client_ids", tuple(int(i) for i in ids))
        object.__setattr__(self, "weights", weights)

    @property
    def num_clients(self) -> int:
        """K."""
        return len(self.client_ids)


Groups = Mapping[str, ArchitectureGroup]


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


def map_clients(fn: Callable[..., Any], in_axes: Sequence[int | None], mesh: Mesh | None = None) -> Callable[..., Any]:
    """Does for every client of a group what `fn` does for one.

    `in_axes` says what is per client (0) and what is shared (None). With a mesh the clients are spread over its only
    axis and nothing crosses devices: `shard_map(vmap(fn))`, since under `vmap` alone the compiler gathers the batches
    of convolutional clients.

    Args:
      fn: a function of one client; positional arguments only, every output per client.
      in_axes: for each argument 0 or None.
      mesh: devices along one axis; the number of clients must be a multiple of their number.

    Returns:
      A function of stacked arguments, [K, ...] where `in_axes` has a 0, with stacked results.

    >>> double_and_add = map_clients(lambda own, shared: 2 * own + shared, (0, None))
    >>> double_and_add(jnp.array([1.0, 2.0]), jnp.array(10.0)).tolist()
    [12.0, 14.0]
    """
    mapped = jax.vmap(fn, tuple(in_axes))
    if mesh is None:
        return mapped
    clients, shared = PartitionSpec(*mesh.axis_names), PartitionSpec()
    return jax.shard_map(
        mapped,
        mesh=mesh,
        in_specs=tuple(shared if axis is None else clients for axis in in_axes),
        out_specs=clients,
        check_vma=False,
    )


def client_keys(key: chex.PRNGKey, client_ids: Sequence[int]) -> chex.PRNGKey:
    """One key per client, [K], from the client's id: neither grouping nor order nor sharding matters.

    That holds for JAX's own keys (threefry). What `rbg` keys give hangs on the place in a batch.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(client_ids, dtype=jnp.uint32))


def client_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh with one axis, `clients`, over the first `num_devices` devices (all by default)."""
    devices = jax.devices()[:num_devices]
    return Mesh(np.asarray(devices), ("clients",))


def shard_clients(tree: chex.ArrayTree, mesh: Mesh | None) -> chex.ArrayTree:
    """Stacked clients, spread over the mesh along their leading axis; as they are where there is no mesh."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*mesh.axis_names)))


def stack_private(groups: Groups, examples: Mapping[int, tuple[Any, Any]]) -> dict[str, PrivateDataset]:
    """Every client's private examples, stacked by group and padded to the longest of the group.

    Args:
      groups: who is in which group.
      examples: for each client id its inputs [n, ...] and integer labels [n]; n may differ between clients.

    Returns:
      Per group, inputs [K, N, ...] in float32, labels [K, N] and num_examples [K].

    Raises:
      ValueError: a client without examples, examples without a client, lengths that differ between inputs and labels,
        shapes that differ between clients, NaN, labels that are not integers from 0.
    """
    check_groups(groups)
    known = {client_id for group in groups.values() for client_id in group.client_ids}
    missing, unknown = sorted(known - set(examples)), sorted(set(examples) - known)
    if missing or unknown:
        raise ValueError(
            "private examples are needed for exactly the clients of the groups: "
            f"missing for {missing}, not in any group {unknown}"
        )
    checked = {client_id: check_examples(f"client {client_id}", *examples[client_id]) for client_id in known}
    shapes = {inputs.shape[1:] for inputs, _ in checked.values()}
    if len(shapes) > 1:
        raise ValueError(f"the inputs of all clients must have one shape, got {sorted(shapes)}")
    return {name: _stack([checked[client_id] for client_id in group.client_ids]) for name, group in groups.items()}


def _stack(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> PrivateDataset:
    num_rows = max(len(labels) for _, labels in examples)

    def pad(rows):
        return np.pad(rows, [(0, num_rows - len(rows))] + [(0, 0)] * (rows.ndim - 1))

    return PrivateDataset(
        inputs=jnp.asarray(np.stack([pad(inputs) for inputs, _ in examples])),
        labels=jnp.asarray(np.stack([pad(labels) for _, labels in examples])),
        num_examples=jnp.asarray([len(labels) for _, labels in examples], dtype=jnp.int32),
    )
