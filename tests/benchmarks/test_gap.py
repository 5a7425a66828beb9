"""The variant `warped_and_cut+decay` of the benchmark of the gap is a run, and another one is not."""

import json
import statistics

import gap
import pytest
from ablation import experiment_of

from fedmd_jax.cli import main
from fedmd_jax.experiments.setup import prepare

SETTINGS = "--batch-statistics public --subset-augmentation warp cut --learning-rate-decay cosine"
WORDS = "--smoke --networks 2conv:n1=2,n2=3 mlp:n1=4 --subset-size 40 --data.num-test 200"


def curve(clients, setup, name):
    return [accuracy["mean"] for accuracy in gap.rounds(clients, setup, gap.variant_of(name), 2)]


def test_joined_variants_equal_a_run_and_another_variant_does_not(tmp_path):
    words = f"{SETTINGS} --revisit.num-epochs 16 --data.evaluate-on validation --no-local --num-rounds 2"
    assert main(["run", "quickstart", *WORDS.split(), *words.split(), "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    wanted = [statistics.mean(line["accuracy"] for line in lines if line["round"] == round_) for round_ in range(3)]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    setup = prepare([experiment_of("quickstart", f"{WORDS} {words} --pooled")])
    clients = gap.Clients(setup, [0, 1])
    found = curve(clients, setup, "warped_and_cut+decay")
    assert found == pytest.approx(wanted, abs=0.01)  # the prediction of one image may differ
    assert clients.pooled_accuracy() == pytest.approx(summary["mean"]["pooled_accuracy"], abs=0.01)
    assert curve(clients, setup, "passes")[2] != found[2]


def test_variants_are_joined():
    assert gap.variant_of("long+decay") == gap.Variant(digest_epochs=3, decays=True)
