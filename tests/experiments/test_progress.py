import io
import re

import pytest
from experiments import runs

from fedmd_jax.experiments.progress import Bar, Lines, Progress, make_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(shown, num_rounds=3, **changes):
    experiment = runs.experiment(num_rounds=num_rounds)
    shown.phase("preparing")
    shown.phase("rounds")
    for round_ in range(num_rounds + 1):
        shown.round(runs.round_metrics(experiment, round_, **changes))
    shown.phase("pooled upper bound")
    shown.close()


def test_lines():
    file = io.StringIO()
    show(Lines(3, file))
    assert file.getvalue().splitlines() == [
        "preparing ...",
        "rounds ...",
        *(f"round {r}/3  accuracy 0.11{2 * r} (0.10{2 * r} to 0.12{2 * r})" for r in range(4)),
        "pooled upper bound ...",
    ]


@pytest.mark.parametrize("num_rounds", [0, 3])
def test_the_bar_ends_with_the_last_phase_round_and_accuracy(num_rounds):
    terminal = Terminal()
    show(Bar(num_rounds, terminal), num_rounds=num_rounds)
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("pooled upper bound: ")
    assert f"{num_rounds}/{num_rounds} [" in last or num_rounds == 0
    assert f"accuracy 0.11{2 * num_rounds}" in last


def test_faults_are_shown():
    for changes, told in (
        ({"digested": False}, ", no consensus: no client with a weight reported"),
        ({"status": {1: "dropped"}}, ", 1 of 3 clients dropped or failed"),
    ):
        terminal, file = Terminal(), io.StringIO()
        for shown in (Bar(1, terminal), Lines(1, file)):
            show(shown, num_rounds=1, **changes)
        assert re.search(rf"round 1/1  accuracy 0\.112 \(.*\){told}\n", file.getvalue())
        assert told in terminal.getvalue()


@pytest.mark.parametrize(
    ("kind", "terminal", "term", "wanted"),
    [
        ("auto", True, "xterm", Bar),
        ("auto", True, "dumb", Lines),
        ("auto", False, "xterm", Lines),
        ("bar", False, "xterm", Bar),
        ("lines", True, "xterm", Lines),
        ("none", True, "xterm", Progress),
    ],
)
def test_the_kind_of_progress(monkeypatch, kind, terminal, term, wanted):
    monkeypatch.setattr("sys.stderr", Terminal() if terminal else io.StringIO())
    monkeypatch.setenv("TERM", term)
    shown = make_progress(kind, 3)
    assert type(shown) is wanted
    shown.close()
