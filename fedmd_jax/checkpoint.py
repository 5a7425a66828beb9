"""Clients on disk: trees of arrays, written whole or not at all, read back to the bit."""

import pathlib

import chex
import jax
from orbax.checkpoint import v1 as ocp


def save_tree(path: pathlib.Path, tree: chex.ArrayTree) -> None:
    """Writes a tree of JAX arrays as a directory that appears when it is complete.

    Args:
      path: the directory; one that is there is replaced.
      tree: of arrays without PRNG keys.
    """
    ocp.save(path.absolute(), tree, overwrite=True)


def load_tree(path: pathlib.Path, shapes: chex.ArrayTree) -> chex.ArrayTree:
    """Reads what `save_tree` has written, onto the first device.

    Args:
      path: the directory.
      shapes: the tree, with a shape and a dtype in each place, as `jax.eval_shape` gives.
    """
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
    return ocp.load(path.absolute(), wanted)
