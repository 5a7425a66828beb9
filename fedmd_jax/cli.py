"""The command line: `fedmd-jax run`, `fedmd-jax sweep`, `fedmd-jax report`, `fedmd-jax data`."""

import argparse
import dataclasses
import errno
import itertools
import os
import pathlib
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import tyro

import fedmd_jax
from fedmd_jax import checks
from fedmd_jax.data.catalogue import find_data_set
from fedmd_jax.data.listing import describe_sizes, files_of, table
from fedmd_jax.data.preparing import prepare_data
from fedmd_jax.experiments import EXPERIMENTS, Experiment, distributed, smoke
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.checkpoint import CheckpointError
from fedmd_jax.experiments.errors import SettingsError, UsageError, bad_input, check_backend
from fedmd_jax.experiments.progress import ProgressKind
from fedmd_jax.experiments.results import sweep as sweeps
from fedmd_jax.experiments.results.figures import plot, plot_seeds, write_plot
from fedmd_jax.experiments.results.listing import list_runs
from fedmd_jax.experiments.results.report import describe
from fedmd_jax.experiments.results.seeds import brief, describe_seeds, read_seeds, seed_jobs, write_seeds
from fedmd_jax.experiments.run_directory import Record
from fedmd_jax.experiments.settings import settings_from
from fedmd_jax.experiments.setup import cache_compiled_programs, choose_seeds_at_once
from fedmd_jax.experiments.train import Command, Signals, run_all

FAILED, BAD_INPUT = 1, 2
_SMOKE_NOTE = "a smoke run: its settings are tiny, its accuracies mean nothing\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """How this process finds the others of a run.

    Attributes:
      distributed: This process is one of many, on Slurm, a TPU pod, Open MPI or Kubernetes. Needs --out or --resume
        with a folder that all processes share. Clients are sharded over the devices of all.
      coordinator: HOST:PORT of process 0, for processes started by hand. Needs the next two.
      num_processes: Number of processes started by hand.
      process_id: Number of this process, from 0.
    """

    distributed: tyro.conf.FlagCreatePairsOff[bool] = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self):
        by_hand = (self.coordinator, self.num_processes, self.process_id)
        if by_hand != (None, None, None) and None in by_hand:
            raise ValueError("processes started by hand need all of --coordinator, --num-processes and --process-id")

    @property
    def are_many(self) -> bool:
        """Whether there are other processes."""
        return self.distributed or self.coordinator is not None

    def as_options(self) -> str:
        """The options that set these values."""
        given = {name.replace("_", "-"): value for name, value in vars(self).items() if value not in (None, False)}
        return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """What run and sweep have in common.

    Attributes:
      out: Directory of the results, which must not exist. None: a new one in runs/.
      num_seeds: Number of seeds, from --seed on, each in a directory of its own; means and standard deviations are
        written, too.
      config: A config.json whose settings are the defaults; options on the command line win.
      smoke: Tiny defaults, with which every part runs and accuracies mean nothing.
      progress: How progress is shown; auto is a bar on a terminal, else lines.
      experiment: All settings.
    """

    out: str | None = None
    num_seeds: int | None = None
    config: str | None = None
    smoke: tyro.conf.FlagCreatePairsOff[bool] = False
    progress: ProgressKind = "auto"
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(_Options):
    """Train a federation: transfer learning, rounds of FedMD, and the baselines.

    Attributes:
      resume: Directory of an interrupted run, which is continued; all settings come from there.
      allow_environment_change: With --resume: also with other versions or devices, to results that are the same but
        for rounding.
      processes: Of a run in many processes.
    """

    resume: str | None = None
    allow_environment_change: tyro.conf.FlagCreatePairsOff[bool] = False
    processes: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Processes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(_Options):
    """Run every combination of some settings.

    Attributes:
      num_seeds: Number of seeds of every combination, from --seed on.
      over: SETTING=VALUE,VALUE,... with any setting; semicolons instead of commas if values have commas, spaces between
        the items of a list. Given again: every combination.
    """

    num_seeds: int = 1
    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class List:
    """List the known data sets and what of them the data folder has; or the files that one of them is prepared from.

    Attributes:
      name: One data set.
      data_dir: Data folder. None: FEDMD_JAX_DATA, else TFDS_DATA_DIR, else ~/tensorflow_datasets.
    """

    name: tyro.conf.Positional[str | None] = None
    data_dir: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Write a data set into the data folder, from its files or by downloading them, which needs tensorflow.

    Attributes:
      name: Data set, such as mnist.
      source: Folder with its files. None: they are downloaded.
      data_dir: Data folder. None: FEDMD_JAX_DATA, else TFDS_DATA_DIR, else ~/tensorflow_datasets. A run reads another
        one with --data.data-dir.
      no_checksums: Take files that are not the published ones to the bit.
    """

    name: tyro.conf.Positional[str]
    source: Annotated[str | None, tyro.conf.arg(name="from")] = None
    data_dir: str | None = None
    no_checksums: tyro.conf.FlagCreatePairsOff[bool] = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments after the program's name; those of this process by default.

    Returns:
      The exit code: 0, 1 if a result cannot be written, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM. Any other
      exception is a bug, and keeps its traceback.
    """
    if argv is None:
        sys.unraisablehook = lambda _: None  # Ctrl-C in a destructor, and callbacks of Orbax after a full disk
    with Signals() as signals:
        try:
            code = _guarded(list(sys.argv[1:] if argv is None else argv), signals)
        except Exception:
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            code = FAILED
        if code and (argv is None or jax.distributed.is_initialized()):
            distributed.exit_now(code)  # a normal exit would wait for computations, Orbax and other processes
    return code


def _guarded(argv: list[str], signals: Signals) -> int:
    """The exit code of a command, after one line about what went wrong."""
    try:
        code = _parse(argv)(signals)
        sys.stdout.flush()
    except SystemExit as end:  # tyro has printed the help, or what is wrong
        return end.code if isinstance(end.code, int) else 0
    except (UsageError, files.RunDirectoryError, CheckpointError, files.WriteError) as error:
        return _complain(error)
    except BrokenPipeError:  # `fedmd-jax report DIR | head`
        _drop_output()
        return FAILED
    except OSError as error:  # of stdout: what else is written or read has errors of its own
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        return _complain(files.WriteError(f"cannot print: {error.strerror}"))
    except KeyboardInterrupt:
        signals.hold()
        print("\nfedmd-jax: interrupted", file=sys.stderr)
        return signals.code
    return code


def _drop_output() -> None:
    """What is still to be printed goes nowhere, so that the exit does not fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: Exception) -> int:
    print(f"fedmd-jax: error: {checks.one_line(str(error))}", file=sys.stderr)
    return FAILED if isinstance(error, files.WriteError) else BAD_INPUT


def _parse(argv: list[str]) -> Callable[[Signals], int]:
    """The command as a function of the signals that interrupt it."""
    if argv == ["--version"]:
        return lambda _: print(f"fedmd-jax {fedmd_jax.__version__}") or 0
    argv, experiments = _with_defaults(argv or ["--help"])
    if {"-h", "--help"} & set(argv) and argv[0] in _COMMANDS:
        return lambda _: print(_help(argv[0], argv[1], experiments)) or 0
    argv = ["--help" if word == "--help-all" else word for word in argv]
    return _ask_tyro(argv, experiments)


def _with_defaults(argv: list[str]) -> tuple[list[str], dict[str, Experiment]]:
    """The arguments with a name after `run` and `sweep`, and the experiments as --config and --smoke have them."""
    if argv[0] not in _COMMANDS:
        return argv, EXPERIMENTS
    early = argparse.ArgumentParser(prog=f"fedmd-jax {argv[0]}", add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--smoke", action="store_true")
    given, _ = early.parse_known_args(argv[1:])
    name, experiments = "quickstart", EXPERIMENTS
    if given.config is not None:
        config = files.read_config_file(pathlib.Path(given.config).expanduser())
        with bad_input():
            experiments = dict.fromkeys(EXPERIMENTS, settings_from(Experiment, config["settings"]))
        name = config["experiment"] if config["experiment"] in EXPERIMENTS else name
    if given.smoke:
        experiments = {name: smoke(experiment) for name, experiment in experiments.items()}
    if len(argv) == 1 or argv[1].startswith("-"):
        argv = [argv[0], name, *argv[1:]]
    if argv[1] not in EXPERIMENTS:
        raise UsageError(checks.unknown("experiment", argv[1], tuple(EXPERIMENTS)))
    return argv, experiments


def _ask_tyro(argv: list[str], experiments: dict[str, Experiment]) -> Callable[[Signals], int]:
    """The command that the arguments say."""
    with bad_input():
        if argv[0] in _COMMANDS:
            kind, act = _COMMANDS[argv[0]]
            default, program = kind(experiment=experiments[argv[1]]), " ".join(["fedmd-jax", *argv[:2]])
            return partial(act, argv, tyro.cli(kind, default=default, args=argv[2:], prog=program))
        app = tyro.extras.SubcommandApp()
        for name, (kind, _) in _COMMANDS.items():
            app.command(_presets_command(kind), name=name)
        app.command(_report_command, name="report")
        app.command(_data_command, name="data")
        return app.cli(args=argv, prog="fedmd-jax", description=fedmd_jax.__doc__.partition("\n")[0])


def _presets_command(kind: type) -> Callable:
    """`run` or `sweep` with all presets, for the help and for shell completion."""
    presets = {name: kind(experiment=experiment) for name, experiment in EXPERIMENTS.items()}
    choice = tyro.extras.subcommand_type_from_defaults(presets, prefix_names=False)

    def command(options: tyro.conf.OmitSubcommandPrefixes[Annotated[choice, tyro.conf.arg(name="")]]):
        return options

    command.__doc__ = kind.__doc__.partition("\n")[0]
    return command


def _report_command(directory: tyro.conf.Positional[str]):
    """Print the table of a finished run, or of several seeds, and redraw its plot; of a folder of runs a line for each.

    Args:
      directory: The run directory, or a folder of them.
    """
    return partial(_report, directory)


def _data_command(command: tyro.conf.OmitSubcommandPrefixes[Annotated[List | Prepare, tyro.conf.arg(name="")]]):
    """List the known data sets, or prepare one."""
    return partial(_data, command)


class _Job(NamedTuple):
    """A run, or a run of several seeds."""

    path: pathlib.Path
    name: str  #: of the experiment
    experiment: Experiment  #: of the first seed
    num_seeds: int | None
    command: str


def _run(argv: Sequence[str], options: Run, signals: Signals) -> int:
    many = options.processes.are_many
    if many:
        processes = options.processes
        distributed.initialize(processes.coordinator, processes.num_processes, processes.process_id)
    check_backend()
    job = _new_job(argv, options) if options.resume is None else _resumed_job(argv, options)
    if many:
        if job.experiment.devices not in (None, "all"):
            raise UsageError(f"many processes use all their devices, got --devices {job.experiment.devices}")
        job = job._replace(experiment=dataclasses.replace(job.experiment, devices="all"))
    cache_compiled_programs()
    environment = " --allow-environment-change" if options.allow_environment_change else ""
    hint = f"to resume: fedmd-jax run --resume {shlex.quote(str(job.path))}{environment}"
    if many:
        hint += f" {options.processes.as_options()}"
        print(hint, file=sys.stderr, flush=True)  # JAX may end this process when another has ended
    config = {"command": job.command, "num_seeds": job.num_seeds}
    resume = options.resume is not None
    command = Command(job.name, config, options.progress, signals, resume, options.allow_environment_change)
    try:
        completed = _run_job(command, job)
    except KeyboardInterrupt:
        if not job.path.is_dir():
            raise
        completed = False
    except jax.errors.JaxRuntimeError:  # with many processes, mostly because another has ended
        if many:
            print(hint, file=sys.stderr)
        raise
    if not completed:
        signals.hold()
        print(hint, file=sys.stderr)
    return 0 if completed else signals.code


def _run_job(command: Command, job: _Job) -> bool:
    """Whether one seed or several were not interrupted."""
    is_smoke = "--smoke" in job.command.split()
    if job.num_seeds is not None:
        summaries: list[Record] = []
        completed = _run_seeds(command, job.path, job.experiment, summaries)
        if summaries and distributed.is_first():
            print(f"\n{_SMOKE_NOTE * is_smoke}{describe_seeds(summaries[-1])}\nresults in {job.path}")
        return completed
    if files.is_finished(job.path):
        print(f"nothing to do: the run in {job.path} is finished")

    def show(path: pathlib.Path, summary: Record) -> None:
        _note_interruption(summary)
        print(f"\n{_SMOKE_NOTE * is_smoke}{describe(summary)}\nresults in {path}")

    return run_all({job.path: job.experiment}, command, done=show)


def _run_seeds(command: Command, path: pathlib.Path, experiment: Experiment, summaries: list[Record]) -> bool:
    """Whether no seed was interrupted; after each seed a summary of those that are done is written and appended."""
    num_seeds = command.config["num_seeds"]
    with bad_input():
        jobs = seed_jobs(path, experiment, num_seeds)
        at_once = choose_seeds_at_once(experiment, num_seeds)
    finished = [seed_path for seed_path in jobs if files.is_finished(seed_path)]

    def write() -> None:
        if finished and distributed.is_first():
            summaries.append(write_seeds(path, finished, num_seeds))

    def done(seed_path: pathlib.Path, summary: Record) -> None:
        _note_interruption(summary)
        if not summary["interrupted"]:
            print(f"\n{brief(summary)}\nresults in {seed_path}")
            if seed_path not in finished:
                finished.append(seed_path)
            write()

    write()
    return run_all(jobs, command, seeds_at_once=at_once, done=done)


def _note_interruption(summary: Record) -> None:
    if summary["interrupted"]:
        rounds = f"round {summary['num_rounds_done']} of {summary['num_rounds']}"
        print(f"\ninterrupted after {rounds}: results so far are kept", file=sys.stderr)


def _new_job(argv: Sequence[str], options: Run) -> _Job:
    name = argv[1]
    if options.processes.are_many and options.out is None:
        raise UsageError("many processes need --out DIR, a folder that all of them share")
    several = "" if options.num_seeds is None else f"-{options.num_seeds}seeds"
    path = _output_path(options, name, f"-seed{options.experiment.seed}{several}")
    return _Job(path, name, options.experiment, options.num_seeds, shlex.join(["fedmd-jax", *argv]))


def _resumed_job(argv: Sequence[str], options: Run) -> _Job:
    """The run in a directory, as its config.json says."""
    kept = {"resume": None, "allow_environment_change": False, "processes": Processes(), "progress": "auto"}
    if dataclasses.replace(options, **kept) != Run(experiment=EXPERIMENTS["quickstart"]):
        raise UsageError(f"run --resume takes all settings from the directory, got {shlex.join(argv)}")
    path = files.user_path(options.resume)
    seeds = sorted(path.glob("seed*[0-9]"), key=lambda seed: int(re.sub(r"\D", "", seed.name)))
    config = files.read_config(path if (path / files.CONFIG).exists() or not seeds else seeds[0])
    try:
        experiment = settings_from(Experiment, config["settings"])
    except ValueError as error:
        raise files.RunDirectoryError(f"cannot read the settings of {path}: {error}") from error
    if options.allow_environment_change:
        experiment = _of_this_machine(experiment)
    return _Job(path, config["experiment"], experiment, config["num_seeds"], config["command"])


def _of_this_machine(experiment: Experiment) -> Experiment:
    """At most as many devices as there are, and no folders that are not there."""
    devices = experiment.devices
    if isinstance(devices, int) and devices > jax.device_count():
        devices = "all"

    def if_there(folder: str | None) -> str | None:
        return folder if folder is not None and pathlib.Path(folder).expanduser().is_dir() else None

    data = dataclasses.replace(experiment.data, data_dir=if_there(experiment.data.data_dir))
    folder = if_there(experiment.pretrained_dir)
    return dataclasses.replace(experiment, devices=devices, data=data, pretrained_dir=folder)


def _sweep(argv: Sequence[str], options: Sweep, signals: Signals) -> int:
    name = argv[1]
    check_backend()
    path = _output_path(options, name, "-sweep")
    combinations = _combinations(argv, options)
    cache_compiled_programs()
    config = {"command": shlex.join(["fedmd-jax", *argv]), "num_seeds": options.num_seeds}
    command = Command(name, config, options.progress, signals)
    rows: list[Record] = []
    completed = True
    for number, (combination, experiment) in enumerate(combinations):
        print(f"\n{sweeps.label(combination)} ({number + 1} of {len(combinations)})", flush=True)
        place = path / sweeps.directory(number, combination)
        record, completed = _run_combination(command, place, combination, experiment)
        with signals.held():
            _write_sweep(path, name, rows := [*rows, record])
        if not completed:
            break
    print(f"\n{_SMOKE_NOTE * options.smoke}{sweeps.describe_sweep(rows)}\nresults in {path}")
    if not completed:
        return signals.code
    return FAILED if any(record["error"] for record in rows) else 0


def _combinations(argv: Sequence[str], options: Sweep) -> list[tuple[sweeps.Combination, Experiment | SettingsError]]:
    """Every combination with its settings, or with the reason why they do not go together.

    Raises:
      UsageError: an unknown setting, a bad value, or no combination that can be run.
    """
    settings = _options_of(options.experiment)
    flags = [name for name, option in settings.items() if option.kind is bool]
    combinations = []
    for combination in sweeps.grid(options.over, list(settings)):
        try:
            command = _parse([*argv, *sweeps.options(combination, flags)])
            combinations.append((combination, command.args[1].experiment))
        except SettingsError as error:
            combinations.append((combination, error))
    if all(isinstance(experiment, SettingsError) for _, experiment in combinations):
        raise combinations[0][1]
    return combinations


def _run_combination(
    command: Command, path: pathlib.Path, combination: sweeps.Combination, experiment: Experiment | SettingsError
) -> tuple[Record, bool]:
    """Its row of the table, and whether it was not interrupted; a combination that fails does not stop the others."""
    summaries: list[Record] = []
    error, completed = None, True
    try:
        if isinstance(experiment, SettingsError):
            raise experiment
        completed = _run_seeds(command, path, experiment, summaries)
    except (files.WriteError, files.RunDirectoryError, OSError):
        raise  # the others cannot be written or printed, either
    except Exception as failed:
        if not isinstance(failed, UsageError):
            traceback.print_exc()
        error = sweeps.failure(failed)
        print(f"fedmd-jax: failed: {error}", file=sys.stderr)
    return sweeps.row(combination, path.name, summaries[-1] if summaries else None, error), completed


def _write_sweep(path: pathlib.Path, name: str, rows: Sequence[Record]) -> None:
    table = sweeps.to_csv(rows)
    if not path.exists():  # the first combination has failed before it could write anything
        files.create(path, {sweeps.TABLE: table})
    files.replace_file(path / sweeps.TABLE, table)
    write_plot(path / sweeps.PLOT, sweeps.plot_sweep, rows, f"{name}: sweep")


def _report(directory: str, signals: Signals) -> int:
    path = files.user_path(directory)
    with files.reading(path):
        note = _SMOKE_NOTE * files.is_smoke(path)
        if (seeds := read_seeds(path)) is not None:
            summary, runs = seeds
            text, drawing = describe_seeds(summary), (plot_seeds, runs)
        elif not (path / files.SUMMARY).is_file() and (lines := list_runs(path)):
            text, drawing = "\n".join(lines), None
        else:
            summary, metrics = files.read_run(path)
            text, drawing = describe(summary), (plot, summary, metrics)
    print(f"{note}{text}")
    if drawing is not None:
        write_plot(path / files.PLOT, *drawing)
    return 0


def _data(command: List | Prepare, signals: Signals) -> int:
    try:
        with bad_input():
            if isinstance(command, Prepare):
                _prepare(command)
            else:
                print(table(command.data_dir) if command.name is None else files_of(find_data_set(command.name)))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise files.WriteError(f"cannot write the data set: {error}") from error
    return 0


def _prepare(command: Prepare) -> None:
    data_set = find_data_set(command.name)
    print(f"preparing {command.name} ...", flush=True)
    prepared = prepare_data(
        command.name, source=command.source, data_dir=command.data_dir, checksums=not command.no_checksums
    )
    done = "prepared in" if prepared.is_new else "there already, nothing is changed (delete it to prepare it again):"
    print(f"{command.name} {done} {prepared.path}: {describe_sizes(prepared.sizes, data_set)}")


def _output_path(options: _Options, name: str, rest: str) -> pathlib.Path:
    """A directory that does not exist; its name tells a smoke run from the experiment."""
    with bad_input():
        seed_jobs(pathlib.Path(), options.experiment, 1 if options.num_seeds is None else options.num_seeds)
    if options.out is None:
        return files.fresh_path(pathlib.Path("runs") / f"{name}{'-smoke' * options.smoke}{rest}")
    path = files.user_path(options.out)
    files.check_new(path)  # before the data is read
    return path


# What --help shows of `run` and `sweep`, by section; --help-all shows everything.
_SECTIONS = {
    "experiment": "networks width weights seed num-seeds",
    "rounds": "num-rounds subset-size distance temperature digest.num-epochs digest.batch-size digest.learning-rate "
    "revisit.num-epochs revisit.batch-size revisit.learning-rate",
    "data": "data.public data.private data.data-dir data.num-public data.num-test data.private-classes data.split "
    "data.examples-per-class",
    "training": "public-training.num-epochs private-training.num-epochs pooled-training.num-epochs local pooled "
    "pretrained-dir",
    "output": "over out resume config smoke progress checkpoint-every",
    "hardware": "devices clients-per-chunk vmap-seeds",
    "many processes": "distributed coordinator num-processes process-id",
}
_COMMANDS = {"run": (Run, _run), "sweep": (Sweep, _sweep)}
_WIDTH = 80


def _help(command: str, name: str, experiments: dict[str, Experiment]) -> str:
    """The options that most people set, each with the first sentence of its description and its default."""
    kind, _ = _COMMANDS[command]
    known = _options_of(kind(experiment=experiments[name]))
    lines = [f"usage: fedmd-jax {command} [NAME] [options]", "", kind.__doc__.partition("\n")[0], ""]
    lines += textwrap.wrap(f"NAME is one of {', '.join(EXPERIMENTS)}.", _WIDTH, break_on_hyphens=False)
    lines += [f"Defaults are those of {name}. --help-all shows every option."]
    for section, options in _SECTIONS.items():
        described = [_describe_option(option, known[option]) for option in options.split() if option in known]
        lines += ["", f"{section}:", *itertools.chain(*described)] if described else []
    return "\n".join(lines)


class _Option(NamedTuple):
    kind: Any
    default: Any
    description: str


def _options_of(settings: Any, prefix: str = "") -> dict[str, _Option]:
    """The options of a dataclass of settings and of those in it, by name.

    >>> _options_of(EXPERIMENTS["quickstart"])["digest.num-epochs"].default
    1
    """
    found, descriptions = {}, {}
    for cls in reversed(type(settings).__mro__):
        described = re.findall(r"^ {6}(\w+): (.*(?:\n {8}.*)*)", cls.__doc__ or "", re.MULTILINE)
        descriptions |= {name: " ".join(text.split()) for name, text in described}
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found |= _options_of(value, "" if field.name in ("experiment", "processes") else f"{name}.")
        else:
            found[name] = _Option(field.type, value, descriptions[field.name])
    return found


def _describe_option(name: str, option: _Option) -> list[str]:
    flag = f"--{name}, --no-{name}" if option.default is True else f"--{name}"
    default = " ".join(map(str, option.default)) if isinstance(option.default, tuple) else str(option.default)
    shown = "" if option.default is False else f" ({textwrap.shorten(default, 40, placeholder=' ...')})"
    first = re.split(r"(?<=[a-z0-9)\]])[.;:] ", option.description)[0].rstrip(".")
    text = f"  {flag:<27} {first}{shown}"
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * 30, break_on_hyphens=False)
