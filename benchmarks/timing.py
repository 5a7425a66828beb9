"""One way to time a jitted function: compilation apart, results blocked, the median of repeats."""

import json
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Timing(NamedTuple):
    """Seconds."""

    compile: float
    run: float  # median of the repeats


def measure(fn: Callable[..., Any], *args: Any, repeats: int = 5) -> Timing:
    """Compiles `fn` for these arguments, runs it once to warm up, then `repeats` times."""
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(compiled(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    return Timing(compile_seconds, statistics.median(seconds))


def matmul_ceiling(size: int = 1024) -> float:
    """GFLOP/s of a plain float32 product on this machine, in this run: what the other figures stand beside."""
    x = jnp.ones((size, size))
    return 2 * size**3 / measure(jnp.matmul, x, x).run / 1e9


def append_json(path: pathlib.Path | None, record: dict[str, Any]) -> None:
    """Adds a line with device, versions and commit; does nothing without a path."""
    if path is None:
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    device = jax.devices()[0]
    about = {
        "device": device.device_kind,
        "platform": device.platform,
        "machine": platform.machine(),
        "jax": jax.__version__,
        "commit": commit,
    }
    with path.open("a") as file:
        file.write(json.dumps({**record, **about}) + "\n")
