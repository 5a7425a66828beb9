"""Hostile input, tried in numbers: what is tried, and what may come of a case.

A case ends in a result, which the target's own check has compared with something obvious, or in a complaint: an error
of a documented kind that this package has raised itself, in one line. All else is a bug: other errors, also those of
the same kind out of the depth of a library, a case that takes too long, one that takes more memory than anybody has.
"""

import collections
import contextlib
import dataclasses
import pathlib
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, strategies
from hypothesis import settings as hypothesis_settings

import fedmd_jax

PACKAGE = str(pathlib.Path(fedmd_jax.__file__).parent)
SECONDS = 20  # of a case; the slowest takes two, where it is the first to compile or to import something
BYTES = 2**31  # more than before the case
LONGEST = 1500  # characters of a complaint


class TooSlow(BaseException):
    """Nobody catches it."""


class UnclearError(AssertionError):
    """An error that tells a user nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Something that takes what others have made.

    Attributes:
      name: of the target.
      case: what is tried.
      check: does it and compares the result; whatever it returns that is not None is counted as a kind of its own.
      errors: the kinds of complaint that are documented; no others, not even kinds of these.
      few: cases in the test suite.
      share: of the cases of a long run, relative to other targets.
    """

    name: str
    case: strategies.SearchStrategy
    check: Callable[[Any], str | None]
    errors: tuple[type[Exception], ...] = (ValueError,)
    few: int = 10
    share: float = 1.0


@dataclasses.dataclass
class Tally:
    """What has come of the cases of a target."""

    kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    slowest: tuple[float, str] = (0.0, "")
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return self.kinds.total()


def fuzz(target: Target, cases: int, *, seed: int, shrink: bool = True) -> Tally:
    """Tries so many cases; hypothesis tells of one that fails, made as small as it can be."""
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])]
    tally = Tally()

    @hypothesis.seed(seed)
    @hypothesis_settings(
        max_examples=cases,
        phases=phases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @hypothesis.given(target.case)
    def attempt(case):
        began = time.perf_counter()
        kind = outcome(target, case)
        took = time.perf_counter() - began
        tally.kinds[kind] += 1
        tally.slowest = max(tally.slowest, (took, f"{case!r:.300}"))
        tally.seconds += took

    attempt()
    return tally


def outcome(target: Target, case: Any) -> str:
    """What comes of a case: "result", or the kind of the complaint; raises where it is neither."""
    try:
        with limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that tell of what they then complain about
            return target.check(case) or "result"
    except target.errors as error:
        check_complaint(target, error)
        return type(error).__name__


def check_complaint(target: Target, error: Exception) -> None:
    """It is of a documented kind, in one line, and raised here and not out of the depth of a library."""
    if type(error) not in target.errors:
        raise UnclearError(f"{type(error).__name__} is not documented: {error}") from error
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    if not last.tb_frame.f_code.co_filename.startswith(PACKAGE):
        raise UnclearError(f"{type(error).__name__} out of {last.tb_frame.f_code.co_filename}: {error}") from error
    check_line(str(error))


def check_line(text: str) -> None:
    """One line that can be printed anywhere."""
    if not text or not text.isprintable() or len(text) > LONGEST:
        raise UnclearError(f"not one line of reasonable length: {text!r:.2000}")


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """No case takes longer, or more memory."""

    def stop(*_):
        raise TooSlow(f"after {SECONDS} seconds")

    statm = pathlib.Path("/proc/self/statm")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else None
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        if used is not None:
            resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
