"""What a run directory holds, read by `report` and by `--resume`, and what the command line is told."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import tempfile
from unittest import mock

from experiments import runs
from fuzzing import odd
from fuzzing.harness import Target, UnclearError, check_line
from hypothesis import strategies as st

from fedmd_jax import cli
from fedmd_jax.cli import main
from fedmd_jax.experiments import resuming
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.errors import SettingsError, UsageError
from fedmd_jax.experiments.networks import architecture_from_name
from fedmd_jax.experiments.results.report import describe
from fedmd_jax.experiments.run_directory import RunDirectoryError, WriteError
from fedmd_jax.experiments.settings import Experiment

_FOLDER = tempfile.TemporaryDirectory(prefix="fuzzing_runs_")
FOLDER = pathlib.Path(_FOLDER.name)
_EXPERIMENT = runs.experiment(num_clients=2, num_rounds=1)


def made(name, write):
    """A directory, made when it is first asked for."""
    path = FOLDER / name
    if not path.exists():
        write(path)
    return path


def fresh(name, write):
    """A copy that a case may spoil."""
    good, path = made(f"good-{name}", write), FOLDER / name
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good, path)
    return path


def spoil(path, case):
    """Edits a file of the directory."""
    name, json_edits, byte_edits = case
    file = path / name
    if name.endswith(".jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines = odd.edited(lines, json_edits)
        text = "".join(odd.to_text(line) + "\n" for line in lines) if isinstance(lines, list) else odd.to_text(lines)
    else:
        text = odd.to_text(odd.edited(json.loads(file.read_text()), json_edits))
    file.write_bytes(odd.damaged(text.encode("utf-8", "surrogatepass"), byte_edits))


def spoilings(*names):
    some_bytes = odd.maybe(st.just([]), odd.byte_edits)
    return st.lists(
        st.tuples(st.sampled_from(names), odd.json_edits, some_bytes),
        min_size=1,
        max_size=2,
        unique_by=lambda case: case[0],
    )


def told(argv):
    """Runs the command line: what it printed, and the kind of its complaint, if it had one."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    out.getvalue().encode()  # can be printed
    if code == 0:
        return out.getvalue(), None
    lines = err.getvalue().splitlines()
    if code not in (cli.FAILED, cli.BAD_INPUT) or not lines or not lines[-1].startswith("fedmd-jax: error: "):
        raise UnclearError(f"exit code {code}: {err.getvalue()!r}")
    for line in lines:
        check_line(line)
    return out.getvalue(), {cli.FAILED: "exit code 1", cli.BAD_INPUT: "exit code 2"}[code]


# report


def one_run(path):
    runs.write(path, _EXPERIMENT, status={1: {0: "incomplete"}})


def two_seeds(path):
    path.mkdir()
    for seed in (7, 8):
        runs.write(path / f"seed{seed}", dataclasses.replace(_EXPERIMENT, seed=seed))
    cli.write_seeds(path, [path / "seed7", path / "seed8"], 2)


def check_report(case):
    path = fresh("run", one_run)
    for spoiling in case:
        spoil(path, spoiling)
    out, complaint = told(["report", str(path)])
    if complaint is None:
        check_table(out, path)
    return complaint


def check_table(out, path):
    """The numbers of the table are those of the file, none of them a NaN."""
    summary = json.loads((path / files.SUMMARY).read_text())
    rows = re.findall(
        r"^ *(-?\d+)  .*?  +(-?[\d.]+)  +(-?[\d.]+|-)  +(-?[\d.]+)  +(-?[\d.]+|-)  +\S+  +\S+$", out, re.MULTILINE
    )
    keys = ("transfer_accuracy", "local_accuracy", "final_accuracy", "pooled_accuracy")
    wanted = [
        (str(client["client_id"]), *("-" if client.get(key) is None else f"{client[key]:.3f}" for key in keys))
        for client in summary["clients"]
    ]
    assert rows == wanted, out
    assert "nan" not in out
    assert describe(summary) in out
    assert (path / files.PLOT).stat().st_size > 1000


def check_report_of_seeds(case):
    path = fresh("seeds", two_seeds)
    for spoiling in case:
        spoil(path, spoiling)
    out, complaint = told(["report", str(path)])
    if complaint is None:
        assert "nan" not in out
        assert "mean and standard deviation" in out or "gain" in out
    return complaint


def check_list(case):
    path = FOLDER / "list"
    path.mkdir(exist_ok=True)
    for name, spoiling in zip(("run", "seeds"), (case, case), strict=True):
        child = fresh(f"list/{name}", {"run": one_run, "seeds": two_seeds}[name])
        for each in spoiling:
            if (child / each[0]).exists():
                spoil(child, each)
    out, complaint = told(["report", str(path)])
    if complaint is None:
        for line in out.splitlines():
            check_line(line)
    return complaint


# --resume


def check_resume(case):
    spoilings, options = case
    path = fresh("interrupted", lambda path: runs.write(path, _EXPERIMENT, num_done=0))
    for spoiling in spoilings:
        spoil(path, spoiling)
    found = resuming.find(["--resume", str(path), *options])
    settings = json.loads((path / files.CONFIG).read_text())["settings"]
    assert isinstance(found.experiment, Experiment)
    if "--elsewhere" not in options:
        assert json.loads(json.dumps(dataclasses.asdict(found.experiment))) == settings


def several(path):
    path.mkdir()
    for seed in (7, 8):
        runs.write(path / f"seed{seed}", dataclasses.replace(_EXPERIMENT, seed=seed), num_done=0)


def check_resume_several(case):
    command, options = case
    path = fresh("several", several)
    config = json.loads((path / "seed7" / files.CONFIG).read_text())
    (path / "seed7" / files.CONFIG).write_text(json.dumps({**config, "command": command}))
    with mock.patch.multiple(cli, run_all=lambda *_, **__: True, keep_compiled_programs=lambda: None):
        return told(["run", "--resume", str(path), *options])[1]


def check_reopen(case):
    spoilings, num_bytes = case
    path = fresh("interrupted", lambda path: runs.write(path, _EXPERIMENT, num_done=0))
    for spoiling in spoilings:
        spoil(path, spoiling)
    content = (path / files.METRICS).read_bytes()
    num_bytes = len(content) if num_bytes is None else num_bytes
    records = files.reopen(path, num_bytes)
    assert (path / files.METRICS).read_bytes() == content[:num_bytes]
    assert all({"round", "client_id", "accuracy"} <= record.keys() for record in records)
    assert [record["round"] for record in records] == sorted(record["round"] for record in records)


# What is typed.

_OPTIONS = [
    *("--num-rounds", "--subset-size", "--networks", "--width", "--weights", "--seeds", "--seed", "--out", "--over"),
    *("--data.num-public", "--data.private-classes", "--data.data-dir", "--digest.batch-size", "--availability"),
    *("--distance", "--temperature", "--score-bound", "--devices", "--no-pooled", "--smoke", "--variant", "--nonsense"),
    *("--resume", "--elsewhere", "--help", "-h", "--from", "--data-dir", "--no-checksums", "--", "-", "=", "--seed="),
]
_VALUES = [
    *("0", "1", "2", "-1", "1.5", "1e400", "nan", "inf", "None", "all", "kl", "mlp", "mlp:n1=3", "2conv:n1=1", "x"),
    *(
        "9" * 30,
        "9" * 5000,
        "a" * 5000,
        "",
        "é",
        "1 2",
        "released",
        "tuned",
        "distance=mae,kl",
        "seed=1,2",
        "pooled=true,x",
    ),
    *("999999999", "1000000000000", "mnist", "cifar10", "\x1b[31m", "\ud800", "a\0b", "a\nb", "{}", "%s", "$x$"),
]
_GOOD = [
    *(["--num-rounds", "1"], ["--distance", "kl"], ["--width", "0.5"], ["--smoke"], ["--no-pooled"], ["--seeds", "2"]),
    *(["--networks", "mlp", "mlp"], ["--availability", "0.5"], ["--devices", "all"], ["--score-bound", "None"]),
]
_odd_words = st.lists(st.sampled_from(_OPTIONS) | st.sampled_from(_VALUES) | st.text(max_size=4), max_size=5)
words = st.tuples(
    st.lists(st.sampled_from(_GOOD), max_size=3, unique_by=str), odd.maybe(st.just([]), _odd_words, 2)
).map(lambda both: [word for words in (*both[0], both[1]) for word in ([words] if isinstance(words, str) else words)])
commands = st.one_of(
    st.tuples(
        st.sampled_from([["run"], ["run", "quickstart"], ["sweep"], ["sweep", "--over", "distance=mae,kl"], ["data"]]),
        words,
    ),
    st.tuples(st.sampled_from([["data", "list"], ["data", "prepare"], ["report"], ["run", "--resume"], []]), words),
)


def check_command(case):
    """Nothing is trained, and nothing is written but below a folder of its own."""
    start, words = case
    if "--out" in words or any(word.startswith(("/", "~")) for word in words):
        words = [word for word in words if word != "--out" and not word.startswith(("/", "~", "--out"))]
    if start[:1] == ["data"] and "prepare" in [*start, *words]:
        words = [*words, "--from", str(FOLDER / "nothing")]  # not from the network
    home = FOLDER / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    before = os.getcwd()
    os.chdir(home)
    try:
        with (
            mock.patch.multiple(cli, run_all=lambda *_, **__: True, keep_compiled_programs=lambda: None),
            mock.patch.dict(os.environ, {"HOME": str(home)}),
        ):
            return told([*start, *words])[1]
    finally:
        os.chdir(before)


# Networks by name.

network_names = st.lists(
    st.sampled_from(
        [
            *(
                "2conv",
                "3conv",
                "mlp",
                "resnet8",
                "resnet20",
                ":",
                ":",
                ",",
                ",",
                "n1=",
                "n2=",
                "n3=",
                "width=",
                "norm=",
            ),
            *(
                "dropout=",
                "1",
                "2",
                "3",
                "0",
                "-1",
                "0.5",
                "1e400",
                "nan",
                "batch",
                "group",
                "9" * 30,
                "9" * 5000,
                "=",
                "x",
            ),
        ]
    ),
    max_size=9,
).map("".join)
network_cases = st.tuples(
    st.sampled_from(["mlp:n1=3", "mlp", "2conv:n1=1,n2=2", "resnet8:width=0.5,norm=group"]) | network_names,
    odd.maybe(st.just(1.0), st.sampled_from([0.001, 3.0, 1e-320, 1e300])),
)


def check_network(case):
    name, width = case
    architecture = architecture_from_name(name, 4, width=width)
    assert callable(architecture.init)


TARGETS = [
    Target(
        name="report of a run",
        case=spoilings("summary.json", "metrics.jsonl", "config.json"),
        check=check_report,
        errors=(),
        few=3,
        share=0.5,
    ),
    Target(
        name="report of several seeds",
        case=spoilings("summary.json", "seed7/summary.json", "seed8/summary.json", "seed8/metrics.jsonl"),
        check=check_report_of_seeds,
        errors=(),
        few=1,
        share=0.3,
    ),
    Target(
        name="report of a folder",
        case=spoilings("summary.json", "seed7/summary.json", "metrics.jsonl"),
        check=check_list,
        errors=(),
        few=2,
        share=0.4,
    ),
    Target(
        name="config.json of --resume",
        case=st.tuples(spoilings("config.json"), st.sampled_from([[], ["--elsewhere"], ["--seeds", "2"]])),
        check=check_resume,
        errors=(RunDirectoryError, UsageError, SettingsError),
        few=12,
        share=3,
    ),
    Target(
        name="--resume of several seeds",
        case=st.tuples(
            st.sampled_from(["", "run --seeds 2", "run --seeds=0", "x --seeds " + "9" * 5000, "run --seeds 999999999"])
            | st.text(max_size=8),
            st.sampled_from([[], ["--seeds", "2"], ["--seeds", "999999999"], ["--seeds", "0"], ["--seeds", "x"]]),
        ),
        check=check_resume_several,
        errors=(),
        few=4,
        share=0.3,
    ),
    Target(
        name="metrics.jsonl of --resume",
        case=st.tuples(spoilings("metrics.jsonl"), odd.maybe(st.none(), st.sampled_from([0, 1, 50, 10**6]))),
        check=check_reopen,
        errors=(RunDirectoryError, WriteError),
        few=10,
        share=1,
    ),
    Target(name="command lines", case=commands, check=check_command, errors=(), few=10, share=2),
    Target(name="names of networks", case=network_cases, check=check_network, few=20, share=1),
]
