import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings, strategies as st

from fedmd_jax.mapping.packing import buffer_lengths, pack, unpack

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool")
ARRAYS = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 2**32 - 1))
TREES = st.dictionaries(st.text(max_size=2), ARRAYS, max_size=4)


def array(dtype, shape, seed):
    """Any bits that the dtype can have: NaN with payloads, negative zero, denormal numbers."""
    dtype = jnp.dtype(dtype)
    bits = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    raw = np.frombuffer(bits, np.uint8)
    return ((raw & 1).astype(dtype) if dtype.name == "bool" else raw.view(dtype)).reshape(shape)


@given(st.lists(TREES, min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_unpack_inverts_pack_to_the_bit(specifications):
    """Trees of any shapes and dtypes, each in buffers that would hold the largest."""
    trees = [{name: array(*leaf) for name, leaf in tree.items()} for tree in specifications]
    lengths = buffer_lengths(trees)
    for tree in trees:
        buffers = pack(tree, lengths)
        assert {dtype: buffer.shape for dtype, buffer in buffers.items()} == {d: (n,) for d, n in lengths.items()}
        back = unpack(buffers, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree))
        assert all(back[name].tobytes() == leaf.tobytes() for name, leaf in tree.items())
        chex.assert_trees_all_equal_shapes_and_dtypes(back, tree)


def test_in_a_program_it_is_the_same(key):
    tree = {"w": jnp.array([1.0, jnp.nan, -0.0]), "n": jnp.int32(3), "keys": jax.random.split(key, 2)}
    shapes = jax.eval_shape(lambda tree: tree, tree)

    @jax.jit
    def there_and_back(tree):
        return unpack(pack(tree, {"float32": 9, "int32": 1, "uint32": 4}), shapes)

    chex.assert_trees_all_equal(there_and_back(tree), tree)


def test_no_buffer_is_longer_than_the_longest_tree_needs():
    trees = [{"a": jnp.zeros((2, 3)), "b": jnp.zeros(2, bool)}, {"a": jnp.zeros(5), "c": jnp.zeros(5)}]
    assert buffer_lengths(trees) == {"bool": 2, "float32": 10}
