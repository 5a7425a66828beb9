"""What the environment of a process says: the command line works, or ends in one line and a code."""

import json
import os
import subprocess
import sys

import chex
import jax
import pytest
import toys
from experiments import runs

import fedmd_jax as fmd
from fedmd_jax.experiments.run_directory import METRICS, PLOT, SUMMARY

INLINE = "module://matplotlib_inline.backend_inline"  # as Jupyter and Colab set it for the programs that they start


def command(*argv, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fedmd_jax", *argv],
        env=os.environ | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    """A smoke run in an environment as it comes."""
    path = tmp_path_factory.mktemp("smoke") / "run"
    assert command("run", "--smoke", "--out", str(path)).returncode == 0
    return path


def results(path):
    """All that is not time or place."""
    return (path / METRICS).read_text(), json.loads((path / SUMMARY).read_text())["clients"]


def test_a_smoke_run_is_the_same_in_a_notebook_and_without_promotion(smoke_run, tmp_path):
    environment = {"MPLBACKEND": INLINE, "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
    done = command("run", "--smoke", "--out", str(tmp_path / "run"), **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert results(tmp_path / "run") == results(smoke_run)
    assert (tmp_path / "run" / PLOT).read_bytes() == (smoke_run / PLOT).read_bytes()
    assert "\n  mean  " in done.stdout
    assert f"\nresults in {tmp_path / 'run'}\n" in done.stdout


@pytest.mark.parametrize("backend", [INLINE, "qtagg"])
def test_plots_are_drawn_whatever_backend_is_set(backend, tmp_path):
    runs.write(tmp_path / "run", runs.experiment())
    expected = (tmp_path / "run" / PLOT).read_bytes()
    (tmp_path / "run" / PLOT).unlink()
    done = command("report", str(tmp_path / "run"), MPLBACKEND=backend)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / PLOT).read_bytes() == expected


@pytest.mark.parametrize(
    ("platform", "argv"),
    [("cuda", ["run"]), ("tpu", ["run"]), ("typo", ["run"]), ("typo", ["sweep", "--over", "distance=mae,kl"])],
)
def test_a_platform_that_is_not_there_is_one_line(platform, argv, tmp_path):
    done = command(*argv, "--out", str(tmp_path / "run"), JAX_PLATFORMS=platform)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"fedmd-jax: error: JAX cannot use JAX_PLATFORMS={platform!r}: ")
    assert done.stderr.endswith("; unset it, or set it to cpu\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_needs_no_device_asks_for_none(tmp_path):
    runs.write(tmp_path / "run", runs.experiment())
    assert command("report", str(tmp_path / "run"), JAX_PLATFORMS="typo").returncode == 0
    assert command("run", "--help", JAX_PLATFORMS="typo").returncode == 0


FULL = "/dev/full"


@pytest.mark.skipif(not os.path.exists(FULL), reason=f"no {FULL}")
@pytest.mark.parametrize(
    "argv", [["--version"], ["report"], ["run", "--smoke"], ["sweep", "--over", "distance=mae,kl"]]
)
def test_a_full_stdout_is_one_line(argv, tmp_path):
    runs.write(tmp_path / "report", runs.experiment())
    where = {"report": [str(tmp_path / "report")], "--version": []}.get(argv[0], ["--out", str(tmp_path / "run")])
    with open(FULL, "w") as full:
        done = command(*argv, *where, stdout=full)
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
    states, history = fmd.run_federation(federation, states, public, private, key, num_rounds=1, test=test)
    found = {"states": dict(states), "accuracy": [metrics.mean_accuracy for metrics in history]}
    size = {"cohort_size": 1}
    everybody = fmd.simulation.init_population(federation, key, public, private, **size)
    everybody, _ = fmd.simulation.transfer_learn_population(federation, everybody, public, key, **size)
    everybody, _ = fmd.simulation.run_population(federation, everybody, public, key, num_rounds=1, test=test, **size)
    return found | {"everybody": fmd.simulation.evaluate_population(federation, everybody, test, **size)}


def test_no_dtype_is_promoted_implicitly():
    expected = rounds_of_all_kinds()
    with jax.numpy_dtype_promotion("strict"):
        found = rounds_of_all_kinds()
    chex.assert_trees_all_equal(found, expected)
