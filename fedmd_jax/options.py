"""What `fedmd-jax run` and `fedmd-jax sweep` can be told: settings from options, and messages for what is none."""

import contextlib
import dataclasses
import io
import re
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import tyro

from fedmd_jax import hints
from fedmd_jax.experiments import EXPERIMENTS, Experiment, smoke
from fedmd_jax.experiments.errors import UsageError, bad_input

HELP = ("-h", "--help")
_DESCRIPTION = "Train a federation: transfer learning, rounds of FedMD, and what they are compared with."
# Paragraphs, since lines of one are joined to a line that no terminal holds.
_EXPERIMENTS = "\n\n".join(
    [
        "Experiments, which set the defaults:",
        *textwrap.wrap(", ".join(EXPERIMENTS), width=90, break_on_hyphens=False),
        "--variant released takes the authors' code's settings; --smoke makes all defaults tiny.",
    ]
)
SMOKE = "--smoke"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What `fedmd-jax run` can be told.

    Attributes:
      out: Directory of the results, which must not exist. Without it: runs/EXPERIMENT-seedSEED, or the
        first of ...-2, ...-3 that does not exist.
      seeds: Run so many seeds, from the seed set below on, each in a directory of its own within that of the results,
        which gets means and standard deviations over them.
      experiment: All settings.
    """

    out: str | None = None
    seeds: int | None = None
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `fedmd-jax sweep` can be told.

    Attributes:
      over: SETTING=VALUE,VALUE,... with any setting below and its values; semicolons instead of commas where values
        have commas, spaces between the items of a list. Given again: every combination.
      out: Directory of the results, which must not exist. Without it: runs/EXPERIMENT-sweep, or the
        first of ...-2, ...-3 that does not exist.
      seeds: Run every combination with so many seeds, from the seed set below on.
      experiment: All settings that are the same in every combination.
    """

    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    out: str | None = None
    seeds: int = 1
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]


def experiment_name(argv: list[str]) -> str:
    """Takes the experiment from the front of the arguments, and its variant from wherever it stands.

    Args:
      argv: the arguments; they lose what is taken.

    Returns:
      The name of a preset.

    Raises:
      UsageError: there is no such experiment, or it has no such variant.
    """
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "quickstart"
    if name not in EXPERIMENTS:
        raise UsageError(hints.unknown("experiment", name, tuple(EXPERIMENTS)))
    return name + _take_variant(name, argv)


def _take_variant(name: str, argv: list[str]) -> str:
    """Takes `--variant` from the arguments: what follows the experiment's name where it is not the paper's."""
    place = next((i for i, word in enumerate(argv) if word.partition("=")[0] == "--variant"), None)
    if place is None:
        return ""
    _, given, variant = argv.pop(place).partition("=")
    if not given:
        variant = argv.pop(place) if place < len(argv) else ""
    if name.endswith("-released"):
        raise UsageError(f"{name} is a variant already, --variant is of {name.removesuffix('-released')}")
    known = ["paper", *(other.removeprefix(f"{name}-") for other in EXPERIMENTS if other.startswith(f"{name}-"))]
    if variant not in known:
        raise UsageError(hints.unknown(f"variant of {name}", variant, known))
    return "" if variant == "paper" else f"-{variant}"


def parse(name: str, argv: Sequence[str], *, kind: type[Run] | type[Sweep] = Run) -> Run | Sweep | None:
    """Settings from options.

    Args:
      name: the experiment whose settings are the defaults.
      argv: the options.
      kind: of which command.

    Returns:
      The settings, or None where the help was asked for, which is printed then.

    Raises:
      UsageError: an option is unknown, or its value is not one; `SettingsError` where values do not go together.
    """
    program = f"fedmd-jax {kind.__name__.lower()} {name}"
    experiment = smoke(EXPERIMENTS[name]) if SMOKE in argv else EXPERIMENTS[name]
    argv = [word for word in argv if word != SMOKE]
    cli = partial(
        tyro.cli,
        kind,
        default=kind(experiment=experiment),
        args=argv,
        prog=program,
        description=f"{_DESCRIPTION}\n\n{_EXPERIMENTS}",
        config=(tyro.conf.DisallowNone,),
    )

    if set(argv) & set(HELP):
        with contextlib.suppress(SystemExit):
            cli()
        return None
    message = io.StringIO()
    try:
        with bad_input(), contextlib.redirect_stdout(message), contextlib.redirect_stderr(message):
            settings, unknown = cli(return_unknown_args=True)
    except SystemExit:
        raise UsageError(f"{_message(message.getvalue())} (see {program} --help)") from None
    if unknown:
        raise UsageError(f"{_unknown_argument(unknown)} (see {program} --help)")
    return settings


# tyro and Python, in the words of this program.
_REWORDED = (
    (r"^Error parsing (experiment\.)?", ""),
    (r"invalid literal for int\(\) with base 10: ", "wanted an integer, got "),
    (r"could not convert string to float: ", "wanted a number, got "),
)


def _message(framed: str) -> str:
    """The first paragraph of tyro's message, which stands between a title and a ruled line."""
    lines = [line.strip(" │") for line in framed.splitlines()]
    start = next((i + 1 for i, line in enumerate(lines) if line and set(line) <= set("-─")), 1)
    end = next((i for i in range(start, len(lines)) if set(lines[i]) <= set("-─")), len(lines))
    text = " ".join(lines[start:end])
    for pattern, words in _REWORDED:
        text = re.sub(pattern, words, text)
    return text


def _unknown_argument(unknown: Sequence[str]) -> str:
    option = next((word for word in unknown if word.startswith("-")), None)
    if option is None:
        return f"unexpected argument {unknown[0]!r}; the experiment stands right after run, all else is --option value"
    known = (*setting_options(Experiment), "--out", "--seeds", "--over", "--variant", SMOKE)
    return hints.unknown("option", option.partition("=")[0], known, list_known=False)


def setting_options(kind: type, prefix: str = "--", *, flags_only: bool = False) -> tuple[str, ...]:
    """The options of a dataclass of settings and of those in it.

    Args:
      kind: the dataclass.
      prefix: what they begin with.
      flags_only: whether only those that are on or off are wanted.

    >>> setting_options(Experiment, flags_only=True)
    ('--local', '--pooled')
    """
    names: list[str] = []
    for field in dataclasses.fields(kind):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.type):
            names += setting_options(field.type, f"{name}.", flags_only=flags_only)
        elif field.type is bool or not flags_only:
            names.append(name)
    return tuple(names)
