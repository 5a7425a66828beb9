"""Errors in what the user asks for, as opposed to bugs."""

import os
from contextlib import AbstractContextManager

import jax

from fedmd_jax.checks import one_line, value_errors_as


class UsageError(ValueError):
    """The command line cannot be carried out; the message is one line."""


class SettingsError(UsageError):
    """Settings that do not fit each other or the data."""


def bad_input() -> AbstractContextManager:
    """A `ValueError` of the checks of settings and data becomes a `SettingsError`; anywhere else it is a bug."""
    return value_errors_as(SettingsError)


def check_backend() -> None:
    """A `UsageError` if JAX does not start, as with JAX_PLATFORMS=cuda and no GPU.

    Of many processes each must have been told of the others before, since this starts JAX.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second has no message: a plugin is not installed
        reason = one_line(str(error).partition(" (set JAX_PLATFORMS")[0], longest=200) or "it is not installed"
        found = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}"
        raise UsageError(f"JAX cannot use {found}: {reason}; unset it, or set it to cpu") from error
