"""The rounds of the ablation equal those of a run."""

import json
import statistics

import ablation
import pytest

from fedmd_jax.cli import main
from fedmd_jax.experiments.setup import prepare

SETTINGS = "--smoke --networks mlp:n1=8 mlp:n1=8 --weights 1 0.5 --score-clip 2 --subset stratified"
NUM_TEST = 300


def test_rounds_equal_those_of_a_run(tmp_path):
    words = f"{SETTINGS} --data.num-test {NUM_TEST} --revisit.num-epochs 3 --digest.batch-size 20"
    common = "--data.evaluate-on validation --no-local --no-pooled --num-rounds 2"
    assert main(["run", "quickstart", *words.split(), *common.split(), "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    wanted = [statistics.mean(line["accuracy"] for line in lines if line["round"] == round_) for round_ in range(3)]
    setup = prepare([ablation.experiment_of("quickstart", words)])
    measured = list(ablation.rounds(setup, 2))
    found = [accuracy["mean"] for _, phase, accuracy in measured if phase != "digest"]
    assert found == pytest.approx(wanted, abs=0.5 / NUM_TEST)  # the prediction of one image may differ
    assert wanted[1] != wanted[2]
    assert all(0 < accuracy["size"] <= 2 for _, phase, accuracy in measured if phase == "digest")  # clipped


@pytest.mark.parametrize("words", ["--availability 0.5", "--completion 0.5"])
def test_participation_is_refused(words):
    with pytest.raises(SystemExit, match="all clients take part here"):
        ablation.experiment_of("quickstart", words)
