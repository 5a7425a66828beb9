"""Clients on the devices of a mesh: sharded, replicated, gathered, fetched to the host.

On several processes (`jax.distributed`) all of them run the same program on the same global arrays, and each holds the
shards of its own devices. A function that fetches or gathers has to be called by all processes.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedmd_jax.checks import check_clients, check_count
from fedmd_jax.mapping.packing import Buffers, Placement, buffer_lengths, pack, place_clients, unpack

PerGroup = Mapping[str, chex.ArrayTree]  # name -> what is stacked, [K, ...]


@jax.tree_util.register_pytree_node_class
class ShardedClients(Mapping[str, chex.ArrayTree]):
    """Per-client arrays sharded over a mesh, as a mapping: name of the group -> stacked, [K, ...].

    Reading a group gathers it from its devices. `gather_clients` reads all groups, `shard_clients` is its inverse. On
    several processes a group has to be read by all of them.

    Attributes:
      stacked: the large groups, padded to a multiple of the devices, leaves [K, ...].
      rows: clients of the small groups, one per device, as flat buffers, leaves [D, L].
      placement: the assignment of clients to devices.
      shapes: shapes of one client of each small group.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> clients = fmd.mapping.shard_clients({"a": jnp.arange(2.0), "b": jnp.arange(3)}, fmd.client_mesh(1))
      >>> type(clients).__name__, list(clients), clients["b"].tolist()
      ('ShardedClients', ['a', 'b'], [0, 1, 2])
    """

    def __init__(self, stacked: PerGroup, rows: Sequence[Buffers], placement: Placement, shapes: PerGroup):
        self.stacked, self.rows, self.placement, self.shapes = stacked, tuple(rows), placement, shapes

    def tree_flatten(self):
        """The arrays, and the static part."""
        shapes = {name: jax.tree.flatten(self.shapes[name]) for name in sorted(self.shapes)}
        frozen = tuple((name, tuple(leaves), structure) for name, (leaves, structure) in shapes.items())
        return (self.stacked, self.rows), (self.placement, frozen)

    @classmethod
    def tree_unflatten(cls, static, arrays):
        """Inverse of `tree_flatten`."""
        placement, frozen = static
        return cls(*arrays, placement, {name: jax.tree.unflatten(tree, leaves) for name, leaves, tree in frozen})

    def __len__(self) -> int:
        return len(self.placement.sizes)

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.placement.sizes))

    def __getitem__(self, name: str) -> chex.ArrayTree:
        size = dict(self.placement.sizes)[name]
        if name in self.stacked:
            if size == self.placement.stacked[name]:
                return self.stacked[name]
            return _read(lambda tree: jax.tree.map(lambda leaf: leaf[:size], tree), self.stacked[name])
        slots = self.placement.slots(name)

        def unpacked(rows):
            clients = [unpack({d: b[device] for d, b in rows[row].items()}, self.shapes[name]) for row, device in slots]
            return jax.tree.map(_stack, *clients)

        return _read(unpacked, {row: self.rows[row] for row, _ in slots})


def shard_clients(clients: PerGroup, mesh: Mesh | None, *, costs: Mapping[str, float] | None = None) -> PerGroup:
    """Shards per-client arrays over a mesh; returns them unchanged without a mesh.

    Args:
      clients: per group, stacked [K, ...]: states, private data, or any other tree. Shapes become shapes with
        shardings, for ahead-of-time compilation.
      mesh: devices along one axis.
      costs: cost of one client of each group, in any unit, as from `client_costs`; equal by default.

    Returns:
      A `ShardedClients`, or `clients` itself without a mesh. Clients that are sharded already keep their placement.

    Raises:
      ValueError: the leaves of a group differ in their number of clients, or a cost is invalid.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> mesh = fmd.client_mesh(1)
      >>> sharded = fmd.mapping.shard_clients({"a": jnp.arange(2.0), "b": jnp.arange(3)}, mesh)
      >>> {name: stacked.tolist() for name, stacked in sharded.items()}
      {'a': [0.0, 1.0], 'b': [0, 1, 2]}
    """
    if mesh is None:
        return clients
    if not isinstance(clients, ShardedClients):
        placement = place_clients(group_sizes(clients), mesh.size, costs=costs)
        in_place = partial(arrange, placement=placement)
        abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(clients))
        clients = jax.eval_shape(in_place, dict(clients)) if abstract else in_place(clients)
    return shard_tree(clients, mesh)


def gather_clients(clients: PerGroup) -> dict[str, chex.ArrayTree]:
    """Inverse of `shard_clients`: per group, stacked [K, ...] without padding. Unsharded input is returned unchanged.

    The result does not depend on the mesh, as a checkpoint requires. Groups without padding are not copied: the next
    phase donates them if they are states. They may still be sharded over processes; use `fetch_to_host` to get NumPy
    arrays.

    Args:
      clients: per group, sharded or not.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> sharded = fmd.mapping.shard_clients({"a": jnp.arange(3)}, fmd.client_mesh(1))
      >>> {name: stacked.tolist() for name, stacked in fmd.gather_clients(sharded).items()}
      {'a': [0, 1, 2]}
    """
    return dict(clients)


def replicate(tree: chex.ArrayTree, mesh: Mesh | None) -> chex.ArrayTree:
    """Replicates a tree on every device of a mesh; returns it unchanged without a mesh.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> public = fmd.mapping.replicate({"inputs": jnp.zeros((5, 4))}, fmd.client_mesh())
      >>> public["inputs"].is_fully_replicated
      True
    """
    return tree if mesh is None else _put(tree, NamedSharding(mesh, PartitionSpec()))


def arrange(clients: PerGroup, placement: Placement) -> ShardedClients:
    """Arranges clients for a placement, without moving them to their devices.

    Args:
      clients: per group, stacked [K, ...]; may be traced.
      placement: the assignment of clients to devices.

    Raises:
      ValueError: the numbers of clients are not those of the placement.
    """
    clients = {name: clients[name] for name, _ in placement.sizes}
    if group_sizes(clients) != dict(placement.sizes):
        raise ValueError(f"clients {dict(placement.sizes)} are wanted, per group, got {group_sizes(clients)}")
    stacked = {
        name: jax.tree.map(partial(_pad_to, size=size), clients[name]) for name, size in placement.stacked.items()
    }
    small = {name: jax.tree.map(_as_numpy, clients[name]) for name in clients if name not in stacked}
    shapes = {
        name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)
        for name, tree in small.items()
    }

    def client(slot):
        return {} if slot is None else jax.tree.map(lambda leaf: leaf[slot[1]], small[slot[0]])

    rows = []
    for slots in placement.device_rows:
        lengths = buffer_lengths([shapes[slot[0]] for slot in slots if slot is not None])
        rows.append(jax.tree.map(_stack, *(pack(client(slot), lengths) for slot in slots)))
    return ShardedClients(stacked, rows, placement, shapes)


def group_sizes(clients: PerGroup) -> dict[str, int]:
    """The number of clients of each group; raises ValueError if the leaves of a group differ in it."""
    if isinstance(clients, ShardedClients):
        return dict(clients.placement.sizes)
    sizes = {}
    for name, tree in clients.items():
        size = check_clients(f"group {name!r}: leaves", tree)
        if size is None:
            raise ValueError(f"group {name!r}: at least one array is wanted, got none")
        sizes[name] = size
    return sizes


def client_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh with one axis, `clients`, over the first `num_devices` devices (all by default).

    Raises:
      ValueError: fewer than one device, or more than there are.

    Example:
      >>> import jax, fedmd_jax as fmd
      >>> mesh = fmd.client_mesh()
      >>> mesh.axis_names, mesh.size == len(jax.devices())
      (('clients',), True)
    """
    devices = jax.devices()
    if num_devices is not None:
        check_count("num_devices", num_devices, minimum=0)  # the upper bound is checked below
    if num_devices is not None and not 1 <= num_devices <= len(devices):
        raise ValueError(f"num_devices must be from 1 to {len(devices)}, the devices that there are, got {num_devices}")
    return Mesh(np.asarray(devices[:num_devices]), ("clients",))


def shard_tree(tree: chex.ArrayTree, mesh: Mesh | None) -> chex.ArrayTree:
    """Shards stacked clients over the mesh along their leading axis; returns them unchanged without a mesh."""
    return tree if mesh is None else _put(tree, NamedSharding(mesh, PartitionSpec(*mesh.axis_names)))


def constrain_replicated(tree: chex.ArrayTree, mesh: Mesh | None) -> chex.ArrayTree:
    """Constrains small arrays to be replicated on the mesh; returns them unchanged without a mesh.

    Otherwise the compiler may shard them for some of their uses and gather them again for others.
    """
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def fetch_to_host(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Fetches arrays to the host as NumPy arrays, in every process.

    All processes have to call it. Arrays that are sharded over processes are replicated on every device first, one
    after the other.

    Args:
      tree: JAX arrays, also on devices of other processes; NumPy arrays are returned unchanged.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> fmd.mapping.fetch_to_host({"a": jnp.arange(3)})
      {'a': array([0, 1, 2], dtype=int32)}
    """

    def gather(leaf):
        if not _has_remote_shards(leaf) or leaf.is_fully_replicated:
            return leaf
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        copies = jax.block_until_ready(_copy_to(everywhere)(leaf))  # finished before the next collective starts
        return np.asarray(copies.addressable_data(0))

    return jax.device_get(jax.tree.map(gather, tree))


@functools.cache
def _copy_to(sharding):
    return jax.jit(lambda leaf: leaf, out_shardings=sharding)


def _has_remote_shards(leaf) -> bool:
    """Whether a shard of an array is on a device of another process."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _pad_to(leaf, size):
    """Pads to `size` clients by repeating the last one."""
    return leaf if leaf.shape[0] == size else _as_numpy(leaf)[np.minimum(np.arange(size), leaf.shape[0] - 1)]


def _stack(*leaves):
    return (jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np).stack(leaves)


def _as_numpy(leaf):
    """As a NumPy array unless traced, so that moving its rows needs no compilation."""
    traced = isinstance(leaf, jax.core.Tracer) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf if traced else np.asarray(leaf)


def _read(view, tree):
    """Applies `view` to sharded arrays, to arrays on the host, to traced arrays, or to shapes."""
    leaves = jax.tree.leaves(tree)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.eval_shape(view, tree)
    if all(isinstance(leaf, (np.ndarray, jax.core.Tracer)) for leaf in leaves):
        return view(tree)
    return jax.tree.map(jnp.array, view(fetch_to_host(tree)))  # copies, since states are donated


def _put(tree, sharding):
    """Puts arrays on the devices of a sharding; each process reads the shards of its own devices only.

    The arrays must be the same in every process, or on these devices already.
    """

    def put(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        if isinstance(leaf, jax.core.Tracer):
            return leaf
        if sharding.is_fully_addressable or _has_remote_shards(leaf):
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)  # `device_put` would send it to all processes, to compare
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)
