"""What a user may have meant."""

import difflib
from collections.abc import Collection


def unknown(what: str, word: str, known: Collection[str], *, list_known: bool = True) -> str:
    """A complaint about a word that is none of the known ones, with those that are close to it.

    Args:
      what: kind of the word, such as "command".
      word: the word.
      known: those there are.
      list_known: whether to list all of them where none is close.

    >>> unknown("command", "rum", ["run", "report"])
    "unknown command 'rum', perhaps you meant run"
    >>> unknown("command", "xyz", ["run", "report"])
    "unknown command 'xyz', known are run, report"
    """
    close = difflib.get_close_matches(word, known, n=3)
    if close:
        return f"unknown {what} {word!r}, perhaps you meant {' or '.join(close)}"
    return f"unknown {what} {word!r}" + (f", known are {', '.join(known)}" if list_known else "")
