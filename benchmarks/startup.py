"""How long does a federation of ten networks take from the start of the process to the end of its first round?

    python benchmarks/startup.py [--width 0.25] [--networks 0 5] [--json FILE]

Runs in two new processes: with an empty compilation cache, and with the cache that the first one wrote. The programs
are those of `fedmd-jax run --no-pooled`, compiled in the background as there; data is little noise, so that
compilation dominates. Seconds: `total` since the start of the process, `waited` for the compiler, `running` the
programs; `tracing` and `compiling` are the times during which at least one thread traced or compiled (or read the
cache); `compiled` is the sum over the programs, several of which may be compiled at once; `cpu` is the time of all
threads.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

COMPILED = "/jax/core/compile/backend_compile_duration"
TRACED = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")
Interval = tuple[float, float]
HIT = "/jax/compilation_cache/cache_hits"


class Listener:
    """Records when JAX traced and compiled, and the number of cache hits."""

    def __init__(self, monitoring):
        self.compiled: list[Interval] = []
        self.traced: list[Interval] = []
        self.hits = 0
        monitoring.register_event_duration_secs_listener(self._duration)
        monitoring.register_event_listener(self._event)

    def _duration(self, event, seconds, **_):
        now = time.perf_counter()
        if event == COMPILED:
            self.compiled.append((now - seconds, now))
        elif event in TRACED:
            self.traced.append((now - seconds, now))

    def _event(self, event, **_):
        self.hits += event == HIT


def covered(intervals: list[Interval]) -> float:
    """Length of the union of the intervals, which may overlap."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def first_round(width: float, networks: list[int], num_public: int, started: float) -> dict:
    """Runs until the end of the first round in this process; figures in seconds."""
    import jax

    listener = Listener(jax.monitoring)
    import numpy as np

    import fedmd_jax as fmd
    from fedmd_jax.experiments.compile import Programs
    from fedmd_jax.models import TABLE_1, architecture_from_linen, head_l2, paper_cnn

    imported = time.time() - started
    groups = {
        f"network {i}": fmd.ArchitectureGroup(
            architecture_from_linen(paper_cnn(TABLE_1[i], width=width), penalty=head_l2(1e-3)), [k]
        )
        for k, i in enumerate(networks)
    }
    rng = np.random.default_rng(0)

    def labelled(n):
        return rng.standard_normal((n, 28, 28, 1), np.float32), rng.integers(16, size=n)

    one_epoch = fmd.TrainingConfig(num_epochs=1, batch_size=128)
    federation = fmd.fedmd(
        groups, subset_size=num_public, public_training=one_epoch, private_training=fmd.TrainingConfig(batch_size=32)
    )
    public, test = fmd.public_dataset(*labelled(num_public)), fmd.labelled_dataset(*labelled(num_public))
    private = fmd.stack_private(groups, {k: labelled(18) for k in range(len(networks))})
    programs, keys = Programs(), jax.random.split(jax.random.key(0), 4)
    programs.restart(federation)
    states = jax.eval_shape(federation.programs["new_states"], keys[0], public.inputs[:1])
    programs.begin("new_states", keys[0], public.inputs[:1])
    for name in groups:
        programs.begin("pretrain", {name: states[name]}, public, keys[1])
    programs.begin("train_private", states, private, keys[2])
    programs.begin("evaluate", states, test)
    programs.begin("round", states, public, private, keys[3])
    states = programs("new_states", keys[0], public.inputs[:1])
    for name in groups:
        trained, _ = programs("pretrain", {name: states[name]}, public, keys[1])
        states = {**states, **trained}
    states, _ = programs("train_private", states, private, keys[2])
    programs("evaluate", states, test)
    states, _ = programs("round", states, public, private, keys[3])
    programs("evaluate", states, test)
    programs.close()
    seconds = programs.seconds()
    return {
        "total": time.time() - started,
        "imports": imported,
        "waited": seconds["compile"],
        "running": sum(seconds[phase] for phase in ("transfer", "rounds", "evaluate")),
        "tracing": covered(listener.traced),
        "compiling": covered(listener.compiled),
        "compiled": sum(stop - start for start, stop in listener.compiled),
        "cpu": time.process_time(),
        "programs": len(listener.compiled),
        "from_cache": listener.hits,
    }


def in_a_fresh_process(options: argparse.Namespace, cache: str) -> dict:
    """Runs `first_round` in a new process with the compilation cache in the folder `cache`."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, __file__, "--width", str(options.width), "--public", str(options.public), "--started"]
    command += [str(time.time()), "--networks", *map(str, options.networks)]
    done = subprocess.run(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=0.25, help="of the networks")
    parser.add_argument("--networks", type=int, nargs="+", default=list(range(10)), help="rows of Table 1")
    parser.add_argument("--public", type=int, default=600, help="public images, and as many test images")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)  # run in this process, started then
    options = parser.parse_args()
    if options.started is not None:
        print(json.dumps(first_round(options.width, options.networks, options.public, options.started)))
        return
    from timing import append_json

    print(f"{len(options.networks)} networks, width {options.width:g}, {options.public} public images")
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            figures = in_a_fresh_process(options, cache)
            if name == "cold":
                print("     " + "".join(f"{figure:>12}" for figure in figures))
            columns = (f"{value:>12}" if isinstance(value, int) else f"{value:>10.1f} s" for value in figures.values())
            print(f"{name:<5}" + "".join(columns), flush=True)
            settings = {"width": options.width, "networks": options.networks, "num_public": options.public}
            append_json(options.json, {"benchmark": "startup", "cache": name, **settings, **figures})


if __name__ == "__main__":
    main()
