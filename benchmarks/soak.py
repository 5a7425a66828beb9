"""Do runs survive half an hour of kills, failing clients and changing devices without losing results?

    python benchmarks/soak.py [--minutes 30] [--seed 0]

Small federations are started with `fedmd-jax run`, killed (SIGKILL, SIGTERM, SIGINT) and resumed until they end; the
number of kills per run is random. The stage of each kill is drawn first (start, transfer learning, rounds), then its
time within the duration of this stage in an uninterrupted run, or its round. Two thirds of the runs change the number
of virtual CPU devices between resumes. In all runs some clients are dropped, are stragglers, send non-finite scores or
diverge in training; which ones depends only on their keys and the public subset, not on the devices.

After every kill, and at the end, it is checked that

* the lines of `metrics.jsonl` that a checkpoint counts are unchanged;
* at the end every client has exactly one line per round, and the summary covers all rounds;
* a run that kept its devices ends with the bytes of an uninterrupted run;
* a run that changed devices ends with the same faults, with losses and accuracies within `LOSS` and `ACCURACY`, and
  with a summary that names the devices.

The half hour begins after compilation and the uninterrupted runs. Prints a line for each run and writes
`benchmarks/results/soak.json`. The exit code is 1 if anything was lost.
"""

import argparse
import collections
import datetime
import itertools
import json
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import jax
import timing

HERE = pathlib.Path(__file__).resolve().parent
RESULT = HERE / "results" / "soak.json"
NUM_ROUNDS, SUBSET, NUM_TEST = 100, 50, 64
NETWORKS = ("mlp:n1=8", "mlp:n1=8", "mlp:n1=12,dropout=0.2", "2conv:n1=2,n2=3")
OPTIONS = [
    *("--networks", *NETWORKS, "--num-rounds", str(NUM_ROUNDS), "--subset-size", str(SUBSET), "--no-pooled"),
    *("--data.num-public", "200", "--data.num-test", str(NUM_TEST), "--availability", "0.8", "--completion", "0.8"),
    *("--public-training.num-epochs", "1", "--private-training.num-epochs", "2", "--devices", "all"),
]
DEVICES, SEEDS = (1, 2, 3), (0, 1)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # SIGKILL twice: it cannot be handled
# The line that begins each stage, and the relative frequency of kills in it.
STAGES = {
    "start": 2,
    "transfer learning: public data": 1,
    "transfer learning: private data": 1,
    "rounds": 7,
}
KILLS = (3, 12)  # least and greatest number per run
# Tolerances of a run that changed devices: relative for losses, one image for accuracies.
LOSS, ACCURACY = 1e-3, 1 / NUM_TEST


def stage_of(line: str) -> str | None:
    """The stage that this line of a process begins or continues."""
    stage = line.removesuffix(" ...\n").partition(", network")[0]
    return stage if stage in STAGES else None


def faulty(architecture):
    """An architecture that fails at random, independently of the devices."""
    import jax.numpy as jnp

    def init(key, inputs):
        params, inner = architecture.init(key, inputs)
        return params, {"inner": inner, "own": jax.random.bits(key)}

    def apply(params, model_state, inputs, *, train, mask=None, key=None):
        logits, inner = architecture.apply(params, model_state["inner"], inputs, train=train, mask=mask, key=key)
        if train:
            broken = jax.random.bits(jax.random.fold_in(key, 7)) % 200 == 0
        else:  # only scores of public subsets, which differ from round to round, not the evaluation
            subset = jnp.sum(jax.lax.bitcast_convert_type(inputs, jnp.uint32), dtype=jnp.uint32)
            drawn = jax.random.bits(
                jax.random.fold_in(jax.random.fold_in(jax.random.key(0), model_state["own"]), subset)
            )
            broken = (drawn % 20 == 0) & (inputs.shape[0] == SUBSET)
        return jnp.where(broken, jnp.nan, logits), {**model_state, "inner": inner}

    return architecture._replace(init=init, apply=apply)


def work(argv: list[str]) -> int:
    """`fedmd-jax` with failing clients."""
    from fedmd_jax import cli
    from fedmd_jax.experiments import setup

    plain = setup.architecture_from_name
    setup.architecture_from_name = lambda *names, **settings: faulty(plain(*names, **settings))
    sys.argv[1:] = argv
    return cli.main()


class Process:
    """A process of a run and its output."""

    def __init__(self, argv: list[str], num_devices: int):
        flags = f"--xla_force_host_platform_device_count={num_devices}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        command = [sys.executable, __file__, "--work", *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.began = {"start": time.perf_counter()}  # time of each stage that has begun
        self.output: list[str] = []
        self.last_round = -1
        self._process = subprocess.Popen(command, env=environment, **pipes)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            self.output.append(line)
            if (stage := stage_of(line)) is not None:
                self.began.setdefault(stage, time.perf_counter())
            if found := re.match(r"round +(\d+)/", line):
                self.last_round = int(found[1])

    @property
    def stage(self) -> str:
        """The last stage that has begun."""
        return list(self.began)[-1]

    def kill(self, number: int, stage: str, delay: float, patience: float, *, after_round: int | None = None) -> bool:
        """Sends a signal `delay` seconds after this or a later stage has begun; False if the process ends before.

        With `after_round` the delay begins after this round, or at the end of the rounds.
        """
        wait_until = time.perf_counter() + patience
        while after_round is not None and self._process.poll() is None and time.perf_counter() < wait_until:
            if self.last_round >= after_round:
                break
            time.sleep(0.005)
        delay += 0 if after_round is None else time.perf_counter() - self.began["start"]
        stage = stage if after_round is None else "start"
        order, give_up = list(STAGES), time.perf_counter() + patience
        while self._process.poll() is None and time.perf_counter() < give_up:
            reached = [began for other, began in [*self.began.items()] if order.index(other) >= order.index(stage)]
            if reached and time.perf_counter() >= reached[0] + delay:
                self._process.send_signal(number)
                return True
            time.sleep(0.005)
        return False

    def wait(self, patience: float) -> int | None:
        """The exit code; None if the process does not end and is killed."""
        try:
            code = self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            code = None
        self._reader.join()
        return code

    def seconds(self) -> dict[str, float]:
        """Duration of each stage of a process that has just ended."""
        times = [*self.began.values(), time.perf_counter()]
        return {
            stage: after - before for stage, (before, after) in zip(self.began, itertools.pairwise(times), strict=True)
        }


class Soak:
    """Starts, kills, resumes and checks runs."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self._folder, self._random = folder, random.Random(seed)
        self.counts: collections.Counter = collections.Counter()
        self.kills: collections.Counter = collections.Counter()
        self.killed_in: collections.Counter = collections.Counter()
        self.faults: collections.Counter = collections.Counter()
        self.problems: list[str] = []
        self.apart = {"loss": 0.0, "accuracy": 0.0}  # largest deviation of a run that changed devices
        self._windows: dict[int, dict[str, float]] = {}  # per number of devices, the seconds of each stage
        self._calm: dict[tuple[int, int], pathlib.Path] = {}

    def prepare(self) -> None:
        """Makes the uninterrupted runs, which also compile everything, and measures their stages."""
        for seed, num_devices in itertools.product(SEEDS, DEVICES):
            path = self._folder / f"calm-seed{seed}-devices{num_devices}"
            process = Process(["run", "quickstart", "--seed", str(seed), *OPTIONS, "--out", str(path)], num_devices)
            if (code := process.wait(patience=1200)) != 0:
                self.problems.append(f"{path.name}: exit code {code}: {_end(process)}")
                return
            seconds, before = process.seconds(), self._windows.get(num_devices, {})
            self._windows[num_devices] = {stage: min(s, before.get(stage, s)) for stage, s in seconds.items()}
            self._calm[seed, num_devices] = path
            print(f"{path.name}: " + ", ".join(f"{stage} {s:.1f} s" for stage, s in seconds.items()), flush=True)

    def run(self, number: int) -> None:
        """Kills and resumes one run until it ends, and checks it."""
        seed, num_devices, is_moved = number % len(SEEDS), self._random.choice(DEVICES), number % 3 > 0
        path, calm, moves = self._folder / f"run{number}", self._calm[seed, num_devices], 0
        done, before, places = b"", self.counts.copy(), []  # numbers of devices that wrote checkpoints, in order
        num_kills = self._random.randint(*KILLS)
        while not (self.problems or _is_finished(path)):
            argv = ["run", "--resume", str(path), *(["--allow-environment-change"] if is_moved else [])]
            if not path.exists():
                argv = ["run", "quickstart", "--seed", str(seed), *OPTIONS, "--out", str(path)]
            elif is_moved and (other := self._random.choice(DEVICES)) != num_devices:
                num_devices, moves = other, moves + 1
            kept = _last_checkpoint(path)
            self._part(argv, num_devices, path, is_killed=self.counts["kills"] - before["kills"] < num_kills)
            if (_last_checkpoint(path) != kept or _is_finished(path)) and places[-1:] != [num_devices]:
                places.append(num_devices)
            done = self._check_kept(path, done)
        if self.problems:
            return
        self.counts.update({"runs": 1, "changes of devices": moves})
        self._check_end(path, done, calm, is_moved=moves > 0)
        continued = json.loads((path / "summary.json").read_text()).get("continued", [])
        if [place["device"]["count"] for place in continued] != places[1:]:
            self.problems.append(f"{path.name}: moved between {places} devices, the summary says {continued}")
        made = ", ".join(f"{self.counts[what] - before[what]} {what}" for what in ("processes", "kills"))
        print(f"run {number}, seed {seed}: {made}, {moves} changes of devices", flush=True)

    def record(self) -> dict:
        """The figures so far."""
        return {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "jax": jax.__version__,
            "cores": os.cpu_count(),
            **dict(sorted(self.counts.items())),
            "kills by signal": dict(sorted(self.kills.items())),
            "kills by stage": {stage: self.killed_in[stage] for stage in STAGES},
            "faults of clients": dict(sorted(self.faults.items())),
            "most that a moved run is apart": self.apart,
            "lost": self.problems,
        }

    def _part(self, argv: list[str], num_devices: int, path: pathlib.Path, *, is_killed: bool) -> None:
        """Runs one process and kills it if it has not ended before."""
        windows = self._windows[num_devices]
        stage = self._random.choices(list(STAGES), weights=STAGES.values())[0]
        number, delay = self._random.choice(SIGNALS), self._random.uniform(0, 1.1) * windows[stage]
        after_round = None
        if stage == "rounds":  # by round number, since times depend on other load
            after_round, delay = self._random.randrange(_last_round(path), NUM_ROUNDS + 1), self._random.uniform(0, 0.2)
        patience = 60 + 20 * sum(windows.values())
        last = _last_round(path)
        process = Process(argv, num_devices)
        sent = is_killed and process.kill(number, stage, delay, patience, after_round=after_round)
        code = process.wait(patience)
        self.counts["processes"] += 1
        expected = {0, 128 + number, -number} if sent else {0}  # negative before Python listens
        importing = sent and process.stage == "start" and "KeyboardInterrupt" in _end(process)
        if code not in expected and not importing:
            self.problems.append(f"{path.name}: exit code {code}, signal {sent and number}: {_end(process)}")
            return
        if code == 0 and not _is_finished(path):
            self.problems.append(f"{path.name}: exit code 0 of an unfinished run: {_end(process)}")
            return
        if code != 0:
            self.counts["kills"] += 1
            self.kills[signal.Signals(number).name] += 1
            self.killed_in[process.stage] += 1
        went_on = next((line for line in process.output if line.startswith(f"{path} is resumed ")), None)
        if "--resume" in argv:
            self.counts["resumes"] += went_on is not None
        began = _round_of(went_on) if went_on else last if "--resume" in argv else 0
        self.counts["rounds made"] += max(_last_round(path) - began, 0)
        self.counts["rounds repeated"] += max(last - began, 0)

    def _check_kept(self, path: pathlib.Path, done: bytes) -> bytes:
        """Returns the lines that the last checkpoint counts, and checks that earlier ones are unchanged."""
        if not (path / "metrics.jsonl").exists():
            return done
        if (last := _last_checkpoint(path)) is None:
            kept = 0
        else:
            metadata = json.loads((path / "checkpoints" / "rounds" / str(last) / "_CHECKPOINT_METADATA").read_text())
            [kept] = metadata["custom_metadata"]["record"]["num_bytes"]
        content = (path / "metrics.jsonl").read_bytes()
        if kept > len(content) or not content.startswith(done):
            self.problems.append(f"{path.name}: lines are gone that a checkpoint counted")
        return max(content[:kept], done, key=len)

    def _check_end(self, path: pathlib.Path, done: bytes, calm: pathlib.Path, *, is_moved: bool) -> None:
        content = (path / "metrics.jsonl").read_bytes()
        lines = [json.loads(line) for line in content.splitlines()]
        found = [(line["round"], line["client_id"]) for line in lines]
        if found != [(r, k) for r in range(NUM_ROUNDS + 1) for k in range(len(NETWORKS))]:
            self.problems.append(f"{path.name}: not every client has one line for every round")
            return
        if not content.startswith(done):
            self.problems.append(f"{path.name}: lines of finished rounds have changed")
        if json.loads((path / "summary.json").read_text())["num_rounds_done"] != NUM_ROUNDS:
            self.problems.append(f"{path.name}: the summary is of fewer rounds")
        faults = collections.Counter(fault for line in lines for fault in line["status"].split(", ") if fault != "ok")
        if len(faults) < 4:
            self.problems.append(f"{path.name}: too few faults of clients: {dict(faults)}")
        self.faults.update(faults)
        if is_moved:
            self._check_moved(path, lines, calm)
        elif content != (calm / "metrics.jsonl").read_bytes():
            self.problems.append(f"{path.name}: not the bytes of an uninterrupted run")
        self.counts["equal but for rounding" if is_moved else "equal to the byte"] += 1

    def _check_moved(self, path: pathlib.Path, lines: list[dict], calm: pathlib.Path) -> None:
        """Compares faults, losses and accuracies with those of an uninterrupted run."""
        others = map(json.loads, (calm / "metrics.jsonl").read_text().splitlines())
        for line, other in zip(lines, others, strict=True):
            where = f"{path.name}: round {line['round']}, client {line['client_id']}"
            if line["status"] != other["status"]:
                self.problems.append(f"{where}: {line['status']} where it was {other['status']}")
                return
            losses = [(line[name], other[name]) for name in ("digest_loss", "revisit_loss")]
            losses = [(ours, theirs) for ours, theirs in losses if ours is not None or theirs is not None]
            if any(None in pair for pair in losses):
                self.problems.append(f"{where}: a loss is missing")
                return
            loss = max((abs(ours - theirs) / max(abs(theirs), 1e-3) for ours, theirs in losses), default=0.0)
            accuracy = abs(line["accuracy"] - other["accuracy"])
            self.apart = {"loss": max(loss, self.apart["loss"]), "accuracy": max(accuracy, self.apart["accuracy"])}
            if loss > LOSS or accuracy > ACCURACY + 1e-6 or math.isnan(loss):
                self.problems.append(f"{where}: loss or accuracy is {loss:.3g} or {accuracy:.3g} away")
                return


def _end(process: Process) -> str:
    return "".join(process.output)[-500:]


def _is_finished(path: pathlib.Path) -> bool:
    summary = path / "summary.json"
    return summary.exists() and not json.loads(summary.read_text())["interrupted"]


def _last_round(path: pathlib.Path) -> int:
    """The last round that has lines."""
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["round"] if lines else 0


def _round_of(went_on: str) -> int:
    found = re.search(r"after round (\d+) of", went_on)
    return int(found[1]) if found else 0


def _last_checkpoint(path: pathlib.Path) -> int | None:
    """The last round with a checkpoint."""
    return max(
        (int(each.name) for each in (path / "checkpoints" / "rounds").glob("*") if each.name.isdigit()), default=None
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="no run is started after this time")
    parser.add_argument("--seed", type=int, default=0, help="seed of kills and changes of devices")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup the processes would ignore it, too
    commit, number = timing.commit(), 0
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(pathlib.Path(folder), options.seed)
        soak.prepare()
        began = time.perf_counter()
        while time.perf_counter() - began < 60 * options.minutes and not soak.problems:
            soak.run(number)
            number += 1
            record = {
                "command": f"python benchmarks/soak.py --minutes {options.minutes:g} --seed {options.seed}",
                "commit": commit,
                "minutes": round((time.perf_counter() - began) / 60, 1),
                **soak.record(),
            }
            RESULT.write_text(json.dumps(record, indent=1) + "\n")  # after every run, in case the soak itself is killed
    print(RESULT.read_text() if number else soak.problems)
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(work(sys.argv[2:]) if sys.argv[1:2] == ["--work"] else main())
