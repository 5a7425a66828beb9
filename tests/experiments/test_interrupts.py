import os
import signal
import sys

import pytest
from experiments import runs

from fedmd_jax.experiments.interrupts import CtrlC, Uninterrupted
from fedmd_jax.experiments.observer import Observer, Observers


def press():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def pythons_own_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Pressing(Observer):
    """Presses Ctrl-C in the middle of what it is told."""

    def __init__(self):
        self.heard = []

    def phase(self, title):
        press()
        self.heard.append(title)

    def round(self, metrics):
        press()
        self.heard.append(metrics.round)

    def local(self, accuracy, undone):
        press()
        self.heard.append(accuracy)

    def pooled(self, accuracy):
        press()
        self.heard.append(accuracy)


def test_ctrl_c_interrupts():
    with CtrlC(), pytest.raises(KeyboardInterrupt):
        press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_held_back_and_raised_after():
    with CtrlC() as ctrl_c:
        ctrl_c.check()
        with ctrl_c.held():
            press()
            with ctrl_c.held():
                press()
            press()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c.check()


def test_held_back_for_good():
    with CtrlC() as ctrl_c:
        ctrl_c.hold()
        with ctrl_c.held():
            press()
        press()


def test_an_observer_hears_everything_whole():
    for tell, heard in (
        (lambda observer: observer.phase("one"), "one"),
        (lambda observer: observer.round(runs.round_metrics(runs.experiment(), 2)), 2),
        (lambda observer: observer.pooled({0: 0.5}), {0: 0.5}),
    ):
        first, second = Pressing(), Pressing()
        with CtrlC() as ctrl_c, pytest.raises(KeyboardInterrupt):
            tell(Uninterrupted(Observers(first, second), ctrl_c))
        assert first.heard == second.heard == [heard]


def test_one_that_python_drops_is_not_lost(capfd):
    class Disturbed:
        def __del__(self):
            press()

    hook = sys.unraisablehook
    with CtrlC() as ctrl_c:
        Disturbed()  # what a destructor raises is reported to the hook, and gone
        with pytest.raises(KeyboardInterrupt):
            Uninterrupted(Observer(), ctrl_c).phase("next")
    assert sys.unraisablehook is hook
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_a_handler_that_is_not_pythons_own_stays(handler):
    signal.signal(signal.SIGINT, handler)
    with CtrlC():
        assert signal.getsignal(signal.SIGINT) is handler
        press()
    assert signal.getsignal(signal.SIGINT) is handler
