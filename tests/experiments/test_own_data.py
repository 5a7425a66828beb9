import chex
import jax
import numpy as np

from fedmd_jax.clients import stack_private
from fedmd_jax.experiments.datasets import load
from fedmd_jax.experiments.own_data import of_everybody, take_own
from fedmd_jax.experiments.prepared import group_clients
from fedmd_jax.mapping import client_mesh
from fedmd_jax.spread import spread_clients


def test_what_each_takes_of_its_own_is_what_one_takes_of_all(experiment):
    """In one process, whose own clients are all; `test_processes` has two."""
    datasets = load(experiment.data, num_clients=3, seed=0)
    groups, mesh, costs = group_clients(experiment, datasets.num_classes), client_mesh(2), {"mlp": 3.0, "mlp:n1=3": 1.0}
    taken, private = take_own(groups, datasets, mesh, costs=costs)
    whole = spread_clients(stack_private(groups, dict(datasets.private)), mesh, costs=costs)
    assert jax.tree.structure(private) == jax.tree.structure(whole)
    chex.assert_trees_all_equal(private, whole)
    everybody = of_everybody(groups, private)
    assert sorted(everybody) == sorted(taken.private) == [0, 1, 2]
    for client_id, examples in everybody.items():
        for part, expected in zip(examples, datasets.private[client_id], strict=True):
            np.testing.assert_array_equal(part, expected)
