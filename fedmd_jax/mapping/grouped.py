"""Maps a function of one client over all clients of all groups, on one device or on a mesh.

Without a mesh the groups run one after the other. On a mesh, a group with at least as many clients as devices is
stacked and padded to a multiple of the devices. Clients of smaller groups are assigned to devices one by one: all
devices run the same program, which branches to the network of its client with `lax.switch`. Per-client arguments are
packed into flat buffers, since the networks on a row of devices differ in shape.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedmd_jax.mapping.chunking import ClientsPerChunk, PartialSums, chunk_of, map_clients, weighted_sum_clients
from fedmd_jax.mapping.groups import Groups, per_client
from fedmd_jax.mapping.packing import buffer_lengths, pack, place_clients, unpack
from fedmd_jax.mapping.sharding import ShardedClients, arrange, constrain_replicated, group_sizes
from fedmd_jax.types import ClientState


def client_costs(groups: Groups, inputs: chex.Array) -> dict[str, float]:
    """Cost of a client of each group: floating point operations of scoring `inputs`.

    Args:
      groups: the architecture groups.
      inputs: any batch, [B, ...]; only shape and dtype are used, nothing is computed.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> def linear(num_outputs):
      ...     def init(key, inputs):
      ...         return jnp.zeros((inputs.shape[1], num_outputs)), {}
      ...     return fmd.Architecture(init, lambda params, state, inputs, *, train: (inputs @ params, state))
      >>> groups = {"small": fmd.ArchitectureGroup(linear(2), (0,)), "large": fmd.ArchitectureGroup(linear(5), (1,))}
      >>> fmd.mapping.client_costs(groups, jnp.zeros((1, 10)))
      {'small': 40.0, 'large': 100.0}
    """
    return {name: _flops(group.architecture, inputs) for name, group in groups.items()}


def map_groups(
    fn: Callable[..., Any],
    in_axes: Sequence[int | None],
    *,
    groups: Groups,
    mesh: Mesh | None = None,
    clients_per_chunk: ClientsPerChunk = None,
) -> Callable[..., Any]:
    """Maps a function of one client over every client of every group.

    Args:
      fn: `(architecture, *arguments) -> results` of one client; a plain tuple of results becomes a tuple of mappings.
      in_axes: for each argument 0 if it is per group and client, None if all clients share it.
      groups: the architecture groups; the clients are those of the arguments.
      mesh: devices along one axis; there is no communication between them.
      clients_per_chunk: number of clients of a group that run at once on a device, as in `fedmd`; for "auto" one of the
        arguments must be the states.

    Returns:
      A function. Its arguments are per group, [K, ...], if `in_axes` is 0. Its results are per group, in a
      `ShardedClients` on a mesh. Arguments that are not sharded yet are sharded, which costs communication if they are
      large.

    Raises:
      ValueError: arguments are sharded in different ways, or over another number of devices.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> groups = {"a": fmd.ArchitectureGroup(None, (0, 1)), "b": fmd.ArchitectureGroup(None, (2,))}
      >>> add = fmd.mapping.map_groups(lambda architecture, own, shared: own + shared, (0, None), groups=groups)
      >>> sums = add({"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}, jnp.array(10.0))
      >>> {name: own.tolist() for name, own in sums.items()}
      {'a': [11.0, 12.0], 'b': [13.0]}
    """
    in_axes = tuple(in_axes)

    def mapped(*arguments):
        placement, stacked, arguments = _placed(groups, in_axes, arguments, mesh)
        results = {
            name: map_clients(one, in_axes, mesh, clients_per_chunk=chunk)(*given)
            for name, one, chunk, given in _stacked_groups(fn, groups, stacked, clients_per_chunk, mesh)
        }
        rows, packed = [], []
        for _, row, given in _rows(fn, in_axes, groups, placement, arguments, _packed):
            packed.append(map_clients(row, (0, *in_axes), mesh)(row.kinds, *given))
            rows.append(row)
        return _by_part(placement, results, packed, rows)

    return mapped


def sum_groups(
    fn: Callable[..., Any],
    in_axes: Sequence[int | None],
    *,
    groups: Groups,
    mesh: Mesh | None = None,
    clients_per_chunk: ClientsPerChunk = None,
    by_group: bool = False,
) -> Callable[..., PartialSums]:
    """The weighted sum of the results of `fn` over all clients of all groups, or over those of each group.

    Args:
      fn: `(architecture, *arguments) -> tree`, of the same shapes for every network, unless `by_group`.
      in_axes: as in `map_groups`.
      groups: as in `map_groups`.
      mesh: as in `map_groups`.
      clients_per_chunk: as in `map_groups`.
      by_group: whether to sum each group apart.

    Returns:
      A function of weights, per group [K], and of arguments as in `map_groups` that returns `PartialSums` over all
      groups: one sum per device, and `finite` per group. If `by_group`, `total` is a mapping of groups.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> groups = {"a": fmd.ArchitectureGroup(None, (0, 1)), "b": fmd.ArchitectureGroup(None, (2,))}
      >>> sum_squares = fmd.mapping.sum_groups(lambda architecture, own: own**2, (0,), groups=groups)
      >>> weights = {"a": jnp.array([1.0, 0.5]), "b": jnp.array([1.0])}
      >>> sum_squares(weights, {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}).total.tolist()
      [12.0]
    """
    in_axes = tuple(in_axes)

    def summed(weights, *arguments):
        placement, stacked, arguments = _placed(groups, in_axes, arguments, mesh)
        sums = {}
        for name, one, chunk, given in _stacked_groups(fn, groups, stacked, clients_per_chunk, mesh):
            own = weights[name]
            if placement is not None:
                own = jnp.pad(own, (0, placement.stacked[name] - own.shape[0]))
            sums[name] = weighted_sum_clients(one, in_axes, mesh, clients_per_chunk=chunk)(own, *given)
        rows, finish = [], _in_its_place if by_group else _as_it_is
        for slots, row, given in _rows(fn, in_axes, groups, placement, arguments, finish):
            own = jnp.stack([jnp.float32(0) if slot is None else weights[slot[0]][slot[1]] for slot in slots])
            rows.append(weighted_sum_clients(row, (0, *in_axes), mesh)(own, row.kinds, *given))
        finite = {name: each.finite for name, each in sums.items()}
        if placement is not None:
            shapes = {name: jax.ShapeDtypeStruct((), bool) for name, _ in placement.sizes if name not in sums}
            finite = ShardedClients(finite, [{"bool": row.finite[:, None]} for row in rows], placement, shapes)
        parts = [*sums.values(), *rows]
        if by_group:
            totals = [*({name: each.total} for name, each in sums.items()), *(row.total for row in rows)]
            total = {name: _add([each[name] for each in totals if name in each]) for name in finite}
        else:
            total = _add([each.total for each in parts])
        return PartialSums(total, _add([each.weight for each in parts]), finite)

    return summed


class _Row:
    """`fn` for the clients of one row, one client per device, as a function that `map_clients` can map.

    Its argument `kind` is the number of the group of a device's client. `finish` (shapes by group, group, result) gives
    the results of all groups the same shapes.
    """

    def __init__(self, fn, in_axes, groups, slots, arguments, finish):
        self.names = list(dict.fromkeys(slot[0] for slot in slots if slot is not None))
        self.kinds = np.asarray([len(self.names) if slot is None else self.names.index(slot[0]) for slot in slots])
        self.shapes = {}  # shapes of the results of one client, known after tracing
        self._finish = finish
        self._ones = {}
        for name in self.names:
            shapes = [None if axis is None else a.shapes[name] for axis, a in zip(in_axes, arguments, strict=True)]
            # Under jit it is traced once, for the shapes and for the results.
            self._ones[name] = jax.jit(partial(_of_packed, partial(fn, groups[name].architecture), shapes))

    def __call__(self, kind, *arguments):
        self.shapes = {name: jax.eval_shape(one, *arguments) for name, one in self._ones.items()}

        def finished(name, *arguments):
            return self._finish(self.shapes, name, self._ones[name](*arguments))

        results = [partial(finished, name) for name in self._ones]
        nothing = jax.eval_shape(results[0], *arguments)

        def idle(*_):
            return jax.tree.map(jnp.zeros_like, nothing)

        return jax.lax.switch(kind, [*results, idle] if (self.kinds == len(results)).any() else results, *arguments)


def _packed(shapes, name, result):
    parts = zip(*map(_parts, shapes.values()), strict=True)
    return tuple(pack(part, buffer_lengths(of_all)) for part, of_all in zip(_parts(result), parts, strict=True))


def _as_it_is(shapes, name, result):
    return result


def _in_its_place(shapes, name, result):
    """The result of a group beside zeros for the other groups of the row."""
    zeros = {other: jax.tree.map(jnp.zeros_like, shape) for other, shape in shapes.items() if other != name}
    return {**zeros, name: result}


def _of_packed(fn, shapes, *arguments):
    """`fn` of one client, with some arguments packed."""
    return fn(*(a if tree is None else unpack(a, tree) for a, tree in zip(arguments, shapes, strict=True)))


def _placed(groups, in_axes, arguments, mesh):
    """The placement, the arguments of the stacked groups by name, and all arguments, sharded alike."""
    mapped = [a for axis, a in zip(in_axes, arguments, strict=True) if axis is not None]
    if mesh is None:
        own = [name for name in groups if name in mapped[0]]
        return None, {name: per_client(itemgetter(name), in_axes, arguments) for name in own}, arguments
    placements = {a.placement for a in mapped if isinstance(a, ShardedClients)}
    if len(placements) > 1 or any(placement.num_devices != mesh.size for placement in placements):
        raise ValueError(
            f"per-client arguments must be sharded over the {mesh.size} devices of the mesh in one way, got "
            f"{len(placements)} ways, over {sorted(placement.num_devices for placement in placements)} devices"
        )
    placement = placements.pop() if placements else place_clients(group_sizes(mapped[0]), mesh.size)
    arguments = per_client(partial(_shard_here, placement=placement, mesh=mesh), in_axes, arguments)
    of_groups = per_client(attrgetter("stacked"), in_axes, arguments)
    stacked = {name: per_client(itemgetter(name), in_axes, of_groups) for name in placement.stacked}
    return placement, stacked, arguments


def _stacked_groups(fn, groups, stacked, clients_per_chunk, mesh):
    """Yields name, function of one client, chunk and arguments of each stacked group."""
    for name, given in stacked.items():
        params = next((argument.params for argument in given if isinstance(argument, ClientState)), ())
        yield name, partial(fn, groups[name].architecture), chunk_of(clients_per_chunk, name, params, mesh), given


def _rows(fn, in_axes, groups, placement, arguments, finish):
    """Yields slots, `_Row` and arguments of each row of clients; nothing without a mesh."""
    for number, slots in enumerate(() if placement is None else placement.device_rows):
        given = per_client(lambda clients, number=number: clients.rows[number], in_axes, arguments)
        yield slots, _Row(fn, in_axes, groups, slots, arguments, finish), given


def _shard_here(clients, placement, mesh):
    """Shards clients inside a program. Arrays whose rows move between devices are replicated first."""
    if isinstance(clients, ShardedClients):
        return clients
    sharded, sizes = arrange(clients, placement), dict(placement.sizes)
    stacked = {
        name: tree if placement.stacked[name] == sizes[name] else constrain_replicated(tree, mesh)
        for name, tree in sharded.stacked.items()
    }
    return ShardedClients(stacked, constrain_replicated(sharded.rows, mesh), placement, sharded.shapes)


def _by_part(placement, stacked, packed, rows):
    """The results of all clients; if they are tuples, a tuple of mappings."""
    shapes = {name: shape for row in rows for name, shape in row.shapes.items()}
    example = next(iter((*stacked.values(), *shapes.values())))
    parts = []
    for part in range(len(_parts(example))):
        large, small = ({name: _parts(tree)[part] for name, tree in trees.items()} for trees in (stacked, shapes))
        buffers = [row[part] for row in packed]
        parts.append(large if placement is None else ShardedClients(large, buffers, placement, small))
    return tuple(parts) if type(example) is tuple else parts[0]


def _parts(result):
    return result if type(result) is tuple else (result,)


def _add(trees):
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def _flops(architecture, inputs):
    num_rows = inputs.shape[0]
    inputs = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype)  # a larger batch may be a loop, counted once
    params, model_state = jax.eval_shape(architecture.init, jax.random.key(0), inputs)
    score = jax.jit(partial(architecture.apply, train=False))
    analysis = score.lower(params, model_state, inputs).cost_analysis()
    if analysis is None:  # the platform has no count
        return num_rows * float(sum(leaf.size for leaf in jax.tree.leaves(params)))
    return num_rows * float(analysis["flops"])
