"""Loads an exported client with Flax and Orbax or safetensors alone, without fedmd_jax.

python exported_reader.py DIRECTORY INPUTS.npy CLASSES.npy: compares the classes it predicts with those in a file.
"""

import json
import pathlib
import sys

import flax.linen as nn
import jax
import numpy as np


class TwoConvolutions(nn.Module):
    """The network 2conv:n1=...,n2=... of fedmd_jax in inference mode, from Flax's own layers."""

    filters: tuple[int, int]
    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.filters[0], (3, 3), name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn1")(x))
        x = nn.avg_pool(x, (2, 2), (1, 1), "SAME", count_include_pad=False)
        x = nn.Conv(self.filters[1], (3, 3), (2, 2), "VALID", name="conv2")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn2")(x))
        return nn.Dense(self.num_classes, use_bias=False, name="head")(x.reshape(len(x), -1))


def read(path):
    """The variables of either format, and what is known of the client."""
    path = pathlib.Path(path).absolute()
    about = json.loads((path / "client.json").read_text())
    if not (path / "variables.safetensors").exists():
        import orbax.checkpoint as ocp

        return ocp.StandardCheckpointer().restore(path / "variables"), about
    from flax.traverse_util import unflatten_dict
    from safetensors.flax import load_file

    return unflatten_dict(load_file(path / "variables.safetensors"), sep="/"), about


def predict(path, images):
    """Logits [N, C] of images, uint8."""
    variables, about = read(path)
    assert not about["preprocessing"]["center_ink"]
    inputs = images / np.float32(about["preprocessing"]["divide_by"])
    inputs = inputs - np.asarray(about["preprocessing"]["subtract"], np.float32)
    assert inputs.shape[1:] == tuple(about["input_shape"])
    filters = [variables["params"][name]["kernel"].shape[-1] for name in ("conv1", "conv2")]
    return TwoConvolutions(tuple(filters), about["num_classes"]).apply(jax.tree.map(np.asarray, variables), inputs)


if __name__ == "__main__":
    directory, images, classes = sys.argv[1:]
    logits = predict(directory, np.load(images))
    np.testing.assert_array_equal(logits.argmax(axis=-1), np.load(classes))
    assert "fedmd_jax" not in sys.modules
    print(f"{directory}: {len(logits)} predictions are the same")
