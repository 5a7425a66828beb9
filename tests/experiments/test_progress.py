import io
import os
import re
import time

import pytest
from experiments import runs

from fedmd_jax.experiments import progress
from fedmd_jax.experiments.kept import ROUNDS
from fedmd_jax.experiments.progress import Bars, Lines, make_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2


def show(shown, num_rounds=3, **changes):
    experiment = runs.experiment(num_rounds=num_rounds)
    with shown:
        shown.phase("preparing")
        shown.phase(ROUNDS)
        for round_ in range(num_rounds + 1):
            shown.round(runs.round_metrics(experiment, round_, **changes))
        shown.phase("pooled upper bound")


def last_frames(terminal):
    """What a terminal shows in the end: each line as it was drawn last."""
    return [line.split("\r")[-1].rstrip() for line in terminal.getvalue().split("\n")]


def test_lines():
    file = io.StringIO()
    show(Lines(3, file))
    assert file.getvalue().splitlines() == [
        "preparing ...",
        "rounds ...",
        "round 0/3  accuracy 0.110 (0.100 to 0.120)",
        "round 1/3  accuracy 0.112 (0.102 to 0.122)",
        "round 2/3  accuracy 0.114 (0.104 to 0.124)",
        "round 3/3  accuracy 0.116 (0.106 to 0.126)",
        "pooled upper bound ...",
    ]


def test_bars_leave_a_line_for_each_phase():
    terminal = Terminal()
    show(Bars(3, terminal))
    preparing, rounds, pooled, end = last_frames(terminal)
    assert preparing == "preparing  00:00"
    assert re.fullmatch(r"rounds 3/3 \|.+\| 00:00, accuracy 0.116", rounds)
    assert pooled == "pooled upper bound  00:00"
    assert end == ""


def test_no_rounds():
    terminal = Terminal()
    show(Bars(0, terminal), num_rounds=0)
    assert last_frames(terminal)[1] == "rounds  00:00, accuracy 0.110"


def test_a_round_without_consensus_says_so():
    terminal, file = Terminal(), io.StringIO()
    for shown in (Bars(1, terminal), Lines(1, file)):
        show(shown, num_rounds=1, digested=False)
    for text in (terminal.getvalue(), file.getvalue()):
        assert "no consensus: nobody with a weight was heard" in text


def test_how_many_clients_failed_is_said():
    terminal, file, experiment = Terminal(), io.StringIO(), runs.experiment(num_rounds=1)
    metrics = runs.round_metrics(experiment, 1, status={2: "absent"})
    for shown in (Bars(1, terminal), Lines(1, file)):
        with shown:
            shown.phase(ROUNDS)
            shown.round(metrics)
    for text in (terminal.getvalue(), file.getvalue()):
        assert ", 1 of 3 clients absent or failed" in text


def test_the_time_left_is_that_of_the_rounds_after_the_first(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    terminal, experiment = Terminal(), runs.experiment(num_rounds=6)
    with Bars(6, terminal) as bars:
        bars.phase(ROUNDS)
        for round_, seconds in enumerate((50, 900, 20, 40)):  # 900: the first compiles
            now += seconds
            bars.round(runs.round_metrics(experiment, round_))
    assert "01:30 left" in last_frames(terminal)[0]  # 3 rounds of 30 seconds
    assert "00:80" not in terminal.getvalue()
    assert "01:20 left" in terminal.getvalue()  # 4 rounds of 20 seconds, before


def test_the_clock_goes_on_while_nothing_is_told(monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_TICKS", 0.01)
    terminal = Terminal()
    with Bars(3, terminal) as bars:
        bars.phase("preparing")
        drawn = terminal.getvalue().count("preparing")
        deadline = time.monotonic() + 10
        while terminal.getvalue().count("preparing") < drawn + 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    drawn = terminal.getvalue()
    time.sleep(0.05)
    assert terminal.getvalue() == drawn  # and stops when closed


@pytest.mark.parametrize(
    ("terminal", "term", "size", "kind"),
    [
        (True, "xterm", (80, 24), Bars),
        (True, "dumb", (80, 24), Lines),
        (True, "xterm", (0, 0), Lines),  # as in some containers
        (False, "xterm", (80, 24), Lines),
    ],
)
def test_bars_are_for_terminals(monkeypatch, terminal, term, size, kind):
    monkeypatch.setattr("sys.stderr", Terminal() if terminal else io.StringIO())
    monkeypatch.setattr("os.get_terminal_size", lambda descriptor: os.terminal_size(size))
    monkeypatch.setenv("TERM", term)
    with make_progress(3) as shown:
        assert type(shown) is kind
