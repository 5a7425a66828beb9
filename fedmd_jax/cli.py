"""The command line: `fedmd-jax run`, `fedmd-jax report`."""

import contextlib
import dataclasses
import io
import os
import pathlib
import sys
from collections.abc import Sequence

import tqdm
import tyro

import fedmd_jax
from fedmd_jax.communication import Communication
from fedmd_jax.experiments import EXPERIMENTS, Experiment
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.procedure import communication, prepare, run
from fedmd_jax.experiments.report import plot, round_records, summarize, table
from fedmd_jax.experiments.stopwatch import Stopwatch
from fedmd_jax.federation import RoundMetrics

USAGE = f"""\
usage: fedmd-jax run [EXPERIMENT] [--out DIR] [options]   train a federation and report on it
       fedmd-jax report DIR                               table and plot of a finished run, again
       fedmd-jax run [EXPERIMENT] --help                  every setting
       fedmd-jax --version

experiments: {", ".join(EXPERIMENTS)} (the default is quickstart: two minutes on two CPU cores, no download)
"""
BAD_INPUT, INTERRUPTED = 2, 130


class UsageError(ValueError):
    """The command line is wrong; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except ValueError as error:
        print("fedmd-jax: error: " + " ".join(str(error).split()), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("fedmd-jax: interrupted", file=sys.stderr)
        return INTERRUPTED


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv[0] == "--version":
        print(f"fedmd-jax {fedmd_jax.__version__}")
        return 0
    commands = {"run": _run, "report": _report}
    if argv[0] not in commands:
        raise UsageError(f"unknown command {argv[0]!r}, known are {', '.join(commands)}")
    return commands[argv[0]](argv[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Experiment):
    """Train a federation: transfer learning, rounds of FedMD, and the pooled upper bound.

    Attributes:
      out: Directory of the results, which must not exist. Default: runs/EXPERIMENT-seedSEED.
    """

    out: str | None = None


def _run(argv: list[str]) -> int:
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "quickstart"
    if name not in EXPERIMENTS:
        raise UsageError(f"unknown experiment {name!r}, known are {', '.join(EXPERIMENTS)}")
    preset = EXPERIMENTS[name]
    settings = parse(Run, Run(**_fields(preset)), argv, prog=f"fedmd-jax run {name}")
    if isinstance(settings, int):
        return settings
    experiment = Experiment(**{key: value for key, value in _fields(settings).items() if key != "out"})
    out = (
        pathlib.Path(settings.out).expanduser()
        if settings.out
        else files.fresh_path(pathlib.Path("runs") / f"{name}-seed{experiment.seed}")
    )

    watch = Stopwatch()
    if out.exists():  # before the data is read; `create` decides
        raise files.RunDirectoryError(f"the output directory must be new, but {out} exists")
    prepared = prepare(experiment)
    files.create(out)
    recorder = Recorder(name, experiment, out, communication(prepared, experiment), watch)
    code = 0
    with recorder:
        try:
            run(prepared, experiment, recorder, watch)
        except KeyboardInterrupt:
            code = INTERRUPTED
    recorder.finish(interrupted=bool(code))
    return code


class Recorder:
    """Writes the run directory and shows the progress."""

    def __init__(self, name: str, experiment: Experiment, out: pathlib.Path, sent: Communication, watch: Stopwatch):
        self._name, self._experiment, self._out, self._sent, self._watch = name, experiment, out, sent, watch
        self._metrics: list[dict] = []
        self._pooled: dict[int, float] | None = None
        self._about = {"versions": files.versions(), "device": files.device()}
        files.write_json(
            out / files.CONFIG,
            {"experiment": name, "settings": dataclasses.asdict(experiment), "seed": experiment.seed, **self._about},
        )
        files.append_lines(out / files.METRICS, [])
        self._progress = make_progress(experiment.num_rounds)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()

    def phase(self, title: str) -> None:
        """Shows it."""
        self._progress.phase(title)

    def round(self, metrics: RoundMetrics) -> None:
        """Writes the lines of the round, and shows it."""
        records = round_records(metrics)
        files.append_lines(self._out / files.METRICS, records)
        self._metrics += records
        self._progress.round(metrics)

    def pooled(self, accuracy: dict[int, float]) -> None:
        """Keeps the upper bound for the summary."""
        self._pooled = accuracy

    def finish(self, *, interrupted: bool) -> None:
        """Writes and shows what there is."""
        if interrupted:
            print("interrupted: what is done so far is kept", file=sys.stderr)
        if self._metrics:
            summary = summarize(
                self._name, self._experiment, self._metrics, self._pooled, self._sent, self._watch.seconds()
            )
            files.write_json(self._out / files.SUMMARY, {**summary, "interrupted": interrupted, **self._about})
            files.replace_file(self._out / files.PLOT, plot(summary, self._metrics))
            print_report(summary)
        print(f"results in {self._out}")


def print_report(summary: dict) -> None:
    """The table, and what the run cost."""
    sent, seconds = summary["communication"], summary["seconds"]
    print(f"\n{table(summary)}\n")
    print(
        f"sent: {sent['upload_bytes_per_client_round'] / 1e3:.0f} kB up and as much down per client and round; "
        f"FedAvg would send {sent['fedavg_bytes_per_client_round'] / 1e3:.0f} kB each way"
    )
    print("seconds: " + ", ".join(f"{phase} {value:.0f}" for phase, value in seconds.items()))


def _report(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            print("usage: fedmd-jax report DIR\n\nPrint the table of a finished run and redraw its accuracy.png.")
            return 0
        raise UsageError("report wants the directory of a finished run: fedmd-jax report DIR")
    path = pathlib.Path(argv[0]).expanduser()
    summary, metrics = files.read_run(path)
    try:
        picture = plot(summary, metrics)
        print_report(summary)
    except (KeyError, TypeError) as error:
        raise files.RunDirectoryError(f"cannot read the run in {path}: {error!r}") from None
    try:
        files.replace_file(path / files.PLOT, picture)
    except OSError as error:
        raise files.RunDirectoryError(f"cannot write {path / files.PLOT}: {error.strerror}") from None
    return 0


def parse(kind: type, default: object, argv: list[str], *, prog: str):
    """Settings from options, or an exit code where the help was asked for.

    Raises:
      UsageError: an option is unknown or its value is not one; the message is the first line of tyro's.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, default=default, args=argv, prog=prog, compact_help=False)
    except SystemExit as stop:
        if not stop.code:
            return 0
        raise UsageError(f"{_first_paragraph(errors.getvalue())} (see {prog} --help)") from None


def _first_paragraph(box: str) -> str:
    """What tyro says in the first part of its framed message."""
    lines = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╭╮╰╯─ ")
        if not text:
            break
        lines.append(text)
    return " ".join(lines)


def _fields(settings: Experiment) -> dict:
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


class Lines:
    """Progress as plain lines, for a log."""

    def __init__(self, num_rounds: int):
        self._num_rounds = num_rounds

    def phase(self, title: str) -> None:
        """A line."""
        print(f"{title} ...", flush=True)

    def round(self, metrics: RoundMetrics) -> None:
        """A line."""
        print(describe(metrics, self._num_rounds), flush=True)

    def close(self) -> None:
        """Nothing to do."""


class Bar:
    """Progress as a bar that knows the phase, the round, the accuracy so far and the time left."""

    def __init__(self, num_rounds: int):
        self._num_rounds = num_rounds
        self._bar = tqdm.tqdm(total=num_rounds, unit="round", dynamic_ncols=True, leave=True)

    def phase(self, title: str) -> None:
        """Names the bar."""
        if title == "rounds":
            self._bar.reset(self._num_rounds)  # the time left is that of the rounds
        self._bar.set_description(title)

    def round(self, metrics: RoundMetrics) -> None:
        """Moves the bar; the line above it stays."""
        self._bar.set_postfix_str(f"accuracy {metrics.mean_accuracy:.3f}")
        self._bar.update(metrics.round - self._bar.n)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def make_progress(num_rounds: int) -> Lines | Bar:
    """A bar on a terminal, lines elsewhere."""
    return Bar(num_rounds) if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else Lines(num_rounds)


def describe(metrics: RoundMetrics, num_rounds: int) -> str:
    """One line about a round."""
    accuracies = [client.accuracy for client in metrics.clients]
    line = (
        f"round {metrics.round:>{len(str(num_rounds))}}/{num_rounds}  accuracy {metrics.mean_accuracy:.3f} "
        f"({min(accuracies):.3f} to {max(accuracies):.3f})"
    )
    return line if metrics.digested else line + "  no consensus: all weights are zero"
