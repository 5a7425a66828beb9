import time

import pytest

from fedmd_jax.experiments.stopwatch import Stopwatch


def test_each_phase_has_its_seconds_and_the_total_has_all():
    watch = Stopwatch()
    for _ in range(2):
        with watch("rounds"):
            time.sleep(0.02)
    time.sleep(0.02)
    seconds = watch.seconds()
    assert list(seconds) == ["compile", "transfer", "pooled", "local", "rounds", "evaluate", "total"]
    assert seconds["rounds"] >= 0.04
    assert seconds["compile"] == seconds["transfer"] == 0
    assert seconds["total"] >= seconds["rounds"] + 0.02


def test_a_phase_that_fails_counts():
    watch = Stopwatch(("rounds",))
    with pytest.raises(RuntimeError), watch("rounds"):
        raise RuntimeError
    assert watch.seconds()["rounds"] > 0


def test_started_again():
    watch = Stopwatch(("rounds",))
    with watch("rounds"):
        time.sleep(0.02)
    watch.restart()
    seconds = watch.seconds()
    assert seconds["rounds"] == 0
    assert seconds["total"] < 0.02
