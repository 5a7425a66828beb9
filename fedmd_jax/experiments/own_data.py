"""Private data of a run in many processes: each takes the examples of the clients on its own devices, and no others."""

from collections.abc import Mapping

import chex
import jax
import numpy as np
from jax.sharding import Mesh

from fedmd_jax.clients import Groups, check_private, stack_examples
from fedmd_jax.experiments.datasets import Datasets
from fedmd_jax.processes import on_host
from fedmd_jax.spread import Spread, gather_clients, own_clients, spread_own_clients
from fedmd_jax.types import PrivateDataset


def take_own(
    groups: Groups, datasets: Datasets, mesh: Mesh, *, costs: Mapping[str, float] | None = None
) -> tuple[Datasets, Spread]:
    """The private examples of this process's clients.

    Args:
      groups: all clients.
      datasets: as `load` gives them: nothing private is taken yet.
      mesh: over devices of several processes.
      costs: with which the clients are spread.

    Returns:
      The datasets, in which `private` has the own clients only, and the private data of all on their devices, padded as
      `stack_private` does it.

    Raises:
      ValueError: examples that cannot be trained on.
    """
    sizes = {name: group.num_clients for name, group in groups.items()}
    ids = {(name, k): groups[name].client_ids[k] for name, k in own_clients(sizes, mesh, costs=costs)}
    private = check_private({client_id: datasets.private[client_id] for client_id in sorted(ids.values())})
    num_rows = {
        name: max(datasets.private.num_examples[client_id] for client_id in group.client_ids)
        for name, group in groups.items()
    }
    own = {}
    for (name, k), client_id in ids.items():
        stack_of_one = stack_examples([private[client_id]], num_rows[name])
        own[name, k] = jax.tree.map(lambda leaf: leaf[0], stack_of_one)
    shapes = {name: _shapes(sizes[name], num_rows[name], datasets.public.inputs) for name in groups}
    return datasets._replace(private=private), spread_own_clients(own, shapes, mesh, costs=costs)


def of_everybody(groups: Groups, private: Mapping[str, PrivateDataset]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Inputs and labels of every client without padding, by id, sent from device to device; by all processes together.

    Args:
      groups: all clients.
      private: their private data, on their devices.
    """
    examples = {}
    for name, stacked in gather_clients(on_host(private)).items():
        for client_id, inputs, labels, n in zip(groups[name].client_ids, *stacked, strict=True):
            examples[client_id] = inputs[:n], labels[:n]
    return examples


def _shapes(num_clients: int, num_rows: int, inputs: chex.Array) -> PrivateDataset:
    return PrivateDataset(
        jax.ShapeDtypeStruct((num_clients, num_rows, *inputs.shape[1:]), inputs.dtype),
        jax.ShapeDtypeStruct((num_clients, num_rows), np.int32),
        jax.ShapeDtypeStruct((num_clients,), np.int32),
    )
