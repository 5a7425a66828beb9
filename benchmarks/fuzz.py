"""Does hostile input, ten thousand times, end in a result or in one clear line?

    python benchmarks/fuzz.py [--cases 12000] [--seed 0] [--target NAME]

Tries the targets of `tests/fuzzing`: configuration and results of a run directory, command lines, data files, the files
of checkpoints, and arrays, counts and settings at the front door. Every target is tried in a process of its own, so
that one that crashes or hangs is told of like any other, and every case has a deadline and a bound on its memory.

Prints a line for each target, and writes `benchmarks/results/fuzz.json`. The exit code is 1 if a case ended otherwise.
"""

import argparse
import collections
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
RESULT = HERE / "results" / "fuzz.json"
TESTS = HERE.parent / "tests"
MINUTES = 20  # for a target


def work(name: str, cases: int, seed: int, place: pathlib.Path) -> None:
    """Tries one target, here."""
    sys.path[0] = str(TESTS)  # instead of the folder of this file
    import conftest  # noqa: F401  JAX at its strictest, on several devices
    from fuzzing.harness import fuzz
    from fuzzing.targets import TARGETS

    (target,) = (target for target in TARGETS if target.name == name)
    tally = fuzz(target, cases, seed=seed)
    seconds, case = tally.slowest
    record = {"kinds": tally.kinds, "seconds": tally.seconds, "slowest": seconds, "slowest_case": case}
    place.write_text(json.dumps(record))


def run(name: str, cases: int, seed: int, folder: pathlib.Path) -> dict:
    """Tries one target in a process of its own; what came of it."""
    place = folder / "tally.json"
    place.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--work", name, str(cases), str(seed), str(place)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
        ended, output = f"exit code {process.returncode}", process.stdout + process.stderr
    except subprocess.TimeoutExpired:
        ended, output = f"no end after {MINUTES} minutes", ""
    if not place.exists():
        return {"target": name, "cases": 0, "failed": f"{ended}: {output[-3000:]}"}
    tally = json.loads(place.read_text())
    kinds = dict(sorted(tally["kinds"].items()))
    return {
        "target": name,
        "cases": sum(kinds.values()),
        "kinds": kinds,
        "seconds": round(tally["seconds"], 1),
        "slowest_seconds": round(tally["slowest"], 2),
        "slowest_case": tally["slowest_case"][:120],
    }


def shares(cases: int) -> dict[str, int]:
    """How many cases each target gets."""
    command = "from fuzzing.targets import TARGETS; import json; print(json.dumps({t.name: t.share for t in TARGETS}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    text = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    parts = json.loads(text.stdout)
    return {name: -(-int(cases * part) // int(sum(parts.values()))) for name, part in parts.items()}


def describe(record: dict) -> str:
    """A line of the table."""
    if "failed" in record:
        return f"{record['target']:<28} FAILED {record['failed']}"
    kinds = ", ".join(f"{kind} {count}" for kind, count in record["kinds"].items())
    return (
        f"{record['target']:<28}{record['cases']:>6} cases {record['seconds']:>7.1f} s, slowest "
        f"{record['slowest_seconds']:>5.2f} s: {kinds}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=12_000, help="of all targets together, at least")
    parser.add_argument("--seed", type=int, default=0, help="another one tries other cases")
    parser.add_argument("--target", help="only this one; nothing is written then")
    options = parser.parse_args()
    began, records = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, cases in shares(options.cases).items():
            if options.target in (None, name):
                records.append(run(name, cases, options.seed, pathlib.Path(folder)))
                print(describe(records[-1]), flush=True)
    kinds: collections.Counter = collections.Counter()
    for record in records:
        kinds.update(record.get("kinds", {}))
    failed = [record["target"] for record in records if "failed" in record]
    if options.target is None:
        write(options, kinds, records, failed, minutes=(time.perf_counter() - began) / 60)
    print(f"{kinds.total()} cases: " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
    return 1 if failed else 0


def write(options: argparse.Namespace, kinds: collections.Counter, records: list, failed: list, minutes: float) -> None:
    """The result, with what it was made with."""
    import hypothesis
    import jax

    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "command": f"python benchmarks/fuzz.py --cases {options.cases} --seed {options.seed}",
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "jax": jax.__version__,
        "hypothesis": hypothesis.__version__,
        "cores": os.cpu_count(),
        "minutes": round(minutes, 1),
        "cases": kinds.total(),
        "kinds": dict(kinds.most_common()),
        "failed": failed,
        "targets": records,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        name, cases, seed, place = sys.argv[2:]
        sys.exit(work(name, int(cases), int(seed), pathlib.Path(place)))
    sys.exit(main())
