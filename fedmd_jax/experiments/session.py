"""Runs that differ in their seeds only: one after the other, each into its own directory, compiled once."""

import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.errors import bad_input
from fedmd_jax.experiments.interrupts import CtrlC, Uninterrupted
from fedmd_jax.experiments.procedure import (
    Observers,
    Prepared,
    clients_at_once,
    communication,
    compiled_once,
    prepare,
    pretrained_from,
)
from fedmd_jax.experiments.progress import make_progress
from fedmd_jax.experiments.recorder import Recorder
from fedmd_jax.experiments.run_directory import Record
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.experiments.stopwatch import Stopwatch


def run_all(
    jobs: Mapping[pathlib.Path, Experiment],
    name: str,
    *,
    command: str,
    ctrl_c: CtrlC,
    show: Callable[[Record], str],
    done: Callable[[pathlib.Path], Any] = lambda path: None,
) -> bool:
    """Runs every experiment into its directory.

    Args:
      jobs: at least one directory, which must not exist, and the settings of its run; they differ in seeds only.
      name: of the experiment.
      command: with which this was started.
      ctrl_c: stops the run that is under way, whose results are kept, and those to come.
      show: what is printed of a run's summary.
      done: called with the directory of every run that was not interrupted, before the next one begins.

    Returns:
      Whether all went well; False after Ctrl-C.

    Raises:
      SettingsError: the data is missing or damaged, or the settings do not fit it.
      RunDirectoryError: a directory exists or cannot be made.
      WriteError: a file cannot be written.
    """
    watch = Stopwatch()
    with bad_input():
        prepared = prepare(next(iter(jobs.values())))
    with compiled_once(prepared, watch) as run:
        for number, (path, experiment) in enumerate(jobs.items()):
            if number > 0:
                prepared = None  # before the next data is read
                watch.restart()
                with bad_input():
                    prepared = prepare(experiment)
            with ctrl_c.held():
                recorder = Recorder(
                    path,
                    name,
                    experiment,
                    command=command,
                    clients_at_once=clients_at_once(prepared),
                    pretrained_from=pretrained_from(prepared),
                )
            completed = _run(run, prepared, recorder, watch, ctrl_c)
            with ctrl_c.held():
                _finish(recorder, prepared, watch, path, show, interrupted=not completed)
                if completed:
                    done(path)
            if not completed:
                return False
            if number + 1 < len(jobs):
                ctrl_c.check()
    return True


def _run(run: Callable, prepared: Prepared, recorder: Recorder, watch: Stopwatch, ctrl_c: CtrlC) -> bool:
    try:
        with make_progress(prepared.experiment.num_rounds) as progress:
            run(prepared, Uninterrupted(Observers(recorder, progress), ctrl_c))
    except KeyboardInterrupt:
        ctrl_c.hold()  # a second one does not stop the writing
        return False
    return True


def _finish(
    recorder: Recorder,
    prepared: Prepared,
    watch: Stopwatch,
    path: pathlib.Path,
    show: Callable[[Record], str],
    *,
    interrupted: bool,
) -> None:
    num_done, num_rounds = recorder.num_rounds_done, prepared.experiment.num_rounds
    if num_done is None:
        print(
            f"\ninterrupted before the first result: {path} has {files.CONFIG} and an empty {files.METRICS}",
            file=sys.stderr,
        )
        return
    if interrupted:
        print(f"\ninterrupted after round {num_done} of {num_rounds}: what is done so far is kept", file=sys.stderr)
    summary = recorder.finish(communication(prepared, num_rounds=num_done), watch.seconds(), interrupted=interrupted)
    print(f"\n{show(summary)}\nresults in {path}")
