"""A whole round leaves the process: exported for machines that are not here, stored, read back, called."""

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
CHOOSES_FOR = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}


def images(seed, num_examples):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num_examples, 6, 6, 1)).astype(np.float32), rng.integers(0, 4, num_examples)


PUBLIC = fmd.public_dataset(*images(100, 9))


def federation(platform, mesh=None):
    """Two clients with convolutions, batch-norm and dropout; the form of a convolution is that of the platform."""
    convolution = partial(conv_general_dilated, choose=partial(choose_form, platform=CHOOSES_FOR[platform]))
    architecture = architecture_from_linen(CNN((2, 3), 4, 0.3, convolution))
    groups = {"cnn": fmd.ArchitectureGroup(architecture, range(NUM_CLIENTS))}
    trainings = {"digest_training": toys.sgd(4), "revisit_training": toys.sgd(2)}
    return fmd.fedmd(groups, subset_size=6, mesh=mesh, **trainings)


def flat(federation):
    """The round of a list of arrays, and the list: what is stored knows neither our records nor those of optax."""
    private = fmd.stack_private(federation.groups, {i: images(i, 3 + i) for i in range(NUM_CLIENTS)})
    states = federation.new_states(jax.random.key(1), PUBLIC.inputs[:1])
    sharded = fmd.mapping.sharding.shard_tree((states, private), federation.mesh)
    leaves, structure = jax.tree.flatten((sharded, PUBLIC))

    def run(leaves, key):
        (states, private), public = jax.tree.unflatten(structure, leaves)
        return jax.tree.leaves(federation.round(states, public, private, key))

    return jax.jit(run), (leaves, jax.random.key(2))


def stored(fn, arguments, platforms):
    """The export after a trip through bytes."""
    return export.deserialize(export.export(fn, platforms=platforms)(*arguments).serialize())


@pytest.mark.parametrize(
    ("platform", "num_devices"), [("cuda", NUM_CLIENTS), ("rocm", None), ("tpu", None), ("tpu", NUM_CLIENTS)]
)
def test_a_round_is_exported_for_machines_that_are_not_here(platform, num_devices):
    mesh = None if num_devices is None else fmd.client_mesh(num_devices)
    exported = stored(*flat(federation(platform, mesh)), [platform])
    assert exported.platforms == (platform,)
    assert exported.nr_devices == (num_devices or 1)
    # The consensus, as it stands in the program before the compiler adds what it must.
    assert exported.mlir_module().count("stablehlo.all_reduce") == (0 if mesh is None else 1)


@pytest.mark.parametrize(
    ("platforms", "num_devices"),
    [(["cpu"], None), (["cpu", "cuda", "rocm", "tpu"], NUM_CLIENTS)],
    ids=["here on one device", "anywhere on two"],
)
def test_a_stored_round_is_the_round(platforms, num_devices):
    """Also where one program is for all platforms, with the forms of one of them."""
    mesh = None if num_devices is None else fmd.client_mesh(num_devices)
    fn, arguments = flat(federation("cpu", mesh))
    actual = jax.device_get(jax.jit(stored(fn, arguments, platforms).call)(*arguments))
    chex.assert_trees_all_close(actual, jax.device_get(fn(*arguments)), rtol=1e-6, atol=1e-6)
