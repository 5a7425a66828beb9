"""The command line: `fedmd-jax run`, `sweep`, `report`, `list` and `data`."""

import argparse
import dataclasses
import errno
import os
import pathlib
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import jax
import tyro

import fedmd_jax
from fedmd_jax import checks
from fedmd_jax.data.catalogue import find_data_set
from fedmd_jax.data.files import DataError, user_path
from fedmd_jax.data.listing import describe_sizes, files_of, table
from fedmd_jax.data.preparing import prepare_data
from fedmd_jax.experiments import EXPERIMENTS, Experiment, distributed, run_directory as files, settings_from, smoke
from fedmd_jax.experiments.algorithms import ALGORITHMS, AlgorithmOptions, descriptions, flag
from fedmd_jax.experiments.checkpoint import CheckpointError
from fedmd_jax.experiments.errors import SettingsError, UsageError, bad_input, check_backend
from fedmd_jax.experiments.overview import overview
from fedmd_jax.experiments.progress import ProgressKind
from fedmd_jax.experiments.results import figures, report, seeds, sweep as sweeps
from fedmd_jax.experiments.setup import cache_compiled_programs, choose_seeds_at_once
from fedmd_jax.experiments.train import Command, Signals, run_all
from fedmd_jax.loggers import LogKind

FAILED, BAD_INPUT = 1, 2
# Options of a process and not of a run, which are given again when it is resumed.
_PROCESS_OPTIONS = ("allow_environment_change", "distributed", "coordinator", "num_processes", "process_id")
_SMOKE_NOTE = "a smoke run: its settings are tiny, its accuracies mean nothing\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """What run and sweep have in common.

    Attributes:
      name: Experiment whose settings are the defaults.
      out: Directory of the results, which must not exist. None: a new one in runs/.
      num_seeds: Number of seeds, from --seed on, each in a directory of its own; means and standard deviations are
        written, too.
      config: A config.json whose settings are the defaults; options on the command line win.
      smoke: Tiny defaults, with which every part runs and accuracies mean nothing.
      progress: How progress is shown; auto is a bar on a terminal, else lines.
      log: Also log the metrics of each round to tensorboard (DIR/tensorboard) or wandb (Weights & Biases).
      experiment: All settings.
    """

    name: tyro.conf.Positional[Literal[tuple(EXPERIMENTS)]] = "quickstart"
    out: str | None = None
    num_seeds: int | None = None
    config: str | None = None
    smoke: tyro.conf.FlagCreatePairsOff[bool] = False
    progress: ProgressKind = "auto"
    log: LogKind | None = None
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(_Options):
    """Train a federation: transfer learning, rounds of an algorithm, and baselines.

    Attributes:
      resume: Directory of an interrupted run, which is continued; all settings come from there.
      allow_environment_change: With --resume: also with other versions or devices, to results that are the same but
        for rounding.
      distributed: This process is one of many, on Slurm, a TPU pod, Open MPI or Kubernetes. Needs --out or --resume
        with a folder that all processes share. Clients are sharded over the devices of all.
      coordinator: HOST:PORT of process 0, for processes started by hand. Needs the next two.
      num_processes: Number of processes started by hand.
      process_id: Number of this process, from 0.
    """

    resume: str | None = None
    allow_environment_change: tyro.conf.FlagCreatePairsOff[bool] = False
    distributed: tyro.conf.FlagCreatePairsOff[bool] = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    @property
    def has_many_processes(self) -> bool:
        """Whether there are other processes."""
        return self.distributed or (self.coordinator, self.num_processes, self.process_id) != (None, None, None)

    def resuming(self, path: pathlib.Path) -> str:
        """The command that resumes the run in this process."""
        words = ["fedmd-jax", "run", "--resume", str(path)]
        for name in _PROCESS_OPTIONS:
            value = getattr(self, name)
            if value is not None and value is not False:  # a process may be number 0
                words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return shlex.join(words)


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

    def act(self) -> None:
        """Prints the list."""
        print(table(self.data_dir) if self.name is None else files_of(find_data_set(self.name)))


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

    def act(self) -> None:
        """Prepares the data set and prints its sizes."""
        data_set = find_data_set(self.name)
        print(f"preparing {self.name} ...", flush=True)
        try:
            done = prepare_data(self.name, source=self.source, data_dir=self.data_dir, checksums=not self.no_checksums)
        except OSError as error:
            raise files.WriteError(f"cannot write the data set: {error}") from error
        how = "prepared in" if done.is_new else "there already, nothing is changed (delete it to prepare it again):"
        print(f"{self.name} {how} {done.path}: {describe_sizes(done.sizes, data_set)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Print the table of a finished run, or of several seeds, and redraw its plot; of a folder of runs a line for each.

    Attributes:
      directory: The run directory, or a folder of them.
      per_class: Print the accuracy of each client of one run on each class after the last round, and the class that
        its examples are most often taken for.
    """

    directory: tyro.conf.Positional[str]
    per_class: tyro.conf.FlagCreatePairsOff[bool] = False

    def act(self) -> None:
        """Prints one of the three."""
        path = user_path(self.directory)
        if self.per_class:
            counts, config = files.read_confusion(path), files.read_config(path)
            with files.reading(path):
                text = report.describe_classes(config["settings"]["data"], counts)
            print(text)
        elif not os.path.isfile(path / files.SUMMARY) and (lines := seeds.list_runs(path)):
            print("\n".join(lines))
        else:
            summary, runs = seeds.read_results(path)
            with files.reading(path):
                text = f"{_SMOKE_NOTE * files.is_smoke(path)}{report.describe(summary)}"
            print(text)
            figures.write_plot(path / files.PLOT, figures.plot_seeds, runs)


@dataclasses.dataclass(frozen=True)
class Overview:
    """List experiments, algorithms, networks and data sets."""

    def act(self) -> None:
        """Prints the list."""
        print(overview())


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
        os.environ["MPLBACKEND"] = "agg"  # plots are files; the backend of Jupyter or Colab may not be installed here
    with Signals() as signals:
        try:
            code = _parse(list(sys.argv[1:] if argv is None else argv))(signals)
            sys.stdout.flush()
        except SystemExit as end:  # tyro has printed the help, or what is wrong
            code = end.code if isinstance(end.code, int) else 0
        except (UsageError, DataError, files.RunDirectoryError, CheckpointError, files.WriteError) as error:
            code = _complain(error)
        except KeyboardInterrupt:
            signals.hold()
            print("\nfedmd-jax: interrupted", file=sys.stderr)
            code = signals.code
        except Exception as error:
            code = FAILED
            if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):  # all other files: WriteError
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit can flush it
                if error.errno == errno.ENOSPC:
                    _complain(files.WriteError(f"cannot print: {error.strerror}"))
            elif jax.distributed.is_initialized():
                traceback.print_exc()
            else:
                raise
        if code and (argv is None or jax.distributed.is_initialized()):
            distributed.exit_now(code)  # a normal exit would wait for computations, Orbax and other processes
    return code


def _complain(error: Exception) -> int:
    print(f"fedmd-jax: error: {checks.one_line(str(error))}", file=sys.stderr)
    return FAILED if isinstance(error, files.WriteError) else BAD_INPUT


def _parse(argv: list[str]) -> Callable[[Signals], int]:
    """The command as a function of the signals that interrupt it."""
    if argv == ["--version"]:
        return lambda _: print(f"fedmd-jax {fedmd_jax.__version__}") or 0
    words = ["--help" if word == "--help-all" else word for word in argv or ["--help"]]
    if words[0] in _COMMANDS:
        kind, act = _COMMANDS[words[0]]
        default = kind(**_defaults(argv))
        if {"-h", "--help"} & set(argv):
            return lambda _: print(_help(argv[0], default)) or 0
        with bad_input():
            options = tyro.cli(kind, default=default, args=words[1:], prog=f"fedmd-jax {words[0]}")
        if options.name != default.name:  # its settings were not taken
            raise UsageError(f"the experiment comes first: fedmd-jax {words[0]} {options.name} [options]")
        return partial(act, argv, options)
    app = tyro.extras.SubcommandApp()
    for name, (kind, _) in _COMMANDS.items():
        app.command(_presets_command(kind), name=name)
    app.command(Report, name="report")
    app.command(Overview, name="list")
    app.command(_data_command, name="data")
    command = app.cli(args=words, prog="fedmd-jax", description=fedmd_jax.__doc__.partition("\n")[0])
    return lambda _: command.act() or 0


def _defaults(argv: list[str]) -> files.Record:
    """Name and settings of the experiment of `run` or `sweep`, before other options are read."""
    early = argparse.ArgumentParser(prog=f"fedmd-jax {argv[0]}", add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--smoke", action="store_true")
    given, _ = early.parse_known_args(argv[1:])
    config = {} if given.config is None else files.read_config_file(user_path(given.config))
    is_named = len(argv) > 1 and not argv[1].startswith("-")
    name = argv[1] if is_named else config.get("experiment", "quickstart")
    if name not in EXPERIMENTS:
        raise UsageError(checks.unknown("experiment", name, tuple(EXPERIMENTS)))
    with bad_input():
        experiment = settings_from(Experiment, config["settings"]) if config else EXPERIMENTS[name]
    return {"name": name, "experiment": smoke(experiment) if given.smoke else experiment}


def _presets_command(kind: type[_Options]) -> Callable:
    """`run` or `sweep` with all presets, for the help and for shell completion."""
    presets = {name: kind(name=name, experiment=experiment) for name, experiment in EXPERIMENTS.items()}
    choice = tyro.extras.subcommand_type_from_defaults(presets, prefix_names=False)

    def command(options: tyro.conf.OmitSubcommandPrefixes[Annotated[choice, tyro.conf.arg(name="")]]):
        return options

    command.__doc__ = kind.__doc__.partition("\n")[0]
    return command


def _data_command(command: tyro.conf.OmitSubcommandPrefixes[Annotated[List | Prepare, tyro.conf.arg(name="")]]):
    """List the known data sets, or prepare one."""
    return command


def _run(argv: Sequence[str], options: Run, signals: Signals) -> int:
    if options.has_many_processes:
        distributed.initialize(options.coordinator, options.num_processes, options.process_id)
    check_backend()
    words = shlex.join(["fedmd-jax", *argv])
    if options.resume is None:
        path = _output_path(options)
    else:
        path = user_path(options.resume)
        options, words = _resumed(path, options, words)
    experiment, hint = options.experiment, f"to resume: {options.resuming(path)}"
    if options.has_many_processes:
        if experiment.devices not in (None, "all"):
            raise UsageError(f"many processes use all their devices, got --devices {experiment.devices}")
        experiment = dataclasses.replace(experiment, devices="all")
        print(hint, file=sys.stderr, flush=True)  # JAX may end this process when another has ended
    cache_compiled_programs()
    is_resumed, change = options.resume is not None, options.allow_environment_change
    config = {"command": words, "num_seeds": options.num_seeds, "log": options.log}
    command = Command(options.name, config, options.progress, signals, is_resumed, change, options.log)
    summaries: list[files.Record] = []
    code = 0
    try:
        _train(path, command, experiment, summaries)
    except KeyboardInterrupt:
        if not path.is_dir():
            raise
        signals.hold()
        code = signals.code
    except jax.errors.JaxRuntimeError:  # with many processes, mostly because another has ended
        print(hint, file=sys.stderr)
        raise
    if summaries and distributed.is_first():
        note = _SMOKE_NOTE * ("--smoke" in words.split())
        print(f"\n{note}{report.describe(summaries[-1])}\nresults in {path}")
    if code:
        print(hint, file=sys.stderr)
    return code


def _resumed(path: pathlib.Path, options: Run, words: str) -> tuple[Run, str]:
    """The options of the run in a directory, as its config.json says, and its command."""
    given = {name: getattr(options, name) for name in ("resume", "progress", *_PROCESS_OPTIONS)}
    if options != Run(experiment=EXPERIMENTS["quickstart"], **given):
        raise UsageError(f"run --resume takes all settings from the directory, got {words}")
    config = files.read_config(path)
    try:
        experiment = settings_from(Experiment, config["settings"])
    except ValueError as error:
        raise files.RunDirectoryError(f"cannot read the settings of {path}: {error}") from error
    if options.allow_environment_change:
        experiment = _of_this_machine(experiment)
    kept = {name: config[name] for name in ("num_seeds", "log")}
    kept |= {"name": config["experiment"], "experiment": experiment}
    return dataclasses.replace(options, **kept), config["command"]


def _of_this_machine(experiment: Experiment) -> Experiment:
    """At most as many devices as there are, and no folders that do not exist."""
    devices = experiment.devices
    if isinstance(devices, int) and devices > jax.device_count():
        devices = "all"

    def if_there(folder: str | None) -> str | None:
        return folder if folder is not None and os.path.isdir(os.path.expanduser(folder)) else None

    data = dataclasses.replace(experiment.data, data_dir=if_there(experiment.data.data_dir))
    pretrained_dir = if_there(experiment.pretrained_dir)
    return dataclasses.replace(experiment, devices=devices, data=data, pretrained_dir=pretrained_dir)


def _train(path: pathlib.Path, command: Command, experiment: Experiment, summaries: list[files.Record]) -> None:
    """Runs one seed, or several and a summary of those that are done after each; appends the summaries."""
    num_seeds = command.config["num_seeds"]
    with bad_input():
        jobs = seeds.seed_jobs(path, experiment, num_seeds)
        at_once = choose_seeds_at_once(experiment, len(jobs))
    if all(map(files.is_finished, jobs)):
        print(f"nothing to do: the run in {path} is finished")

    def summarize_finished() -> None:
        finished = [job for job in jobs if files.is_finished(job)]
        if num_seeds is not None and finished and distributed.is_first():
            summaries.append(seeds.write_seeds(path, finished, num_seeds))

    def done(job: pathlib.Path, summary: files.Record) -> None:
        if summary["interrupted"]:
            rounds = f"round {summary['num_rounds_done']} of {summary['num_rounds']}"
            print(f"\ninterrupted after {rounds}: results so far are kept", file=sys.stderr)
        if num_seeds is None:
            summaries.append(summary)
        elif not summary["interrupted"]:
            print(f"\n{report.brief(summary)}\nresults in {job}")
            summarize_finished()

    summarize_finished()
    run_all(jobs, command, seeds_at_once=at_once, done=done)


def _sweep(argv: Sequence[str], options: Sweep, signals: Signals) -> int:
    check_backend()
    path = _output_path(options)
    combinations = _combinations(argv, options)
    cache_compiled_programs()
    files.create(path, {sweeps.TABLE: b""})
    config = {"command": shlex.join(["fedmd-jax", *argv]), "num_seeds": options.num_seeds, "log": options.log}
    command, code = Command(options.name, config, options.progress, signals, log=options.log), 0
    rows: list[sweeps.Row] = []
    for number, (combination, experiment) in enumerate(combinations):
        print(f"\n{sweeps.label(combination)} ({number + 1} of {len(combinations)})", flush=True)
        place = path / sweeps.directory(number, combination)
        summaries: list[files.Record] = []
        error = None
        try:
            if isinstance(experiment, SettingsError):
                raise experiment
            _train(place, command, experiment, summaries)
        except KeyboardInterrupt:
            signals.hold()
            code = signals.code
        except (files.WriteError, files.RunDirectoryError, OSError):
            raise  # the others cannot be written or printed, either
        except Exception as failed:  # does not stop the others
            if not isinstance(failed, UsageError):
                traceback.print_exc()
            error, code = sweeps.failure(failed), FAILED
            print(f"fedmd-jax: failed: {error}", file=sys.stderr)
        rows.append(sweeps.Row(combination, place.name, summaries[-1] if summaries else None, error))
        with signals.held():
            files.replace_file(path / sweeps.TABLE, sweeps.to_csv(rows))
            figures.write_plot(path / sweeps.PLOT, sweeps.plot_sweep, rows, f"{options.name}: sweep")
        if code not in (0, FAILED):
            break
    print(f"\n{_SMOKE_NOTE * options.smoke}{sweeps.describe_sweep(rows)}\nresults in {path}")
    return code


def _combinations(argv: Sequence[str], options: Sweep) -> list[tuple[sweeps.Combination, Experiment | SettingsError]]:
    """Every combination with its settings, or with the reason why they do not go together.

    Raises:
      UsageError: an unknown setting, a bad value, or no combination that can be run.
    """
    settings = _options_of(options.experiment)
    flags = [name for name, (default, _) in settings.items() if isinstance(default, bool)]
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


def _output_path(options: _Options) -> pathlib.Path:
    """A directory that does not exist; its name tells a smoke run from the experiment."""
    with bad_input():
        seeds.seed_jobs(pathlib.Path(), options.experiment, options.num_seeds)
    if options.out is not None:
        path = user_path(options.out)
        files.check_new(path)  # before the data is read
        return path
    if isinstance(options, Run) and options.has_many_processes:
        raise UsageError("many processes need --out DIR, a folder that all of them share")
    algorithm = "" if options.experiment.algorithm == "fedmd" else f"-{options.experiment.algorithm}"
    several = "" if options.num_seeds is None else f"-{options.num_seeds}seeds"
    rest = "-sweep" if isinstance(options, Sweep) else f"-seed{options.experiment.seed}{several}"
    return files.fresh_path(pathlib.Path("runs") / f"{options.name}{algorithm}{'-smoke' * options.smoke}{rest}")


_COMMANDS = {"run": (Run, _run), "sweep": (Sweep, _sweep)}
# What --help shows of `run` and `sweep`, by section; --help-all shows everything.
_ALGORITHM_OPTIONS = [flag(field.name) for field in dataclasses.fields(AlgorithmOptions)]
_SECTIONS = {
    "experiment": "networks width weights seed num-seeds",
    "algorithm": " ".join(
        ["algorithm", *_ALGORITHM_OPTIONS, "distance", "temperature", "batch-statistics", "server-network"]
    ),
    "rounds": "num-rounds subset-size digest.num-epochs digest.batch-size digest.learning-rate "
    "revisit.num-epochs revisit.batch-size revisit.learning-rate",
    "data": "data.public data.private data.data-dir data.num-public data.num-test data.private-classes data.split "
    "data.examples-per-class data.alpha",
    "training": "public-training.num-epochs private-training.num-epochs pooled-training.num-epochs local pooled "
    "pretrained-dir",
    "output": "over out resume config smoke progress log checkpoint-every",
    "hardware": "devices clients-per-chunk vmap-seeds",
    "many processes": "distributed coordinator num-processes process-id",
}
_WIDTH = 80


def _help(command: str, default: _Options) -> str:
    """The options that most people set, each with the first sentence of its description and its default."""
    known = _options_of(default)
    lines = [f"usage: fedmd-jax {command} [NAME] [options]", "", default.__doc__.partition("\n")[0], ""]
    lines += textwrap.wrap(f"NAME is one of {', '.join(EXPERIMENTS)}.", _WIDTH, break_on_hyphens=False)
    lines += textwrap.wrap(f"Algorithms are {', '.join(ALGORITHMS)}.", _WIDTH, break_on_hyphens=False)
    lines += [f"Defaults are those of {default.name}. --help-all shows every option."]
    for section, text in _SECTIONS.items():
        options = [option for option in text.split() if option in known]
        lines += ["", f"{section}:"] if options else []
        for option in options:
            lines += _describe_option(option, *known[option])
    return "\n".join(lines)


def _options_of(settings: Any, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Default and description of each option of a dataclass of settings and of those in it.

    >>> _options_of(EXPERIMENTS["quickstart"])["digest.num-epochs"]
    (1, 'Passes over the data.')
    """
    found, described = {}, {}
    for cls in reversed(type(settings).__mro__):
        described |= descriptions(cls.__doc__ or "")
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found |= _options_of(value, {"experiment": "", "algorithm-options": "algorithm."}.get(name, f"{name}."))
        else:
            found[name] = (value, described[field.name])
    return found


def _describe_option(name: str, default: Any, description: str) -> list[str]:
    flag = f"--{name}, --no-{name}" if default is True else f"--{name}"
    value = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    shown = "" if default in (False, "default") else f" ({textwrap.shorten(value, 40, placeholder=' ...')})"
    first = re.split(r"(?<=[a-z0-9)\]])[.;:] ", description)[0].rstrip(".")
    text = f"  {flag:<27} {first}{shown}"
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * 30, break_on_hyphens=False)
