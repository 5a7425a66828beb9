"""The config.json of a run that is resumed, and what the command line is told."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
import tempfile
from unittest import mock

from experiments import runs
from fuzzing import odd
from fuzzing.harness import Target
from hypothesis import strategies as st

from fedmd_jax import cli
from fedmd_jax.cli import main
from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments.networks import architecture_from_name
from fedmd_jax.experiments.run_directory import RunDirectoryError
from fedmd_jax.experiments.settings import Experiment, settings_from

_FOLDER = tempfile.TemporaryDirectory(prefix="fuzzing_runs_")
FOLDER = pathlib.Path(_FOLDER.name)
_EXPERIMENT = runs.experiment(num_clients=2, num_rounds=1)


def told(argv):
    """Runs the command line: the kind of its complaint, if it had one; what it printed can be printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    out.getvalue().encode()
    assert code in (0, cli.FAILED, cli.BAD_INPUT), err.getvalue()
    assert (code == 0) or err.getvalue()
    return f"exit code {code}" if code else None


def check_config(case):
    """A config.json is refused, or its settings come back from JSON as they are."""
    json_edits, byte_edits = case
    path = FOLDER / "run"
    if not path.exists():
        runs.write(path, _EXPERIMENT, num_done=0)
    content = json.loads((path / files.CONFIG).read_text())
    text = odd.to_text(odd.edited(content, json_edits))
    spoiled = FOLDER / "config.json"
    spoiled.write_bytes(odd.damaged(text.encode("utf-8", "surrogatepass"), byte_edits))
    settings = files.read_config_file(spoiled)["settings"]
    experiment = settings_from(Experiment, settings)
    assert json.loads(json.dumps(dataclasses.asdict(experiment))) == settings


# What is typed.

_OPTIONS = [
    *("--num-rounds", "--subset-size", "--networks", "--width", "--weights", "--num-seeds", "--seed"),
    *("--out", "--over"),
    *("--data.num-public", "--data.private-classes", "--data.data-dir", "--digest.batch-size", "--availability"),
    *("--distance", "--temperature", "--score-clip", "--devices", "--no-pooled", "--smoke", "--nonsense"),
    *("--resume", "--allow-environment-change", "--help", "-h", "--from", "--data-dir", "--no-checksums"),
    *("--", "-", "=", "--seed="),
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
    *(["--num-rounds", "1"], ["--distance", "kl"], ["--width", "0.5"], ["--smoke"], ["--no-pooled"]),
    *(["--num-seeds", "2"],),
    *(["--networks", "mlp", "mlp"], ["--availability", "0.5"], ["--devices", "all"], ["--score-clip", "None"]),
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
            mock.patch.multiple(cli, run_all=lambda *_, **__: True, cache_compiled_programs=lambda: None),
            mock.patch.dict(os.environ, {"HOME": str(home)}),
        ):
            return told([*start, *words])
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
        name="config.json",
        case=st.tuples(odd.json_edits, odd.maybe(st.just([]), odd.byte_edits)),
        check=check_config,
        errors=(RunDirectoryError, ValueError),
        few=12,
        share=3,
    ),
    Target(name="command lines", case=commands, check=check_command, errors=(), few=10, share=2),
    Target(name="names of networks", case=network_cases, check=check_network, few=20, share=1),
]
