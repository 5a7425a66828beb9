"""Functions of one client, mapped over the clients of a group: at once, in chunks, one by one, over devices."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedmd_jax.checks import as_list, check_clients, check_count, check_numbers, told
from fedmd_jax.processes import put_global

Chunk = int | None | Literal["auto"]
# How many clients of a group and device run at once: of all groups, or by the name of the group.
ClientsPerChunk = Chunk | Mapping[str, Chunk]


def chunk_of(
    clients_per_chunk: ClientsPerChunk, name: str, params: chex.ArrayTree, mesh: Mesh | None = None
) -> int | None:
    """How many clients of the group `name` run at once; None is all of them.

    Args:
      clients_per_chunk: the setting; a group that it does not name is "auto".
      name: of the group.
      params: its stacked parameters, [K, ...], for `choose_chunk`.
      mesh: whose platform counts; that of the default backend without one.

    >>> params = {"kernel": jnp.zeros((2, 3, 3, 1, 8))}
    >>> chunk_of({"large": 1}, "large", params), chunk_of(4, "small", params), chunk_of(None, "small", params)
    (1, 4, None)
    """
    chunk = clients_per_chunk.get(name, "auto") if isinstance(clients_per_chunk, Mapping) else clients_per_chunk
    platform = None if mesh is None else mesh.devices.flat[0].platform
    return choose_chunk(params, platform=platform) if chunk == "auto" else chunk


def choose_chunk(params: chex.ArrayTree, *, platform: str | None = None) -> int | None:
    """How many clients of a group run fastest at once: the one place where this is decided.

    Args:
      params: stacked parameters, [K, ...]; a leaf of rank 5 is taken for the kernel of a convolution.
      platform: "cpu", "gpu" or "tpu"; None for the default backend.

    Returns:
      A number of clients, or None for all of them.
    """
    # Two CPU cores, ms of a client in the small round of `benchmarks/clients.py`, by hand:
    #                              all of them   chunks of 16   of 4   one by one
    #   CNN((8, 16)), 64 clients        61            57         40        37
    #   resnet8, 8 clients             705                      666       515
    #   MLP((64,)), 64 clients           3.7           3.1        3.1       3.7
    # A convolution keeps the cores busy alone, and the activations of several clients leave the cache.
    if (platform or jax.default_backend()) != "cpu":
        return None
    return 1 if any(jnp.ndim(leaf) >= 5 for leaf in jax.tree.leaves(params)) else 16


def check_chunks(clients_per_chunk: ClientsPerChunk, groups: Collection[str]) -> None:
    """A `ValueError` where a setting is of no group, or neither "auto", None nor an integer of at least 1."""
    if isinstance(clients_per_chunk, Mapping) and not set(clients_per_chunk) <= set(groups):
        raise ValueError(
            f"clients_per_chunk must be of the groups {sorted(groups)}, got one of "
            f"{told(sorted(set(clients_per_chunk) - set(groups), key=str))}"
        )
    chunks = clients_per_chunk.values() if isinstance(clients_per_chunk, Mapping) else [clients_per_chunk]
    for chunk in chunks:
        if chunk is not None and not (isinstance(chunk, str) and chunk == "auto"):
            check_count("clients_per_chunk", chunk)


def map_clients(
    fn: Callable[..., Any],
    in_axes: Sequence[int | None],
    mesh: Mesh | None = None,
    *,
    clients_per_chunk: int | None = None,
) -> Callable[..., Any]:
    """Does for every client of a group what `fn` does for one.

    `in_axes` says what is per client (0) and what is shared (None). With a mesh the clients are spread over its only
    axis and nothing crosses devices: `shard_map(vmap(fn))`, since under `vmap` alone the compiler gathers the batches
    of convolutional clients.

    Args:
      fn: a function of one client; positional arguments only, every output per client.
      in_axes: for each argument 0 or None.
      mesh: devices along one axis; the number of clients must be a multiple of their number.
      clients_per_chunk: how many clients of a device run at once, the others one chunk after the other: bounds memory,
        and changes results by no more than rounding. None is all of them; 1 is one by one, without any `vmap`.

    Returns:
      A function of stacked arguments, [K, ...] where `in_axes` has a 0, with stacked results.

    Raises:
      ValueError: clients_per_chunk is neither None nor an integer of at least 1, an axis neither 0 nor None, or the
        arguments are not of as many, or not of one number of clients.

    >>> double_and_add = map_clients(lambda own, shared: 2 * own + shared, (0, None))
    >>> double_and_add(jnp.array([1.0, 2.0]), jnp.array(10.0)).tolist()
    [12.0, 14.0]
    """
    in_axes = _check_axes(in_axes)
    _check_chunk(clients_per_chunk)

    def mapped(*arguments):
        num_clients = _num_clients(in_axes, arguments)
        of_chunk = _of_chunk(fn, in_axes, num_clients, clients_per_chunk)
        if clients_per_chunk is None or num_clients == 1:
            return of_chunk(*arguments)
        rows, _ = _chunks(num_clients, clients_per_chunk)
        results = jax.lax.map(lambda rows: of_chunk(*_take(in_axes, arguments, rows)), rows)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[rows.ndim :])[:num_clients], results)

    return _spread(mapped, in_axes, mesh)


class ClientSums(NamedTuple):
    """What is left of what many clients gave: sums over those who are heard, and who gave what can be used."""

    total: Any  # [D, ...]: results times weights, one sum per device
    weight: chex.Array  # [D]: weights of those who are in it
    finite: chex.Array  # [K], bool: whether all of a client's result is finite


def weighted_sum_clients(
    fn: Callable[..., Any],
    in_axes: Sequence[int | None],
    mesh: Mesh | None = None,
    *,
    clients_per_chunk: int | None = None,
) -> Callable[..., ClientSums]:
    """The weighted sum over a group's clients of what `fn` gives for one: `map_clients` for a result nobody keeps.

    Only the results of one chunk are ever held. A client contributes nothing, not even a NaN, where its weight is zero
    or its result is not finite in all places. Each device sums its own clients; sums of several groups are added device
    by device before anything crosses devices, and then `add_devices` does.

    Args:
      fn: a function of one client; positional arguments only.
      in_axes: for each argument of `fn` 0 or None.
      mesh: as in `map_clients`.
      clients_per_chunk: as in `map_clients`.

    Returns:
      A function of weights [K] and stacked arguments, with the sums of each device; D is 1 without a mesh. Weights
      that are negative or not finite count as zero.

    Raises:
      ValueError: clients_per_chunk is neither None nor an integer of at least 1, or not every client has one weight.

    >>> sum_squares = weighted_sum_clients(jnp.square, (0,), clients_per_chunk=2)
    >>> sums = sum_squares(jnp.array([1.0, 0.5, 4.0]), jnp.array([1.0, 2.0, jnp.nan]))
    >>> sums.total.tolist(), sums.weight.tolist(), sums.finite.tolist()
    ([3.0], [1.5], [True, True, False])
    """
    in_axes = _check_axes(in_axes)
    _check_chunk(clients_per_chunk)

    def summed(weights, *arguments):
        num_clients = _num_clients(in_axes, arguments)
        check_numbers("weights", weights)
        weights = _weights_of_device(jnp.asarray(weights), num_clients, mesh)
        of_chunk = _of_chunk(fn, in_axes, num_clients, clients_per_chunk)

        def sum_chunk(weights, *arguments):
            return _sum_heard(weights, of_chunk(*arguments))

        if clients_per_chunk is None or num_clients == 1:
            return sum_chunk(weights, *arguments)
        rows, real = _chunks(num_clients, clients_per_chunk)

        def of_rows(rows, real):
            *sums, finite = sum_chunk(jnp.where(real, weights[rows], 0.0), *_take(in_axes, arguments, rows))
            return sums, finite

        def step(sums, chunk):
            more, finite = of_rows(*chunk)
            return jax.tree.map(jnp.add, sums, more), finite

        nothing = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_rows, rows[0], real[0])[0]
        )
        sums, finite = jax.lax.scan(step, nothing, (rows, real))
        return ClientSums(*sums, finite.reshape(-1)[:num_clients])

    def one_sum(*arguments):
        *sums, finite = summed(*arguments)
        return ClientSums(*jax.tree.map(lambda leaf: leaf[None], sums), finite)

    # Every device has all weights: they are a few numbers, and a layout for them would spread to what computes them.
    return _spread(one_sum, (None, *in_axes), mesh)


def add_devices(sums: chex.ArrayTree, mesh: Mesh | None = None) -> chex.ArrayTree:
    """One sum per device, [D, ...] -> the sum of all, [...]; with a mesh the one thing that crosses devices."""
    if mesh is None:
        return jax.tree.map(lambda leaf: leaf[0], sums)
    (axis,) = mesh.axis_names

    def add(sums):
        return jax.lax.psum(jax.tree.map(lambda leaf: leaf[0], sums), axis)

    return jax.shard_map(add, mesh=mesh, in_specs=PartitionSpec(axis), out_specs=PartitionSpec(), check_vma=False)(sums)


def chunk_rows(num_clients: int, clients_per_chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Which clients go together when at most `clients_per_chunk` do, in even chunks.

    Args:
      num_clients: K.
      clients_per_chunk: at least 1.

    Returns:
      Rows of the clients, [chunks, clients of a chunk], and which are real: where the last chunk is not full it
      repeats the last client, since a chunk of another size would be a second program to compile.

    >>> chunk_rows(5, 4)[0].tolist()
    [[0, 1, 2], [3, 4, 4]]
    """
    num_chunks = -(-num_clients // clients_per_chunk)
    size = -(-num_clients // num_chunks)
    rows = np.arange(num_chunks * size).reshape(num_chunks, size)
    return np.minimum(rows, num_clients - 1), rows < num_clients


def client_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh with one axis, `clients`, over the first `num_devices` devices (all by default).

    Raises:
      ValueError: fewer than one device, or more than there are.
    """
    devices = jax.devices()
    if num_devices is not None:
        check_count("num_devices", num_devices, minimum=0)  # more of it below
    if num_devices is not None and not 1 <= num_devices <= len(devices):
        raise ValueError(f"num_devices must be from 1 to {len(devices)}, the devices that there are, got {num_devices}")
    return Mesh(np.asarray(devices[:num_devices]), ("clients",))


def shard_clients(tree: chex.ArrayTree, mesh: Mesh | None) -> chex.ArrayTree:
    """Stacked clients, spread over the mesh along their leading axis; as they are where there is no mesh."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    return jax.tree.map(lambda leaf: put_global(leaf, sharding), tree)


def on_every_device(tree: chex.ArrayTree, mesh: Mesh | None) -> chex.ArrayTree:
    """A few numbers of which every device has all; as they are where there is no mesh.

    Without it the compiler may spread them, since some of their users are, and must gather them again for the others.
    """
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def _check_chunk(clients_per_chunk):
    if clients_per_chunk is not None:
        check_count("clients_per_chunk", clients_per_chunk)


def _of_chunk(fn, in_axes, num_clients, clients_per_chunk):
    """`fn` for all clients of a chunk, stacked; where they come one by one, `fn` as it is."""
    if num_clients == 1:
        return _of_one(fn, in_axes)
    return fn if clients_per_chunk == 1 else jax.vmap(fn, in_axes)


def _of_one(fn, in_axes):
    """`vmap` of a single client: without it a training step takes a CPU 1.4 times less."""

    def of_one(*arguments):
        rows = [
            argument if axis is None else jax.tree.map(lambda leaf: leaf[0], argument)
            for axis, argument in zip(in_axes, arguments, strict=True)
        ]
        return jax.tree.map(lambda leaf: leaf[None], fn(*rows))

    return of_one


def _chunks(num_clients, clients_per_chunk):
    """`chunk_rows`, and numbers instead of rows where clients go one by one."""
    rows, real = chunk_rows(num_clients, clients_per_chunk)
    return (rows[:, 0], real[:, 0]) if clients_per_chunk == 1 else (rows, real)


def _num_clients(in_axes, arguments):
    """The leading size of everything that is per client; a `ValueError` where there are several, or is none."""
    if len(arguments) != len(in_axes):
        raise ValueError(f"{len(in_axes)} arguments are wanted, one for each of in_axes, got {len(arguments)}")
    mapped = [argument for axis, argument in zip(in_axes, arguments, strict=True) if axis is not None]
    num_clients = check_clients("what is per client", mapped)
    if num_clients is None:
        raise ValueError("at least one argument must be per client, with the axis 0 and an array, got none")
    return num_clients


def _check_axes(in_axes):
    in_axes = tuple(as_list("in_axes", in_axes))
    if not all(
        axis is None or (isinstance(axis, int) and not isinstance(axis, bool) and axis == 0) for axis in in_axes
    ):
        raise ValueError(f"in_axes must be 0 or None for each argument, got {told(in_axes)}")
    return in_axes


def only_usable(weights: chex.Array) -> chex.Array:
    """Weights, and zero where one is negative or not finite."""
    return jnp.where((weights > 0) & (weights < jnp.inf), weights, 0.0)


def _take(in_axes, arguments, rows):
    def take(leaf):
        return jnp.asarray(leaf).at[rows].get(mode="promise_in_bounds")

    return [
        argument if axis is None else jax.tree.map(take, argument)
        for axis, argument in zip(in_axes, arguments, strict=True)
    ]


def _sum_heard(weights, results):
    """`ClientSums` of [k] and [k, ...], or of a weight and a result."""
    finite = partial(_all_finite, num_batch=weights.ndim)
    finite = reduce(jnp.logical_and, map(finite, jax.tree.leaves(results)))
    weights = jnp.where(finite, only_usable(weights), 0.0)
    return ClientSums(jax.tree.map(partial(_weighted_sum, weights), results), jnp.sum(weights), finite)


def _all_finite(leaf, *, num_batch):
    return jnp.all(jnp.isfinite(leaf), axis=tuple(range(num_batch, leaf.ndim)))


def _weighted_sum(weights, results):
    heard = jnp.expand_dims(weights > 0, range(weights.ndim, results.ndim))
    silenced = jnp.where(heard, results, 0.0)  # 0 * NaN would be NaN
    return jnp.tensordot(weights, silenced, axes=weights.ndim, precision=jax.lax.Precision.HIGHEST)


def _weights_of_device(weights, num_clients, mesh):
    wanted = (num_clients * (1 if mesh is None else mesh.size),)
    if weights.shape != wanted:
        raise ValueError(f"one weight per client is needed, of shape {wanted}, got {weights.shape}")
    if mesh is None:
        return weights
    (axis,) = mesh.axis_names
    return jax.lax.dynamic_slice_in_dim(weights, jax.lax.axis_index(axis) * num_clients, num_clients)


def _spread(fn, in_axes, mesh):
    """`fn` of all clients as it is, or with a mesh on every device for the clients there."""
    if mesh is None:
        return fn
    clients, shared = PartitionSpec(*mesh.axis_names), PartitionSpec()
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=tuple(shared if axis is None else clients for axis in in_axes),
        out_specs=clients,
        check_vma=False,
    )
