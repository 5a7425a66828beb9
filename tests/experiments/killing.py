"""A program: kills a run again and again, lets it come to its end, and compares it with one that was left alone.

JAX is imported once and does nothing in this process, so that it can be forked: a run then starts within a second.
"""

import os
import pathlib
import random
import shlex
import signal
import sys
import time

import matplotlib.backends.backend_agg
import matplotlib.figure
from experiments.counting import counting

from fedmd_jax import cli
from fedmd_jax.experiments import run_directory as files, train
from fedmd_jax.experiments.setup import prepare

IMPORTED = matplotlib  # what every run needs, here once
NUM_KILLS = int(os.environ.get("NUM_KILLS", "20"))
OPTIONS = shlex.split(
    "--networks mlp --data.num-public 100 --data.num-test 30 --subset-size 20 --num-rounds 400 "
    "--public-training.num-epochs 1 --private-training.num-epochs 1 --pooled-training.num-epochs 1"
)


def start(*argv):
    """The process of a run whose programs train nothing."""
    if pid := os.fork():
        return pid
    train.prepare = lambda experiments, **options: counting(prepare(experiments, **options))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os._exit(cli.main(["run", *map(str, argv)]))


def end_of(pid):
    """The exit code of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def progress(path):
    """How far a run is: the size of its metrics; the number of pretrained groups and the last checkpoint."""
    metrics, checkpoints = path / files.METRICS, path / files.CHECKPOINTS
    rounds = [int(each.name) for each in (checkpoints / "rounds").glob("*") if each.name.isdigit()]
    pretrained = len(list((checkpoints / "pretrained").glob("*")))
    return metrics.stat().st_size if metrics.exists() else 0, [pretrained, max(rounds, default=-1)]


def kill(pid, path, number, delay):
    """Waits for new lines or for other clients, and then for so many seconds, and kills."""
    what, give_up = number % 2, time.monotonic() + 60
    before = progress(path)[what]
    while progress(path)[what] <= before and time.monotonic() < give_up:
        assert os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "it has ended before"
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(pid, signal.SIGTERM if number == NUM_KILLS // 2 else signal.SIGKILL)
    return end_of(pid)


def main(folder):
    """0 where all is as it should be."""
    whole, path, rng = folder / "whole", folder / "run", random.Random(5)
    assert end_of(start("--out", whole, *OPTIONS)) == 0
    ends, stages = [], []
    for number in range(NUM_KILLS):
        argv = ["--resume", path] if path.exists() else ["--out", path, *OPTIONS]
        ends.append(kill(start(*argv), path, number, rng.uniform(0, 0.03)))
        stages.append(str(progress(path)))
    print(f"{stages=}\n{ends=}")
    assert sorted(ends) == [-signal.SIGKILL] * (NUM_KILLS - 1) + [128 + signal.SIGTERM]
    assert len(set(stages)) > NUM_KILLS // 2
    assert end_of(start("--resume", path)) == 0
    assert (path / files.METRICS).read_bytes() == (whole / files.METRICS).read_bytes()
    assert {file.name for file in path.iterdir()} == {file.name for file in whole.iterdir()}


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
