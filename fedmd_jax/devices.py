"""All clients of all groups: one group after the other on one device, side by side on many, whatever their networks.

On a mesh a group with at least as many clients as there are devices stays stacked, padded to a multiple. Of smaller
groups each device takes whole clients: one program for all devices, in which each branches to the network that it has
(`lax.switch`), with what is per client in flat buffers, since the networks of a row of devices differ in shape.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedmd_jax.clients import Groups
from fedmd_jax.mapping import (
    ClientsPerChunk,
    ClientSums,
    chunk_of,
    map_clients,
    on_every_device,
    weighted_sum_clients,
)
from fedmd_jax.packing import buffer_lengths, pack, unpack
from fedmd_jax.placement import place_clients
from fedmd_jax.spread import Spread, arrange, group_sizes
from fedmd_jax.types import ClientState


def client_costs(groups: Groups, inputs: chex.Array) -> dict[str, float]:
    """What a client of each group costs: floating point operations of scoring `inputs`.

    Args:
      groups: the architecture groups.
      inputs: any batch, [B, ...]; only shape and dtype are used, nothing is computed.

    >>> from fedmd_jax.clients import ArchitectureGroup
    >>> from fedmd_jax.types import Architecture
    >>> def linear(num_outputs):
    ...     def init(key, inputs):
    ...         return jnp.zeros((inputs.shape[1], num_outputs)), {}
    ...     return Architecture(init, lambda params, state, inputs, *, train: (inputs @ params, state))
    >>> groups = {"small": ArchitectureGroup(linear(2), (0,)), "large": ArchitectureGroup(linear(5), (1,))}
    >>> client_costs(groups, jnp.zeros((1, 10)))
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
    """Does for every client of every group what `fn` does for one.

    Args:
      fn: (architecture, *arguments) -> results of one client; a plain tuple of results becomes a tuple of mappings.
      in_axes: for each argument 0 where it is per group and client, None where all clients share it.
      groups: of which the architectures are taken; the clients are those of the arguments.
      mesh: devices along one axis; nothing crosses them.
      clients_per_chunk: how many clients of a group run at once on a device, as in `fedmd`; for "auto" one of
        the arguments must be the states.

    Returns:
      A function of arguments that are per group, [K, ...], where `in_axes` has a 0; so are its results, as a `Spread`
      where there is a mesh. Arguments that are not spread yet are, which costs communication if they are large.

    Raises:
      ValueError: arguments that are spread in different ways, or over other numbers of devices.

    >>> from fedmd_jax.clients import ArchitectureGroup
    >>> groups = {"a": ArchitectureGroup(None, (0, 1)), "b": ArchitectureGroup(None, (2,))}
    >>> add = map_groups(lambda architecture, own, shared: own + shared, (0, None), groups=groups)
    >>> sums = add({"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}, jnp.array(10.0))
    >>> {name: own.tolist() for name, own in sums.items()}
    {'a': [11.0, 12.0], 'b': [13.0]}
    """
    in_axes = tuple(in_axes)

    def mapped(*arguments):
        placement, names, of_group, arguments = _placed(groups, in_axes, arguments, mesh)
        results = {}
        for name in names:
            given = of_group(name, in_axes, arguments)
            one = partial(fn, groups[name].architecture)
            chunk = _chunk(clients_per_chunk, name, given, mesh)
            results[name] = map_clients(one, in_axes, mesh, clients_per_chunk=chunk)(*given)
        if placement is None:
            return _unzip(results)
        rows = [_Row(fn, in_axes, groups, seats, arguments, packed=True) for seats in placement.rows]
        packed = [
            map_clients(row, (0, *in_axes), mesh)(row.kinds, *_of_row(number, in_axes, arguments))
            for number, row in enumerate(rows)
        ]
        return _spread_results(placement, results, packed, rows)

    return mapped


def sum_groups(
    fn: Callable[..., Any],
    in_axes: Sequence[int | None],
    *,
    groups: Groups,
    mesh: Mesh | None = None,
    clients_per_chunk: ClientsPerChunk = None,
) -> Callable[..., ClientSums]:
    """The weighted sum over all clients of all groups of what `fn` gives for one: `weighted_sum_clients`, of everybody.

    Args:
      fn: (architecture, *arguments) -> a tree of the same shapes for every network.
      in_axes: as in `map_groups`.
      groups: as in `map_groups`.
      mesh: as in `map_groups`.
      clients_per_chunk: as in `map_groups`.

    Returns:
      A function of weights, per group [K], and of arguments as those of `map_groups`, with the `ClientSums` of
      everybody: one sum per device, and `finite` per group.

    >>> from fedmd_jax.clients import ArchitectureGroup
    >>> groups = {"a": ArchitectureGroup(None, (0, 1)), "b": ArchitectureGroup(None, (2,))}
    >>> sum_squares = sum_groups(lambda architecture, own: own**2, (0,), groups=groups)
    >>> weights = {"a": jnp.array([1.0, 0.5]), "b": jnp.array([1.0])}
    >>> sum_squares(weights, {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}).total.tolist()
    [12.0]
    """
    in_axes = tuple(in_axes)

    def summed(weights, *arguments):
        placement, names, of_group, arguments = _placed(groups, in_axes, arguments, mesh)
        sums = {}
        for name in names:
            given = of_group(name, in_axes, arguments)
            one = partial(fn, groups[name].architecture)
            chunk = _chunk(clients_per_chunk, name, given, mesh)
            own = weights[name] if mesh is None else _pad(weights[name], placement.stacked[name])
            sums[name] = weighted_sum_clients(one, in_axes, mesh, clients_per_chunk=chunk)(own, *given)
        rows = []
        for number, seats in enumerate(placement.rows if placement else ()):
            row = _Row(fn, in_axes, groups, seats, arguments, packed=False)
            own = jnp.stack([jnp.float32(0) if seat is None else weights[seat[0]][seat[1]] for seat in seats])
            of_row = _of_row(number, in_axes, arguments)
            rows.append(weighted_sum_clients(row, (0, *in_axes), mesh)(own, row.kinds, *of_row))
        finite = {name: each.finite for name, each in sums.items()}
        if placement is not None:
            shapes = {name: jax.ShapeDtypeStruct((), bool) for name, _ in placement.sizes if name not in sums}
            finite = Spread(finite, [{"bool": row.finite[:, None]} for row in rows], placement, shapes)
        everybody = [*sums.values(), *rows]
        return ClientSums(_add([each.total for each in everybody]), _add([each.weight for each in everybody]), finite)

    return summed


class _Row:
    """`fn` of the clients of one row, one on each device: what a device has of it says `kind`, the place of its group.

    As a function of one client it fits into `map_clients`.
    """

    def __init__(self, fn, in_axes, groups, seats, arguments, *, packed):
        self.names = list(dict.fromkeys(seat[0] for seat in seats if seat is not None))
        self.kinds = np.asarray([len(self.names) if seat is None else self.names.index(seat[0]) for seat in seats])
        self.shapes = {}  # of the results of one client, known when the program has been traced
        self._packed = packed
        self._ones = {}
        for name in self.names:
            shapes = [None if axis is None else a.shapes[name] for axis, a in zip(in_axes, arguments, strict=True)]
            # A function of its own is traced once, for its shapes and for its results.
            self._ones[name] = jax.jit(partial(_of_packed, partial(fn, groups[name].architecture), shapes))

    def __call__(self, kind, *arguments):
        self.shapes = {name: jax.eval_shape(one, *arguments) for name, one in self._ones.items()}
        finish = self._pack if self._packed else lambda result: result
        results = [partial(lambda one, *arguments: finish(one(*arguments)), one) for one in self._ones.values()]
        nothing = jax.eval_shape(results[0], *arguments)

        def idle(*_):
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nothing)

        return jax.lax.switch(kind, [*results, idle] if (self.kinds == len(results)).any() else results, *arguments)

    def _pack(self, result):
        parts = zip(*map(_parts, self.shapes.values()), strict=True)
        return tuple(pack(part, buffer_lengths(shapes)) for part, shapes in zip(_parts(result), parts, strict=True))


def _of_packed(fn, shapes, *arguments):
    """`fn` of one client, some of whose arguments are packed."""
    return fn(*(a if tree is None else unpack(a, tree) for a, tree in zip(arguments, shapes, strict=True)))


def _placed(groups, in_axes, arguments, mesh):
    """The placement, the groups that are stacked, how to find their arguments, and all arguments, spread alike."""
    mapped = [a for axis, a in zip(in_axes, arguments, strict=True) if axis is not None]
    if mesh is None:
        return None, [name for name in groups if name in mapped[0]], _of_group, arguments
    placements = {a.placement for a in mapped if isinstance(a, Spread)}
    if len(placements) > 1 or any(placement.num_devices != mesh.size for placement in placements):
        raise ValueError(
            f"what is per client must be spread over the {mesh.size} devices of the mesh in one way, got "
            f"{len(placements)} ways, over {sorted(placement.num_devices for placement in placements)} devices"
        )
    placement = placements.pop() if placements else place_clients(group_sizes(mapped[0]), mesh.size)
    spread = partial(_spread_here, placement=placement, mesh=mesh)
    arguments = [a if axis is None else spread(a) for axis, a in zip(in_axes, arguments, strict=True)]
    return placement, placement.stacked, _of_stacked, arguments


def _spread_here(clients, placement, mesh):
    """A `Spread`, also of what a program computes: whatever it moves is on every device first."""
    if isinstance(clients, Spread):
        return clients
    spread, sizes = arrange(clients, placement), dict(placement.sizes)
    stacked = {
        name: tree if placement.stacked[name] == sizes[name] else on_every_device(tree, mesh)
        for name, tree in spread.stacked.items()
    }
    return Spread(stacked, on_every_device(spread.rows, mesh), placement, spread.shapes)


def _spread_results(placement, stacked, packed, rows):
    """The results of all clients, each part of them a `Spread`."""
    shapes = {name: shape for row in rows for name, shape in row.shapes.items()}
    example = next(iter((*stacked.values(), *shapes.values())))
    parts = tuple(
        Spread(
            {name: _parts(result)[part] for name, result in stacked.items()},
            [buffers[part] for buffers in packed],
            placement,
            {name: _parts(shape)[part] for name, shape in shapes.items()},
        )
        for part in range(len(_parts(example)))
    )
    return parts if type(example) is tuple else parts[0]


def _unzip(results):
    """Per group tuples -> a tuple of what is per group."""
    example = next(iter(results.values()))
    if type(example) is not tuple:
        return results
    return tuple({name: result[part] for name, result in results.items()} for part in range(len(example)))


def _parts(result):
    return result if type(result) is tuple else (result,)


def _of_group(name, in_axes, arguments):
    return [a if axis is None else a[name] for axis, a in zip(in_axes, arguments, strict=True)]


def _of_stacked(name, in_axes, arguments):
    return [a if axis is None else a.stacked[name] for axis, a in zip(in_axes, arguments, strict=True)]


def _of_row(number, in_axes, arguments):
    return [a if axis is None else a.rows[number] for axis, a in zip(in_axes, arguments, strict=True)]


def _chunk(clients_per_chunk, name, arguments, mesh):
    params = next((argument.params for argument in arguments if isinstance(argument, ClientState)), ())
    return chunk_of(clients_per_chunk, name, params, mesh)


def _add(trees):
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def _pad(weights, size):
    return jnp.pad(weights, (0, size - weights.shape[0]))


def _flops(architecture, inputs):
    params, model_state = jax.eval_shape(architecture.init, jax.random.key(0), inputs)
    score = jax.jit(partial(architecture.apply, train=False))
    analysis = score.lower(params, model_state, inputs).cost_analysis()
    if analysis is None:  # a platform that does not count them
        return float(sum(leaf.size for leaf in jax.tree.leaves(params)))
    return float(analysis["flops"])
