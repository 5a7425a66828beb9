"""What a user may have meant, and how it is said."""

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


def one_line(text: str, *, longest: int = 1000) -> str:
    r"""A message in one line that any terminal can show, whatever it quotes.

    Args:
      text: the message.
      longest: as many characters are kept, of a longer one from both ends.

    >>> one_line("cannot read\n  a\x1b[31m")
    'cannot read a?[31m'
    """
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} ... {line[-half:]}"
