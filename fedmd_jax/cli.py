"""The command line: `fedmd-jax run`, `fedmd-jax sweep`, `fedmd-jax report`, `fedmd-jax data`."""

import dataclasses
import json
import os
import pathlib
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import fedmd_jax
from fedmd_jax import data_command, hints
from fedmd_jax.checkpoint import CheckpointError
from fedmd_jax.experiments import EXPERIMENTS, Experiment, resuming, together
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.compilation_cache import keep_compiled_programs
from fedmd_jax.experiments.errors import SettingsError, UsageError, bad_input
from fedmd_jax.experiments.interrupts import CtrlC
from fedmd_jax.experiments.prepared import choose_seeds_at_once
from fedmd_jax.experiments.results import sweep as sweeps
from fedmd_jax.experiments.results.figures import plot, plot_seeds, write_plot
from fedmd_jax.experiments.results.listing import list_runs
from fedmd_jax.experiments.results.report import describe
from fedmd_jax.experiments.results.seeds import (
    brief,
    check_num_seeds,
    describe_seeds,
    read_seeds,
    seed_jobs,
    write_seeds,
)
from fedmd_jax.experiments.run_directory import Record
from fedmd_jax.experiments.session import run_all
from fedmd_jax.experiments.together import Processes
from fedmd_jax.options import (
    HELP,
    Run,
    Sweep,
    experiment_name,
    parse,
    parse_processes,
    setting_options,
    variant_name,
)

USAGE = f"""\
usage: fedmd-jax run [EXPERIMENT] [--out DIR] [options]   train a federation and report on it
       fedmd-jax run [EXPERIMENT] --seeds N               the same for N seeds, with error bands
       fedmd-jax run --resume DIR [--elsewhere]           go on with a run that was interrupted, on another machine
       fedmd-jax run ... --distributed                    in many processes: Slurm, TPU pods; by hand with
                         --coordinator HOST:PORT --num-processes N --process-id I
       fedmd-jax run [EXPERIMENT] --help                  every setting
       fedmd-jax sweep [EXPERIMENT] --over SETTING=VALUE,VALUE,... [--seeds N] [options]
                                                          every combination of some settings
       fedmd-jax report DIR                               table and plot of a finished run, again; or a list of runs
       fedmd-jax data list | prepare NAME [--help]        data sets: what there is, preparing one
       fedmd-jax --version

experiments: {", ".join(EXPERIMENTS)} (the default is quickstart: two minutes on two CPU cores, no download)
"""
REPORT_USAGE = """\
usage: fedmd-jax report DIR

Print the table of a finished run, or of several seeds, and redraw its accuracy.png. Of a folder of runs, such as runs/:
one line for each.
"""
FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments after the program's name; those of this process by default.

    Returns:
      The exit code: 0, 1 where a result cannot be written, 2 for bad input, 3 where another process of the run has
      ended early, 130 after Ctrl-C, 143 after SIGTERM. Any other exception is a bug, and keeps its traceback.
    """
    with CtrlC() as ctrl_c:
        code = together.end_together(lambda: _guarded(list(sys.argv[1:] if argv is None else argv), ctrl_c))
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
    message = hints.one_line(str(error))
    together.failed(message)
    print(f"fedmd-jax: error: {message}", file=sys.stderr)
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
    name = experiment_name(argv)
    settings = parse(name, argv)
    if settings is None:
        return 0
    name = variant_name(name, settings.defaults.variant)
    experiment, num_seeds = settings.experiment, settings.seeds
    several = "" if num_seeds is None else f"-{_at_least_one(num_seeds)}seeds"
    experiment = _everywhere(experiment, settings.processes)
    together.start(settings.processes, ctrl_c.hand_over)
    _check_settings_are_the_same(experiment, num_seeds)
    experiment = _side_by_side(experiment, num_seeds or 1)

    def new_path() -> str:
        path = _output_path(settings.out, f"{name}{_tiny(settings)}-seed{experiment.seed}{several}")
        files.check_new(path)  # before the data is read; `Recorder` checks again
        return str(path)

    path = pathlib.Path(together.tell(new_path))
    keep_compiled_programs()
    train = partial(run_all, name=name, command=command, ctrl_c=ctrl_c)
    return _run_here(train, path, experiment, num_seeds, ctrl_c, smoke=settings.defaults.smoke)


def _resume(argv: list[str], ctrl_c: CtrlC) -> int:
    if set(argv) & set(HELP):
        raise UsageError(resuming.USAGE)
    processes, argv = parse_processes(argv)
    together.start(processes, ctrl_c.hand_over)
    path, name, experiment, command, num_seeds, elsewhere = resuming.find_together(argv)
    if elsewhere and processes.wanted:
        experiment = dataclasses.replace(experiment, devices="all")  # whatever it was before
    experiment = _everywhere(experiment, processes)
    if elsewhere and num_seeds is not None:
        experiment = _side_by_side(experiment, num_seeds)
    if num_seeds is None and together.tell(lambda: files.is_finished(path)):
        print(f"nothing to do: the run in {path} is finished")
        return 0
    keep_compiled_programs()
    train = partial(run_all, name=name, command=command, ctrl_c=ctrl_c, resume=True, elsewhere=elsewhere)
    hint = " --elsewhere" if elsewhere else ""
    smoke = together.is_first() and files.is_smoke(path)
    return _run_here(train, path, experiment, num_seeds, ctrl_c, smoke=smoke, hint=hint)


def _everywhere(experiment: Experiment, processes: Processes) -> Experiment:
    """Many processes use all devices that they have."""
    if not processes.wanted:
        return experiment
    if experiment.devices not in (None, "all"):
        raise UsageError(f"many processes use all their devices, got --devices {experiment.devices}")
    return dataclasses.replace(experiment, devices="all")


def _check_settings_are_the_same(experiment: Experiment, num_seeds: int | None) -> None:
    """A `UsageError` where a process was started with others; folders may be elsewhere on each machine."""
    settings = dataclasses.asdict(experiment) | {
        "seeds": num_seeds,
        "pretrained_dir": experiment.pretrained_dir is None,
    }
    settings["data"].pop("data_dir")
    together.check_same("settings", json.loads(json.dumps(settings)))


def _run_here(
    train: Callable[..., bool],
    path: pathlib.Path,
    experiment: Experiment,
    num_seeds: int | None,
    ctrl_c: CtrlC,
    *,
    smoke: bool,
    hint: str = "",
) -> int:
    """One seed or several into a directory, and how to go on where that is interrupted."""
    go_on = f"fedmd-jax run --resume {shlex.quote(str(path))}{hint}"
    together.go_on_with(go_on)
    summaries: list[Record] = []
    try:
        if num_seeds is None:
            completed = train({path: experiment}, show=partial(_marked, describe, smoke))
        else:
            completed = _run_seeds(train, path, experiment, num_seeds, summaries)
    except KeyboardInterrupt:
        if not path.is_dir():
            raise
        completed = False
    if summaries:
        print(f"\n{_marked(describe_seeds, smoke, summaries[-1])}\nresults in {path}")
    if not completed:
        ctrl_c.hold()
        print(f"to go on: {go_on}{together.hint_options()}", file=sys.stderr)
        return ctrl_c.code
    return 0


def _side_by_side(experiment: Experiment, num_seeds: int) -> Experiment:
    """A new run with the number of seeds that run at once, where it is not one; one that goes on keeps it."""
    with bad_input():
        at_once = choose_seeds_at_once(experiment, num_seeds)
    same = at_once == (experiment.seeds_at_once or 1)
    return experiment if same else dataclasses.replace(experiment, seeds_at_once=at_once)


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
    finished = together.tell(lambda: [str(each) for each in jobs if files.is_finished(each)])  # by a run that goes on
    done = [seed_path for seed_path in jobs if str(seed_path) in finished]
    if done and together.is_first():
        summaries.append(write_seeds(path, done, num_seeds))

    def note(seed_path: pathlib.Path) -> None:
        if not together.is_first():
            return
        done.append(seed_path)
        summaries.append(write_seeds(path, done, num_seeds))

    left = {seed_path: seed for seed_path, seed in jobs.items() if seed_path not in done}
    return not left or train(left, show=brief, done=note)


def _sweep(argv: list[str], ctrl_c: CtrlC) -> int:
    command = shlex.join(["fedmd-jax", "sweep", *argv])
    name = experiment_name(argv)
    settings = parse(name, argv, kind=Sweep)
    if settings is None:
        return 0
    _at_least_one(settings.seeds)
    combinations = _combinations(name, argv, settings)
    name = variant_name(name, settings.defaults.variant)
    path = _output_path(settings.out, f"{name}{_tiny(settings)}-sweep")
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
    print(f"\n{_marked(sweeps.describe_sweep, settings.defaults.smoke, rows)}\nresults in {path}")
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
    known = [option.removeprefix("--") for option in setting_options(Experiment)]
    flags = [option.removeprefix("--") for option in setting_options(Experiment, flags_only=True)]
    combinations = []
    for combination in sweeps.grid(settings.over, known):
        try:
            options = [*argv, *sweeps.options(combination, flags)]
            experiment = parse(name, options, kind=Sweep).experiment
            combinations.append((combination, _side_by_side(experiment, settings.seeds)))
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
    table = sweeps.to_csv(rows)
    if not path.exists():  # the first combination has failed before it could write anything
        files.create(path, {sweeps.TABLE: table})
    files.replace_file(path / sweeps.TABLE, table)
    write_plot(path / sweeps.PLOT, sweeps.plot_sweep, rows, f"{name}: sweep")


def _at_least_one(num_seeds: int) -> int:
    with bad_input():
        check_num_seeds(num_seeds)
    return num_seeds


def _tiny(settings: Run | Sweep) -> str:
    """Part of a directory's name, so that nobody takes a smoke run for the experiment."""
    return "-smoke" if settings.defaults.smoke else ""


def _output_path(out: str | None, stem: str) -> pathlib.Path:
    if out is None:
        return files.fresh_path(pathlib.Path("runs") / stem)
    path = pathlib.Path(os.path.normpath(os.path.expanduser(out)))
    files.check_path(path)
    return path


def _report(argv: list[str]) -> int:
    if set(argv) & set(HELP):
        print(REPORT_USAGE, end="")
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UsageError("report wants one directory of a finished run: fedmd-jax report DIR")
    path = pathlib.Path(os.path.expanduser(argv[0]))
    files.check_path(path)
    if (seeds := read_seeds(path)) is not None:
        summary, runs = seeds
        print(_marked(describe_seeds, files.is_smoke(path), summary))
        write_plot(path / files.PLOT, plot_seeds, runs)
        return 0
    if not (path / files.SUMMARY).is_file() and (lines := list_runs(path)):
        print("\n".join(lines))
        return 0
    summary, metrics = files.read_run(path)
    print(_marked(describe, files.is_smoke(path), summary))
    write_plot(path / files.PLOT, plot, summary, metrics)
    return 0


def _marked(describe: Callable[[Any], str], smoke: bool, results: Any) -> str:
    """The text of a table, under a line that says so where its numbers mean nothing."""
    return ("a smoke run: its settings are tiny, its accuracies mean nothing\n" if smoke else "") + describe(results)


def _data(argv: list[str]) -> None:
    try:
        with bad_input():
            data_command.run(argv)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise files.WriteError(f"cannot write the data set: {error}") from error
