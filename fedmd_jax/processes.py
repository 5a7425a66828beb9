"""Arrays of a run in many processes, `jax.distributed`: each process has a part of them, the one on its own devices.

All processes run the same program on the same global arrays. What is said here to be done by all of them together
waits until all of them do it; in one process nobody waits and nothing is sent.
"""

import functools
from typing import Any

import chex
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def on_host(tree: chex.ArrayTree) -> chex.ArrayTree:
    """All arrays as NumPy arrays, in every process; by all processes together.

    Args:
      tree: of arrays on devices, also on those of other processes, which send their parts then, one array after the
        other: so much memory is needed on each device. What is a NumPy array stays what it is.

    >>> on_host({"a": jax.numpy.arange(3)})
    {'a': array([0, 1, 2], dtype=int32)}
    """
    leaves, structure = jax.tree.flatten(tree)
    apart = [is_elsewhere(leaf) and not leaf.is_fully_replicated for leaf in leaves]
    here = iter(jax.device_get([leaf for leaf, is_apart in zip(leaves, apart, strict=True) if not is_apart]))
    fetched = [_gather(leaf) if is_apart else next(here) for leaf, is_apart in zip(leaves, apart, strict=True)]
    return jax.tree.unflatten(structure, fetched)


def put_global(leaf: Any, sharding: Sharding) -> jax.Array:
    """An array on the devices of a sharding, of which each process reads the parts of its own devices only.

    Args:
      leaf: an array that this process has, of which every process has the same, or that has been put before.
      sharding: also over devices of other processes.
    """
    if sharding.is_fully_addressable or is_elsewhere(leaf):
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)  # `device_put` would send all of it to all processes, to compare
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def is_elsewhere(leaf: Any) -> bool:
    """Whether a part of an array is on devices of other processes."""
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _gather(leaf):
    everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    copies = jax.block_until_ready(_copy_to(everywhere)(leaf))  # on all devices, before anything else crosses them
    return np.asarray(copies.addressable_data(0))


@functools.cache
def _copy_to(sharding):
    return jax.jit(lambda leaf: leaf, out_shardings=sharding)
