"""Does a federation survive half an hour of kills, failing clients and changing devices, and lose nothing?

    python benchmarks/soak.py [--minutes 30] [--seed 0]

Run after run of a small federation is started as `fedmd-jax run`, killed at a random moment (SIGKILL, SIGTERM, SIGINT),
resumed, killed again, until it ends. A third of the runs is moved to other numbers of virtual CPU devices between
resumes. In all of them clients are absent, are late, send what is not finite or blow up in training. After every kill,
and at the end, it is checked that

* what a checkpoint counted as done is still there, to the byte, and stays so;
* at the end every client has exactly one line for every round, and the summary is that of all rounds;
* a run that stayed on its devices ends with the bytes of one that nobody killed.

Prints a line for each run, and writes `benchmarks/results/soak.json`. The exit code is 1 if anything was lost.
"""

import argparse
import collections
import datetime
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import jax

HERE = pathlib.Path(__file__).resolve().parent
RESULT = HERE / "results" / "soak.json"
NUM_ROUNDS = 40
NETWORKS = ("mlp:n1=8", "mlp:n1=8", "mlp:n1=12,dropout=0.2", "2conv:n1=2,n2=3", "mlp:n1=6")
OPTIONS = [
    *("--networks", *NETWORKS, "--num-rounds", str(NUM_ROUNDS), "--subset-size", "60", "--no-pooled"),
    *("--data.num-public", "200", "--data.num-test", "60", "--availability", "0.8", "--completion", "0.8"),
    *("--public-training.num-epochs", "1", "--private-training.num-epochs", "2", "--devices", "all"),
]
# Of signals, SIGKILL is the one that nobody hears.
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXPECTED = {0, -signal.SIGKILL, 143, 130, -signal.SIGTERM, -signal.SIGINT}  # the last two before Python listens
MIXED = (1, 2, 3)  # devices that a run is moved between


def faulty(architecture):
    """The network of a client that fails now and then: which bits decide, so that a run that is resumed fails alike."""
    import jax.numpy as jnp

    def apply(params, model_state, inputs, *, train, mask=None, key=None):
        logits, model_state = architecture.apply(params, model_state, inputs, train=train, mask=mask, key=key)
        if train:  # one of 200 steps
            broken = jax.random.bits(jax.random.fold_in(key, 7)) % 200 == 0
        else:  # one of 20 states
            first = jnp.ravel(jax.tree.leaves(params)[0])[0].astype(jnp.float32)
            broken = jax.lax.bitcast_convert_type(first, jnp.uint32) % 20 == 0
        return jnp.where(broken, jnp.nan, logits), model_state

    return architecture._replace(apply=apply)


def work(argv: list[str]) -> int:
    """`fedmd-jax` with failing clients."""
    from fedmd_jax import cli
    from fedmd_jax.experiments import procedure

    plain = procedure.architecture_from_name
    procedure.architecture_from_name = lambda *names, **settings: faulty(plain(*names, **settings))
    return cli.main(argv)


class Soak:
    """Starts, kills, resumes, checks and counts."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self._folder, self._random = folder, random.Random(seed)
        self.counts: collections.Counter = collections.Counter()
        self.faults: collections.Counter = collections.Counter()
        self.problems: list[str] = []
        self._seconds = 0.0  # of a run that nobody kills

    def run(self, number: int) -> None:
        """One run until it ends, and what it is compared with."""
        mixed = number % 3 == 2
        num_devices = self._random.choice(MIXED)
        start = ["run", "quickstart", "--seed", str(number), *OPTIONS]
        path = self._folder / f"run{number}"
        calm = self._calm(path, start, num_devices)
        kills, moves, done = 0, 0, b""
        while not (path / "summary.json").exists() or json.loads((path / "summary.json").read_text())["interrupted"]:
            if mixed and kills and (other := self._random.choice(MIXED)) != num_devices:
                num_devices, moves = other, moves + 1
            again = ["run", "--resume", str(path), *(["--elsewhere"] if mixed else [])]
            code = self._process(again if path.exists() else [*start, "--out", str(path)], num_devices, path)
            if code is None:
                return
            kills += code != 0
            done = self._check_kept(path, done)
        self._check_end(path, done)
        if not mixed and calm is not None:
            if calm != (path / "metrics.jsonl").read_bytes():
                self.problems.append(f"{path.name}: not the bytes of a run that nobody killed")
            self.counts["compared to the byte"] += 1
        self.counts.update(runs=1, rounds=NUM_ROUNDS, kills=kills, changes_of_devices=moves)
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        self.faults.update(fault for line in lines for fault in line["status"].split(", ") if fault != "ok")
        print(f"run {number}: {kills} kills, {moves} changes of devices, {len(lines)} lines", flush=True)

    def _process(self, argv: list[str], num_devices: int, path: pathlib.Path) -> int | None:
        """The exit code of a process that is killed, unless it is faster; None where it ended as it should not."""
        process = self._start(argv, num_devices)
        try:
            code = process.wait(timeout=self._random.uniform(0.1, 1.2) * self._seconds)
        except subprocess.TimeoutExpired:
            number = self._random.choice(SIGNALS)
            process.send_signal(number)
            code = process.wait()
            self.counts[f"kills with {number.name}"] += 1
        self.counts["processes"] += 1
        output = process.stdout.read()
        if code not in EXPECTED:
            self.problems.append(f"{path.name}: exit code {code}: {output[-500:]}")
            return None
        return code

    def _start(self, argv: list[str], num_devices: int) -> subprocess.Popen:
        flags = f"--xla_force_host_platform_device_count={num_devices}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        command = [sys.executable, __file__, "--work", *argv]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def _check_kept(self, path: pathlib.Path, done: bytes) -> bytes:
        """The lines that checkpoints vouch for, now; those of before are among them."""
        from fedmd_jax.checkpoint import CheckpointError, Checkpoints

        if not (path / "metrics.jsonl").exists():
            return done
        rounds = Checkpoints(path / "checkpoints" / "rounds")
        try:
            kept = rounds.record(rounds.latest)["position"]["num_bytes"] if rounds.latest else 0
        except CheckpointError as error:
            self.problems.append(f"{path.name}: {error}")
            return done
        content = (path / "metrics.jsonl").read_bytes()
        if kept > len(content) or not content.startswith(done):
            self.problems.append(f"{path.name}: lines are gone that a checkpoint counted")
        return max(content[:kept], done, key=len)

    def _check_end(self, path: pathlib.Path, done: bytes) -> None:
        content = (path / "metrics.jsonl").read_bytes()
        lines = [json.loads(line) for line in content.splitlines()]
        found = [(line["round"], line["client_id"]) for line in lines]
        if found != [(r, k) for r in range(NUM_ROUNDS + 1) for k in range(len(NETWORKS))]:
            self.problems.append(f"{path.name}: not every client has one line for every round")
        if not content.startswith(done):
            self.problems.append(f"{path.name}: lines of finished rounds have changed")
        if json.loads((path / "summary.json").read_text())["num_rounds_done"] != NUM_ROUNDS:
            self.problems.append(f"{path.name}: the summary is of fewer rounds")

    def _calm(self, path: pathlib.Path, start: list[str], num_devices: int) -> bytes | None:
        """The lines of the same run, left alone, and how long it takes."""
        calm, began = path.with_name(f"{path.name}-calm"), time.perf_counter()
        process = self._start([*start, "--out", str(calm)], num_devices)
        output = process.communicate()[0]
        self._seconds = time.perf_counter() - began
        if process.returncode == 0:
            return (calm / "metrics.jsonl").read_bytes()
        self.problems.append(f"{calm.name}: exit code {process.returncode}: {output[-500:]}")
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="after which no new run is started")
    parser.add_argument("--seed", type=int, default=0, help="of kills and changes of devices")
    options = parser.parse_args()
    began, number = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(pathlib.Path(folder), options.seed)
        while time.perf_counter() - began < 60 * options.minutes and not soak.problems:
            soak.run(number)
            number += 1
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    record = {
        "command": f"python benchmarks/soak.py --minutes {options.minutes:g} --seed {options.seed}",
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        **dict(sorted(soak.counts.items())),
        "faults of clients": dict(sorted(soak.faults.items())),
        "lost": soak.problems,
    }
    if soak.counts["runs"]:
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(work(sys.argv[2:]) if sys.argv[1:2] == ["--work"] else main())
