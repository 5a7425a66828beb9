"""Exported clients, read back, and read by a program that has Flax alone."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toys
from experiments import exported_reader
from flax import linen as nn, nnx

import fedmd_jax as fmd
from fedmd_jax.experiments.networks import architecture_from_name
from fedmd_jax.experiments.run_directory import RunDirectoryError
from fedmd_jax.simulation import Preprocessing

FORMATS = ("orbax", "safetensors")


class WithBatchNorm(nnx.Module):
    def __init__(self, rngs):
        layers = [nnx.Linear(5, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)]
        self.layers = nnx.List(layers) if hasattr(nnx, "List") else layers  # flax 0.11

    def __call__(self, x):
        return self.layers[1](self.layers[0](x))


def client_of(architecture, shape, seed=0, preprocess=None):
    """A client whose variables are all different numbers."""
    inputs = np.random.default_rng(seed).normal(size=(70, *shape)).astype(np.float32)
    groups = {"network": fmd.ArchitectureGroup(architecture, (2, 5))}
    states = fmd.fedmd(groups).new_states(jax.random.key(seed), inputs)
    rng = np.random.default_rng(seed)
    states = jax.tree.map(lambda leaf: np.abs(leaf) + rng.uniform(0.1, 1, leaf.shape).astype(leaf.dtype), states)
    return fmd.trained_clients(groups, states, inputs, preprocess=preprocess)[5], inputs


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        (toys.linear(), (5,)),
        (toys.normed(), (5,)),
        (fmd.architecture_from_nnx(WithBatchNorm), (5,)),
        (architecture_from_name("resnet8:width=0.1", 7), (8, 8, 3)),
    ],
    ids=["function", "state", "nnx", "resnet"],
)
def test_a_client_comes_back_as_it_was(architecture, shape, format, tmp_path):
    client, inputs = client_of(architecture, shape, preprocess=Preprocessing(np.ones(shape, np.float32)))
    again = fmd.import_client(fmd.export_client(client, tmp_path / "client", format=format), architecture)
    assert (again.client_id, again.name, again.num_classes) == (5, "network", client.num_classes)
    for ours, theirs in ((again.params, client.params), (again.state.model_state, client.state.model_state)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    np.testing.assert_array_equal(again.logits(inputs), client.logits(inputs))
    np.testing.assert_array_equal(again.preprocess.mean, client.preprocess.mean)
    with pytest.raises(RunDirectoryError, match=r"must be new, but .* exists"):
        fmd.export_client(client, tmp_path / "client", format=format)


@pytest.mark.parametrize("format", FORMATS)
def test_another_program_with_a_network_of_its_own_predicts_the_same(format, tmp_path):
    network = architecture_from_name("2conv:n1=3,n2=4", 7)
    client, _ = client_of(network, (9, 9, 1), preprocess=Preprocessing(np.full((9, 9, 1), 0.25, np.float32)))
    images = np.random.default_rng(1).integers(0, 256, (60, 9, 9, 1), dtype=np.uint8)
    fmd.export_client(client, tmp_path / "client", format=format)
    logits = client.logits(client.preprocess(images))
    assert len(set(logits.argmax(axis=-1).tolist())) > 1
    np.testing.assert_allclose(exported_reader.predict(tmp_path / "client", images), logits, rtol=1e-4)


def test_variables_are_those_that_linen_takes(tmp_path):
    module = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)])
    client, inputs = client_of(fmd.architecture_from_linen(module, train_argument=None), (5,))
    variables, about = exported_reader.read(fmd.export_client(client, tmp_path / "client"))
    assert sorted(variables["params"]) == ["layers_0", "layers_2"]
    np.testing.assert_allclose(module.apply(variables, inputs), client.logits(inputs), rtol=1e-5)
    assert about == {
        "architecture": "network",
        "client_id": 5,
        "num_classes": 3,
        "input_shape": [5],
        "input_dtype": "float32",
        "preprocessing": None,
        "versions": about["versions"],
    }
    assert about["versions"]["fedmd_jax"] == fmd.__version__


def test_what_cannot_be_exported_or_imported(tmp_path):
    client, _ = client_of(toys.linear(), (5,))
    with pytest.raises(ValueError, match="unknown format 'pickle', known are orbax, safetensors"):
        fmd.export_client(client, tmp_path / "client", format="pickle")
    halves, _ = client_of(
        toys.linear()._replace(init=lambda *_: ({"w": jnp.ones((5, 4)), "b": jnp.ones(4, jnp.bfloat16)}, {})), (5,)
    )
    with pytest.raises(ValueError, match="use format 'orbax'"):
        fmd.export_client(halves, tmp_path / "client", format="safetensors")
    with pytest.raises(RunDirectoryError, match=r"cannot read .*client: No such file or directory"):
        fmd.import_client(tmp_path / "client", toys.linear())
    fmd.export_client(client, tmp_path / "client", format="safetensors")
    with pytest.raises(ValueError, match=r"has another network: params/u is missing there, float32\[5, 6\] "):
        fmd.import_client(tmp_path / "client", toys.tanh_mlp())
    file = tmp_path / "client" / "client.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"input_shape": None}))
    with pytest.raises(RunDirectoryError, match="it may be damaged"):
        fmd.import_client(tmp_path / "client", toys.linear())


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    client, _ = client_of(toys.linear(), (5,))
    monkeypatch.setattr(ocp.StandardCheckpointer, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(RunDirectoryError, match="no space"):
        fmd.export_client(client, tmp_path / "client")
    assert not list(tmp_path.iterdir())


def test_a_format_whose_package_is_missing_says_how_to_install_it(tmp_path, monkeypatch):
    client, _ = client_of(toys.linear(), (5,))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fedmd_jax\[safetensors\]'"):
        fmd.export_client(client, tmp_path / "client", format="safetensors")
    assert not list(tmp_path.iterdir())
