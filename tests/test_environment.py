"""Environment variables and streams of a process: the command line works, or ends with one line and an exit code."""

import os
import re
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
import toys
from experiments import runs

import fedmd_jax as fmd
from fedmd_jax.experiments.run_directory import PLOT


def command(*argv, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fedmd_jax", *argv],
        env=os.environ | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def test_a_run_in_a_notebook_and_without_implicit_promotion(tmp_path):
    inline = "module://matplotlib_inline.backend_inline"  # set by Jupyter and Colab for the programs that they start
    environment = {"MPLBACKEND": inline, "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    done = command("run", "--smoke", "--out", str(tmp_path / "run"), **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / PLOT).exists()
    assert re.search(r"^ +mean  ", done.stdout, re.MULTILINE)  # the table
    assert f"\nresults in {tmp_path / 'run'}\n" in done.stdout


def test_a_report_ignores_the_backend_of_plots_and_asks_for_no_device(tmp_path):
    runs.write(tmp_path / "run", runs.experiment())
    expected = (tmp_path / "run" / PLOT).read_bytes()
    (tmp_path / "run" / PLOT).unlink()
    done = command("report", str(tmp_path / "run"), MPLBACKEND="qtagg", JAX_PLATFORMS="typo")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / PLOT).read_bytes() == expected


@pytest.mark.parametrize(
    ("platform", "argv"), [("cuda", ["run"]), ("typo", ["sweep", "--over", "distance=mae,kl"])], ids=["run", "sweep"]
)
def test_a_missing_platform_is_one_line(platform, argv, tmp_path):
    done = command(*argv, "--out", str(tmp_path / "run"), JAX_PLATFORMS=platform)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"fedmd-jax: error: JAX cannot use JAX_PLATFORMS={platform!r}: ")
    assert done.stderr.endswith("; unset it, or set it to cpu\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


FULL = "/dev/full"


@pytest.mark.skipif(not os.path.exists(FULL), reason=f"no {FULL}")
@pytest.mark.parametrize("argv", [["--version"], ["report", "DIR"], ["run", "--smoke", "--out", "DIR/run"]])
def test_a_full_stdout_is_one_line(argv, tmp_path):
    runs.write(tmp_path / "report", runs.experiment())
    with open(FULL, "w") as full:
        done = command(*(word.replace("DIR", str(tmp_path / "report")) for word in argv), stdout=full)
    assert (done.returncode, done.stderr) == (1, "fedmd-jax: error: cannot print: No space left on device\n")


# The library.


def rounds_of_all_kinds():
    """States after transfer learning and a round, of a federation and of a population, and their evaluation."""
    groups = {"a": fmd.ArchitectureGroup(toys.linear(), (0, 1))}
    training = fmd.TrainingConfig(batch_size=4, shuffle=False)  # Adam, the default
    phases = ("public", "private", "pooled", "digest", "revisit")
    federation = fmd.fedmd(groups, subset_size=6, **{f"{phase}_training": training for phase in phases})
    public, test = fmd.public_dataset(*toys.examples(100, 7)), fmd.labelled_dataset(*toys.examples(200, 9))
    private = toys.private(groups, lambda client_id: 5 - client_id)
    key = jax.random.key(0)
    states = federation.init(key, public, private)
    states, _ = federation.transfer_learn(states, public, private, key)
    rounds = {"num_rounds": 1, "learning_rate_schedule": fmd.simulation.cosine_decay(1)}
    states, history = fmd.run_federation(federation, states, public, private, key, test=test, **rounds)
    size = {"cohort_size": 1}
    population = fmd.simulation.init_population(federation, key, public, private, **size)
    population, _ = fmd.simulation.transfer_learn_population(federation, population, public, key, **size)
    population, _ = fmd.simulation.run_population(federation, population, public, key, num_rounds=1, test=test, **size)
    images = fmd.public_dataset(np.arange(128.0, dtype=np.float32).reshape(2, 8, 8, 1))
    return {
        "states": dict(states),
        "augmented": fmd.algorithms.draw_augmented_subset(key, images, 2).inputs,
        "accuracy": [metrics.mean_accuracy for metrics in history],
        "population": fmd.simulation.evaluate_population(federation, population, test, **size),
    }


def test_no_dtype_is_promoted_implicitly():
    expected = rounds_of_all_kinds()
    with jax.numpy_dtype_promotion("strict"):
        found = rounds_of_all_kinds()
    chex.assert_trees_all_equal(found, expected)
