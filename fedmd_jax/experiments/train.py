"""The train loop: transfer learning, rounds of FedMD beside the local-only baseline, and the pooled upper bound.

A run writes its metrics after each round, then a checkpoint that names the size of the metrics. A run that is resumed
cuts its metrics to that size, so that it may be interrupted anywhere.
"""

import contextlib
import functools
import itertools
import pathlib
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedmd_jax.checks import one_line
from fedmd_jax.experiments import distributed
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.checkpoint import CheckpointError, Checkpoints, PretrainedCache, difference
from fedmd_jax.experiments.compile import Programs
from fedmd_jax.experiments.errors import bad_input
from fedmd_jax.experiments.progress import Progress, ProgressKind, make_progress
from fedmd_jax.experiments.results.figures import plot, write_plot
from fedmd_jax.experiments.results.report import summarize
from fedmd_jax.experiments.run_directory import Record
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.experiments.setup import Setup, prepare
from fedmd_jax.mapping.groups import group_client_ids
from fedmd_jax.mapping.sharding import fetch_to_host
from fedmd_jax.simulation.federation import States
from fedmd_jax.simulation.metrics import (
    OK,
    PRIVATE_FAULT,
    PUBLIC_FAULT,
    RoundMetrics,
    reverted_clients,
    round_metrics,
    with_faults,
)
from fedmd_jax.types import RoundInfo

REVISIT_FAULT = "revisit not finite"  # of the local-only baseline
Accuracies = list[dict[int, float | None]]  # per seed, by client id


class Signals:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt in a `with` block, but not within `held`.

    They are remembered, since Python drops an exception that falls into a destructor. A signal that is ignored, as
    under nohup, stays ignored.
    """

    def __init__(self):
        self._number: int | None = None  # of the last signal
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        if threading.current_thread() is threading.main_thread():  # no other thread may take signals
            self._before = {number: own for number, own in usual.items() if signal.getsignal(number) is own}
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @property
    def code(self) -> int:
        """The exit code after a signal: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self._number or signal.SIGINT)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is raised within."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    def hold(self) -> None:
        """Nothing is raised from here on."""
        self._held = True

    def check(self, round_: int | None = None) -> None:
        """Raises KeyboardInterrupt if there was a signal; after a round also if another process had SIGTERM."""
        if round_ is not None and distributed.preemption_requested(round_):
            self._number = signal.SIGTERM
        if self._number is not None:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        if not self._held:
            raise KeyboardInterrupt


class Command(NamedTuple):
    """What all runs of one command have in common."""

    name: str  #: of the experiment
    config: Record  #: more content of config.json
    progress: ProgressKind  #: how it is shown
    signals: Signals  #: interrupt a run, whose results so far are kept
    resume: bool = False  #: whether directories that exist are resumed
    allow_environment_change: bool = False  #: whether they may be resumed with other versions or devices


class _Run(NamedTuple):
    """One run, or several seeds that are trained at once."""

    command: Command
    setup: Setup
    programs: Programs
    cache: PretrainedCache
    checkpoints: Checkpoints
    writers: Sequence[files.Writer]  #: one per seed in the first process, none in the others
    before: Record  #: of the checkpoint from which the run is resumed
    progress: Progress

    def fetch(self, tree: Any) -> list[Any]:
        """Results on the host, per seed."""
        return self.setup.per_seed(fetch_to_host(tree))

    def seconds(self) -> dict[str, float]:
        """Seconds of one seed by phase, with those before the run was resumed."""
        spent, num_seeds = self.programs.seconds(), len(self.setup.experiments)
        return {phase: self.before["seconds"].get(phase, 0.0) + spent[phase] / num_seeds for phase in spent}


def run_all(
    jobs: Mapping[pathlib.Path, Experiment],
    command: Command,
    *,
    seeds_at_once: int = 1,
    done: Callable[[pathlib.Path, Record], Any],
) -> bool:
    """Runs experiments that differ in their seeds only and are not finished yet, with the same compiled programs.

    Args:
      jobs: settings by run directory.
      command: what they have in common.
      seeds_at_once: how many of them are trained at once, in one program.
      done: called with directory and summary of each run, also of one that was interrupted after round 0.

    Returns:
      Whether all runs were completed; False after Ctrl-C or SIGTERM.

    Raises:
      SettingsError: the data is missing or damaged, or the settings do not fit it.
      RunDirectoryError: a directory exists or cannot be made, or cannot be resumed.
      CheckpointError: a checkpoint is damaged, or of another run.
      WriteError: a file cannot be written.
    """
    remaining, programs = list(jobs.items()), None
    with contextlib.ExitStack() as programs_stack:
        while remaining:
            batch, remaining = dict(remaining[:seeds_at_once]), remaining[seeds_at_once:]
            if all(map(files.is_finished, batch)):
                continue
            command.signals.check()
            with bad_input():
                setup = prepare(list(batch.values()), batched=seeds_at_once > 1)
            if programs is None:
                programs = Programs(setup.federation)
                programs_stack.callback(programs.close)
            programs.restart()
            with contextlib.ExitStack() as stack:
                cache = setup.pretrained_cache(next(iter(batch)))
                found = {name: str(cache.path(name)) for name in cache.found()}
                known = {"clients_at_once": setup.clients_at_once(), "pretrained_from": found}
                opened, start = _open(stack, setup, list(batch), command, known)
                kind = command.progress if distributed.is_first() else "none"
                progress = stack.enter_context(contextlib.closing(make_progress(kind, setup.experiment.num_rounds)))
                run = _Run(command, setup, programs, cache, *opened, progress)
                if not _run(run, start, done):
                    return False
    return True


def _open(
    stack: contextlib.ExitStack, setup: Setup, paths: Sequence[pathlib.Path], command: Command, config: Record
) -> tuple[tuple[Checkpoints, list[files.Writer], Record], dict[str, Any]]:
    """Reopens run directories that are resumed, and makes the others; or raises and changes none.

    Returns:
      Checkpoints, writers, the record of the latest checkpoint; and the states in it, by name.
    """
    is_first, identity = distributed.is_first(), setup.identity()
    there = [path for path in paths if command.resume and path.is_dir()]
    distributed.check_same("settings, data and versions", [identity, list(map(str, (*paths, *there)))])
    before, start = {"num_bytes": [0] * len(paths), "seconds": {}, "continued": [], "round": None}, {}
    for path in there if is_first else ():
        stack.enter_context(files.locked(path))  # before anything in it is read
    folder, checkpoints = paths[0] / files.CHECKPOINTS / "rounds", None
    if paths[0] in there:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder)))
    if checkpoints is not None and checkpoints.latest is not None:
        names = ("fedmd", "local") if setup.experiment.local else ("fedmd",)
        check = functools.partial(_check_identity, identity, checkpoints.path, command.allow_environment_change)
        start, before = checkpoints.load(dict.fromkeys(names, setup.shapes()), check)
        if before["identity"]["environment"] != identity["environment"]:
            before["continued"].append({"after_round": before["round"], **identity["environment"]})
    writers = []
    with command.signals.held():
        for path, experiment, num_bytes in zip(paths, setup.experiments, before["num_bytes"], strict=True):
            if is_first and path in there:
                writers.append(files.reopen(path, num_bytes))
            elif is_first:
                writers.append(files.Writer.create(path, command.name, experiment, **command.config, **config))
                stack.enter_context(files.locked(path))
        if checkpoints is None:
            checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder)))
    if there and is_first:
        where = "from the beginning" if before["round"] is None else f"after round {before['round']}"
        print(f"{paths[0]} is resumed {where}", flush=True)
    return (checkpoints, writers, {**before, "identity": identity}), start


def _check_identity(identity: Record, path: pathlib.Path, allow_environment_change: bool, record: Record) -> None:
    """A `CheckpointError` if a checkpoint is of another run."""
    found, hint = record["identity"], ""
    wanted = {part: identity[part] for part in identity if part != "environment" or not allow_environment_change}
    different = difference(wanted, {part: found.get(part) for part in wanted})
    if different and different.startswith("environment"):
        hint = "; --allow-environment-change resumes it to results that are the same but for rounding"
    if different:
        raise CheckpointError(one_line(f"the checkpoint {path} is of another run: {different}{hint}"))


def _run(run: _Run, start: dict[str, Any], done: Callable[[pathlib.Path, Record], Any]) -> bool:
    """Trains, and writes the summary; whether it was not interrupted."""
    pooled, completed, setup, signals = None, False, run.setup, run.command.signals
    try:
        pooled = _train(run, start)
        completed = True
    except KeyboardInterrupt:
        signals.hold()  # another signal does not interrupt the writing
    with signals.held():
        run.progress.close()
        run.checkpoints.wait()
        for seed, writer in enumerate(run.writers):
            if writer.num_rounds_done is None:
                print(f"\ninterrupted before the first result of {writer.path}", file=sys.stderr)
                continue
            summary = summarize(
                run.command.name,
                setup.experiments[seed],
                writer.metrics,
                pooled=pooled and pooled[seed],
                communication=setup.communication(writer.num_rounds_done),
                seconds=run.seconds(),
                interrupted=not completed,
                continued=run.before["continued"],
            )
            write_summary(writer.path, summary, writer.metrics)
            done(writer.path, summary)
        if completed and distributed.is_first() and setup.experiment.pretrained_dir is None:
            shutil.rmtree(run.cache.folder, ignore_errors=True)
    return completed


def write_summary(path: pathlib.Path, summary: Record, metrics: Sequence[Record]) -> None:
    """Writes summary and plot of the rounds that are done, at least round 0."""
    write_plot(path / files.PLOT, plot, summary, metrics)
    files.replace_file(path / files.SUMMARY, files.to_json(summary))  # last: it says that all is there


def _train(run: _Run, start: dict[str, Any]) -> Accuracies | None:
    """Does everything that is not done yet.

    Args:
      run: where results go.
      start: states on the host from a checkpoint, by name; empty for a new run. Emptied, to free the memory.

    Returns:
      The pooled upper bound per seed, if it is wanted.
    """
    setup, programs, experiment = run.setup, run.programs, run.setup.experiment
    public, private, local = setup.data.public, setup.data.private, None
    resumed = bool(start)
    _begin_to_compile(run, resumed=resumed)
    if resumed:
        states = setup.put(start.pop("fedmd"))
        local = setup.put(start.pop("local")) if experiment.local else None
    else:
        states, faults = _transfer_learn(run)
        if experiment.local:
            local = jax.tree.map(jnp.copy, states)
    run.progress.phase("rounds")
    if not resumed:
        _record(run, 0, states, local, faults=faults)
    for round_ in range((run.before["round"] or 0) + 1, experiment.num_rounds + 1):
        key, participants, local_info = setup.round_key(round_), setup.participants(round_), None
        states, info = programs("round", states, public, private, key, **participants)
        if experiment.local:
            local, local_info = programs("revisit", local, private, key, **participants)
        _record(run, round_, states, local, info, local_info)
    return _train_pooled(run) if experiment.pooled else None


def _begin_to_compile(run: _Run, *, resumed: bool) -> None:
    """In the order in which the programs are called."""
    setup, data, keys = run.setup, run.setup.data, run.setup.keys
    states = setup.federation.put(setup.shapes())
    if not resumed:
        calls = _pretrain_calls(run)
        if calls:
            run.programs.begin("new_states", keys.init, setup.first_input)
        for names in calls:
            some = _some(states, names)
            run.programs.begin("pretrain", some, data.pretraining, keys.public, *setup.validation("pretrain"))
        run.programs.begin("train_private", states, data.private, keys.private, *setup.validation("train_private"))
    run.programs.begin("evaluate", states, data.test)
    if (run.before["round"] or 0) < setup.experiment.num_rounds:
        key, participants = setup.round_key(1), setup.participants(1)
        run.programs.begin("round", states, data.public, data.private, key, **participants)
        if setup.experiment.local:
            run.programs.begin("revisit", states, data.private, key, **participants)
    if setup.experiment.pooled:
        run.programs.begin("train_pooled", states, data.pooling, keys.pooled, *setup.validation("train_pooled"))


def _pretrain_calls(run: _Run) -> list[list[str]]:
    """The groups that are not in the cache: one after the other, or all groups at once on a mesh."""
    names, found = list(run.setup.federation.groups), run.cache.found()
    missing = [name for name in names if name not in found]
    if run.setup.federation.mesh is not None:
        return [names] if missing else []
    return [[name] for name in missing]


def _some(states: States, names: Sequence[str]) -> States:
    """The states of some groups; sharded states stay sharded only as a whole."""
    return states if len(names) == len(states) else {name: states[name] for name in names}


def _pretrain(run: _Run) -> tuple[States, list[list[int]]]:
    """Clients after the public half of transfer learning; and per seed the ids of those whose training failed."""
    setup, groups = run.setup, run.setup.federation.groups
    calls = _pretrain_calls(run)
    if calls:
        run.progress.phase("preparing the networks")
        fresh = run.programs("new_states", setup.keys.init, setup.first_input)
    for names in calls:
        which = f", network {list(groups).index(names[0]) + 1} of {len(groups)}" if len(names) < len(groups) else ""
        run.progress.phase(f"transfer learning: public data{which}")
        arguments = setup.data.pretraining, setup.keys.public, *setup.validation("pretrain")
        trained, info = run.programs("pretrain", _some(fresh, names), *arguments)
        failed = _failed(run, info)
        with run.command.signals.held():
            for name in names:
                run.cache.save(
                    name, trained[name], {"failed": [sorted(ids & {*groups[name].client_ids}) for ids in failed]}
                )
        run.command.signals.check()
    loaded = {name: run.cache.load(name) for name in groups}
    states = setup.put({name: states for name, (states, _) in loaded.items()})
    failed = zip(*(record["failed"] for _, record in loaded.values()), strict=True)
    return states, [sorted(itertools.chain(*ids)) for ids in failed]


def _transfer_learn(run: _Run) -> tuple[States, list[dict[str, list[int]]]]:
    """Clients after transfer learning; and per seed what went wrong for which of them."""
    setup = run.setup
    states, public_failed = _pretrain(run)
    run.progress.phase("transfer learning: private data")
    arguments = setup.data.private, setup.keys.private, *setup.validation("train_private")
    states, info = run.programs("train_private", states, *arguments)
    failed = zip(public_failed, _failed(run, info), strict=True)
    return states, [dict(zip((PUBLIC_FAULT, PRIVATE_FAULT), ids, strict=True)) for ids in failed]


def _train_pooled(run: _Run) -> Accuracies:
    """The pooled upper bound per seed and client; None for a client whose training failed."""
    setup = run.setup
    states, _ = _pretrain(run)
    run.progress.phase("pooled upper bound")
    arguments = setup.data.pooling, setup.keys.pooled, *setup.validation("train_pooled")
    states, info = run.programs("train_pooled", states, *arguments)
    results = zip(_evaluate(run, states), _failed(run, info), strict=True)
    return [{i: None if i in failed else accuracy for i, accuracy in found.items()} for found, failed in results]


def _record(
    run: _Run,
    round_: int,
    states: States,
    local: States | None,
    info: RoundInfo | None = None,
    local_info: Any = None,
    faults: Sequence[Mapping[str, list[int]]] | None = None,
) -> None:
    """Evaluates the clients after a round, and writes metrics and checkpoint."""
    setup, groups = run.setup, run.setup.federation.groups
    evaluations = run.fetch(run.programs("evaluate", states, setup.data.test))
    infos = run.fetch(info) if info is not None else [None] * len(evaluations)
    metrics = [round_metrics(groups, round_, *each) for each in zip(evaluations, infos, strict=True)]
    if faults is not None:
        metrics = [with_faults(*each) for each in zip(metrics, faults, strict=True)]
    if local is None:
        baseline = [{}] * len(metrics)
    elif info is None:  # before round 1 both are the same
        baseline = [{client.client_id: (client.accuracy, OK) for client in each.clients} for each in metrics]
    else:
        completed = [each.participation.completed for each in infos]
        results = zip(_evaluate(run, local), _failed(run, local_info, completed), strict=True)
        baseline = [
            {i: (accuracy, REVISIT_FAULT if i in failed else OK) for i, accuracy in found.items()}
            for found, failed in results
        ]
    clients = tuple(client for each in metrics for client in each.clients)
    mean = RoundMetrics(round_, clients, any(each.digested for each in metrics))
    with run.command.signals.held():
        for writer, of_seed, of_local in zip(run.writers, metrics, baseline, strict=False):
            writer.append(files.round_records(of_seed, of_local))
        run.progress.round(mean)
        trees = {"fedmd": states} if local is None else {"fedmd": states, "local": local}
        _save_checkpoint(run, round_, trees, mean.mean_accuracy)
    run.command.signals.check(round_)


def _save_checkpoint(run: _Run, round_: int, trees: dict[str, States], accuracy: float) -> None:
    """If it is due; a round that ends while another's is being written goes without, but for the last round."""
    every, is_last = run.setup.experiment.checkpoint_every, round_ == run.setup.experiment.num_rounds
    may_skip = not is_last and jax.process_count() == 1  # processes must agree
    if every == 0 or (round_ % every and not is_last) or (may_skip and run.checkpoints.is_busy):
        return
    num_bytes = [writer.num_bytes for writer in run.writers]
    record = {**run.before, "round": round_, "num_bytes": num_bytes, "seconds": run.seconds()}
    run.checkpoints.save(round_, trees, record, accuracy=accuracy)


def _evaluate(run: _Run, states: States) -> list[dict[int, float]]:
    """Accuracy per seed and client."""
    groups, evaluations = run.setup.federation.groups, run.fetch(run.programs("evaluate", states, run.setup.data.test))
    return [{c.client_id: c.accuracy for c in round_metrics(groups, 0, each, None).clients} for each in evaluations]


def _failed(run: _Run, info: Any, completed: Sequence[Any] | None = None) -> list[set[int]]:
    """Per seed the ids of the clients whose training did not end in finite numbers, of those that completed it."""
    infos = run.fetch(info)
    completed = completed or [None] * len(infos)
    client_ids = group_client_ids(run.setup.federation.groups)
    return [set(reverted_clients(client_ids, *each)) for each in zip(infos, completed, strict=True)]
