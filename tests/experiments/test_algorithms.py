"""Every algorithm through the command line, with the server's state and its network."""

import csv
import dataclasses
import json
import re
import shlex

import numpy as np
import pytest
from experiments.playing import Disturbed, playing

from fedmd_jax import load_run
from fedmd_jax.cli import main
from fedmd_jax.experiments import EXPERIMENTS, run_directory as files, train
from fedmd_jax.experiments.algorithms import ALGORITHMS, AlgorithmOptions, make_algorithm, option_defaults
from fedmd_jax.experiments.networks import KINDS
from fedmd_jax.experiments.setup import prepare

SERVER = "ds-fl --server-network mlp:n1=4"
WITH_STATE = ("fedavg", SERVER)


@pytest.fixture
def options(data_folder):
    return shlex.split(
        f"--data.data-dir {data_folder} --data.public dots --data.private marks --data.num-public 30 "
        "--data.private-classes 4 1 2 --data.num-test 20 --networks mlp:n1=3 mlp:n1=3 mlp:n1=4 --subset-size 10 "
        "--public-training.num-epochs 1 --private-training.num-epochs 1 --revisit.num-epochs 1 --no-pooled"
    )


def run(path, options, algorithm, *more):
    """The lines of metrics.jsonl, and the summary."""
    assert main(["run", "--out", str(path), *options, "--algorithm", *algorithm.split(), *more]) == 0
    lines = [json.loads(line) for line in (path / files.METRICS).read_text().splitlines()]
    return lines, json.loads((path / files.SUMMARY).read_text())


@pytest.fixture(scope="module")
def pretrained_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("pretrained"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_runs(options, pretrained_dir, tmp_path, name, capsys):
    more = shlex.split(f"--networks mlp:n1=3 mlp:n1=3 --num-rounds 1 --no-local --pretrained-dir {pretrained_dir}")
    lines, summary = run(tmp_path / "run", options, name, *more)
    assert [(line["round"], line["client_id"], line["status"]) for line in lines] == [
        (round_, client_id, "ok") for round_ in range(2) for client_id in range(2)
    ]
    before, after = lines[0]["revisit_loss"], lines[2]["revisit_loss"]
    assert before is None
    assert np.isfinite(after)
    assert summary["algorithm"] == name
    sent = summary["communication"]
    up, down, total, network = sent.values()
    assert total == round((up + down) * 2)
    assert network == 4 * (25 * 3 + 3 + 3 * 7 + 7)
    assert 0 < up <= max(network, 4 * 10 * 7)
    out = capsys.readouterr().out
    assert ("FedMD" in out) == (name == "fedmd")
    assert name == "fedmd" or f" {name} " in out
    client = load_run(tmp_path / "run").client(1)
    inputs, labels, _ = load_run(tmp_path / "run").test_data()
    assert (client.predict(inputs) == labels).mean() == pytest.approx(summary["clients"][1]["final_accuracy"])


@pytest.mark.parametrize("algorithm", WITH_STATE)
def test_a_server_with_a_state_is_resumed_to_the_bit(options, pretrained_dir, tmp_path, monkeypatch, algorithm):
    options = [*options, "--num-rounds", "3", "--pretrained-dir", pretrained_dir]
    lines, summary = run(tmp_path / "whole", options, algorithm)
    argv = ["--out", str(tmp_path / "run"), *options, "--algorithm", *algorithm.split()]
    with monkeypatch.context() as disturbed:
        disturbed.setattr(train, "make_progress", lambda *_: Disturbed(2, KeyboardInterrupt))
        assert main(["run", *argv]) == 130
    assert main(["run", "--resume", str(tmp_path / "run")]) == 0
    metrics = [(tmp_path / name / files.METRICS).read_bytes() for name in ("whole", "run")]
    assert metrics[0] == metrics[1]
    assert len({line["accuracy"] for line in lines}) > 1
    client = load_run(tmp_path / "run").client(2)
    inputs, labels, _ = load_run(tmp_path / "run").test_data()
    assert (client.predict(inputs) == labels).mean() == pytest.approx(summary["clients"][2]["final_accuracy"])


def test_the_server_is_in_metrics_summary_table_and_plot(options, tmp_path, capsys):
    lines, summary = run(tmp_path / "run", options, SERVER, "--num-rounds", "1")
    events = ["round"] * 3 + ["server"]
    assert [line["event"] for line in lines] == events * 2
    assert [line["round"] for line in lines] == [0] * 4 + [1] * 4
    assert summary["mean"]["server_accuracy"] == lines[-1]["accuracy"]
    row = capsys.readouterr().out.split("ensemble")[1].splitlines()[1]
    assert row.split() == ["server", "-", "-", f"{lines[-1]['accuracy']:.3f}", "-", "-", "-"]
    _, metrics = files.read_run(tmp_path / "run")
    assert metrics == lines
    trained = load_run(tmp_path / "run")
    assert [record["event"] for record in trained.history] == ["round"] * 6
    labels = [line.get_label() for line in trained.plot().axes[0].get_lines()]
    assert "server" in labels


@pytest.mark.parametrize("algorithm", WITH_STATE[-1:])
def test_many_devices_and_seeds_at_once_change_rounding_only(options, tmp_path, algorithm):
    options = [*options, "--num-rounds", "2", "--no-local"]
    one, _ = run(tmp_path / "one", options, algorithm)
    many, _ = run(tmp_path / "many", options, algorithm, "--devices", "2")
    seeds = ["--out", str(tmp_path / "seeds"), "--num-seeds", "2", "--vmap-seeds", "2"]
    assert main(["run", *options, "--algorithm", *algorithm.split(), *seeds]) == 0
    _, first = files.read_run(tmp_path / "seeds" / "seed0")
    for others in (many, first):
        for line, other in zip(one, others, strict=True):
            assert line.keys() == other.keys()
            for field, value in line.items():
                assert other[field] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)


def test_clients_that_start_together_are_other_pretrained_clients(experiment, tmp_path):
    paths = {}
    for algorithm in ("fedmd", "ds-fl", "fedavg"):
        setup = prepare([dataclasses.replace(experiment, algorithm=algorithm)])
        paths[algorithm] = setup.pretrained_cache(tmp_path).path("mlp")
    assert paths["fedmd"] == paths["ds-fl"] != paths["fedavg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("fedavg --algorithm.temperature 1", "algorithm.temperature is not an option of fedavg, which has no options"),
        ("ds-fl --algorithm.power 2", "algorithm.power is not an option of ds-fl, which has algorithm.temperature"),
        ("ds-fl --algorithm.temperature 0", "algorithm ds-fl: temperature must be positive and finite, got 0.0"),
        ("ds-fl --distance kl", "distance is of algorithm fedmd, but algorithm is ds-fl, .*, got kl"),
        ("ds-fl --temperature 0.1", "temperature is .*, which has algorithm.temperature, got 0.1"),
        ("fedavg --score-clip 3", "score_clip is of algorithm fedmd, but algorithm is fedavg, .*, got 3.0"),
        ("fedavg --server-network mlp", "fedavg has no use for a network of the server, got one"),
        ("ds-fl --server-network cnn", "network 'cnn': the kind must be one of .*"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(options, message, tmp_path, capsys):
    assert main(["run", "--out", str(tmp_path / "run"), "--algorithm", *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.fullmatch(f"fedmd-jax: error: {message}\n", err), err
    assert list(tmp_path.iterdir()) == []


def test_every_option_has_a_type_of_its_own_and_a_description():
    for name in ALGORITHMS:
        options = option_defaults(name)
        assert make_algorithm(name, AlgorithmOptions(**options)).name == name
        assert all(f"{option}: Option of " in AlgorithmOptions.__doc__ for option in options)


def test_the_list_has_a_line_for_everything(capsys):
    assert main(["list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert names[: -len(names) + len(EXPERIMENTS) + len(ALGORITHMS) + len(KINDS)] == [*EXPERIMENTS, *ALGORITHMS, *KINDS]
    assert {"embedded/digits", "mnist", "cifar100"} < set(names)


def test_a_sweep_over_algorithms(tmp_path, capsys):
    over = ["--over", "algorithm=fedmd,ds-fl", "--over", "algorithm.temperature=default,0.5", "--num-rounds", "1"]
    with playing("sweep") as play:
        assert play("--out", tmp_path / "sweep", *over, "--networks", "mlp", "mlp", "--no-pooled")[0] == 1
    rows = list(csv.reader((tmp_path / "sweep" / "sweep.csv").read_text().splitlines()))
    assert [row[:3] for row in rows[1:]] == [
        ["fedmd", "default", "1"],
        ["fedmd", "0.5", "0"],
        ["ds-fl", "default", "1"],
        ["ds-fl", "0.5", "1"],
    ]
    assert rows[2][-1] == "algorithm.temperature is not an option of fedmd, which has no options"
    [header] = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("algorithm ")]
    assert header[2:] == ["seeds", "transfer", "local", "final", "pooled", "gain", "over", "local"]
