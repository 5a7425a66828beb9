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
from fedmd_jax.placement import Placement, place_clients
from fedmd_jax.processes import on_host, put_global

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


def _put(tree, sharding):
    def put(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return leaf if isinstance(leaf, jax.core.Tracer) else put_global(leaf, sharding)

    return jax.tree.map(put, tree)
