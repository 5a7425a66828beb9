"""The train loop: transfer learning, rounds of an algorithm beside the local-only baseline, the pooled upper bound.

A run writes its metrics after each round, then a checkpoint that names the size of the metrics. A run that is resumed
cuts its metrics to that size, so that it may be interrupted anywhere.
"""

import contextlib
import dataclasses
import functools
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedmd_jax.algorithms.base import join_states, split_states
from fedmd_jax.checks import one_line
from fedmd_jax.client.evaluation import Evaluation
from fedmd_jax.client.scoring import compute_accuracy
from fedmd_jax.experiments import distributed, run_directory as files
from fedmd_jax.experiments.checkpoint import CLIENTS, CheckpointError, Checkpoints, PretrainedCache, Trees, difference
from fedmd_jax.experiments.compile import Programs
from fedmd_jax.experiments.divergence import Watch
from fedmd_jax.experiments.errors import UsageError, bad_input
from fedmd_jax.experiments.progress import Progress, ProgressKind, make_progress
from fedmd_jax.experiments.results.figures import plot, write_plot
from fedmd_jax.experiments.results.report import summarize
from fedmd_jax.experiments.run_directory import Record
from fedmd_jax.experiments.settings import Experiment, settings_from
from fedmd_jax.experiments.setup import Setup, deciding_settings, prepare
from fedmd_jax.loggers import LOGGERS, Logger, LogKind, TensorBoard, WandB
from fedmd_jax.mapping import fetch_to_host
from fedmd_jax.mapping.groups import group_client_ids
from fedmd_jax.simulation import metrics as outcomes
from fedmd_jax.simulation.federation import States
from fedmd_jax.simulation.metrics import RoundMetrics
from fedmd_jax.simulation.trained import mean_logits, trained_clients
from fedmd_jax.types import FederationState

Accuracies = list[dict[int, float | None]]  # per seed, by client id
Faults = Sequence[Mapping[str, set[int]]]  # per seed: fault -> ids of the clients
_LOCAL, _SERVER = "local", "server"  # names of trees in checkpoints: the local-only baseline, and the server's state
_PROGRAMS = {CLIENTS: "round", _LOCAL: "revisit"}  # of a round
AllStates = dict[str, States | FederationState]  # of the algorithm, under `CLIENTS`, and of the local-only baseline


class Signals:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt in a `with` block, but not within `held`.

    They are remembered, since Python drops an exception that is raised in a destructor. A signal that is ignored, as
    under nohup, stays ignored.
    """

    def __init__(self):
        self._number: int | None = None  # of the last signal
        self._held = False
        self._previous: dict[int, Any] = {}  # handlers

    def __enter__(self) -> "Signals":
        for number, default in {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}.items():
            if signal.getsignal(number) is default:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def code(self) -> int:
        """The exit code after a signal: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self._number or signal.SIGINT)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is raised within."""
        was_held, self._held = self._held, True
        try:
            yield
        finally:
            self._held = was_held

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
    log: LogKind | None = None  #: where metrics are logged, too


class _Run(NamedTuple):
    """One run, or several seeds that are trained at once."""

    command: Command
    setup: Setup
    programs: Programs
    cache: PretrainedCache
    checkpoints: Checkpoints
    writers: Sequence[files.Writer]  #: one per seed in the first process, none in the others
    watches: Sequence[Watch]  #: one per writer
    loggers: Sequence[Logger]  #: one per writer, if metrics are logged
    resumed: Record  #: record of the checkpoint from which the run is resumed
    progress: Progress

    def begin(self, program: str, *states: Any) -> None:
        """Starts to compile a program for these states."""
        arguments, named = self.setup.arguments(program)
        self.programs.begin(program, *states, *arguments, **named)

    def call(self, program: str, *states: Any, round_: int = 1) -> Any:
        """Calls a program with these states and the data of the run."""
        arguments, named = self.setup.arguments(program, round_)
        return self.programs(program, *states, *arguments, **named)

    def fetch(self, tree: Any) -> list[Any]:
        """Results on the host, per seed."""
        return self.setup.per_seed(fetch_to_host(tree))

    def seconds(self) -> dict[str, float]:
        """Seconds of one seed by phase, with those before the run was resumed."""
        spent, num_seeds = self.programs.seconds(), len(self.setup.experiments)
        return {phase: self.resumed["seconds"].get(phase, 0.0) + spent[phase] / num_seeds for phase in spent}


def run_all(
    jobs: Mapping[pathlib.Path, Experiment],
    command: Command,
    *,
    seeds_at_once: int = 1,
    done: Callable[[pathlib.Path, Record], Any],
) -> None:
    """Runs experiments that differ in their seeds only and are not finished yet, with the same compiled programs.

    Args:
      jobs: settings by run directory.
      command: what they have in common.
      seeds_at_once: how many of them are trained at once, in one program.
      done: called with directory and summary of each run, also of one that was interrupted after round 0.

    Raises:
      KeyboardInterrupt: after Ctrl-C or SIGTERM; the results so far are written.
      SettingsError: the data is missing or damaged, or the settings do not fit it.
      RunDirectoryError: a directory exists or cannot be made, or cannot be resumed.
      CheckpointError: a checkpoint is damaged, or of another run.
      WriteError: a file cannot be written.
      UsageError: a package is missing that logs metrics.
    """
    if command.log is not None:
        try:
            LOGGERS[command.log].load()
        except ModuleNotFoundError as error:
            raise UsageError(str(error)) from error
    items = list(jobs.items())
    with contextlib.closing(Programs()) as programs:
        for first in range(0, len(items), seeds_at_once):
            batch = dict(items[first : first + seeds_at_once])
            if all(map(files.is_finished, batch)):
                continue
            command.signals.check()
            with bad_input():
                setup = prepare(list(batch.values()), batched=seeds_at_once > 1)
            programs.restart(setup.federation)
            with contextlib.ExitStack() as stack:
                with command.signals.held():
                    run, states = _open(stack, setup, programs, list(batch), command)
                _run(run, states, done)


def _open(
    stack: contextlib.ExitStack, setup: Setup, programs: Programs, paths: Sequence[pathlib.Path], command: Command
) -> tuple[_Run, AllStates]:
    """Reopens run directories that are resumed, and makes the others.

    Returns:
      The run, and the states in its latest checkpoint, by name.

    Raises:
      RunDirectoryError, CheckpointError: a directory cannot be resumed; it is not changed.
    """
    is_first, identity = distributed.is_first(), setup.identity()
    existing = [path for path in paths if command.resume and path.is_dir()]
    distributed.check_same("settings, data and versions", [identity, list(map(str, (*paths, *existing)))])
    cache = setup.pretrained_cache(paths[0])
    config = {**command.config, "pretrained_from": {name: str(cache.path(name)) for name in cache.found()}}
    for path, experiment in zip(paths, setup.experiments, strict=True) if is_first else ():
        if path not in existing:
            files.Writer.create(path, command.name, experiment, **config)
        stack.enter_context(files.locked(path))  # before anything in it is read
    folder = paths[0] / files.CHECKPOINTS / "rounds"
    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder)))
    resumed, states = {"num_bytes": [0] * len(paths), "seconds": {}, "continued": [], "round": None}, {}
    if checkpoints.latest is not None:
        shapes = {CLIENTS: setup.start_shapes(), **({_LOCAL: setup.shapes()} if setup.experiment.local else {})}
        check = functools.partial(_check_identity, identity, checkpoints.path, command.allow_environment_change)
        trees, resumed = checkpoints.load(_to_trees(shapes), check)
        states = _from_trees(trees)
        if resumed["identity"]["environment"] != identity["environment"]:
            resumed["continued"].append({"after_round": resumed["round"], **identity["environment"]})
    writers = list(map(files.reopen, paths, resumed["num_bytes"])) if is_first else []
    if existing and is_first:
        where = "from the beginning" if resumed["round"] is None else f"after round {resumed['round']}"
        print(f"{paths[0]} is resumed {where}", flush=True)
    progress = make_progress(command.progress if is_first else "none", setup.experiment.num_rounds)
    stack.enter_context(contextlib.closing(progress))
    resumed |= {"identity": identity, "inputs": setup.inputs()}
    each = zip(writers, setup.experiments, strict=False) if command.log is not None else ()
    loggers = [stack.enter_context(_open_logger(command, *of_seed)) for of_seed in each]
    watches = [Watch(writer.metrics) for writer in writers]
    return _Run(command, setup, programs, cache, checkpoints, writers, watches, loggers, resumed, progress), states


def _open_logger(command: Command, writer: files.Writer, experiment: Experiment) -> Logger:
    if command.log == "tensorboard":
        first_round = 0 if writer.num_rounds_done is None else writer.num_rounds_done + 1
        return TensorBoard(writer.path / command.log, first_round=first_round)
    name, settings = f"{command.name}, seed {experiment.seed}", dataclasses.asdict(experiment)
    with bad_input():
        return WandB(writer.path, project="fedmd_jax", name=name, config=settings)


def _to_trees(states: AllStates) -> dict[str, Trees]:
    """The trees of a checkpoint: clients, and what there is of the server."""
    clients, memory, model = split_states(states[CLIENTS])
    parts = {"memory": memory, "model": model}
    server = {name: tree for name, tree in parts.items() if jax.tree.leaves(tree)}
    return {**states, CLIENTS: clients, **({_SERVER: server} if server else {})}


def _from_trees(trees: dict[str, Trees]) -> AllStates:
    """The inverse of `_to_trees`."""
    server = {"memory": (), "model": (), **trees.pop(_SERVER, {})}
    return {**trees, CLIENTS: join_states(trees[CLIENTS], **server)}


def _check_identity(identity: Record, path: pathlib.Path, allow_environment_change: bool, record: Record) -> None:
    """A `CheckpointError` if a checkpoint is of another run."""
    found, hint = {**record["identity"]}, ""
    with contextlib.suppress(ValueError):  # an older version did not know all settings: it had their defaults
        found["settings"] = deciding_settings(settings_from(Experiment, found["settings"]))
    wanted = {part: identity[part] for part in identity if part != "environment" or not allow_environment_change}
    different = difference(wanted, {part: found.get(part) for part in wanted})
    if different and different.startswith("environment"):
        hint = "; --allow-environment-change resumes it to results that are the same but for rounding"
    if different:
        raise CheckpointError(one_line(f"the checkpoint {path} is of another run: {different}{hint}"))


def _run(run: _Run, states: AllStates, done: Callable[[pathlib.Path, Record], Any]) -> None:
    """Trains, and writes the summary, also after an interruption."""
    pooled, ensemble, interruption, setup, signals = None, None, None, run.setup, run.command.signals
    try:
        pooled, ensemble = _train(run, states)
    except KeyboardInterrupt as error:
        signals.hold()  # another signal does not interrupt the writing
        interruption = error
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
                ensemble=ensemble and ensemble[seed],
                communication=setup.communication(writer.num_rounds_done),
                seconds=run.seconds(),
                interrupted=interruption is not None,
                continued=run.resumed["continued"],
            )
            write_summary(writer.path, summary, writer.metrics)
            done(writer.path, summary)
        if interruption is not None:
            raise interruption
        if distributed.is_first() and setup.experiment.pretrained_dir is None:
            shutil.rmtree(run.cache.folder, ignore_errors=True)


def write_summary(path: pathlib.Path, summary: Record, metrics: Sequence[Record]) -> None:
    """Writes summary and plot of the rounds that are done, at least round 0."""
    write_plot(path / files.PLOT, plot, summary, metrics)
    files.replace_file(path / files.SUMMARY, files.to_json(summary))  # last: it says that all is there


def _train(run: _Run, states: AllStates) -> tuple[Accuracies | None, list[float | None]]:
    """Does everything that is not done yet.

    Args:
      run: where results go.
      states: of a checkpoint, on the host, by name; empty for a new run. Replaced, to free the memory.

    Returns:
      The pooled upper bound per seed, if it is wanted; and the accuracy of the ensemble of all clients per seed.
    """
    run.command.signals.check()
    experiment, first_round = run.setup.experiment, (run.resumed["round"] or 0) + 1
    _begin_to_compile(run, resumed=bool(states))
    for name in states:
        states[name] = run.setup.put(states[name])
    if states:
        run.progress.phase("rounds")
    else:
        states[CLIENTS], faults = _transfer_learn(run)
        if experiment.local:
            states[_LOCAL] = jax.tree.map(jnp.copy, states[CLIENTS])
        if run.setup.federation.has_server_state:
            states[CLIENTS] = FederationState(states[CLIENTS], *run.call("new_server"))
        run.progress.phase("rounds")
        _record(run, 0, states, {}, faults)
    for round_ in range(first_round, experiment.num_rounds + 1):
        infos = {}
        for name in states:
            states[name], infos[name] = run.call(_PROGRAMS[name], states[name], round_=round_)
        _record(run, round_, states, infos)
    ensemble = _evaluate_ensemble(run, states[CLIENTS])
    return _train_pooled(run) if experiment.pooled else None, ensemble


def _begin_to_compile(run: _Run, *, resumed: bool) -> None:
    """In the order in which the programs are called."""
    experiment, federation, states = run.setup.experiment, run.setup.federation, run.setup.start_shapes()
    states = states if federation.mesh is None else run.setup.put(states)
    clients, _, model = split_states(states)
    calls = [] if resumed else _pretrain_calls(run)
    if calls:
        run.begin("new_states")
    for names in calls:
        run.begin("pretrain", _some(clients, names))
    rounds_left = (run.resumed["round"] or 0) < experiment.num_rounds
    wanted = {
        "train_private": (not resumed, clients),
        "new_server": (not resumed and federation.has_server_state,),
        "confusion": (True, clients),
        "evaluate_server": (federation.server is not None, model),
        "estimate_statistics": (not resumed and experiment.batch_statistics == "public", clients),
        "round": (rounds_left, states),
        "revisit": (rounds_left and experiment.local, clients),
        "train_pooled": (experiment.pooled, clients),
    }
    for program, (is_wanted, *arguments) in wanted.items():
        if is_wanted:
            run.begin(program, *arguments)


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


def _pretrain(run: _Run) -> tuple[States, list[set[int]]]:
    """Clients after the public half of transfer learning; and per seed the ids of those whose training failed."""
    groups, calls = run.setup.federation.groups, _pretrain_calls(run)
    if calls:
        run.progress.phase("preparing the networks")
        fresh = run.call("new_states")
    for names in calls:
        which = f", network {list(groups).index(names[0]) + 1} of {len(groups)}" if len(names) < len(groups) else ""
        run.progress.phase(f"transfer learning: public data{which}")
        trained, info = run.call("pretrain", _some(fresh, names))
        failed = _failed(run, info)
        with run.command.signals.held():
            for name in names:
                of_group = [sorted(ids & {*groups[name].client_ids}) for ids in failed]
                run.cache.save(name, trained[name], {"failed": of_group})
        run.command.signals.check()
    loaded = {name: run.cache.load(name) for name in groups}
    failed = zip(*(record["failed"] for _, record in loaded.values()), strict=True)
    states = {name: states for name, (states, _) in loaded.items()}
    return run.setup.put(states), [set().union(*ids) for ids in failed]


def _transfer_learn(run: _Run) -> tuple[States, Faults]:
    """Clients after transfer learning; and per seed what went wrong for which of them."""
    states, public_failed = _pretrain(run)
    run.progress.phase("transfer learning: private data")
    states, info = run.call("train_private", states)
    failed = zip(public_failed, _failed(run, info), strict=True)
    return states, [{outcomes.PUBLIC_FAULT: public, outcomes.PRIVATE_FAULT: private} for public, private in failed]


def _train_pooled(run: _Run) -> Accuracies:
    """The pooled upper bound per seed and client; None for a client whose training failed."""
    states, _ = _pretrain(run)
    run.progress.phase("pooled upper bound")
    states, info = run.call("train_pooled", states)
    results = zip(_metrics(run, 0, _evaluate(run, states)), _failed(run, info), strict=True)
    return [
        {client.client_id: None if client.client_id in failed else client.accuracy for client in metrics.clients}
        for metrics, failed in results
    ]


def _record(run: _Run, round_: int, states: AllStates, infos: Mapping[str, Any], faults: Faults | None = None) -> None:
    """Evaluates the clients after a round, and writes metrics and checkpoint."""
    evaluations, local = _evaluate(run, states[CLIENTS]), [None] * len(run.writers)
    metrics = _metrics(run, round_, evaluations, infos.get(CLIENTS), faults)
    estimated: Sequence[RoundMetrics | None] = [None] * len(run.writers)
    if round_ == 0 and run.setup.experiment.batch_statistics == "public":
        clients = run.call("estimate_statistics", split_states(states[CLIENTS]).clients)
        estimated = _metrics(run, round_, _evaluate(run, clients))
    if run.setup.federation.server is not None:
        servers = run.fetch(run.call("evaluate_server", split_states(states[CLIENTS]).model))
        metrics = [
            of_seed._replace(server_accuracy=float(each.accuracy))
            for of_seed, each in zip(metrics, servers, strict=True)
        ]
    if _LOCAL in states:
        reverted = _failed(run, infos[_LOCAL], infos[CLIENTS].participation.completed) if infos else []
        failed = [{outcomes.REVISIT_FAULT: ids} for ids in reverted]
        local = _metrics(run, round_, _evaluate(run, states[_LOCAL]), None, failed)
    clients = tuple(client for each in metrics for client in each.clients)
    mean = RoundMetrics(round_, clients, any(each.digested for each in metrics))
    with run.command.signals.held():
        # Other processes have no writers.
        results = zip(run.writers, evaluations, metrics, local, estimated, strict=False)
        for writer, of_seed, *of_clients in results:
            writer.append(files.round_records(*of_clients))
            writer.write_confusion(files.confusion_records(run.setup.federation.groups, round_, of_seed))
        with files.writing("cannot log metrics"):
            for logger, writer in zip(run.loggers, run.writers, strict=False):
                logger.log([record for record in writer.metrics if record["round"] == round_])
        run.progress.round(mean)
        _warn_of_divergence(run, metrics)
        _save_checkpoint(run, round_, states, mean.mean_accuracy)
    run.command.signals.check(round_)


def _warn_of_divergence(run: _Run, metrics: Sequence[RoundMetrics]) -> None:
    hint = ": --batch-statistics public helps if batch norms are the cause"
    hint = hint if run.setup.experiment.batch_statistics == "moving" else ""
    for watch, writer, of_seed in zip(run.watches, run.writers, metrics, strict=False):
        if diverges := watch(of_seed.round, of_seed.mean_accuracy, of_seed.consensus_size):
            print(f"\nfedmd-jax: warning: {writer.path}: {diverges}{hint}", file=sys.stderr)


def _save_checkpoint(run: _Run, round_: int, states: AllStates, accuracy: float) -> None:
    """If it is due; a round that ends while another's is being written goes without, but for the last round."""
    every, is_last = run.setup.experiment.checkpoint_every, round_ == run.setup.experiment.num_rounds
    may_skip = not is_last and jax.process_count() == 1  # processes must agree
    due = every is not None and (is_last or (every > 0 and round_ % every == 0))
    if not due or (may_skip and run.checkpoints.is_busy):
        return
    num_bytes = [writer.num_bytes for writer in run.writers]
    record = {**run.resumed, "round": round_, "num_bytes": num_bytes, "seconds": run.seconds()}
    run.checkpoints.save(round_, _to_trees(states), record, accuracy=accuracy)


def _evaluate(run: _Run, states: States | FederationState) -> list[dict[str, Evaluation]]:
    """Accuracies and confusion counts of the clients per seed and group, on the host."""
    return run.fetch(run.call("confusion", split_states(states).clients))


def _evaluate_ensemble(run: _Run, states: States | FederationState) -> list[float | None]:
    """Accuracy of the mean of the clients' logits, per seed; a client with non-finite logits is excluded."""
    [tests] = run.setup.data["confusion"]
    accuracies: list[float | None] = []
    for of_seed, test in zip(run.fetch(split_states(states).clients), run.fetch(tests), strict=True):
        clients = trained_clients(run.setup.federation.groups, of_seed, test.inputs).values()
        logits = [client.logits(test.inputs) for client in clients]
        finite = [each for each in logits if bool(jnp.isfinite(each).all())]
        accuracies.append(float(compute_accuracy(mean_logits(jnp.stack(finite)), test)) if finite else None)
    return accuracies


def _metrics(
    run: _Run, round_: int, evaluations: Sequence[Any], info: Any = None, faults: Faults | None = None
) -> list[RoundMetrics]:
    """Metrics after a round, per seed."""
    groups = run.setup.federation.groups
    results = zip(evaluations, run.fetch(info), faults or [{}] * len(evaluations), strict=True)
    return [outcomes.with_faults(outcomes.round_metrics(groups, round_, *each), of_seed) for *each, of_seed in results]


def _failed(run: _Run, info: Any, completed: Any = None) -> list[set[int]]:
    """Per seed the ids of the clients whose training did not end in finite numbers, of those that completed it."""
    client_ids = group_client_ids(run.setup.federation.groups)
    results = zip(run.fetch(info), run.fetch(completed), strict=True)
    return [set(outcomes.reverted_clients(client_ids, *each)) for each in results]
