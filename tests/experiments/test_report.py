import io

import numpy as np
import pytest
from experiments import runs
from matplotlib.image import imread

from fedmd_jax.experiments.report import describe, plot, table
from fedmd_jax.experiments.run_directory import PLOT, read_run

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("num_clients", "num_networks", "num_rounds", "pooled"),
    [(1, 1, 0, None), (2, 2, 0, 0.9), (2, 1, 1, None), (8, 3, 8, 0.9), (30, 15, 3, 0.9), (40, 40, 120, 1.0)],
)
def test_the_plot_is_a_picture_of_any_run(tmp_path, num_clients, num_networks, num_rounds, pooled):
    experiment = runs.experiment(num_clients, num_rounds, num_networks)
    runs.write(tmp_path / "run", experiment, pooled=pooled)
    content = (tmp_path / "run" / PLOT).read_bytes()
    assert content.startswith(PNG)
    pixels = imread(io.BytesIO(content))[..., :3]
    coloured = np.ptp(pixels, axis=-1).max(axis=1) > 0.2
    assert coloured.sum() > 10  # rows with a line, a dot or a dash that is not grey


def test_the_plot_depends_on_what_is_in_the_directory_only(tmp_path):
    runs.write(tmp_path / "run", runs.experiment())
    assert plot(*read_run(tmp_path / "run")) == (tmp_path / "run" / PLOT).read_bytes()


def test_the_table(tmp_path):
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=10))
    assert table(summary).splitlines() == [
        "client  architecture  transfer   FedMD  pooled    gain",
        "     0  mlp:n1=1         0.100   0.120   0.900    +2.0",
        "     1  mlp:n1=2         0.110   0.130   0.900    +2.0",
        "     2  mlp:n1=1         0.120   0.140   0.900    +2.0",
        "------------------------------------------------------",
        "  mean                   0.110   0.130   0.900    +2.0",
    ]


def test_the_table_without_a_bound(tmp_path):
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=0), pooled=None)
    assert table(summary).splitlines()[-1] == "  mean                   0.110   0.110       -    +0.0"


def test_what_a_run_has_cost(tmp_path):
    text = describe(runs.write(tmp_path / "run", runs.experiment()))
    assert text.splitlines()[-2:] == [
        "sent per client and round: 3.2 kB up, 3.2 kB down (FedAvg: 23.6 kB each way)",
        "seconds: compile 3, transfer 1, rounds 2, total 8",
    ]
