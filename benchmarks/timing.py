"""Timing: first calls separately, blocking on results, medians of interleaved repeats, peak memory per contender."""

import contextlib
import json
import multiprocessing
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Timing(NamedTuple):
    """Seconds of compilation and of a run."""

    compile: float
    run: float  # median of the repeats


class Sample(NamedTuple):
    """Seconds of one method of one contender."""

    first: float  # the first call, which compiles
    median: float  # of the repeats after it
    low: float
    high: float


def measure(fn: Callable[..., Any], *args: Any, repeats: int = 5) -> Timing:
    """Compiles `fn` for these arguments, runs it once to warm up, then times `repeats` runs."""
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


def matmul_ceiling(dtype: str = "float32") -> float:
    """GFLOP/s of a matrix product on this machine, for comparison; large enough to occupy a GPU."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    return 2 * size**3 / measure(jnp.matmul, x, x).run / 1e9


def copy_ceiling(size: int = 2**26) -> float:
    """GB/s, read and written, of a copy of `size` floats, for comparison."""
    return 2 * 4 * size / measure(jnp.negative, jnp.ones(size)).run / 1e9


class Contender:
    """A process that builds `make(*args)` once and calls its methods on request.

    Two libraries in one process would share an allocator, thread pools and peak memory. Methods take no arguments and
    return when their work is complete.
    """

    def __init__(self, make: Callable[..., Any], *args: Any):
        """Waits until the object is built; raises a `RuntimeError` if that fails."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args))
        self._process.start()
        theirs.close()  # else the end of the process would not be noticed
        try:
            self.end("construction")
        except BaseException:
            self.close()
            raise

    def __call__(self, method: str) -> tuple[float, Any]:
        """Returns seconds and the result of the method; raises a `RuntimeError` if it failed."""
        self.begin(method)
        return self.end(method)

    def begin(self, method: str) -> None:
        """Starts a call, for contenders that run concurrently."""
        try:
            self._pipe.send(method)
        except OSError:
            raise RuntimeError(f"a contender ended before {method}") from None

    def end(self, method: str) -> tuple[float, Any]:
        """Waits for the started call."""
        try:
            seconds, result, error = self._pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"a contender died in {method}; was there enough memory?") from None
        if error:
            raise RuntimeError(f"{method}: {error}")
        return seconds, result

    def close(self) -> None:
        """Ends the process by closing its pipe."""
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.terminate()


def _serve(pipe, make, args):
    def answer(call):
        start = time.perf_counter()
        try:
            result, error = call(), None
        except Exception as failure:  # reported through the pipe
            result, error = None, f"{type(failure).__name__}: {failure}"
        return result, (time.perf_counter() - start, result, error)

    subject, (seconds, _, error) = answer(lambda: make(*args))
    own = {"reset_peak": reset_peak, "peak_bytes": peak_bytes, "versions": versions}
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        pipe.send((seconds, None, error))
        while True:
            method = pipe.recv()
            pipe.send(answer(lambda method=method: getattr(subject, method, own.get(method))())[1])
    if hasattr(subject, "close"):
        subject.close()


def interleave(
    contenders: Mapping[str, Contender], methods: Sequence[str], *, repeats: int
) -> dict[str, dict[str, Sample]]:
    """Times every method of every contender in turn, so that noise on the machine affects all of them.

    Args:
      contenders: Contenders by name; each repeat begins with another one.
      methods: Names, called in this order; all contenders run one before the next.
      repeats: Number of timed repeats after one call that is not counted.

    Returns:
      Contender -> method -> `Sample`.
    """
    names = list(contenders)
    seconds = {name: {method: [contenders[name](method)[0]] for method in methods} for name in names}
    for name in names:
        contenders[name]("reset_peak")
    for repeat in range(repeats):
        turn = repeat % max(len(names), 1)
        for method in methods:
            for name in names[turn:] + names[:turn]:
                seconds[name][method].append(contenders[name](method)[0])
    return {
        name: {
            method: Sample(first, statistics.median(rest), min(rest), max(rest))
            for method, (first, *rest) in found.items()
        }
        for name, found in seconds.items()
    }


def reset_peak() -> None:
    """Resets the peak memory, which includes compilation (on Linux and for PyTorch on GPUs only)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Peak memory of this process: that of the accelerator if there is one, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if jax.default_backend() != "cpu":
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    with contextlib.suppress(OSError):
        # `ru_maxrss` would include the process that this one was forked from.
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """Versions of Python and of the imported libraries."""
    names = [name for name in ("jax", "flax", "torch", "keras", "tensorflow") if name in sys.modules]
    return {"python": platform.python_version(), **{name: sys.modules[name].__version__ for name in names}}


def commit() -> str:
    """The commit of this checkout, marked if there are uncommitted changes."""
    command, here = ["git", "describe", "--always", "--dirty", "--exclude", "*"], pathlib.Path(__file__).parent
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=False).stdout.strip()


def append_json(path: pathlib.Path | None, record: dict[str, Any]) -> None:
    """Appends a line: `record` on top of device, versions and commit; does nothing without a path."""
    if path is None:
        return
    device = jax.devices()[0]
    about = {
        "device": device.device_kind,
        "platform": device.platform,
        "machine": platform.machine(),
        **versions(),
        "commit": commit(),
    }
    with path.open("a") as file:
        file.write(json.dumps({**about, **record}) + "\n")
