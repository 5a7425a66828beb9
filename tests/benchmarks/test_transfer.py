"""The benchmark of transfer learning: its clients are those of a run, and own means are subtracted correctly."""

import json

import gap
import numpy as np
import pytest
import transfer
from ablation import experiment_of

import fedmd_jax as fmd
from fedmd_jax.cli import main
from fedmd_jax.experiments.setup import prepare

WORDS = "--smoke --networks mlp:n1=4 2conv:n1=2,n2=3 --data.num-test 200"


def test_clients_are_those_of_a_run(tmp_path):
    words = "--data.evaluate-on validation --no-local --no-pooled --num-rounds 0"
    assert main(["run", "quickstart", *WORDS.split(), *words.split(), "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = transfer.measure("quickstart", WORDS, [0, 1])
    wanted = [client["transfer_accuracy"] for client in summary["clients"]]
    assert found["transfer"] == pytest.approx(wanted, abs=0.01)  # the prediction of one image may differ
    assert found["re-estimated"][0] == found["transfer"][0]  # no batch norm


def test_other_orders_and_parts_of_groups_are_refused():
    setup = prepare([experiment_of("quickstart", WORDS)])
    for client_ids in ([1, 0], [0, 7]):
        with pytest.raises(SystemExit, match="whole groups, in their order"):
            gap.Clients(setup, client_ids)


def test_own_means_are_those_of_the_private_source():
    setup = prepare([experiment_of("quickstart", WORDS)])
    clients = gap.Clients(setup, [0])
    others = transfer.with_own_mean(clients, setup)
    images, _ = fmd.data.load_images(setup.experiment.data.private, "train")
    mean = fmd.data.mean_image(fmd.data.scale(images))
    ((name, private),) = others.private.items()
    for inputs in (others.test.inputs, private.inputs):
        pixels = 255 * (np.asarray(inputs) + mean)
        np.testing.assert_allclose(pixels, np.round(pixels), atol=1e-3)
    assert not np.allclose(private.inputs, clients.private[name].inputs)
