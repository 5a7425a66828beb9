"""The watch for rounds that diverge, through the command line; and what re-estimation gives after transfer learning."""

import json
import shlex

import numpy as np
import pytest
from experiments.playing import Disturbed

from fedmd_jax.cli import main
from fedmd_jax.experiments import run_directory as files, train

HINT = ": --batch-statistics public helps if batch norms are the cause"
DIVERGING = "--num-rounds 5 --revisit.learning-rate 0.5 --no-local"


@pytest.fixture
def options(data_folder):
    return shlex.split(
        f"--data.data-dir {data_folder} --data.public dots --data.private marks --data.num-public 30 "
        "--data.private-classes 4 1 2 --data.num-test 20 --networks mlp:n1=3 mlp:n1=3 --subset-size 10 "
        "--public-training.num-epochs 3 --private-training.num-epochs 8 --revisit.num-epochs 4 --no-pooled"
    )


def read(path):
    """The summary, and per round the mean accuracy and the size of the consensus."""
    summary, lines = files.read_run(path)
    rounds = [[line for line in lines if line["round"] == r] for r in range(summary["num_rounds_done"] + 1)]
    sizes = [{line.get("consensus_size") for line in of_round} for of_round in rounds]
    assert all(len(of_round) == 1 for of_round in sizes)  # the same for all clients
    return summary, [np.mean([line["accuracy"] for line in of_round]) for of_round in rounds], [s.pop() for s in sizes]


def expected(path, hint=HINT):
    """The warning that a run should have given; empty if it has not diverged."""
    _, accuracies, sizes = read(path)
    for r in range(1, len(sizes)):
        best = max(accuracies[: r + 1])
        if sizes[r] > 2 * sizes[1] and accuracies[r] < best - 0.02:
            fallen = f"the mean accuracy is {accuracies[r]:.3f} (best: {best:.3f})"
            grown = f"the size of the consensus {sizes[r]:.2f} (first: {sizes[1]:.2f})"
            return f"fedmd-jax: warning: {path}: after round {r} {fallen}, and {grown}{hint}"
    return ""


def warnings(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "warning" in line]


def test_rounds_that_diverge_are_reported_once(options, tmp_path, capsys, monkeypatch):
    """Also if the run is interrupted after each round in turn and resumed, and of several seeds at once."""
    whole = tmp_path / "whole"
    assert main(["run", "--out", str(whole), *options, *DIVERGING.split()]) == 0
    found, told = warnings(capsys), expected(whole)
    assert found == [told]
    assert told
    path = tmp_path / "resumed"
    for number in range(5):
        with monkeypatch.context() as disturbed:
            disturbed.setattr(train, "make_progress", lambda *_, n=number: Disturbed(n + 1, KeyboardInterrupt))
            new = ["--out", str(path), *options, *DIVERGING.split()]
            assert main(["run", *(["--resume", str(path)] if number else new)]) == 130
    assert main(["run", "--resume", str(path)]) == 0
    assert (path / files.METRICS).read_bytes() == (whole / files.METRICS).read_bytes()
    assert warnings(capsys) == [expected(path)]
    seeds = ["--out", str(tmp_path / "seeds"), "--num-seeds", "2", "--vmap-seeds", "2"]
    assert main(["run", *options, *DIVERGING.split(), *seeds]) == 0
    told = [expected(tmp_path / "seeds" / f"seed{seed}") for seed in range(2)]
    assert sorted(warnings(capsys)) == sorted(filter(None, told))


def test_the_setting_that_is_chosen_is_not_recommended(options, tmp_path, capsys):
    more = [*DIVERGING.split(), "--batch-statistics", "public-scores"]
    assert main(["run", "--out", str(tmp_path / "run"), *options, *more]) == 0
    assert warnings(capsys) == [expected(tmp_path / "run", hint="")]


def test_without_divergence_there_is_no_warning_and_the_summary_has_the_sizes(options, tmp_path, capsys):
    assert main(["run", "--out", str(tmp_path / "run"), *options, "--num-rounds", "2"]) == 0
    assert expected(tmp_path / "run") == ""
    assert warnings(capsys) == []
    summary, _, sizes = read(tmp_path / "run")
    assert summary["consensus_size"] == {"first": sizes[1], "last": sizes[2]}
    assert (summary["batch_statistics"], sizes[0]) == ("moving", None)
    assert "reestimated_accuracy" not in summary["mean"]


def test_methods_without_a_consensus_of_scores(options, tmp_path):
    more = ["--num-rounds", "1", "--algorithm", "ds-fl"]
    assert main(["run", "--out", str(tmp_path / "run"), *options, *more]) == 0
    summary, _, sizes = read(tmp_path / "run")
    assert "consensus_size" not in summary
    assert sizes == [None, None]


def test_the_table_has_both_accuracies_after_transfer_learning(options, tmp_path, capsys):
    """They differ for a network with batch norms, whose moving statistics have hardly moved, and not for an MLP."""
    out = ["--out", str(tmp_path / "seeds"), "--num-seeds", "2"]
    more = "--num-rounds 1 --no-local --batch-statistics public --devices 2 --networks 2conv:n1=4,n2=4 mlp:n1=3"
    assert main(["run", *out, *options, *more.split()]) == 0
    summaries = []
    for seed in range(2):
        summary, lines = files.read_run(tmp_path / "seeds" / f"seed{seed}")
        assert summary["batch_statistics"] == "public"
        for line in lines:
            assert ("reestimated_accuracy" in line) == (line["round"] == 0)
        assert summary["clients"][1]["reestimated_accuracy"] == summary["clients"][1]["transfer_accuracy"]
        summaries.append(summary)
    of_cnn = [summary["clients"][0] for summary in summaries]
    assert [each["reestimated_accuracy"] for each in of_cnn] != [each["transfer_accuracy"] for each in of_cnn]
    of_seeds = json.loads((tmp_path / "seeds" / files.SUMMARY).read_text())
    means = [summary["mean"]["reestimated_accuracy"] for summary in summaries]
    assert of_seeds["mean"]["reestimated_accuracy"]["mean"] == pytest.approx(np.mean(means))
    assert of_seeds["batch_statistics"] == "public"
    assert set(of_seeds["consensus_size"]["last"]) == {"mean", "std"}
    capsys.readouterr()
    assert main(["report", str(tmp_path / "seeds" / "seed1")]) == 0
    [row] = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("re-estimated")]
    assert row[:2] == ["re-estimated", f"{summaries[1]['mean']['reestimated_accuracy']:.3f}"]
