from experiments import runs

from fedmd_jax.experiments.results.report import describe, table


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
    status = {2: {1: "digest not finite"}, 5: {1: "incomplete, digest not finite"}}
    status = {round_: {0: "absent", **status.get(round_, {})} for round_ in range(1, 10)}
    summary = runs.write(tmp_path / "run", runs.experiment(num_rounds=10), status=status)
    assert describe(summary).splitlines()[6:11] == [
        "",
        "client 0 (mlp:n1=1): absent in 9 of 10 rounds",
        "client 1 (mlp:n1=2): digest not finite in rounds 2, 5",
        "client 1 (mlp:n1=2): incomplete in round 5",
        "",
    ]
    for client in summary["clients"]:
        del client["faults"]  # as older versions have written it
    assert len(describe(summary).splitlines()) == 9
