"""Maps functions of one client over the clients of a group: at once, in chunks, one by one, or over devices."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fedmd_jax.checks import as_list, check_clients, check_count, check_numbers, describe_value
from fedmd_jax.mapping.groups import per_client

Chunk = int | None | Literal["auto"]
# Number of clients of a group that run at once on a device: for all groups, or by name of the group.
ClientsPerChunk = Chunk | Mapping[str, Chunk]


def chunk_of(
    clients_per_chunk: ClientsPerChunk, name: str, params: chex.ArrayTree, mesh: Mesh | None = None
) -> int | None:
    """Number of clients of the group `name` that run at once; None for all of them.

    Args:
      clients_per_chunk: the setting; "auto" for groups that it does not name.
      name: name of the group.
      params: stacked parameters of the group, [K, ...], for `choose_chunk`.
      mesh: mesh whose platform is used; None for the default backend.

    >>> params = {"kernel": jnp.zeros((2, 3, 3, 1, 8))}
    >>> chunk_of({"large": 1}, "large", params), chunk_of(4, "small", params), chunk_of(None, "small", params)
    (1, 4, None)
    """
    chunk = clients_per_chunk.get(name, "auto") if isinstance(clients_per_chunk, Mapping) else clients_per_chunk
    platform = None if mesh is None else mesh.devices.flat[0].platform
    return choose_chunk(params, platform=platform) if chunk == "auto" else chunk


def choose_chunk(params: chex.ArrayTree, *, platform: str | None = None) -> int | None:
    """The fastest number of clients of a group to run at once. All automatic choices are made here.

    Args:
      params: stacked parameters, [K, ...]; a leaf of rank 5 is assumed to be the kernel of a convolution.
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
    """Raises ValueError if a setting names an unknown group, or is not "auto", None or an integer of at least 1."""
    chunks = clients_per_chunk if isinstance(clients_per_chunk, Mapping) else dict.fromkeys(groups, clients_per_chunk)
    if unknown := set(chunks) - set(groups):
        raise ValueError(
            f"clients_per_chunk must be of the groups {sorted(groups)}, got one of "
            f"{describe_value(sorted(unknown, key=str))}"
        )
    for chunk in chunks.values():
        if chunk is not None and not (isinstance(chunk, str) and chunk == "auto"):
            check_count("clients_per_chunk", chunk)


def map_clients(
    fn: Callable[..., Any],
    in_axes: Sequence[int | None],
    mesh: Mesh | None = None,
    *,
    clients_per_chunk: int | None = None,
) -> Callable[..., Any]:
    """Maps a function of one client over the clients of a group.

    `in_axes` tells which arguments are per client (0) and which are shared (None). With a mesh the clients are sharded
    over its only axis, without communication between devices: `shard_map(vmap(fn))`, since under `vmap` alone the
    compiler gathers the batches of convolutional clients.

    Args:
      fn: a function of one client; positional arguments only, every output per client.
      in_axes: for each argument 0 or None.
      mesh: devices along one axis; the number of clients must be a multiple of their number.
      clients_per_chunk: number of clients of a device that run at once; chunks run one after the other. It bounds
        memory and changes results by rounding only. None for all clients; 1 for one by one, without `vmap`.

    Returns:
      A function of stacked arguments, [K, ...] where `in_axes` has a 0, with stacked results.

    Raises:
      ValueError: clients_per_chunk is neither None nor an integer of at least 1, an axis is neither 0 nor None, or the
        arguments differ in number from `in_axes`, or from each other in their number of clients.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> double_and_add = fmd.mapping.map_clients(lambda own, shared: 2 * own + shared, (0, None))
      >>> double_and_add(jnp.array([1.0, 2.0]), jnp.array(10.0)).tolist()
      [12.0, 14.0]
    """
    in_axes = _check_mapping(in_axes, clients_per_chunk)

    def mapped(*arguments):
        num_clients = _num_clients(in_axes, arguments)
        of_chunk = _of_chunk(fn, in_axes, num_clients, clients_per_chunk)
        if clients_per_chunk is None or num_clients <= clients_per_chunk:
            return of_chunk(*arguments)
        if clients_per_chunk == 1:  # JAX does not copy arguments that `fn` returns, such as an optimizer state
            return jax.lax.map(lambda own: fn(*_with_shared(in_axes, own, arguments)), _own(in_axes, arguments))
        rows, _ = _chunks(num_clients, clients_per_chunk)
        results = jax.lax.map(lambda rows: of_chunk(*per_client(partial(_take, rows), in_axes, arguments)), rows)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[rows.ndim :])[:num_clients], results)

    return _shard_map(mapped, in_axes, mesh)


class PartialSums(NamedTuple):
    """Per-device weighted sums of the clients' results, and which clients had finite results."""

    total: Any  #: [D, ...]: results times weights, one sum per device
    weight: chex.Array  #: [D]: sum of the weights of the clients in it
    finite: chex.Array  #: [K], bool: whether all of a client's result is finite


def weighted_sum_clients(
    fn: Callable[..., Any],
    in_axes: Sequence[int | None],
    mesh: Mesh | None = None,
    *,
    clients_per_chunk: int | None = None,
) -> Callable[..., PartialSums]:
    """The weighted sum of the results of `fn` over the clients of a group, without holding the result of each.

    At most the results of one chunk are in memory. Clients with weight zero or with a non-finite result are excluded.
    Each device sums its own clients; the partial sums of several groups are added on each device before `all_reduce`
    adds those of all devices.

    Args:
      fn: a function of one client; positional arguments only.
      in_axes: for each argument of `fn` 0 or None.
      mesh: as in `map_clients`.
      clients_per_chunk: as in `map_clients`.

    Returns:
      A function of weights [K] and stacked arguments that returns the partial sums of each device; D is 1 without a
      mesh. Negative and non-finite weights count as zero.

    Raises:
      ValueError: clients_per_chunk is neither None nor an integer of at least 1, or there is not one weight per client.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> sum_squares = fmd.mapping.weighted_sum_clients(jnp.square, (0,), clients_per_chunk=2)
      >>> sums = sum_squares(jnp.array([1.0, 0.5, 4.0]), jnp.array([1.0, 2.0, jnp.nan]))
      >>> sums.total.tolist(), sums.weight.tolist(), sums.finite.tolist()
      ([3.0], [1.5], [True, True, False])
    """
    in_axes = _check_mapping(in_axes, clients_per_chunk)

    def summed(weights, *arguments):
        num_clients = _num_clients(in_axes, arguments)
        check_numbers("weights", weights)
        weights = _weights_of_device(jnp.asarray(weights), num_clients, mesh)
        of_chunk = _of_chunk(fn, in_axes, num_clients, clients_per_chunk)

        def sum_chunk(weights, *arguments):
            return _masked_sum(weights, of_chunk(*arguments))

        if clients_per_chunk is None or num_clients <= clients_per_chunk:
            return sum_chunk(weights, *arguments)
        rows, real = _chunks(num_clients, clients_per_chunk)

        def of_rows(rows, real):
            own = jnp.where(real, weights[rows], 0.0)
            *sums, finite = sum_chunk(own, *per_client(partial(_take, rows), in_axes, arguments))
            return sums, finite

        def step(sums, chunk):
            more, finite = of_rows(*chunk)
            return jax.tree.map(jnp.add, sums, more), finite

        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_rows, rows[0], real[0])[0])
        sums, finite = jax.lax.scan(step, nothing, (rows, real))
        return PartialSums(*sums, finite.reshape(-1)[:num_clients])

    def one_sum(*arguments):
        *sums, finite = summed(*arguments)
        return PartialSums(*jax.tree.map(lambda leaf: leaf[None], sums), finite)

    # Weights are replicated: they are few, and a sharding of them would propagate to the code that computes them.
    return _shard_map(one_sum, (None, *in_axes), mesh)


def all_reduce(sums: chex.ArrayTree, mesh: Mesh | None = None) -> chex.ArrayTree:
    """Adds the partial sums of all devices, [D, ...] -> [...]: the only collective of a round."""
    if mesh is None:
        return jax.tree.map(lambda leaf: leaf[0], sums)
    (axis,) = mesh.axis_names

    def add(sums):
        return jax.lax.psum(jax.tree.map(lambda leaf: leaf[0], sums), axis)

    return jax.shard_map(add, mesh=mesh, in_specs=PartitionSpec(axis), out_specs=PartitionSpec(), check_vma=False)(sums)


def chunk_rows(num_clients: int, clients_per_chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides clients into even chunks of at most `clients_per_chunk`.

    Args:
      num_clients: number of clients, K.
      clients_per_chunk: maximum number of clients in a chunk, at least 1.

    Returns:
      Rows of the clients, [chunks, clients of a chunk], and which of them are real. A last chunk that is not full
      repeats the last client, since a chunk of another size would need another program.

    >>> chunk_rows(5, 4)[0].tolist()
    [[0, 1, 2], [3, 4, 4]]
    """
    num_chunks = -(-num_clients // clients_per_chunk)
    size = -(-num_clients // num_chunks)
    rows = np.arange(num_chunks * size).reshape(num_chunks, size)
    return np.minimum(rows, num_clients - 1), rows < num_clients


def _of_chunk(fn, in_axes, num_clients, clients_per_chunk):
    """`fn` for the stacked clients of a chunk; `fn` itself if clients run one by one."""
    if num_clients > 1:
        return fn if clients_per_chunk == 1 else jax.vmap(fn, in_axes)

    def of_one(*arguments):  # on a CPU a training step is 1.4 times faster than under `vmap`
        only = per_client(partial(jax.tree.map, lambda leaf: leaf[0]), in_axes, arguments)
        return jax.tree.map(lambda leaf: leaf[None], fn(*only))

    return of_one


def _chunks(num_clients, clients_per_chunk):
    """`chunk_rows`, with scalars instead of rows if clients run one by one."""
    rows, real = chunk_rows(num_clients, clients_per_chunk)
    return (rows[:, 0], real[:, 0]) if clients_per_chunk == 1 else (rows, real)


def _num_clients(in_axes, arguments):
    """The number of clients of the per-client arguments; raises ValueError if they differ or there are none."""
    if len(arguments) != len(in_axes):
        raise ValueError(f"{len(in_axes)} arguments are wanted, one for each of in_axes, got {len(arguments)}")
    num_clients = check_clients("per-client arguments", _own(in_axes, arguments))
    if num_clients is None:
        raise ValueError("at least one argument must be per client, with the axis 0 and an array, got none")
    return num_clients


def _own(in_axes, arguments):
    """The per-client arguments."""
    return [argument for axis, argument in zip(in_axes, arguments, strict=True) if axis is not None]


def _with_shared(in_axes, own, arguments):
    """The arguments, with `own` instead of those that are per client."""
    own = iter(own)
    return [argument if axis is None else next(own) for axis, argument in zip(in_axes, arguments, strict=True)]


def _check_mapping(in_axes, clients_per_chunk):
    """The axes as a tuple; raises ValueError if they or the chunk are invalid."""
    in_axes = tuple(as_list("in_axes", in_axes))
    if not all(axis is None or (type(axis) is int and axis == 0) for axis in in_axes):
        raise ValueError(f"in_axes must be 0 or None for each argument, got {describe_value(in_axes)}")
    if clients_per_chunk is not None:
        check_count("clients_per_chunk", clients_per_chunk)
    return in_axes


def valid_weights(weights: chex.Array) -> chex.Array:
    """The weights, with zero instead of negative and non-finite ones."""
    return jnp.where((weights > 0) & (weights < jnp.inf), weights, 0.0)


def _take(rows, tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).at[rows].get(mode="promise_in_bounds"), tree)


def _masked_sum(weights, results):
    """`PartialSums` of weights [k] and results [k, ...], or of one weight and one result."""
    finite = partial(_all_finite, num_batch=weights.ndim)
    finite = reduce(jnp.logical_and, map(finite, jax.tree.leaves(results)))
    weights = jnp.where(finite, valid_weights(weights), 0.0)
    return PartialSums(jax.tree.map(partial(_weighted_sum, weights), results), jnp.sum(weights), finite)


def _all_finite(leaf, *, num_batch):
    return jnp.all(jnp.isfinite(leaf), axis=tuple(range(num_batch, leaf.ndim)))


def _weighted_sum(weights, results):
    mask = jnp.expand_dims(weights > 0, range(weights.ndim, results.ndim))
    masked = jnp.where(mask, results, 0.0)  # 0 * NaN would be NaN
    return jnp.tensordot(weights, masked, axes=weights.ndim, precision=jax.lax.Precision.HIGHEST)


def _weights_of_device(weights, num_clients, mesh):
    wanted = (num_clients * (1 if mesh is None else mesh.size),)
    if weights.shape != wanted:
        raise ValueError(f"one weight per client is needed, of shape {wanted}, got {weights.shape}")
    if mesh is None:
        return weights
    (axis,) = mesh.axis_names
    return jax.lax.dynamic_slice_in_dim(weights, jax.lax.axis_index(axis) * num_clients, num_clients)


def _shard_map(fn, in_axes, mesh):
    """`fn` of all clients; with a mesh, each device applies it to its own clients."""
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
