"""The benchmark of transfer learning: its clients are those of a run, and own means are subtracted correctly."""

import ablation
import gap
import numpy as np
import pytest
import transfer

import fedmd_jax as fmd
from fedmd_jax.experiments.setup import prepare

WORDS = "--smoke --networks mlp:n1=4 2conv:n1=2,n2=3 --data.num-test 200"


@pytest.fixture(scope="module")
def setup():
    return prepare([ablation.experiment_of("quickstart", WORDS)])


def test_clients_are_those_of_the_ablation(setup):
    """Which are those of a run, see test_ablation.py."""
    found = transfer.measure("quickstart", WORDS, [0, 1])
    clients = gap.Clients(setup, [0, 1])
    assert found["transfer"] == transfer.accuracies(clients, ablation.transferred(setup))
    assert found["re-estimated"][0] == found["transfer"][0]  # no batch norm
    others = transfer.with_own_mean(clients, setup)  # trained and tested on the same images
    assert found["own mean"] == transfer.accuracies(others, others.start())
    assert found["own mean"] != transfer.accuracies(clients, others.start())


def test_own_means_are_those_of_the_private_source(setup):
    clients = gap.Clients(setup, [0])
    others = transfer.with_own_mean(clients, setup)
    images, _ = fmd.data.load_images(setup.experiment.data.private, "train")
    mean = fmd.data.mean_image(fmd.data.scale(images))
    ((name, private),) = others.private.items()
    for inputs in (others.test.inputs, private.inputs):
        pixels = 255 * (np.asarray(inputs) + mean)
        np.testing.assert_allclose(pixels, np.round(pixels), atol=1e-3)
    assert not np.allclose(private.inputs, clients.private[name].inputs)


@pytest.mark.parametrize("client_ids", [[1, 0], [0, 7]])
def test_other_orders_and_unknown_clients_are_refused(client_ids, setup):
    with pytest.raises(SystemExit, match="whole groups, in their order"):
        gap.Clients(setup, client_ids)
