"""A program: runs of two processes on this machine, whole, killed and resumed.

JAX is imported once and does nothing in this process, so that it can be forked: a process of a run then starts soon.
"""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import socket
import sys
import time

import jax
from experiments.killing import end_of

from fedmd_jax import cli
from fedmd_jax.experiments import run_directory as files

SECONDS = 300  # after which a process is taken for stuck
NUM_ROUNDS = 6
# A group that fills the devices, with padding, and one that does not.
OPTIONS = shlex.split(
    "--networks mlp:n1=4 mlp:n1=4 mlp:n1=3 mlp:n1=4 mlp:n1=4 mlp:n1=4 --data.num-public 100 "
    f"--data.num-test 30 --subset-size 20 --public-training.num-epochs 1 --private-training.num-epochs 1 "
    f"--no-pooled --revisit.num-epochs 1 --num-rounds {NUM_ROUNDS}"
)


def start(folder, name, num_devices, *argv):
    """A process that runs the command line with so many devices; what it says is in two files."""
    if pid := os.fork():
        return pid
    for stream, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{name}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    signal.alarm(SECONDS)  # nothing is left behind
    jax.config.update("jax_num_cpu_devices", num_devices)
    sys.argv = ["fedmd-jax", "run", *map(str, argv)]
    sys.exit(cli.main())


def start_two(folder, *argv, seeds=(0, 0)):
    """Two processes with two devices each; `seeds` are of a new run."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    by_hand = f"--coordinator 127.0.0.1:{port} --num-processes 2 --process-id".split()
    seeds = [[] if "--resume" in argv else ["--seed", seed] for seed in seeds]
    return [start(folder, f"process{i}", 2, *argv, *by_hand, i, *seeds[i]) for i in range(2)]


def kill(pids, which, path, lines, number=signal.SIGKILL):
    """Sends a signal to one of two when so many lines of metrics are there; both codes, and how long the other took."""
    metrics, give_up = path / files.METRICS, time.monotonic() + SECONDS
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines) and time.monotonic() < give_up:
        time.sleep(0.001)
    os.kill(pids[which], number)
    killed = time.monotonic()
    ends = [end_of(pid) for pid in pids]
    return ends, time.monotonic() - killed


def said(folder, process):
    """What a process has written to stderr."""
    return (folder / f"process{process}.err").read_text()


def main(folder):
    """What has happened, in words; the tests judge it."""
    told, here = {}, folder / "run"
    told["one"] = end_of(start(folder, "one", 4, "--out", folder / "one", "--devices", "all", *OPTIONS))
    told["two"] = list(map(end_of, start_two(folder, "--out", folder / "two", *OPTIONS)))
    for name, which, lines, number in (
        ("killed 1", 1, 6, signal.SIGKILL),
        ("killed 0", 0, 12, signal.SIGKILL),
        ("terminated 1", 1, 24, signal.SIGTERM),
    ):
        argv = ["--resume", here] if here.exists() else ["--out", here, *OPTIONS]
        ends, seconds = kill(start_two(folder, *argv), which, here, lines, number)
        told[name] = {"ends": ends, "seconds": seconds, "said": [said(folder, i) for i in range(2)]}
        told[name]["lines"] = (here / files.METRICS).read_bytes().count(b"\n")
    told["resumed"] = list(map(end_of, start_two(folder, "--resume", here)))
    told["differ"] = list(map(end_of, start_two(folder, "--out", folder / "differ", *OPTIONS, seeds=(0, 1))))
    told["differ said"] = [said(folder, i) for i in range(2)]
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    with contextlib.chdir(sys.argv[1]):
        main(pathlib.Path(sys.argv[1]))
