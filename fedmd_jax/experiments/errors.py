"""What is wrong with the user's wishes, and not with the program."""

import contextlib
import os
from collections.abc import Iterator

import jax

from fedmd_jax.checks import one_line


class UsageError(ValueError):
    """The command line asks for what cannot be; the message is one line."""


class SettingsError(UsageError):
    """Settings that do not fit each other or the data."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """What the checks of settings and data complain of is the user's; a `ValueError` anywhere else is a bug."""
    try:
        yield
    except ValueError as error:
        raise SettingsError(str(error)) from error


def check_backend() -> None:
    """A `UsageError` if JAX does not start, as with JAX_PLATFORMS=cuda and no GPU.

    Of many processes each must have been told of the others before, since this starts JAX.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second has no message: a plugin is not installed
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = one_line(str(error).partition(" (set JAX_PLATFORMS")[0], longest=200)
        raise UsageError(
            f"JAX cannot use JAX_PLATFORMS={platforms!r}: {reason or 'no such platform is installed'}; unset it, or "
            "set it to cpu"
        ) from error
