"""Runs that differ in their seeds only, compiled once: one after the other or side by side, each into its directory."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments import together
from fedmd_jax.experiments.errors import bad_input
from fedmd_jax.experiments.interrupts import CtrlC, Uninterrupted
from fedmd_jax.experiments.kept import LOCAL_PARTS, PRETRAINED, TRANSFERRED, OfFirst, OnDisk
from fedmd_jax.experiments.observer import Observers
from fedmd_jax.experiments.prepared import Prepared, client_shapes, clients_at_once, communication, prepare
from fedmd_jax.experiments.procedure import compiled_once, pretrained_from
from fedmd_jax.experiments.progress import Progress, Several, make_progress
from fedmd_jax.experiments.recorder import Recorder
from fedmd_jax.experiments.resuming import identity
from fedmd_jax.experiments.run_directory import Record
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.experiments.side_by_side import Meeting, pad_alike
from fedmd_jax.experiments.stopwatch import Stopwatch

T = TypeVar("T")


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
    at_once = next(iter(jobs.values())).seeds_at_once or 1
    meeting = Meeting(at_once) if at_once > 1 else None
    watch = Stopwatch()
    # Signals are of the main thread, and runs side by side are not in it.
    held = ctrl_c.held if meeting is None else contextlib.nullcontext
    check = partial(_check, held=held, resume=resume, elsewhere=elsewhere)
    begin = partial(
        _begin_all, watch=watch, ctrl_c=ctrl_c, check=check, open_=partial(_open, name=name, command=command)
    )
    first, *others = _batches(list(jobs.items()), at_once)
    going = begin(first)
    with compiled_once(going[0].prepared, watch, going[0].writing.kept, meeting) as run:
        if not _run_batch(run, going, meeting, ctrl_c, show, done):
            return False
        for batch in others:
            ctrl_c.check()
            going = None  # before the next data is read
            watch.restart()
            going = begin(batch)
            if not _run_batch(run, going, meeting, ctrl_c, show, done):
                return False
    return True


def _batches(jobs: Sequence[T], size: int) -> list[Sequence[T]]:
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


class _Going(NamedTuple):
    """A run that goes on."""

    path: pathlib.Path
    prepared: Prepared
    writing: "_Writing"
    seconds: "_Share"


def _begin_all(
    jobs: Sequence[tuple[pathlib.Path, Experiment]],
    *,
    watch: Stopwatch,
    ctrl_c: CtrlC,
    check: "Callable[[pathlib.Path, Prepared, _Share], _Checked]",
    open_: "Callable[[pathlib.Path, Prepared, _Checked], _Writing]",
) -> list[_Going]:
    """All begin, or nothing is done to the directory of any."""
    with bad_input():
        prepared = [prepare(experiment) for _, experiment in jobs]
    going = []
    with contextlib.ExitStack() as refused:
        checked = []
        for (path, _), each in zip(jobs, prepared, strict=True):
            seconds = _Share(watch, len(jobs))
            checked.append(check(path, each, seconds))
            if checked[-1].lock is not None:
                refused.callback(checked[-1].lock.close)
        with ctrl_c.held():
            for (path, _), each, known in zip(jobs, prepared, checked, strict=True):
                writing = open_(path, each, known)
                refused.callback(writing.close)
                going.append(_Going(path, each, writing, known.seconds))
            refused.pop_all()
    if len(going) > 1:
        padded = _padded_alike(prepared)
        going = [each._replace(prepared=alike) for each, alike in zip(going, padded, strict=True)]
    return going


def _run_batch(
    run: Callable,
    going: Sequence[_Going],
    meeting: Meeting | None,
    ctrl_c: CtrlC,
    show: Callable[[Record], str],
    done: Callable[[pathlib.Path], Any],
) -> bool:
    """Whether these, which run at once, were not interrupted."""
    with contextlib.ExitStack() as writing:
        for each in going:
            writing.callback(each.writing.close)
        completed = _run(run, going[0], ctrl_c) if meeting is None else _meet(run, going, meeting, ctrl_c)
        with ctrl_c.held():
            for each in going:
                _finish(each, show, interrupted=not completed)
                if completed:
                    done(each.path)
    return completed


class _Share:
    """What a run has of the seconds of all that run side by side, and those before it was interrupted.

    Attributes:
      before: seconds by phase.
    """

    def __init__(self, watch: Stopwatch, num_runs: int):
        self._watch, self._num_runs = watch, num_runs
        self.before: Mapping[str, float] = {}

    def __call__(self) -> dict[str, float]:
        so_far = self._watch.seconds()
        return {phase: self.before.get(phase, 0.0) + spent / self._num_runs for phase, spent in so_far.items()}


class _Position:
    """Where a run is, for its checkpoints."""

    def __init__(self, seconds: _Share):
        self._seconds, self.recorder = seconds, None

    def __call__(self) -> Record:
        return {"num_bytes": self.recorder.num_bytes, "seconds": self._seconds()}


class _Checked(NamedTuple):
    """What is known of a run before anything is done to its directory."""

    seconds: _Share
    position: _Position
    kept: OnDisk | None = None  # of many processes in the first only, as the next two
    lock: files.Lock | None = None
    resume_at: int | None = None


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


def _check(
    path: pathlib.Path,
    prepared: Prepared,
    seconds: _Share,
    *,
    held: Callable[[], contextlib.AbstractContextManager],
    resume: bool,
    elsewhere: bool,
) -> _Checked:
    """A directory where a run goes on is this process's from here on, and all in it is known to be good."""
    experiment, position = prepared.experiment, _Position(seconds)
    checked = _Checked(seconds, position)
    known = identity(prepared) if experiment.checkpoint_every else None
    if not together.is_first():
        return checked
    if known is not None:
        kept = OnDisk(
            path,
            known,
            every=experiment.checkpoint_every,
            num_rounds=experiment.num_rounds,
            position=position,
            held=held,
        )
        checked = checked._replace(kept=kept)
    if not (resume and path.is_dir()):
        return checked
    with contextlib.ExitStack() as refused:
        lock = files.lock(path)  # before anything in it is read
        refused.callback(lock.close)
        if files.is_finished(path):
            raise files.RunDirectoryError(f"nothing to do: another process has finished the run in {path}")
        ignored = LOCAL_PARTS if elsewhere else ()
        found = checked.kept.check(client_shapes(prepared), ignored=ignored) if checked.kept else None
        found = found or {"num_bytes": 0, "seconds": {}}
        seconds.before = found["seconds"]
        refused.pop_all()
    return checked._replace(lock=lock, resume_at=found["num_bytes"])


def _open(path: pathlib.Path, prepared: Prepared, checked: _Checked, *, name: str, command: str) -> _Writing:
    """A new directory, or one where a run goes on. Of many processes the first writes, and lets the others know."""
    experiment, kept, recorder = prepared.experiment, checked.kept, None
    if together.is_first():
        recorder = checked.position.recorder = Recorder(
            path,
            name,
            experiment,
            command=command,
            clients_at_once=clients_at_once(prepared),
            pretrained_from=pretrained_from(prepared),
            resume_at=checked.resume_at,
            lock=checked.lock,
        )
        num_done = recorder.num_rounds_done
        if kept is not None:
            kept.go_on(num_done)
        if checked.resume_at is not None:
            print(f"{path} goes on {_where(kept, num_done, experiment.num_rounds)}", flush=True)
    return _Writing(recorder, OfFirst(kept) if together.are_many() and experiment.checkpoint_every else kept)


def _where(kept: OnDisk | None, num_done: int | None, num_rounds: int) -> str:
    if num_done is not None:
        return f"after round {num_done} of {num_rounds}"
    # The clients of round 0 are on disk before its results are.
    told = {TRANSFERRED: "after transfer learning", PRETRAINED: "within transfer learning"}
    found = [where for phase, where in told.items() if kept is not None and kept.last(phase) is not None]
    return found[0] if found else "from the beginning"


def _run(run: Callable, going: _Going, ctrl_c: CtrlC) -> bool:
    num_rounds = going.prepared.experiment.num_rounds
    try:
        with make_progress(num_rounds) if together.is_first() else Progress() as progress:
            observers = [progress] if going.writing.recorder is None else [going.writing.recorder, progress]
            run(going.prepared, Uninterrupted(Observers(*observers), ctrl_c), going.writing.kept)
        going.writing.wait()
    except KeyboardInterrupt:
        ctrl_c.hold()  # a second one does not stop the writing
        return False
    return True


def _meet(run: Callable, going: Sequence[_Going], meeting: Meeting, ctrl_c: CtrlC) -> bool:
    """All of them side by side, each in a thread, where no signal comes."""
    first_rounds = [each.writing.recorder.num_rounds_done for each in going]
    first_rounds = [0 if done is None else done + 1 for done in first_rounds]
    try:
        with make_progress(going[0].prepared.experiment.num_rounds) as progress:
            observers = Several(progress, first_rounds).observers()
            seeds = ", ".join(str(each.prepared.experiment.seed) for each in going)
            print(f"seeds {seeds} side by side" if len(going) > 1 else f"seed {seeds}", flush=True)
            meeting.hold(
                [
                    partial(run, each.prepared, Observers(each.writing.recorder, observer), each.writing.kept)
                    for each, observer in zip(going, observers, strict=True)
                ],
                held=ctrl_c.held,
                check=ctrl_c.check,
            )
        for each in going:
            each.writing.wait()
    except KeyboardInterrupt:
        ctrl_c.hold()
        return False
    return True


def _padded_alike(prepared: Sequence[Prepared]) -> list[Prepared]:
    """So that all fit into one program; writers have different numbers of images in every seed."""
    names = ("private", "pooling", "validation")
    data = [{name: getattr(each, name) for name in names} | {"test": each.datasets.test} for each in prepared]
    padded = pad_alike(data)
    return [
        each._replace(datasets=each.datasets._replace(test=of_it.pop("test")), **of_it)
        for each, of_it in zip(prepared, padded, strict=True)
    ]


def _finish(going: _Going, show: Callable[[Record], str], *, interrupted: bool) -> None:
    path, prepared, writing, seconds = going
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
        seconds(),
        interrupted=interrupted,
        continued=kept.continued if kept is not None else (),
    )
    if kept is not None and not interrupted:
        kept.finish()
    print(f"\n{show(summary)}\nresults in {path}")
