"""Rounds in parts are those of a run."""

import json
import statistics

import ablation
import pytest

from fedmd_jax.cli import main
from fedmd_jax.experiments.setup import prepare

SETTINGS = "--smoke --networks mlp:n1=8 mlp:n1=8 --weights 1 0.5 --score-clip 2 --subset stratified"
NUM_TEST = 300


def test_rounds_in_parts_end_where_those_of_a_run_do(tmp_path):
    words = f"{SETTINGS} --data.num-test {NUM_TEST} --revisit.num-epochs 3 --digest.batch-size 20"
    common = "--data.evaluate-on validation --no-local --no-pooled --num-rounds 2"
    assert main(["run", "quickstart", *words.split(), *common.split(), "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    wanted = [statistics.mean(line["accuracy"] for line in lines if line["round"] == round_) for round_ in range(3)]
    setup = prepare([ablation.experiment_of("quickstart", words)])
    told = list(ablation.rounds(setup, 2))
    found = [accuracy["mean"] for _, phase, accuracy in told if phase != "digest"]
    assert found == pytest.approx(wanted, abs=0.5 / NUM_TEST)  # of the two clients' images one may be told otherwise
    assert wanted[1] != wanted[2]
    assert all(0 < accuracy["size"] <= 2 for _, phase, accuracy in told if phase == "digest")  # of bounded scores


@pytest.mark.parametrize("words", ["--availability 0.5", "--completion 0.5"])
def test_what_it_cannot_do_is_refused(words):
    with pytest.raises(SystemExit, match="everybody takes part here"):
        ablation.experiment_of("quickstart", words)
