"""What is per client, spread over the devices of a mesh, and back: to its reader a mapping of groups like any other."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedmd_jax.checks import check_clients
from fedmd_jax.packing import Buffers, buffer_lengths, pack, unpack
from fedmd_jax.placement import Placement, Seat, place_clients
from fedmd_jax.processes import is_elsewhere, on_host, put_global

PerGroup = Mapping[str, chex.ArrayTree]  # name -> what is stacked, [K, ...]


@jax.tree_util.register_pytree_node_class
class Spread(Mapping[str, chex.ArrayTree]):
    """What is per client, spread over a mesh, and to its reader a mapping like any other: name -> stacked, [K, ...].

    Reading a group fetches it from its devices. `gather_clients` reads all of them, `spread_clients` is the way back.
    Where some of the devices are those of other processes, all processes read together.

    Attributes:
      stacked: the large groups, padded to a multiple of the devices, leaves [K, ...].
      rows: clients of the small groups, one on each device: flat buffers, leaves [D, L].
      placement: who is where.
      shapes: of one client of each small group.
    """

    def __init__(
        self,
        stacked: dict[str, chex.ArrayTree],
        rows: Sequence[Buffers],
        placement: Placement,
        shapes: Mapping[str, chex.ArrayTree],
    ):
        self.stacked, self.rows, self.placement, self.shapes = stacked, tuple(rows), placement, shapes

    def tree_flatten(self):
        """Arrays, and what a program is compiled for."""
        shapes = {name: jax.tree.flatten(self.shapes[name]) for name in sorted(self.shapes)}
        frozen = tuple((name, tuple(leaves), structure) for name, (leaves, structure) in shapes.items())
        return (self.stacked, self.rows), (self.placement, frozen)

    @classmethod
    def tree_unflatten(cls, static, arrays):
        """The other way."""
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
        seats = self.placement.seats(name)

        def unpacked(rows):
            clients = [unpack({d: b[device] for d, b in rows[row].items()}, self.shapes[name]) for row, device in seats]
            return jax.tree.map(_stack, *clients)

        return _read(unpacked, {row: self.rows[row] for row, _ in seats})


def spread_clients(clients: PerGroup, mesh: Mesh | None, *, costs: Mapping[str, float] | None = None) -> PerGroup:
    """What is per client, put on the devices that compute it; as it is where there is no mesh.

    Args:
      clients: per group, stacked [K, ...]: states, private data, anything. Shapes become shapes that know their
        devices, for programs that are compiled ahead.
      mesh: devices along one axis.
      costs: of one client of each group, in any unit, as `client_costs` gives; all the same by default.

    Returns:
      A `Spread`, or `clients` itself where there is no mesh. What has been spread before stays where it is.

    Raises:
      ValueError: trees of a group are of several numbers of clients, or a cost that is none.

    >>> from fedmd_jax.mapping import client_mesh
    >>> spread = spread_clients({"a": jnp.arange(2.0), "b": jnp.arange(3)}, client_mesh(1))
    >>> {name: stacked.tolist() for name, stacked in spread.items()}
    {'a': [0.0, 1.0], 'b': [0, 1, 2]}
    """
    if mesh is None:
        return clients
    if not isinstance(clients, Spread):
        placement = place_clients(group_sizes(clients), mesh.size, costs=costs)
        in_place = partial(arrange, placement=placement)
        abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(clients))
        clients = jax.eval_shape(in_place, dict(clients)) if abstract else in_place(clients)
    return _put(clients, NamedSharding(mesh, PartitionSpec(*mesh.axis_names)))


def gather_clients(clients: PerGroup) -> dict[str, chex.ArrayTree]:
    """The other way: per group, stacked [K, ...] without padding; what no mesh has a part in, as it is.

    This is what a checkpoint keeps: it does not depend on the mesh. Groups that fill their devices evenly are the very
    arrays, not copies: of states, the next phase consumes them. Those may be spread over processes; `on_host` is not.

    Args:
      clients: spread or not.
    """
    return dict(clients)


def spread_own_clients(
    own: Mapping[Seat, chex.ArrayTree], shapes: PerGroup, mesh: Mesh, *, costs: Mapping[str, float] | None = None
) -> Spread:
    """`spread_clients` where each process has the clients of its own devices only, such as their private data.

    Args:
      own: group and position of a client -> what is of it, on the host, of all those that `own_clients` names.
      shapes: of all clients, per group, stacked [K, ...].
      mesh: also over devices of other processes.
      costs: as in `spread_clients`.
    """
    placement = place_clients(group_sizes(shapes), mesh.size, costs=costs)
    spread = jax.eval_shape(partial(arrange, placement=placement), dict(shapes))
    sharding = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))

    def fill(shape, content):
        return jax.make_array_from_callback(shape.shape, sharding, content)

    stacked = {}
    for name, tree in spread.stacked.items():
        leaves, structure = jax.tree.flatten(tree)
        last = dict(placement.sizes)[name] - 1
        filled = [fill(leaf, partial(_stack_own, own, name, last, leaf, i)) for i, leaf in enumerate(leaves)]
        stacked[name] = structure.unflatten(filled)
    rows = []
    for seats, buffers in zip(placement.rows, spread.rows, strict=True):
        lengths = {dtype: buffer.shape[1] for dtype, buffer in buffers.items()}
        of_row = partial(_pack_own, own, seats, lengths)
        rows.append({dtype: fill(buffer, partial(of_row, dtype)) for dtype, buffer in buffers.items()})
    return Spread(stacked, rows, placement, spread.shapes)


def is_spread_over_processes(mesh: Mesh | None) -> bool:
    """Whether a part of the devices is another process's."""
    return mesh is not None and any(device.process_index != jax.process_index() for device in mesh.devices.flat)


def own_clients(sizes: Mapping[str, int], mesh: Mesh, *, costs: Mapping[str, float] | None = None) -> list[Seat]:
    """Group and position of every client on a device of this process; everybody where there is no other process.

    Args:
      sizes: clients of each group, K.
      mesh: over which they are spread.
      costs: as in `spread_clients`.

    >>> from fedmd_jax.mapping import client_mesh
    >>> own_clients({"a": 1, "b": 2}, client_mesh(2))
    [('b', 0), ('a', 0), ('b', 1)]
    """
    placement = place_clients(sizes, mesh.size, costs=costs)
    here = [number for number, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    return list(dict.fromkeys(seat for device in here for seat in placement.clients_on(device)))


def clients_here(clients: PerGroup) -> dict[str, chex.ArrayTree]:
    """Per group what this process has of it, [k, ...]: all, but where some are on devices of other processes.

    A group of which nobody is here is left out. Padding, which repeats the last client of a group, may be among them.
    """
    if not isinstance(clients, Spread) or not any(map(is_elsewhere, jax.tree.leaves(clients))):
        return dict(clients)
    here = {name: jax.tree.map(_addressable_rows, tree) for name, tree in clients.stacked.items()}
    of_group = {}
    for seats, buffers in zip(clients.placement.rows, clients.rows, strict=True):
        shards = [
            {shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards} for leaf in buffers.values()
        ]
        for device in shards[0]:
            if (seat := seats[device]) is not None:
                own = {dtype: np.asarray(shard[device])[0] for dtype, shard in zip(buffers, shards, strict=True)}
                of_group.setdefault(seat[0], []).append(unpack(own, clients.shapes[seat[0]]))
    return here | {name: jax.tree.map(_stack, *own) for name, own in of_group.items()}


def share_with_clients(tree: chex.ArrayTree, mesh: Mesh | None) -> chex.ArrayTree:
    """What all clients see, put on every device once; as it is where there is no mesh."""
    return tree if mesh is None else _put(tree, NamedSharding(mesh, PartitionSpec()))


def arrange(clients: PerGroup, placement: Placement) -> Spread:
    """Everything in its place, but not yet on its device.

    Args:
      clients: per group, stacked [K, ...]; what a program computes stays in the program.
      placement: who is where.

    Raises:
      ValueError: other numbers of clients than those of the placement.
    """
    clients = {name: clients[name] for name, _ in placement.sizes}
    if group_sizes(clients) != dict(placement.sizes):
        raise ValueError(f"clients {dict(placement.sizes)} are wanted, per group, got {group_sizes(clients)}")
    stacked = {
        name: jax.tree.map(partial(_fill_up, size=size), clients[name]) for name, size in placement.stacked.items()
    }
    small = {name: jax.tree.map(_on_host, clients[name]) for name in clients if name not in stacked}
    shapes = {
        name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)
        for name, tree in small.items()
    }
    rows = []
    for seats in placement.rows:
        lengths = buffer_lengths([shapes[seat[0]] for seat in seats if seat is not None])
        packed = [
            pack({}, lengths)
            if seat is None
            else pack(jax.tree.map(lambda leaf, k=seat[1]: leaf[k], small[seat[0]]), lengths)
            for seat in seats
        ]
        rows.append(jax.tree.map(_stack, *packed))
    return Spread(stacked, rows, placement, shapes)


def group_sizes(clients: PerGroup) -> dict[str, int]:
    """The number of clients of each group; a `ValueError` where a group has several."""
    if isinstance(clients, Spread):
        return dict(clients.placement.sizes)
    sizes = {name: check_clients(f"group {name!r}: all that is per client", tree) for name, tree in clients.items()}
    for name, size in sizes.items():
        if size is None:
            raise ValueError(f"group {name!r}: at least one array is wanted, got none")
    return sizes


def _fill_up(leaf, size):
    """The last client once more, until there are enough."""
    return leaf if leaf.shape[0] == size else _on_host(leaf)[np.minimum(np.arange(size), leaf.shape[0] - 1)]


def _stack(*leaves):
    return (jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np).stack(leaves)


def _on_host(leaf):
    """As a NumPy array, where it is not being computed: nothing is compiled for moving it."""
    traced = isinstance(leaf, jax.core.Tracer) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf if traced else np.asarray(leaf)


def _read(view, tree):
    """A view of arrays on their devices, of arrays on the host, of arrays in a program, or of shapes."""
    leaves = jax.tree.leaves(tree)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        return jax.eval_shape(view, tree)
    if all(isinstance(leaf, (np.ndarray, jax.core.Tracer)) for leaf in leaves):
        return view(tree)
    return jax.tree.map(jnp.array, view(on_host(tree)))  # copies, since states are donated


def _stack_own(own, name, last, leaf, number, index):
    """A part of leaf `number` of a large group: what is beyond the last client repeats it."""
    clients = [own[name, min(k, last)] for k in range(*index[0].indices(leaf.shape[0]))]
    return np.stack([jax.tree.leaves(client)[number] for client in clients])


def _pack_own(own, seats, lengths, dtype, index):
    """The buffer of one device in a row."""
    seat = seats[index[0].start or 0]
    return np.asarray(pack({} if seat is None else own[seat], lengths)[dtype])[None]


def _addressable_rows(leaf):
    shards = {shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def _put(tree, sharding):
    def put(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return leaf if isinstance(leaf, jax.core.Tracer) else put_global(leaf, sharding)

    return jax.tree.map(put, tree)
