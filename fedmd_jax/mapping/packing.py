"""Where clients are computed, and networks of different shapes in arrays of one shape.

`place_clients` assigns clients to the devices of a mesh: large groups in equal parts, the clients of small groups
balanced by cost. `pack` turns any tree into one flat buffer per dtype, and `unpack` restores it to the bit, so that
every device of a mesh can hold another network.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.checks import check_count, check_not_negative, describe_value

Slot = tuple[str, int]  # a group and the position of one of its clients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Assignment of clients to devices. It is hashable, since programs are compiled for it.

    A group with at least as many clients as devices is `stacked`: each device has the same number of its clients, and
    the last ones may be padding. Clients of smaller groups are in `device_rows`: each row has one client per device, or
    None.

    Attributes:
      num_devices: number of devices, D.
      sizes: name and number of clients K of every group, by name.
      device_rows: rows of D clients of small groups; None for a device without a client.
    """

    num_devices: int
    sizes: tuple[tuple[str, int], ...]
    device_rows: tuple[tuple[Slot | None, ...], ...]

    @property
    def stacked(self) -> dict[str, int]:
        """The large groups and their numbers of clients including padding, which are multiples of D."""
        d = self.num_devices
        return {name: -(-size // d) * d for name, size in self.sizes if size >= d}

    def slots(self, name: str) -> list[tuple[int, int]]:
        """Row and device of each client of a small group."""
        places = {slot: (row, d) for row, slots in enumerate(self.device_rows) for d, slot in enumerate(slots)}
        return [places[name, position] for position in range(dict(self.sizes)[name])]


def place_clients(sizes: Mapping[str, int], num_devices: int, *, costs: Mapping[str, float] | None = None) -> Placement:
    """Assigns every client to a device.

    Args:
      sizes: number of clients of each group, K.
      num_devices: number of devices, D.
      costs: cost of one client of each group, in any unit; equal by default.

    Raises:
      ValueError: no device, a group without a cost, or a cost that is negative or not finite.

    >>> placement = place_clients({"a": 1, "b": 1, "c": 1, "many": 5}, 2, costs={"a": 1, "b": 5, "c": 2, "many": 1})
    >>> placement.device_rows
    ((('b', 0), ('c', 0)), (None, ('a', 0)))
    >>> placement.stacked
    {'many': 6}
    """
    check_count("num_devices", num_devices)
    costs = dict.fromkeys(sizes, 1.0) if costs is None else costs
    check_costs(costs, sizes)
    in_order = tuple(sorted(sizes.items()))  # the order of `jax.tree`, so that it is the same under jit
    clients = [(name, k) for name, size in in_order if size < num_devices for k in range(size)]
    shares = balance([costs[name] for name, _ in clients], num_devices)
    rows = tuple(
        tuple(clients[share[row]] if row < len(share) else None for share in shares)
        for row in range(max(map(len, shares)))
    )
    return Placement(num_devices=num_devices, sizes=in_order, device_rows=rows)


def check_costs(costs: Mapping[str, float], groups: Collection[str]) -> None:
    """Raises ValueError if a group has no cost, or one that is negative or not finite."""
    if not isinstance(costs, Mapping):
        raise ValueError(f"costs must be one for each group, got {describe_value(costs)}")
    for name in groups:
        check_not_negative(f"group {name!r}: the cost of a client", costs.get(name))


def balance(costs: Sequence[float], num_devices: int) -> list[list[int]]:
    """Distributes jobs over devices with balanced load.

    Jobs are assigned in order of decreasing cost, each to the device with the smallest load (then with the fewest
    jobs). The largest load is at most 4/3 of the optimum.

    Args:
      costs: cost of each job.
      num_devices: number of devices, D.

    Returns:
      The jobs of each device, in order of decreasing cost.

    References:
      Graham, Bounds on Multiprocessing Timing Anomalies, 1969: longest processing time first.

    >>> balance([1, 5, 2, 2], 2)
    [[1], [2, 3, 0]]
    """
    shares: list[list[int]] = [[] for _ in range(num_devices)]
    loads = [0.0] * num_devices
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        device = min(range(num_devices), key=lambda device: (loads[device], len(shares[device]), device))
        shares[device].append(job)
        loads[device] += costs[job]
    return shares


Buffers = dict[str, chex.Array]  # by dtype, [L]
Lengths = Mapping[str, int]  # by dtype


def buffer_lengths(shapes: Collection[chex.ArrayTree]) -> dict[str, int]:
    """Lengths of buffers that can hold any one of these trees.

    Args:
      shapes: trees of arrays or of their shapes.

    >>> buffer_lengths([{"a": jnp.zeros((2, 3))}, {"a": jnp.zeros(4), "b": jnp.zeros((), int)}])
    {'float32': 6, 'int32': 1}
    """
    longest: dict[str, int] = {}
    for tree in shapes:
        sums: dict[str, int] = {}
        for dtype, shape in map(_stored, jax.tree.leaves(tree)):
            sums[dtype] = sums.get(dtype, 0) + math.prod(shape)
        for dtype, length in sums.items():
            longest[dtype] = max(longest.get(dtype, 0), length)
    return dict(sorted(longest.items()))


def pack(tree: chex.ArrayTree, lengths: Lengths) -> Buffers:
    """Packs a tree into one flat buffer per dtype, padded with zeros; typed PRNG keys are stored as their words.

    Args:
      tree: JAX or NumPy arrays; the result has the same kind.
      lengths: lengths of the buffers, from `buffer_lengths` of a collection with this tree.

    >>> pack({"a": np.ones((2, 2), np.float32), "b": np.int32(7)}, {"float32": 5, "int32": 2})
    {'float32': array([1., 1., 1., 1., 0.], dtype=float32), 'int32': array([7, 0], dtype=int32)}
    """
    leaves: dict[str, list[chex.Array]] = {dtype: [] for dtype in lengths}
    for leaf in jax.tree.leaves(tree):
        words = jax.random.key_data(leaf) if _is_key(leaf.dtype) else leaf
        leaves[words.dtype.name].append(words.reshape(-1))
    return {dtype: _join(leaves[dtype], dtype, length) for dtype, length in lengths.items()}


def unpack(buffers: Buffers, shapes: chex.ArrayTree) -> chex.ArrayTree:
    """Inverse of `pack`.

    Args:
      buffers: JAX or NumPy arrays.
      shapes: the tree of shapes and dtypes.

    >>> unpack({"float32": np.arange(5.0)}, {"a": jax.ShapeDtypeStruct((2, 2), "float32")})
    {'a': array([[0., 1.], [2., 3.]])}
    """
    position = dict.fromkeys(buffers, 0)

    def take(leaf):
        dtype, shape = _stored(leaf)
        begin, position[dtype] = position[dtype], position[dtype] + math.prod(shape)
        words = buffers[dtype][begin : position[dtype]].reshape(shape)
        return jax.random.wrap_key_data(words, impl=_implementation(leaf)) if _is_key(leaf.dtype) else words

    return jax.tree.map(take, shapes)


def _stored(leaf):
    """Dtype and shape with which a buffer stores an array."""
    if not _is_key(leaf.dtype):
        return np.dtype(leaf.dtype).name, leaf.shape
    words = jax.eval_shape(jax.random.key_data, leaf)
    return words.dtype.name, words.shape


def _implementation(keys):
    """The implementation of PRNG keys that are given as shapes only."""
    found = []
    jax.eval_shape(lambda keys: found.append(jax.random.key_impl(keys)), keys)
    return found[0]


def _is_key(dtype):
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _join(leaves, dtype, length):
    numpy = jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np
    rest = np.zeros(length - sum(leaf.size for leaf in leaves), jnp.dtype(dtype))
    return numpy.concatenate([*leaves, rest])
