"""The command line: `fedmd-jax run`, `fedmd-jax sweep`, `fedmd-jax report`, `fedmd-jax data`."""

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import tyro

import fedmd_jax
from fedmd_jax import data_command, hints
from fedmd_jax.checkpoint import CheckpointError
from fedmd_jax.experiments import EXPERIMENTS, Experiment, resuming, smoke
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments import sweep as sweeps
from fedmd_jax.experiments.compilation_cache import keep_compiled_programs
from fedmd_jax.experiments.errors import SettingsError, UsageError, bad_input
from fedmd_jax.experiments.figures import plot, plot_seeds
from fedmd_jax.experiments.interrupts import CtrlC
from fedmd_jax.experiments.report import describe
from fedmd_jax.experiments.run_directory import Record
from fedmd_jax.experiments.seeds import brief, describe_seeds, read_seeds, seed_jobs, write_seeds
from fedmd_jax.experiments.session import run_all

USAGE = f"""\
usage: fedmd-jax run [EXPERIMENT] [--out DIR] [options]   train a federation and report on it
       fedmd-jax run [EXPERIMENT] --seeds N               the same for N seeds, with error bands
       fedmd-jax run --resume DIR                         go on with a run that was interrupted
       fedmd-jax run [EXPERIMENT] --help                  every setting
       fedmd-jax sweep [EXPERIMENT] --over SETTING=VALUE,VALUE,... [--seeds N] [options]
                                                          every combination of some settings
       fedmd-jax report DIR                               table and plot of finished runs, again
       fedmd-jax data list | prepare NAME [--help]        data sets: what there is, preparing one
       fedmd-jax --version

experiments: {", ".join(EXPERIMENTS)} (the default is quickstart: two minutes on two CPU cores, no download)
"""
REPORT_USAGE = """\
usage: fedmd-jax report DIR

Print the table of a finished run, or of several seeds, and redraw its accuracy.png.
"""
_DESCRIPTION = "Train a federation: transfer learning, rounds of FedMD, and what they are compared with."
HELP = ("-h", "--help")
FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143
# Paragraphs, since lines of one are joined to a line that no terminal holds.
_EXPERIMENTS = "\n\n".join(
    [
        "Experiments, which set the defaults:",
        *textwrap.wrap(", ".join(EXPERIMENTS), width=90, break_on_hyphens=False),
        "--variant released takes the authors' code's settings; --smoke makes all defaults tiny.",
    ]
)
SMOKE = "--smoke"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What `fedmd-jax run` can be told.

    Attributes:
      out: Directory of the results, which must not exist. Without it: runs/EXPERIMENT-seedSEED, or the
        first of ...-2, ...-3 that does not exist.
      seeds: Run so many seeds, from the seed set below on, each in a directory of its own within that of the results,
        which gets means and standard deviations over them.
      experiment: All settings.
    """

    out: str | None = None
    seeds: int | None = None
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `fedmd-jax sweep` can be told.

    Attributes:
      over: SETTING=VALUE,VALUE,... with any setting below and its values; semicolons instead of commas where values
        have commas, spaces between the items of a list. Given again: every combination.
      out: Directory of the results, which must not exist. Without it: runs/EXPERIMENT-sweep, or the
        first of ...-2, ...-3 that does not exist.
      seeds: Run every combination with so many seeds, from the seed set below on.
      experiment: All settings that are the same in every combination.
    """

    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    out: str | None = None
    seeds: int = 1
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments after the program's name; those of this process by default.

    Returns:
      The exit code: 0, 1 where a result cannot be written, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM. Any
      other exception is a bug, and keeps its traceback.
    """
    with CtrlC() as ctrl_c:
        code = _guarded(list(sys.argv[1:] if argv is None else argv), ctrl_c)
        if code in (INTERRUPTED, TERMINATED) and argv is None:
            # A normal exit would wait for the computation that is under way.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def _guarded(argv: list[str], ctrl_c: CtrlC) -> int:
    """The exit code of a command, and one line about what went wrong."""
    try:
        code = _dispatch(argv, ctrl_c)
        sys.stdout.flush()
    except (UsageError, files.RunDirectoryError, CheckpointError) as error:
        return _complain(error, BAD_INPUT)
    except files.WriteError as error:
        return _complain(error, FAILED)
    except BrokenPipeError:  # `fedmd-jax report DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        ctrl_c.hold()
        print("\nfedmd-jax: interrupted", file=sys.stderr)
        return ctrl_c.code
    return code


def _complain(error: Exception, code: int) -> int:
    print("fedmd-jax: error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


def _dispatch(argv: list[str], ctrl_c: CtrlC) -> int:
    command, *rest = argv or ["--help"]
    if command in HELP:
        print(USAGE, end="")
    elif command == "--version":
        print(f"fedmd-jax {fedmd_jax.__version__}")
    elif command == "run":
        return _run(rest, ctrl_c)
    elif command == "sweep":
        return _sweep(rest, ctrl_c)
    elif command == "report":
        return _report(rest)
    elif command == "data":
        _data(rest)
    else:
        raise UsageError(hints.unknown("command", command, ("run", "sweep", "report", "data")))
    return 0


def _run(argv: list[str], ctrl_c: CtrlC) -> int:
    if any(word.partition("=")[0] == "--resume" for word in argv):
        return _resume(argv, ctrl_c)
    command = shlex.join(["fedmd-jax", "run", *argv])
    name = _experiment_name(argv)
    settings = parse(name, argv)
    if settings is None:
        return 0
    experiment, num_seeds = settings.experiment, settings.seeds
    several = "" if num_seeds is None else f"-{_at_least_one(num_seeds)}seeds"
    tiny = "-smoke" if SMOKE in argv else ""  # no one should take it for the experiment
    path = _output_path(settings.out, f"{name}{tiny}-seed{experiment.seed}{several}")
    files.check_new(path)  # before the data is read; `Recorder` checks again
    keep_compiled_programs()
    train = partial(run_all, name=name, command=command, ctrl_c=ctrl_c)
    return _run_here(train, path, experiment, num_seeds, ctrl_c)


def _resume(argv: list[str], ctrl_c: CtrlC) -> int:
    path, name, experiment, command, num_seeds = resuming.find(argv)
    if num_seeds is None and files.is_finished(path):
        print(f"nothing to do: the run in {path} is finished")
        return 0
    keep_compiled_programs()
    train = partial(run_all, name=name, command=command, ctrl_c=ctrl_c, resume=True)
    return _run_here(train, path, experiment, num_seeds, ctrl_c)


def _run_here(
    train: Callable[..., bool], path: pathlib.Path, experiment: Experiment, num_seeds: int | None, ctrl_c: CtrlC
) -> int:
    """One seed or several into a directory, and how to go on where that is interrupted."""
    if num_seeds is None:
        completed = train({path: experiment}, show=describe)
    else:
        summaries: list[Record] = []
        completed = _run_seeds(train, path, experiment, num_seeds, summaries)
        if summaries:
            print(f"\n{describe_seeds(summaries[-1])}\nresults in {path}")
    if not completed:
        print(f"to go on: fedmd-jax run --resume {shlex.quote(str(path))}", file=sys.stderr)
        return ctrl_c.code
    return 0


def _run_seeds(
    train: Callable[..., bool],
    path: pathlib.Path,
    experiment: Experiment,
    num_seeds: int,
    summaries: list[Record],
) -> bool:
    """Whether there was no Ctrl-C; after every seed another summary of those that are done, whatever comes then."""
    with bad_input():
        jobs = seed_jobs(path, experiment, num_seeds)
    done = [seed_path for seed_path in jobs if files.is_finished(seed_path)]  # by a run that goes on
    if done:
        summaries.append(write_seeds(path, done, num_seeds))

    def note(seed_path: pathlib.Path) -> None:
        done.append(seed_path)
        summaries.append(write_seeds(path, done, num_seeds))

    left = {seed_path: seed for seed_path, seed in jobs.items() if seed_path not in done}
    return not left or train(left, show=brief, done=note)


def _sweep(argv: list[str], ctrl_c: CtrlC) -> int:
    command = shlex.join(["fedmd-jax", "sweep", *argv])
    name = _experiment_name(argv)
    settings = parse(name, argv, kind=Sweep)
    if settings is None:
        return 0
    _at_least_one(settings.seeds)
    path = _output_path(settings.out, f"{name}-sweep")
    combinations = _combinations(name, argv, settings)
    files.check_new(path)
    keep_compiled_programs()
    train = partial(run_all, name=name, command=command, ctrl_c=ctrl_c)
    rows: list[Record] = []
    for number, (combination, experiment) in enumerate(combinations):
        place = sweeps.directory(number, combination)
        print(f"\n{sweeps.label(combination)} ({number + 1} of {len(combinations)})", flush=True)
        record, completed = _run_combination(train, path / place, combination, experiment, settings.seeds)
        with ctrl_c.held():
            _write_sweep(path, name, rows := [*rows, record])
        if not completed:
            break
    print(f"\n{sweeps.describe_sweep(rows)}\nresults in {path}")
    if len(rows) < len(combinations) or not completed:
        return ctrl_c.code
    return FAILED if any(record["error"] for record in rows) else 0


def _combinations(
    name: str, argv: Sequence[str], settings: Sweep
) -> list[tuple[sweeps.Combination, Experiment | SettingsError]]:
    """Every combination with its settings, or with why they do not go together.

    Raises:
      UsageError: a setting or a value that cannot be, or no combination that can.
    """
    known = [option.removeprefix("--") for option in _options(Experiment)]
    flags = [option.removeprefix("--") for option in _options(Experiment, flags_only=True)]
    combinations = []
    for combination in sweeps.grid(settings.over, known):
        try:
            options = [*argv, *sweeps.options(combination, flags)]
            combinations.append((combination, parse(name, options, kind=Sweep).experiment))
        except SettingsError as error:
            combinations.append((combination, error))
    if all(isinstance(experiment, SettingsError) for _, experiment in combinations):
        raise combinations[0][1]
    return combinations


def _run_combination(
    train: Callable[..., bool],
    path: pathlib.Path,
    combination: sweeps.Combination,
    experiment: Experiment | SettingsError,
    num_seeds: int,
) -> tuple[Record, bool]:
    """Its row of the table, and whether there was no Ctrl-C; what fails is told, and does not stop the others."""
    summaries: list[Record] = []
    error, completed = None, True
    try:
        if isinstance(experiment, SettingsError):
            raise experiment
        completed = _run_seeds(train, path, experiment, num_seeds, summaries)
    except (files.WriteError, files.RunDirectoryError):
        raise  # the others cannot be written, either
    except Exception as failed:
        if not isinstance(failed, UsageError):
            traceback.print_exc()
        error = sweeps.failure(failed)
        print(f"fedmd-jax: failed: {error}", file=sys.stderr)
    return sweeps.row(combination, path.name, summaries[-1] if summaries else None, error), completed


def _write_sweep(path: pathlib.Path, name: str, rows: Sequence[Record]) -> None:
    contents = {sweeps.TABLE: sweeps.to_csv(rows), sweeps.PLOT: sweeps.plot_sweep(rows, f"{name}: sweep")}
    if not path.exists():  # the first combination has failed before it could write anything
        files.create(path, contents)
    for file, content in contents.items():
        files.replace_file(path / file, content)


def _experiment_name(argv: list[str]) -> str:
    """Takes the experiment from the front of the arguments."""
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "quickstart"
    if name not in EXPERIMENTS:
        raise UsageError(hints.unknown("experiment", name, tuple(EXPERIMENTS)))
    return name + _take_variant(name, argv)


def _take_variant(name: str, argv: list[str]) -> str:
    """Takes `--variant` from the arguments: what follows the experiment's name where it is not the paper's."""
    place = next((i for i, word in enumerate(argv) if word.partition("=")[0] == "--variant"), None)
    if place is None:
        return ""
    _, given, variant = argv.pop(place).partition("=")
    if not given:
        variant = argv.pop(place) if place < len(argv) else ""
    if name.endswith("-released"):
        raise UsageError(f"{name} is a variant already, --variant is of {name.removesuffix('-released')}")
    known = ["paper", *(other.removeprefix(f"{name}-") for other in EXPERIMENTS if other.startswith(f"{name}-"))]
    if variant not in known:
        raise UsageError(hints.unknown(f"variant of {name}", variant, known))
    return "" if variant == "paper" else f"-{variant}"


def _at_least_one(num_seeds: int) -> int:
    if num_seeds < 1:
        raise UsageError(f"seeds must be an integer of at least 1, got {num_seeds}")
    return num_seeds


def _output_path(out: str | None, stem: str) -> pathlib.Path:
    if out is None:
        return files.fresh_path(pathlib.Path("runs") / stem)
    return pathlib.Path(os.path.normpath(os.path.expanduser(out)))


def _report(argv: list[str]) -> int:
    if set(argv) & set(HELP):
        print(REPORT_USAGE, end="")
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UsageError("report wants one directory of a finished run: fedmd-jax report DIR")
    path = pathlib.Path(os.path.expanduser(argv[0]))
    if (seeds := read_seeds(path)) is not None:
        summary, runs = seeds
        print(describe_seeds(summary))
        files.replace_file(path / files.PLOT, plot_seeds(runs))
        return 0
    summary, metrics = files.read_run(path)
    print(describe(summary))
    files.replace_file(path / files.PLOT, plot(summary, metrics))
    return 0


def _data(argv: list[str]) -> None:
    try:
        with bad_input():
            data_command.run(argv)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise files.WriteError(f"cannot write the data set: {error}") from error


def parse(name: str, argv: Sequence[str], *, kind: type[Run] | type[Sweep] = Run) -> Run | Sweep | None:
    """Settings from options.

    Args:
      name: the experiment whose settings are the defaults.
      argv: the options.
      kind: of which command.

    Returns:
      The settings, or None where the help was asked for, which is printed then.

    Raises:
      UsageError: an option is unknown, or its value is not one; `SettingsError` where values do not go together.
    """
    program = f"fedmd-jax {kind.__name__.lower()} {name}"
    experiment = smoke(EXPERIMENTS[name]) if SMOKE in argv else EXPERIMENTS[name]
    argv = [word for word in argv if word != SMOKE]
    cli = partial(
        tyro.cli,
        kind,
        default=kind(experiment=experiment),
        args=argv,
        prog=program,
        description=f"{_DESCRIPTION}\n\n{_EXPERIMENTS}",
        config=(tyro.conf.DisallowNone,),
    )

    if set(argv) & set(HELP):
        with contextlib.suppress(SystemExit):
            cli()
        return None
    message = io.StringIO()
    try:
        with bad_input(), contextlib.redirect_stdout(message), contextlib.redirect_stderr(message):
            settings, unknown = cli(return_unknown_args=True)
    except SystemExit:
        raise UsageError(f"{_message(message.getvalue())} (see {program} --help)") from None
    if unknown:
        raise UsageError(f"{_unknown_argument(unknown)} (see {program} --help)")
    return settings


# tyro and Python, in the words of this program.
_REWORDED = (
    (r"^Error parsing (experiment\.)?", ""),
    (r"invalid literal for int\(\) with base 10: ", "wanted an integer, got "),
    (r"could not convert string to float: ", "wanted a number, got "),
)


def _message(framed: str) -> str:
    """The first paragraph of tyro's message, which stands between a title and a ruled line."""
    lines = [line.strip(" │") for line in framed.splitlines()]
    start = next((i + 1 for i, line in enumerate(lines) if line and set(line) <= set("-─")), 1)
    end = next((i for i in range(start, len(lines)) if set(lines[i]) <= set("-─")), len(lines))
    text = " ".join(lines[start:end])
    for pattern, words in _REWORDED:
        text = re.sub(pattern, words, text)
    return text


def _unknown_argument(unknown: Sequence[str]) -> str:
    option = next((word for word in unknown if word.startswith("-")), None)
    if option is None:
        return f"unexpected argument {unknown[0]!r}; the experiment stands right after run, all else is --option value"
    known = (*_options(Experiment), "--out", "--seeds", "--over", "--variant", SMOKE)
    return hints.unknown("option", option.partition("=")[0], known, list_known=False)


def _options(kind: type, prefix: str = "--", *, flags_only: bool = False) -> tuple[str, ...]:
    """The options of a dataclass of settings and of those in it; or only those that are on or off."""
    names: list[str] = []
    for field in dataclasses.fields(kind):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.type):
            names += _options(field.type, f"{name}.", flags_only=flags_only)
        elif field.type is bool or not flags_only:
            names.append(name)
    return tuple(names)
