"""One way to time things: the first call apart, results blocked, medians of interleaved repeats, memory of each."""

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
    """Seconds."""

    compile: float
    run: float  # median of the repeats


class Sample(NamedTuple):
    """Seconds of one piece of work of one contender."""

    first: float  # the first call, in which everything is compiled
    median: float  # of the repeats after it
    low: float
    high: float


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


def copy_ceiling(size: int = 2**26) -> float:
    """GB/s, read and written, of a copy of that many floats, by the same token."""
    return 2 * 4 * size / measure(jnp.negative, jnp.ones(size)).run / 1e9


class Contender:
    """A process of its own, in which `make(*args)` is built once and its methods are called when it is their turn.

    Two libraries in one process would share an allocator, thread pools and a peak of memory. The one whose turn it is
    not sleeps. Methods take nothing and return when their work is done, not when it is on its way.
    """

    def __init__(self, make: Callable[..., Any], *args: Any):
        """Waits until it is built, so that it disturbs nobody; a `RuntimeError` where that fails."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args))
        self._process.start()
        theirs.close()  # else nobody would see it when the process dies
        try:
            self.end("the making")
        except BaseException:
            self.close()
            raise

    def __call__(self, method: str) -> tuple[float, Any]:
        """Seconds, and what the method returned; a `RuntimeError` where it failed."""
        self.begin(method)
        return self.end(method)

    def begin(self, method: str) -> None:
        """The first half of a call, for those that work side by side."""
        try:
            self._pipe.send(method)
        except OSError:
            raise RuntimeError(f"a contender is gone before {method}") from None

    def end(self, method: str) -> tuple[float, Any]:
        """The second half."""
        try:
            seconds, result, error = self._pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"a contender died in {method}; was there enough memory?") from None
        if error:
            raise RuntimeError(f"{method}: {error}")
        return seconds, result

    def close(self) -> None:
        """Ends the process, which goes by itself when its pipe is closed."""
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.terminate()


def _serve(pipe, make, args):
    def answer(call):
        start = time.perf_counter()
        try:
            result, error = call(), None
        except Exception as failure:  # is told, not raised, where nobody would see it
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
    """Times every method of every contender, taking turns: what disturbs the machine meets all of them.

    Args:
      contenders: by name; each repeat begins with another one.
      methods: names, called in this order, all contenders doing one before anybody does the next.
      repeats: after one call of each that is not counted.

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
    """Forgets the peak so far, which is the compiler's (Linux; elsewhere, and on GPUs of JAX, it stays)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Peak memory of this process: that of the accelerator where there is one, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if jax.default_backend() != "cpu":
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    with contextlib.suppress(OSError):
        # Of this program alone; `ru_maxrss` begins with what the process was forked from.
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """Of Python and of what is imported here, of the libraries that make a difference."""
    names = [name for name in ("jax", "flax", "torch", "keras", "tensorflow") if name in sys.modules]
    return {"python": platform.python_version(), **{name: sys.modules[name].__version__ for name in names}}


def append_json(path: pathlib.Path | None, record: dict[str, Any]) -> None:
    """Adds a line with device, versions and commit; what `record` says of them goes before; nothing without a path."""
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
        **versions(),
        "commit": commit,
    }
    with path.open("a") as file:
        file.write(json.dumps({**about, **record}) + "\n")
