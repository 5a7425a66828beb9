import dataclasses

from experiments import runs

from fedmd_jax.experiments.results.report import describe, table
from fedmd_jax.experiments.results.seeds import describe_seeds, summarize_seeds
from fedmd_jax.experiments.run_directory import read_run


def test_the_table(tmp_path):
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=10))
    assert table(summary).splitlines() == [
        "client  architecture  transfer   local   FedMD  pooled    gain  over local",
        "     0  mlp:n1=1         0.100   0.050   0.120   0.900    +2.0        +7.0",
        "     1  mlp:n1=2         0.110   0.050   0.130   0.900    +2.0        +8.0",
        "     2  mlp:n1=1         0.120   0.050   0.140   0.900    +2.0        +9.0",
        "--------------------------------------------------------------------------",
        "  mean                   0.110   0.050   0.130   0.900    +2.0        +8.0",
    ]


def test_the_table_without_a_control_and_a_bound(tmp_path):
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=0), local=None, pooled=None)
    last = "  mean                   0.110       -   0.110       -    +0.0           -"
    assert table(summary).splitlines()[-1] == last
    for accuracies in (summary["mean"], *summary["clients"]):
        del accuracies["local_accuracy"]  # as older versions have written it
    assert table(summary).splitlines()[-1] == last


def test_what_a_run_has_cost(tmp_path):
    text = describe(runs.write(tmp_path / "run", runs.experiment()))
    assert text.splitlines()[-2:] == [
        "sent per client and round: 3.2 kB up, 3.2 kB down (FedAvg: 23.6 kB each way)",
        "seconds: compile 3, transfer 1, rounds 2, total 8",
    ]


def test_what_went_wrong_stands_below_the_table(tmp_path):
    status = {2: {1: "digest not finite"}, 5: {1: "straggler, digest not finite"}}
    status = {round_: {0: "dropped", **status.get(round_, {})} for round_ in range(1, 10)}
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=10), status=status)
    assert describe(summary).splitlines()[6:11] == [
        "",
        "client 0 (mlp:n1=1): dropped in 9 of 10 rounds",
        "client 1 (mlp:n1=2): digest not finite in rounds 2, 5",
        "client 1 (mlp:n1=2): straggler in round 5",
        "",
    ]
    for client in summary["clients"]:
        del client["faults"]  # as older versions have written it
    assert len(describe(summary).splitlines()) == 9


def test_what_went_wrong_in_the_control_does_too(tmp_path):
    experiment, status = runs.experiment(num_rounds=3), {2: {1: "dropped"}}
    summary = runs.write(tmp_path / "run", experiment, status=status, failed={1: [2, 3], 2: [1]})
    assert read_run(tmp_path / "run")[0]["clients"][1]["faults"] == {"dropped": [2], "local only not finite": [2, 3]}
    assert describe(summary).splitlines()[7:10] == [
        "client 1 (mlp:n1=2): dropped in round 2",
        "client 1 (mlp:n1=2): local only not finite in rounds 2, 3",
        "client 2 (mlp:n1=1): local only not finite in round 1",
    ]


def test_accuracy_that_is_not_of_the_test_set_says_so(tmp_path):
    experiment, text = runs.experiment(), "accuracy is on private validation data"
    on_test = runs.write(tmp_path / "test", experiment)
    data = dataclasses.replace(experiment.data, evaluate_on="validation")
    on_validation = runs.write(tmp_path / "validation", dataclasses.replace(experiment, data=data))
    assert (on_test["evaluate_on"], on_validation["evaluate_on"]) == ("test", "validation")
    assert text in describe(on_validation).splitlines()
    assert text not in describe(on_test)
    del on_test["evaluate_on"]  # as older versions have written it
    assert text not in describe(on_test)
    assert text in describe_seeds(summarize_seeds([on_validation], 1)).splitlines()
    assert text not in describe_seeds(summarize_seeds([on_test], 1))


PLACE = {"device": {"platform": "gpu", "kind": "H100", "count": 8}, "versions": {"fedmd_jax": "1.2", "jax": "9.9"}}


def test_a_run_that_went_on_elsewhere_says_so(tmp_path):
    continued = [{"after_round": None, **PLACE}, {"after_round": 1, **PLACE}]
    runs.write(tmp_path / "run", runs.experiment(), continued=continued)
    summary, _ = read_run(tmp_path / "run")
    assert summary["continued"] == continued
    assert describe(summary).splitlines()[7:9] == [
        f"went on {when} on 8 x H100, fedmd_jax 1.2, jax 9.9: the same but for rounding"
        for when in ("before round 0", "after round 1")
    ]
