"""One trained client in files that programs without this package read, and back."""

import importlib
import json
import pathlib
from types import ModuleType
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.checks import unknown
from fedmd_jax.data.files import user_path
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.simulation.trained import Preprocessing, TrainedClient
from fedmd_jax.types import Architecture, ClientState

_ABOUT, _ORBAX, _SAFETENSORS = "client.json", "variables", "variables.safetensors"
Format = Literal["orbax", "safetensors"]


def export_client(client: TrainedClient, path: str | pathlib.Path, *, format: Format = "orbax") -> pathlib.Path:
    """Writes one client to a directory: the variables of its network, and what is known of it.

    `client.json` has architecture, number of classes, shape and dtype of inputs, preprocessing of images (`center_ink`,
    then `divide_by`, then `subtract`; null if it is not known) and versions.

    The variables are those of a Flax linen module, `{"params": {...}, "batch_stats": {...}}`, as its `apply` takes
    them, with names and shapes of Flax's own layers: `kernel` [in, out] or [h, w, in, out], `bias`, and `scale`,
    `bias`, `mean`, `var` of batch norms, whose epsilon is 1e-3 in the networks of this package. Optimizer states are
    left out.

    Args:
      client: from `load_run(...).client(...)` or `trained_clients`.
      path: a new directory.
      format: "orbax", a standard checkpoint of nested dictionaries in `variables/`; or "safetensors", one file
        `variables.safetensors` with names such as `params/head/kernel`, which takes the extra `safetensors`.

    Returns:
      The path.

    Raises:
      RunDirectoryError: the directory exists or cannot be made.
      ValueError: an unknown format.

    Example:
      >>> import tempfile
      >>> import jax, jax.numpy as jnp
      >>> import fedmd_jax as fmd
      >>> from fedmd_jax.models import MLP
      >>> network = fmd.architecture_from_linen(MLP((8,), num_classes=3))
      >>> federation = fmd.fedmd({"mlp": fmd.ArchitectureGroup(network, client_ids=(0, 1, 2))})
      >>> inputs = jnp.ones((5, 4))
      >>> states = federation.new_states(jax.random.key(0), inputs)  # and training
      >>> client = fmd.trained_clients(federation.groups, states, inputs)[2]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = fmd.export_client(client, f"{folder}/client2")
      ...     again = fmd.import_client(path, network)
      >>> bool((again.predict(inputs) == client.predict(inputs)).all())
      True

      A program that has Flax and Orbax, but not this package, with its own module of the same names::

        import flax.linen as nn
        import orbax.checkpoint as ocp

        class MLP(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.relu(nn.Dense(8, name="dense1")(x))
                return nn.Dense(3, name="head")(x)

        variables = ocp.StandardCheckpointer().restore("/absolute/path/client2/variables")
        logits = MLP().apply(variables, inputs)
    """
    if format not in ("orbax", "safetensors"):
        raise ValueError(unknown("format", str(format), ("orbax", "safetensors")))
    path, arrays = user_path(path), {name: np.asarray(leaf) for name, leaf in _named(client.state).items()}
    about = {
        "architecture": client.name,
        "client_id": client.client_id,
        "num_classes": client.num_classes,
        "input_shape": client.inputs.shape[1:],
        "input_dtype": client.inputs.dtype.name,
        "versions": files.origin()["versions"],
        "preprocessing": client.preprocess.to_record() if isinstance(client.preprocess, Preprocessing) else None,
    }
    content = {_ABOUT: json.dumps(about).encode()}  # on one line: a mean image has thousands of numbers
    if format == "safetensors":
        if any(array.dtype.kind not in "biuf" for array in arrays.values()):
            raise ValueError("safetensors does not read bfloat16 into NumPy: use format 'orbax'")
        content[_SAFETENSORS] = _safetensors().save(arrays)

    def save(folder: pathlib.Path) -> None:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / _ORBAX).absolute(), ocp.tree.from_flat_dict(arrays, sep="/"))

    return files.create(path, content, save) if format == "orbax" else files.create(path, content)


def import_client(path: str | pathlib.Path, architecture: Architecture) -> TrainedClient:
    """Reads what `export_client` has written.

    Args:
      path: the directory.
      architecture: the client's network.

    Returns:
      The client, without optimizer states.

    Raises:
      RunDirectoryError: no such directory, or `client.json` is missing or damaged.
      ValueError: the client has another network.

    Example:
      >>> import tempfile
      >>> import jax, jax.numpy as jnp
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((8,), num_classes=3))
      >>> groups = {"mlp": fmd.ArchitectureGroup(network, client_ids=(2,))}
      >>> inputs = jnp.ones((5, 4))
      >>> states = fmd.fedmd(groups).new_states(jax.random.key(0), inputs)  # and training
      >>> client = fmd.trained_clients(groups, states, inputs)[2]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = fmd.export_client(client, f"{folder}/client2")
      ...     fmd.import_client(path, network)
      TrainedClient(client_id=2, name='mlp', inputs=float32[N, 4])

      A client of a run has the network that its name describes, with the settings `width` and `dtype`::

        from fedmd_jax.experiments.networks import architecture_from_name

        network = architecture_from_name("2conv:n1=128,n2=256", num_classes=16, width=0.25)
        client = fmd.import_client("client2", network)
    """
    path = user_path(path)
    with files.reading(path):
        about = json.loads((path / _ABOUT).read_bytes())
        inputs = jax.ShapeDtypeStruct((1, *about["input_shape"]), jnp.dtype(about["input_dtype"]))
        preprocess = about["preprocessing"] and Preprocessing.from_record(about["preprocessing"])
        known = {"client_id": about["client_id"], "name": about["architecture"], "preprocess": preprocess}
    state = ClientState(*jax.eval_shape(architecture.init, jax.random.key(0), inputs), (), ())
    arrays, shapes = _read_arrays(path), _named(state)
    for name in {**shapes, **arrays}:
        there, here = (_describe(leaves[name]) if name in leaves else "missing" for leaves in (arrays, shapes))
        if there != here:
            raise ValueError(f"the client in {path} has another network: {name} is {there} there, {here} here")
    state = jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in shapes])
    return TrainedClient(architecture=architecture, state=state, inputs=inputs, **known)


def _safetensors() -> ModuleType:
    try:
        return importlib.import_module("safetensors.numpy")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the format needs safetensors: pip install 'fedmd_jax[safetensors]'") from error


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The variables by name, in either format."""
    if (path / _SAFETENSORS).exists():
        return _safetensors().load_file(path / _SAFETENSORS)
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return _flat(checkpointer.restore((path / _ORBAX).absolute()))


def _named(state: ClientState) -> dict[str, Any]:
    """The variables of a client by name, such as `params/head/kernel`, in the order of the leaves."""
    named = {**_flat({"params": state.params}), **_flat(state.model_state)}
    if "" in named or len(named) < len(jax.tree.leaves((state.params, state.model_state))):
        raise ValueError("the model state must be a mapping of collections without the name params, as that of Flax is")
    return named


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _flat(tree: chex.ArrayTree) -> dict[str, Any]:
    """Leaves by path: `{"a": {"b": 1}}` becomes `{"a/b": 1}`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
