import io

import numpy as np
import pytest
from experiments import runs
from matplotlib.image import imread

from fedmd_jax.experiments.results.figures import plot, plot_seeds
from fedmd_jax.experiments.run_directory import PLOT, read_run


@pytest.mark.parametrize(
    ("num_clients", "num_networks", "num_rounds", "local", "pooled"),
    [(1, 1, 0, None, None), (2, 2, 1, 0.1, None), (30, 15, 3, 0.0, 1.0)],
)
def test_the_plot_is_a_picture_of_any_run(tmp_path, num_clients, num_networks, num_rounds, local, pooled):
    experiment = runs.experiment(num_clients, num_rounds, num_networks)
    runs.write(tmp_path / "run", experiment, local=local, pooled=pooled)
    content = (tmp_path / "run" / PLOT).read_bytes()
    pixels = imread(io.BytesIO(content))[..., :3]
    coloured = np.ptp(pixels, axis=-1).max(axis=1) > 0.2
    assert coloured.sum() > 10  # rows with a line, a dot or a dash that is not grey
    assert plot(*read_run(tmp_path / "run")) == content  # it depends only on the directory


def test_the_plot_shows_faults_baselines_and_the_evaluation_data(tmp_path):
    changes = {"sound": {}, "faults": {"status": {2: {1: "dropped"}, 3: {0: "scores not finite"}}}}
    changes |= {"no baseline": {"local": None}, "no bound": {"pooled": None}}
    for name, change in changes.items():
        runs.write(tmp_path / name, runs.experiment(num_rounds=4), **change)
    found = {name: read_run(tmp_path / name) for name in changes}
    pictures = {plot(*each) for each in found.values()}
    pictures |= {plot_seeds([found["sound"], found["faults"]]), plot_seeds([found["sound"]] * 2)}
    summary, metrics = found["sound"]
    pictures |= {plot({**summary, "evaluate_on": "validation"}, metrics)}
    assert len(pictures) == len(changes) + 3
