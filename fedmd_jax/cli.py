"""The command line: `fedmd-jax run`, `fedmd-jax report`."""

import contextlib
import dataclasses
import difflib
import io
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated

import tyro

import fedmd_jax
from fedmd_jax.experiments import EXPERIMENTS, Experiment
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.compilation_cache import keep_compiled_programs
from fedmd_jax.experiments.figures import plot
from fedmd_jax.experiments.interrupts import CtrlC, Uninterrupted
from fedmd_jax.experiments.procedure import Observers, Prepared, communication, prepare, run
from fedmd_jax.experiments.progress import make_progress
from fedmd_jax.experiments.recorder import Recorder
from fedmd_jax.experiments.report import describe
from fedmd_jax.experiments.stopwatch import Stopwatch

USAGE = f"""\
usage: fedmd-jax run [EXPERIMENT] [--out DIR] [options]   train a federation and report on it
       fedmd-jax run [EXPERIMENT] --help                  every setting
       fedmd-jax report DIR                               table and plot of a finished run, again
       fedmd-jax --version

experiments: {", ".join(EXPERIMENTS)} (the default is quickstart: two minutes on two CPU cores, no download)
"""
REPORT_USAGE = """\
usage: fedmd-jax report DIR

Print the table of a finished run and redraw its accuracy.png.
"""
_DESCRIPTION = "Train a federation: transfer learning, rounds of FedMD, and what they are compared with."
HELP = ("-h", "--help")
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class UsageError(ValueError):
    """The command line asks for what cannot be; the message is one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What `fedmd-jax run` can be told.

    Attributes:
      out: Directory of the results, which must not exist. Without it: runs/EXPERIMENT-seedSEED, or the
        first of ...-2, ...-3 that does not exist.
      experiment: All settings.
    """

    out: str | None = None
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: arguments after the program's name; those of this process by default.

    Returns:
      The exit code: 0, 1 where a result cannot be written, 2 for bad input, 130 after Ctrl-C. Any other exception is
      a bug, and keeps its traceback.
    """
    with CtrlC() as ctrl_c:
        code = _guarded(list(sys.argv[1:] if argv is None else argv), ctrl_c)
        if code == INTERRUPTED and argv is None:
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
    except (UsageError, files.RunDirectoryError) as error:
        return _complain(error, BAD_INPUT)
    except files.WriteError as error:
        return _complain(error, FAILED)
    except BrokenPipeError:  # `fedmd-jax report DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        ctrl_c.hold()
        print("\nfedmd-jax: interrupted", file=sys.stderr)
        return INTERRUPTED
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
    elif command == "report":
        return _report(rest)
    else:
        raise UsageError(_unknown("command", command, ("run", "report")))
    return 0


def _run(argv: list[str], ctrl_c: CtrlC) -> int:
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "quickstart"
    if name not in EXPERIMENTS:
        raise UsageError(_unknown("experiment", name, tuple(EXPERIMENTS)))
    settings = parse(name, argv)
    if settings is None:
        return 0
    experiment, watch = settings.experiment, Stopwatch()
    path = _output_path(settings.out, name, experiment.seed)
    files.check_new(path)  # before the data is read; `Recorder` checks again
    keep_compiled_programs()
    with _bad_input():
        prepared = prepare(experiment)
    with ctrl_c.held():
        recorder = Recorder(path, name, experiment, command=shlex.join(["fedmd-jax", "run", name, *argv]))
    interrupted = False
    try:
        with make_progress(experiment.num_rounds) as progress:
            run(prepared, Uninterrupted(Observers(recorder, progress), ctrl_c), watch)
    except KeyboardInterrupt:
        interrupted = True
    ctrl_c.hold()  # a second one does not stop the writing
    _finish(recorder, prepared, watch, path, interrupted=interrupted)
    return INTERRUPTED if interrupted else 0


def _finish(recorder: Recorder, prepared: Prepared, watch: Stopwatch, path: pathlib.Path, *, interrupted: bool) -> None:
    done, num_rounds = recorder.num_rounds_done, prepared.experiment.num_rounds
    if done is None:
        print(
            f"\ninterrupted before the first result: {path} has {files.CONFIG} and an empty {files.METRICS}",
            file=sys.stderr,
        )
        return
    if interrupted:
        print(f"\ninterrupted after round {done} of {num_rounds}: what is done so far is kept", file=sys.stderr)
    summary = recorder.finish(communication(prepared, num_rounds=done), watch.seconds(), interrupted=interrupted)
    print(f"\n{describe(summary)}\nresults in {path}")


def _output_path(out: str | None, name: str, seed: int) -> pathlib.Path:
    if out is None:
        return files.fresh_path(pathlib.Path("runs") / f"{name}-seed{seed}")
    return pathlib.Path(os.path.normpath(os.path.expanduser(out)))


def _report(argv: list[str]) -> int:
    if set(argv) & set(HELP):
        print(REPORT_USAGE, end="")
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UsageError("report wants one directory of a finished run: fedmd-jax report DIR")
    path = pathlib.Path(os.path.expanduser(argv[0]))
    summary, metrics = files.read_run(path)
    print(describe(summary))
    files.replace_file(path / files.PLOT, plot(summary, metrics))
    return 0


def parse(name: str, argv: Sequence[str]) -> Run | None:
    """Settings from options.

    Args:
      name: the experiment whose settings are the defaults.
      argv: the options.

    Returns:
      The settings, or None where the help was asked for, which is printed then.

    Raises:
      UsageError: an option is unknown, or its value is not one.
    """
    program = f"fedmd-jax run {name}"
    cli = partial(
        tyro.cli,
        Run,
        default=Run(experiment=EXPERIMENTS[name]),
        args=list(argv),
        prog=program,
        description=f"{_DESCRIPTION}\n\nExperiments, which set the defaults: {', '.join(EXPERIMENTS)}.",
        config=(tyro.conf.DisallowNone,),
    )

    if set(argv) & set(HELP):
        with contextlib.suppress(SystemExit):
            cli()
        return None
    message = io.StringIO()
    try:
        with _bad_input(), contextlib.redirect_stdout(message), contextlib.redirect_stderr(message):
            settings, unknown = cli(return_unknown_args=True)
    except SystemExit:
        raise UsageError(f"{_message(message.getvalue())} (see {program} --help)") from None
    if unknown:
        raise UsageError(f"{_unknown_argument(unknown)} (see {program} --help)")
    return settings


@contextlib.contextmanager
def _bad_input() -> Iterator[None]:
    """What the checks of settings and data complain of is the user's; a `ValueError` anywhere else is a bug."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


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
    return _unknown("option", option.partition("=")[0], (*_options(Experiment), "--out"))


def _options(kind: type, prefix: str = "--") -> tuple[str, ...]:
    """The options of a dataclass of settings and of those in it."""
    names: list[str] = []
    for field in dataclasses.fields(kind):
        name = prefix + field.name.replace("_", "-")
        names += _options(field.type, f"{name}.") if dataclasses.is_dataclass(field.type) else [name]
    return tuple(names)


def _unknown(what: str, word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3)
    if close:
        return f"unknown {what} {word!r}, perhaps you meant {' or '.join(close)}"
    return f"unknown {what} {word!r}" + ("" if what == "option" else f", known are {', '.join(known)}")
