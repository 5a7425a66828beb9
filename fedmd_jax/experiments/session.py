"""Runs that differ in their seeds only: one after the other, each into its own directory, compiled once."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments import together
from fedmd_jax.experiments.errors import bad_input
from fedmd_jax.experiments.interrupts import CtrlC, Uninterrupted
from fedmd_jax.experiments.kept import LOCAL_PARTS, OfFirst, OnDisk
from fedmd_jax.experiments.procedure import (
    Observers,
    Prepared,
    client_shapes,
    clients_at_once,
    communication,
    compiled_once,
    prepare,
    pretrained_from,
)
from fedmd_jax.experiments.progress import Progress, make_progress
from fedmd_jax.experiments.recorder import Recorder
from fedmd_jax.experiments.resuming import identity
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
    resume: bool = False,
    elsewhere: bool = False,
) -> bool:
    """Runs every experiment into its directory.

    Args:
      jobs: at least one directory, which must not exist, and the settings of its run; they differ in seeds only.
      name: of the experiment.
      command: with which this was started.
      ctrl_c: stops the run that is under way, whose results are kept, and those to come.
      show: what is printed of a run's summary.
      done: called with the directory of every run that was not interrupted, before the next one begins.
      resume: whether a directory that exists is that of an interrupted run, which goes on.
      elsewhere: whether it may go on with other versions and on other devices.

    Returns:
      Whether all went well; False after Ctrl-C or SIGTERM.

    Raises:
      SettingsError: the data is missing or damaged, or the settings do not fit it.
      RunDirectoryError: a directory exists or cannot be made, or its run cannot go on.
      CheckpointError: a checkpoint is damaged, or of another run.
      WriteError: a file cannot be written.
    """
    watch = Stopwatch()
    begin = partial(_begin, name=name, command=command, watch=watch, ctrl_c=ctrl_c, resume=resume, elsewhere=elsewhere)
    first, experiment = next(iter(jobs.items()))
    with bad_input():
        prepared = prepare(experiment)
    writing = begin(first, prepared)
    with compiled_once(prepared, watch, writing.kept) as run:
        for number, (path, experiment) in enumerate(jobs.items()):
            if number > 0:
                prepared = writing = None  # before the next data is read
                watch.restart()
                with bad_input():
                    prepared = prepare(experiment)
                writing = begin(path, prepared)
            with contextlib.closing(writing):
                completed = _run(run, prepared, writing, ctrl_c)
                with ctrl_c.held():
                    _finish(writing, prepared, watch, path, show, interrupted=not completed)
                    if completed:
                        done(path)
            if not completed:
                return False
            if number + 1 < len(jobs):
                ctrl_c.check()
    return True


class _Writing(NamedTuple):
    """What writes into the directory of a run."""

    recorder: Recorder | None  # of many processes in the first only
    kept: OnDisk | OfFirst | None

    def close(self) -> None:
        """All is on disk, and another process may have the directory."""
        try:
            self.wait()
        finally:
            if self.recorder is not None:
                self.recorder.close()

    def wait(self) -> None:
        """All is on disk."""
        if self.kept is not None:
            self.kept.close()


def _begin(path: pathlib.Path, prepared: Prepared, **settings: Any) -> _Writing:
    """Of many processes the first writes, and lets the others know."""
    known = identity(prepared) if prepared.experiment.checkpoint_every else None
    if not together.are_many():
        return _begin_here(path, prepared, known, **settings)
    writing = _begin_here(path, prepared, known, **settings) if together.is_first() else _Writing(None, None)
    return writing if known is None else writing._replace(kept=OfFirst(writing.kept))


def _begin_here(
    path: pathlib.Path,
    prepared: Prepared,
    known: Record | None,
    *,
    name: str,
    command: str,
    watch: Stopwatch,
    ctrl_c: CtrlC,
    resume: bool,
    elsewhere: bool,
) -> _Writing:
    """A new directory, or one where a run goes on, which nothing is done to before all in it is known to be good."""
    experiment, kept, resume_at = prepared.experiment, None, None
    recorder = None

    def position() -> Record:
        return {"num_bytes": recorder.num_bytes, "seconds": watch.seconds()}

    if known is not None:
        kept = OnDisk(
            path,
            known,
            every=experiment.checkpoint_every,
            num_rounds=experiment.num_rounds,
            position=position,
            held=ctrl_c.held,
        )
    with contextlib.ExitStack() as refused:
        lock = None
        if resume and path.is_dir():
            lock = files.lock(path)  # before anything in it is read
            refused.callback(lock.close)
            if files.is_finished(path):
                raise files.RunDirectoryError(f"nothing to do: another process has finished the run in {path}")
            ignored = LOCAL_PARTS if elsewhere else ()
            found = kept.check(client_shapes(prepared), ignored=ignored) if kept else None
            found = found or {"num_bytes": 0, "seconds": {}}
            resume_at = found["num_bytes"]
            watch.restart(found["seconds"])
        with ctrl_c.held():
            recorder = Recorder(
                path,
                name,
                experiment,
                command=command,
                clients_at_once=clients_at_once(prepared),
                pretrained_from=pretrained_from(prepared),
                resume_at=resume_at,
                lock=lock,
            )
            refused.pop_all()
    if kept is not None:
        kept.go_on(recorder.num_rounds_done)
    if resume_at is not None:
        num_done = recorder.num_rounds_done
        where = "from the beginning" if num_done is None else f"after round {num_done} of {experiment.num_rounds}"
        print(f"{path} goes on {where}", flush=True)
    return _Writing(recorder, kept)


def _run(run: Callable, prepared: Prepared, writing: _Writing, ctrl_c: CtrlC) -> bool:
    try:
        with make_progress(prepared.experiment.num_rounds) if together.is_first() else Progress() as progress:
            observers = [progress] if writing.recorder is None else [writing.recorder, progress]
            run(prepared, Uninterrupted(Observers(*observers), ctrl_c), writing.kept)
        writing.wait()
    except KeyboardInterrupt:
        ctrl_c.hold()  # a second one does not stop the writing
        return False
    return True


def _finish(
    writing: _Writing,
    prepared: Prepared,
    watch: Stopwatch,
    path: pathlib.Path,
    show: Callable[[Record], str],
    *,
    interrupted: bool,
) -> None:
    recorder, kept = writing
    if recorder is None:
        return
    num_done, num_rounds = recorder.num_rounds_done, prepared.experiment.num_rounds
    if num_done is None:
        print(
            f"\ninterrupted before the first result: {path} has {files.CONFIG} and an empty {files.METRICS}",
            file=sys.stderr,
        )
        return
    if interrupted:
        print(f"\ninterrupted after round {num_done} of {num_rounds}: what is done so far is kept", file=sys.stderr)
    summary = recorder.finish(
        communication(prepared, num_rounds=num_done),
        watch.seconds(),
        interrupted=interrupted,
        continued=kept.continued if kept is not None else (),
    )
    if kept is not None and not interrupted:
        kept.finish()
    print(f"\n{show(summary)}\nresults in {path}")
