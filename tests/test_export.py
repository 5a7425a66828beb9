"""A round is exported for other machines, serialized, deserialized and called."""

from functools import partial

import chex
import jax
import numpy as np
import pytest
import toys
from jax import export

import fedmd_jax as fmd
from fedmd_jax.models import CNN, architecture_from_linen, choose_form, conv_general_dilated

NUM_CLIENTS = 2
CHOOSES_FOR = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}


def images(seed, num_examples):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num_examples, 6, 6, 1)).astype(np.float32), rng.integers(0, 4, num_examples)


PUBLIC = fmd.public_dataset(*images(100, 9))


def flat_round(platform, num_devices):
    """A round as a function of a list of arrays, and these: a serialized program knows no records of ours or of optax.

    Two clients with convolutions in the form for this platform, batch-norm and dropout.
    """
    convolution = partial(conv_general_dilated, choose=partial(choose_form, platform=CHOOSES_FOR[platform]))
    architecture = architecture_from_linen(CNN((2, 3), 4, 0.3, convolution))
    groups = {"cnn": fmd.ArchitectureGroup(architecture, range(NUM_CLIENTS))}
    mesh = None if num_devices == 1 else fmd.client_mesh(num_devices)
    trainings = {"digest_training": toys.sgd(4), "revisit_training": toys.sgd(2)}
    federation = fmd.fedmd(groups, subset_size=6, mesh=mesh, **trainings)
    private = fmd.stack_private(groups, {i: images(i, 3 + i) for i in range(NUM_CLIENTS)})
    states = federation.new_states(jax.random.key(1), PUBLIC.inputs[:1])
    sharded = fmd.mapping.sharding.shard_tree((states, private), mesh)
    leaves, structure = jax.tree.flatten((sharded, PUBLIC))

    def run(leaves, key):
        (states, private), public = jax.tree.unflatten(structure, leaves)
        return jax.tree.leaves(federation.round(states, public, private, key))

    return jax.jit(run), (leaves, jax.random.key(2))


def serialized(fn, arguments, platforms):
    return export.deserialize(export.export(fn, platforms=platforms)(*arguments).serialize())


@pytest.mark.parametrize(("platform", "num_devices"), [("cuda", NUM_CLIENTS), ("tpu", 1)])
def test_a_round_is_exported_for_other_platforms(platform, num_devices):
    exported = serialized(*flat_round(platform, num_devices), [platform])
    assert exported.platforms == (platform,)
    assert exported.nr_devices == num_devices
    # The consensus, in the program before compilation.
    assert exported.mlir_module().count("stablehlo.all_reduce") == (0 if num_devices == 1 else 1)


@pytest.mark.parametrize(("platforms", "num_devices"), [(["cpu"], 1), (["cpu", "cuda", "tpu"], NUM_CLIENTS)])
def test_an_exported_round_equals_the_round(platforms, num_devices):
    """Also if one program is for several platforms, with the forms of one of them."""
    fn, arguments = flat_round("cpu", num_devices)
    found = jax.device_get(jax.jit(serialized(fn, arguments, platforms).call)(*arguments))
    chex.assert_trees_all_close(found, jax.device_get(fn(*arguments)), rtol=1e-6, atol=1e-6)
