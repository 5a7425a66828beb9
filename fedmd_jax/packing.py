"""Trees of any arrays as flat buffers, one per dtype, and back to the bit.

Networks of different shapes become arrays of one shape, so that each device of a mesh can hold another one.
"""

import math
from collections.abc import Collection, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np

Buffers = dict[str, chex.Array]  # by dtype, [L]
Lengths = Mapping[str, int]  # by dtype


def buffer_lengths(shapes: Collection[chex.ArrayTree]) -> dict[str, int]:
    """How long the buffers must be that hold any one of these trees.

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
    """A tree as one flat buffer per dtype, filled up with zeros; typed PRNG keys are stored as their words.

    Args:
      tree: JAX arrays, or NumPy arrays for a result of NumPy arrays.
      lengths: of the buffers, from `buffer_lengths` of a collection with this tree.

    >>> pack({"a": np.ones((2, 2), np.float32), "b": np.int32(7)}, {"float32": 5, "int32": 2})
    {'float32': array([1., 1., 1., 1., 0.], dtype=float32), 'int32': array([7, 0], dtype=int32)}
    """
    leaves: dict[str, list[chex.Array]] = {dtype: [] for dtype in lengths}
    for leaf in jax.tree.leaves(tree):
        words = jax.random.key_data(leaf) if _is_key(leaf.dtype) else leaf
        leaves[words.dtype.name].append(words.reshape(-1))
    return {dtype: _join(leaves[dtype], dtype, length) for dtype, length in lengths.items()}


def unpack(buffers: Buffers, shapes: chex.ArrayTree) -> chex.ArrayTree:
    """The tree that `pack` was given.

    Args:
      buffers: JAX or NumPy arrays.
      shapes: the tree with a shape and a dtype in each place.

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
    """Dtype and shape of what a buffer holds of an array."""
    if not _is_key(leaf.dtype):
        return np.dtype(leaf.dtype).name, leaf.shape
    words = jax.eval_shape(jax.random.key_data, leaf)
    return words.dtype.name, words.shape


def _implementation(keys):
    """Of PRNG keys of which there is only the shape."""
    found = []
    jax.eval_shape(lambda keys: found.append(jax.random.key_impl(keys)), keys)
    return found[0]


def _is_key(dtype):
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _join(leaves, dtype, length):
    numpy = jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np
    rest = np.zeros(length - sum(leaf.size for leaf in leaves), jnp.dtype(dtype))
    return numpy.concatenate([*leaves, rest])
