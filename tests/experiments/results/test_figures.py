import io

import numpy as np
import pytest
from experiments import runs
from matplotlib.image import imread

from fedmd_jax.experiments.results.figures import plot, plot_seeds
from fedmd_jax.experiments.run_directory import PLOT, read_run

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("num_clients", "num_networks", "num_rounds", "local", "pooled"),
    [
        (1, 1, 0, None, None),
        (2, 2, 0, None, 0.9),
        (2, 1, 1, 0.1, None),
        (8, 3, 8, 0.1, 0.9),
        (30, 15, 3, 0.1, 0.9),
        (40, 40, 120, 0.0, 1.0),
    ],
)
def test_the_plot_is_a_picture_of_any_run(tmp_path, num_clients, num_networks, num_rounds, local, pooled):
    experiment = runs.experiment(num_clients, num_rounds, num_networks)
    runs.write(tmp_path / "run", experiment, local=local, pooled=pooled)
    content = (tmp_path / "run" / PLOT).read_bytes()
    assert content.startswith(PNG)
    pixels = imread(io.BytesIO(content))[..., :3]
    coloured = np.ptp(pixels, axis=-1).max(axis=1) > 0.2
    assert coloured.sum() > 10  # rows with a line, a dot or a dash that is not grey


def test_the_plot_depends_on_what_is_in_the_directory_only(tmp_path):
    runs.write(tmp_path / "run", runs.experiment())
    assert plot(*read_run(tmp_path / "run")) == (tmp_path / "run" / PLOT).read_bytes()


def test_a_run_of_an_older_version_has_no_control(tmp_path):
    runs.write(tmp_path / "run", runs.experiment())
    summary, metrics = read_run(tmp_path / "run")
    with_control = plot(summary, metrics)
    for client in summary["clients"]:
        del client["local_accuracy"]
    without = plot(summary, metrics)
    assert without.startswith(PNG)
    assert without != with_control


def test_the_plot_says_on_what_accuracy_is_measured(tmp_path):
    runs.write(tmp_path / "run", runs.experiment())
    summary, metrics = read_run(tmp_path / "run")
    on_test = plot(summary, metrics)
    assert plot({**summary, "evaluate_on": "validation"}, metrics) != on_test
    del summary["evaluate_on"]  # as older versions have written it
    assert plot(summary, metrics) == on_test


def test_what_went_wrong_is_marked(tmp_path):
    runs.write(tmp_path / "run", runs.experiment(num_rounds=4), status={2: {1: "dropped"}, 3: {0: "scores not finite"}})
    runs.write(tmp_path / "sound", runs.experiment(num_rounds=4))
    marked, sound = (read_run(tmp_path / name) for name in ("run", "sound"))
    pictures = {plot(*marked), plot(*sound), plot_seeds([marked, sound]), plot_seeds([sound, sound])}
    assert len(pictures) == 4
    for record in marked[1]:
        del record["status"]  # as older versions have written it
    assert plot(*marked) == plot(*sound)
