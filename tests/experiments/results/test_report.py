import dataclasses

from experiments import runs

from fedmd_jax.experiments.results.report import brief, describe
from fedmd_jax.experiments.results.seeds import summarize_seeds
from fedmd_jax.experiments.run_directory import read_run


def test_the_table_and_what_a_run_has_cost(tmp_path):
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=10))
    assert describe(summary).splitlines() == [
        "client  architecture  transfer   local   FedMD  pooled    gain  over local",
        "     0  mlp:n1=1         0.100   0.050   0.120   0.900    +2.0        +7.0",
        "     1  mlp:n1=2         0.110   0.050   0.130   0.900    +2.0        +8.0",
        "     2  mlp:n1=1         0.120   0.050   0.140   0.900    +2.0        +9.0",
        "--------------------------------------------------------------------------",
        "  mean                   0.110   0.050   0.130   0.900    +2.0        +8.0",
        "",
        "sent per client and round: 3.2 kB up, 3.2 kB down (FedAvg: 23.6 kB each way)",
        "seconds: compile 3, transfer 1, rounds 2, total 8",
    ]


def test_the_ensemble_stands_below_the_mean(tmp_path):
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=10))
    summary["mean"]["ensemble_accuracy"] = 0.75
    assert describe(summary).splitlines()[4:7] == [
        "----------------------------------------------------------------------------",
        "    mean                   0.110   0.050   0.130   0.900    +2.0        +8.0",
        "ensemble                       -       -   0.750       -       -           -",
    ]
    several = describe(summarize_seeds([summary, summary], 2))
    assert several.splitlines()[6].split() == ["ensemble", "-", "-", "0.750", "±0.000", "-"]


def test_without_baselines(tmp_path):
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=0), local=None, pooled=None)
    mean = describe(summary).splitlines()[5]
    assert mean == "  mean                   0.110       -   0.110       -    +0.0           -"
    assert brief(summary) == "seed 7, mean accuracy: transfer 0.110, FedMD 0.110"


def test_faults_of_fedmd_and_of_the_baseline_stand_below_the_table(tmp_path):
    status = {2: {1: "digest not finite"}, 5: {1: "straggler, digest not finite"}}
    status = {round_: {0: "dropped", **status.get(round_, {})} for round_ in range(1, 10)}
    experiment = runs.experiment(num_rounds=10)
    summary = runs.write(tmp_path / "run", experiment, status=status, failed={1: [2, 3], 2: [1]})
    assert describe(summary).splitlines()[6:13] == [
        "",
        "client 0 (mlp:n1=1): dropped in 9 of 10 rounds",
        "client 1 (mlp:n1=2): digest not finite in rounds 2, 5",
        "client 1 (mlp:n1=2): local only not finite in rounds 2, 3",
        "client 1 (mlp:n1=2): straggler in round 5",
        "client 2 (mlp:n1=1): local only not finite in round 1",
        "",
    ]


def test_accuracy_that_is_not_of_the_test_set_says_so(tmp_path):
    experiment, text = runs.experiment(), "accuracy is on private validation data"
    data = dataclasses.replace(experiment.data, evaluate_on="validation")
    for name, each in {"test": experiment, "validation": dataclasses.replace(experiment, data=data)}.items():
        summary = runs.write(tmp_path / name, each)
        assert summary["evaluate_on"] == name
        for of_whole in (summary, summarize_seeds([summary], 1)):
            assert (text in describe(of_whole).splitlines()) == (name == "validation")


PLACE = {"device": {"platform": "gpu", "kind": "H100", "count": 8}, "versions": {"fedmd_jax": "1.2", "jax": "9.9"}}


def test_a_run_that_was_continued_elsewhere_says_so(tmp_path):
    continued = [{"after_round": None, **PLACE}, {"after_round": 1, **PLACE}]
    runs.write(tmp_path / "run", runs.experiment(), continued=continued)
    summary, _ = read_run(tmp_path / "run")
    assert summary["continued"] == continued
    assert describe(summary).splitlines()[7:9] == [
        f"continued {when} on 8 x H100, fedmd_jax 1.2, jax 9.9: the same but for rounding"
        for when in ("before round 0", "after round 1")
    ]
