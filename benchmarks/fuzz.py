"""Does hostile input, ten thousand times, end in a result or in one clear line?

    python benchmarks/fuzz.py [--cases 12000] [--seed 0] [--target NAME]

Tries the targets of `tests/fuzzing`: configuration and results of a run directory, command lines, data files, the files
of checkpoints, and arrays, counts and settings at the front door. All are tried in one process that is started
anew where a case has ended it, so that a crash is told of like any other bug; every case has a deadline and a bound on
its memory.

Prints a line for each target, and writes `benchmarks/results/fuzz.json`. The exit code is 1 if a case ended otherwise.
"""

import argparse
import collections
import datetime
import faulthandler
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback

HERE = pathlib.Path(__file__).resolve().parent
RESULT = HERE / "results" / "fuzz.json"
TESTS = HERE.parent / "tests"
MINUTES = 20  # for a target


def work(cases: int, seed: int, place: pathlib.Path, names: list[str]) -> None:
    """Tries these targets, one after the other, in this process; a line for each as soon as it is done."""
    sys.path[0] = str(TESTS)  # instead of the folder of this file
    import conftest  # noqa: F401  JAX at its strictest, on several devices
    from fuzzing.harness import fuzz
    from fuzzing.targets import TARGETS

    whole = sum(target.share for target in TARGETS)
    for target in TARGETS:
        if names and target.name not in names:
            continue
        faulthandler.dump_traceback_later(60 * MINUTES, exit=True)  # of a library that hears no alarm
        record = {"target": target.name}
        try:
            tally = fuzz(target, math.ceil(cases * target.share / whole), seed=seed)
            record |= {"cases": tally.cases, "kinds": dict(sorted(tally.kinds.items()))}
            record |= {"seconds": round(tally.seconds, 1), "slowest_seconds": round(tally.slowest[0], 2)}
            record["slowest_case"] = tally.slowest[1][:120]
            if not tally.kinds["result"]:
                record["failed"] = "no case was a good one"
        except Exception:
            record["failed"] = traceback.format_exc()
        with place.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(describe(record), flush=True)


def run(options: argparse.Namespace, folder: pathlib.Path) -> list[dict]:
    """Tries all targets, in another process wherever one has ended it."""
    place, records = folder / "tallies.jsonl", []
    names = [options.target] if options.target else target_names()
    while len(records) < len(names):
        command = [sys.executable, __file__, "--work", str(options.cases), str(options.seed), str(place)]
        process = subprocess.run([*command, *names[len(records) :]], check=False)
        lines = place.read_text().splitlines() if place.exists() else []
        found = [json.loads(line) for line in lines]
        if len(found) < len(names):
            found.append({"target": names[len(found)], "failed": f"its process ended with code {process.returncode}"})
            place.write_text("".join(json.dumps(record) + "\n" for record in found))
            print(describe(found[-1]), flush=True)
        records = found
    return records


def target_names() -> list[str]:
    """In the order in which they are tried."""
    command = "from fuzzing.targets import TARGETS; print(*(target.name for target in TARGETS), sep=chr(10))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    return subprocess.check_output([sys.executable, "-c", command], env=environment, text=True).splitlines()


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
    began, commit = time.perf_counter(), describe_commit()
    with tempfile.TemporaryDirectory() as folder:
        records = run(options, pathlib.Path(folder))
    kinds: collections.Counter = collections.Counter()
    for record in records:
        kinds.update(record.get("kinds", {}))
    failed = [record["target"] for record in records if "failed" in record]
    if options.target is None:
        write(options, commit, kinds, records, failed, minutes=(time.perf_counter() - began) / 60)
    print(f"{kinds.total()} cases: " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
    return 1 if failed else 0


def describe_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()


def write(
    options: argparse.Namespace, commit: str, kinds: collections.Counter, records: list, failed: list, minutes: float
) -> None:
    """The result, with what it was made with."""
    import hypothesis
    import jax

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
        cases, seed, place, *names = sys.argv[2:]
        sys.exit(work(int(cases), int(seed), pathlib.Path(place), names))
    sys.exit(main())
