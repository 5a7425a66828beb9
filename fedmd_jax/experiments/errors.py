"""What is wrong with the user's wishes, and not with the program."""

import contextlib
from collections.abc import Iterator


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
