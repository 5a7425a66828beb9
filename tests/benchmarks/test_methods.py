"""The comparison of methods is paired, is continued after an interruption, and has Student's intervals."""

import json

import methods
import numpy as np
import pytest
from scipy import stats

TINY = ["--experiment", "quickstart", "--smoke", "--settings", "--networks mlp:n1=8 mlp:n1=8 --num-rounds 2"]


def line(method, seed, accuracy, split="0.1", **more):
    costs = {} if method in methods.BASELINES else {"up": 4000, "down": 8000, "seconds_per_round": 1.0}
    return {"method": method, "seed": seed, "split": split, "accuracy": accuracy, "worst": accuracy / 2} | costs | more


def cells(table):
    head, _, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Lines, and the command that made them."""
    out = tmp_path_factory.mktemp("methods")
    command = [*TINY, "--out", str(out), "--pretrained-dir", str(out / "pretrained"), "--seeds", "2", "--splits", "0.1"]
    command += ["--methods", "fedmd", "ds-fl"]
    assert methods.main(command) == 0
    return out, command


def test_methods_of_one_seed_start_from_the_same_clients(compared):
    out, _ = compared
    lines = {(each["method"], each["seed"]): each for each in methods.read_lines(out / methods.LINES)}
    names = ("fedmd", "ds-fl", *methods.BASELINES)
    assert lines.keys() == {(name, seed) for name in names for seed in (0, 1)}
    for seed in (0, 1):
        start = lines["transfer", seed]["accuracy"]
        assert lines["fedmd", seed]["curve"][0] == lines["ds-fl", seed]["curve"][0] == start
        assert lines["fedmd", seed]["accuracy"] == lines["fedmd", seed]["curve"][2]
        assert {len(each["accuracies"]) for each in lines.values()} == {2}
    assert lines["transfer", 0]["accuracy"] != lines["transfer", 1]["accuracy"]
    assert lines["fedmd", 0]["up"] == lines["fedmd", 0]["down"] == 4 * 100 * 16


def test_finished_runs_are_not_repeated_and_other_settings_are_refused(compared, monkeypatch):
    out, command = compared
    files = [out / name for name in (methods.LINES, methods.TABLE)]
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr(methods, "run", None)
    assert methods.main(command) == 0
    assert [file.read_bytes() for file in files] == before
    with pytest.raises(SystemExit, match=r"methods\.jsonl has results of other settings: choose another --out"):
        methods.main([*command, "--settings", "--num-rounds 3"])


def test_a_method_that_fails_does_not_stop_the_others(compared, monkeypatch, tmp_path, capsys):
    done = []

    def run(experiment, method, seeds, _):
        done.append((method, experiment.data.split, experiment.local, list(seeds)))
        assert method != "fedmd"

    monkeypatch.setattr(methods, "run", run)
    command = [*TINY, "--out", str(tmp_path), "--splits", "iid", "--seeds", "1", "--methods", "fedmd", "ds-fl"]
    assert methods.main(command) == 1
    assert done == [("fedmd", "classes", True, [0]), ("ds-fl", "classes", False, [0])]
    assert "AssertionError" in capsys.readouterr().err


def test_the_table_has_paired_intervals_and_the_median_time():
    rng = np.random.default_rng(0)
    fedmd, other = rng.uniform(0.3, 0.9, (2, 5))
    lines = [line("fedmd", seed, fedmd[seed], seconds_per_round=seed**2) for seed in (4, 0, 3, 1, 2)]
    lines += [line("fedavg", seed, other[seed]) for seed in range(5)] + [line("pooled", 0, 0.9)]
    first, second, last = cells(methods.table(lines))
    assert [row["method"] for row in (first, second, last)] == ["fedmd", "fedavg", "*pooled*"]
    assert first["accuracy"] == f"{np.mean(fedmd):.3f} ± {np.std(fedmd, ddof=1):.3f}"
    assert first["s/round"] == "4.00"
    low, high = 100 * np.array(stats.ttest_rel(other, fedmd).confidence_interval(0.95))
    assert second["minus FedMD, points [95 %]"] == f"{(low + high) / 2:+.1f} [{low:+.1f}, {high:+.1f}]"
    assert (second["bytes up"], second["bytes down"]) == ("4,000", "8,000")
    assert (last["accuracy"], last["bytes up"]) == ("0.900", "")
    assert last["minus FedMD, points [95 %]"] == f"{100 * (0.9 - fedmd[0]):+.1f}"


def test_every_method_is_in_the_plot(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(methods, "to_png", lambda figure: drawn.append(figure) or b"")
    lines = [line(name, 0, 0.5, split, curve=[0.2, 0.4, 0.5]) for name in methods.METHODS for split in methods.SPLITS]
    lines += [line(name, 0, 0.5) for name in methods.BASELINES]
    (tmp_path / methods.LINES).write_text("".join(json.dumps(each) + "\n" for each in lines))
    methods.write_results(tmp_path)
    (figure,) = drawn
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(methods.METHODS)
    for axes in figure.axes:
        sent = {tuple(each.get_xdata()) for each in axes.lines if each.get_label().startswith("_child")}
        assert (12_000, 24_000) in sent
