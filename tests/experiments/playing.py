"""The command line with programs that train nothing, interrupted at a stage."""

import contextlib
import functools

import pytest
from experiments.counting import counting

from fedmd_jax.cli import main
from fedmd_jax.experiments import train
from fedmd_jax.experiments.progress import Lines
from fedmd_jax.experiments.setup import prepare


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Disturbed(Lines):
    """Progress that raises at a stage, a phase or a round; a round is shown before its checkpoint is written."""

    def __init__(self, stage, kind):
        super().__init__(3)
        self._stage, self._kind, self.told = stage, kind, []

    def phase(self, title):
        self._hear(title)

    def round(self, metrics):
        self._hear(metrics.round)

    def _hear(self, stage):
        self.told.append(stage)
        if stage == self._stage:
            raise self._kind


@functools.cache
def prepared(experiments, batched):
    return counting(prepare(experiments, batched=batched))


@contextlib.contextmanager
def playing(command="run"):
    """Runs the command line up to a stage of one of its batches of seeds; the exit code, and what was shown."""

    def play(*argv, stage=None, kind=KeyboardInterrupt, batch=1, command=command):
        listening = []

        def make(*_):
            listening.append(Disturbed(stage if len(listening) + 1 == batch else None, kind))
            return listening[-1]

        code = None
        with pytest.MonkeyPatch.context() as disturbed, contextlib.suppress(Killed):
            disturbed.setattr(train, "make_progress", make)
            code = main([command, *map(str, argv)])
        return code, [each.told for each in listening]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "prepare", lambda experiments, batched: prepared(tuple(experiments), batched))
        monkeypatch.setattr(train, "plot", lambda summary, metrics: repr(metrics).encode())  # takes its time
        yield play
