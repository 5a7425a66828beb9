import csv
import io
import itertools

import pytest
from experiments import runs

from fedmd_jax.experiments.errors import SettingsError, UsageError
from fedmd_jax.experiments.results import sweep
from fedmd_jax.experiments.results.seeds import seed_jobs, write_seeds

KNOWN = ("distance", "digest.num-epochs", "weights", "networks", "pooled")


def test_the_grid_is_the_product_of_all_values():
    found = sweep.grid(["distance=mae,kl", "digest.num_epochs=1,2,3"], KNOWN)
    expected = [
        {"distance": distance, "digest.num-epochs": epochs}
        for distance, epochs in itertools.product(("mae", "kl"), "123")
    ]
    assert found == expected


def test_values_with_commas_stand_between_semicolons():
    found = sweep.grid(["networks=2conv:n1=8,n2=16 mlp;mlp mlp"], KNOWN)
    assert [each["networks"] for each in found] == ["2conv:n1=8,n2=16 mlp", "mlp mlp"]


@pytest.mark.parametrize(
    ("overs", "message"),
    [
        ([], "a sweep needs at least one --over"),
        (["distanse=mae"], "unknown setting 'distanse', known are distance, digest.num-epochs, weights, networks, "),
        (["distance"], "--over is written SETTING=VALUE,VALUE,..., got 'distance'"),
        (["distance=mae,"], "--over is written SETTING=VALUE,VALUE,..., got 'distance=mae,'"),
        (["distance=mae,mae"], "every setting and every value once, got 'distance=mae,mae' again"),
        (["distance=mae", "distance=kl"], "every setting and every value once, got 'distance=kl' again"),
    ],
)
def test_what_is_no_grid(overs, message):
    with pytest.raises(UsageError, match=message):
        sweep.grid(overs, KNOWN)


def test_the_options_of_a_combination():
    combination = {"weights": "1 0.5", "pooled": "False", "digest.num-epochs": "2"}
    assert sweep.options(combination, ["pooled"]) == [
        *("--weights", "1", "0.5"),
        "--no-pooled",
        *("--digest.num-epochs", "2"),
    ]
    assert sweep.options({"pooled": "true"}, ["pooled"]) == ["--pooled"]
    with pytest.raises(UsageError, match="pooled must be true or false, got 'maybe'"):
        sweep.options({"pooled": "maybe"}, ["pooled"])


def test_a_directory_has_a_name_that_a_file_system_takes():
    name = sweep.directory(3, {"data.private": "emnist/letters", "networks": "mlp " * 99})
    assert name.startswith("003-data.private=emnist_letters")
    assert len(name) <= 84


@pytest.fixture
def rows(tmp_path):
    jobs = seed_jobs(tmp_path, runs.experiment(), 2)
    for path, experiment in jobs.items():
        runs.write(path, experiment, pooled=None)
    summary = write_seeds(tmp_path, list(jobs), 2)
    return [
        sweep.Row({"distance": "mae", "weights": "1 1"}, "000", summary, None),
        sweep.Row({"distance": "kl", "weights": "1 1"}, "001", None, "out of memory"),
    ]


def test_the_table_as_a_file(rows):
    first, second = csv.DictReader(io.StringIO(sweep.to_csv(rows).decode()))
    assert (first["distance"], first["weights"], first["num_seeds"], first["directory"]) == ("mae", "1 1", "2", "000")
    assert float(first["final_accuracy_mean"]) == pytest.approx(0.114)
    assert float(first["gain_over_local_points_std"]) == pytest.approx(0, abs=1e-9)
    assert first["pooled_accuracy_mean"] == first["error"] == ""
    assert (second["num_seeds"], second["final_accuracy_mean"], second["error"]) == ("0", "", "out of memory")


def test_the_table_for_people(rows):
    header, first, second, failed = sweep.describe_sweep(rows).splitlines()
    assert header.split()[:5] == ["distance", "weights", "seeds", "transfer", "local"]
    assert "0.114 ±0.000" in first
    assert second.split() == ["kl", "1", "1", "0", *"------"]
    assert failed == "failed: distance=kl weights=1 1: out of memory"
    assert len(header) == len(first) == len(second)


def test_the_plot_is_a_picture_also_if_all_have_failed_and_says_on_what_accuracy_is_measured(rows):
    both = [rows[0]._replace(summary={**rows[0].summary, "evaluate_on": "validation"}), rows[0]]
    pictures = {sweep.plot_sweep(shown, "x") for shown in (rows, rows[1:], both, both[:1] * 2, both[1:] * 2)}
    assert len(pictures) == 5
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)


def test_a_failure_is_one_line():
    assert sweep.failure(SettingsError("too\nmany")) == "too many"
    assert sweep.failure(RuntimeError("out of\nmemory")) == "RuntimeError: out of memory"
