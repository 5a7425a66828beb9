"""What `fedmd-jax run` and `fedmd-jax sweep` can be told: settings from options, and messages for what is none."""

import contextlib
import dataclasses
import io
import re
import textwrap
from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar, get_args

import tyro

from fedmd_jax import hints
from fedmd_jax.experiments import EXPERIMENTS, Experiment, smoke
from fedmd_jax.experiments.errors import UsageError, bad_input
from fedmd_jax.experiments.together import Processes

T = TypeVar("T")
HELP = ("-h", "--help")
_DESCRIPTION = "Train a federation: transfer learning, rounds of FedMD, and what they are compared with."
# Paragraphs, since lines of one are joined to a line that no terminal holds.
_EXPERIMENTS = "\n\n".join(
    [
        "Experiments, which set the defaults:",
        *textwrap.wrap(", ".join(EXPERIMENTS), width=90, break_on_hyphens=False),
        "Where {None} is among the values, None unsets what the experiment has set.",
    ]
)
Variant = Literal["paper", "released", "tuned"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """Which settings those are that are not given.

    Attributes:
      variant: Of the paper's experiments: paper; released, the settings of the authors' code; or tuned, of letters-iid,
        those that did best on validation images.
      smoke: Tiny defaults: every part runs, and no accuracy means anything. What is given beside it is taken as it is:
        the networks of --smoke --width 0.25 are wider than those of --smoke alone.
    """

    variant: Variant = "paper"
    smoke: tyro.conf.FlagCreatePairsOff[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What `fedmd-jax run` can be told.

    Attributes:
      out: Directory of the results, which must not exist. None: runs/EXPERIMENT-seedSEED, or the first
        of ...-2, ...-3 that does not exist.
      seeds: Run so many seeds, from the seed set below on, each in a directory of its own within that of the results,
        which gets means and standard deviations over them.
      processes: Whether this is one of many processes.
      defaults: What is not given.
      experiment: All settings.
    """

    out: str | None = None
    seeds: int | None = None
    processes: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Processes)
    defaults: Annotated[Defaults, tyro.conf.arg(name="")] = Defaults()
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `fedmd-jax sweep` can be told.

    Attributes:
      over: SETTING=VALUE,VALUE,... with any setting below and its values; semicolons instead of commas where values
        have commas, spaces between the items of a list. Given again: every combination.
      out: Directory of the results, which must not exist. None: runs/EXPERIMENT-sweep, or the first
        of ...-2, ...-3 that does not exist.
      seeds: Run every combination with so many seeds, from the seed set below on.
      defaults: What is not given.
      experiment: All settings that are the same in every combination.
    """

    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    out: str | None = None
    seeds: int = 1
    defaults: Annotated[Defaults, tyro.conf.arg(name="")] = Defaults()
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]


def experiment_name(argv: list[str]) -> str:
    """Takes the experiment from the front of the arguments; the quickstart where there is none.

    Args:
      argv: the arguments; they lose what is taken.

    Raises:
      UsageError: there is no such experiment.
    """
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "quickstart"
    if name not in EXPERIMENTS:
        raise UsageError(hints.unknown("experiment", name, tuple(EXPERIMENTS)))
    return name


def variant_name(name: str, variant: Variant) -> str:
    """The name of an experiment's variant.

    Args:
      name: the experiment, which may be a variant already.
      variant: of it.

    Raises:
      UsageError: it has no such variant.

    >>> variant_name("letters-iid", "released")
    'letters-iid-released'
    """
    own = _variant_of(name)
    if variant == own:
        return name
    if own != "paper":
        raise UsageError(f"{name} is a variant already, --variant is of {name.removesuffix(f'-{own}')}")
    if f"{name}-{variant}" not in EXPERIMENTS:
        raise UsageError(f"{name} has no variant {variant}")
    return f"{name}-{variant}"


def _variant_of(name: str) -> Variant:
    return next((variant for variant in get_args(Variant) if name.endswith(f"-{variant}")), "paper")


def parse(name: str, argv: Sequence[str], *, kind: type[Run] | type[Sweep] = Run) -> Run | Sweep | None:
    """Settings from options.

    Args:
      name: the experiment.
      argv: the options.
      kind: of which command.

    Returns:
      The settings, or None where the help was asked for, which is printed then.

    Raises:
      UsageError: an option is unknown, or its value is not one; `SettingsError` where values do not go together.
    """
    program = f"fedmd-jax {kind.__name__.lower()} {name}"
    words = [word for word in argv if word not in HELP]
    usual = Defaults(variant=_variant_of(name))
    defaults, _ = _ask_tyro(Defaults, usual, words, program)
    experiment = EXPERIMENTS[variant_name(name, defaults.variant)]
    default = kind(defaults=usual, experiment=smoke(experiment) if defaults.smoke else experiment)
    if len(words) < len(argv):
        description = f"{_DESCRIPTION}\n\n{_EXPERIMENTS}"
        with contextlib.suppress(SystemExit):
            tyro.cli(kind, default=default, args=argv, prog=program, description=description)
        return None
    settings, unknown = _ask_tyro(kind, default, words, program)
    if unknown:
        raise UsageError(f"{_unknown_argument(unknown)} (see {program} --help)")
    return settings


def parse_processes(argv: Sequence[str]) -> tuple[Processes, list[str]]:
    """What the options say of many processes, and the options that say something else.

    Raises:
      UsageError: values that are none, or that do not go together.
    """
    return _ask_tyro(Processes, Processes(), argv, "fedmd-jax run")


def _ask_tyro(kind: type[T], default: T, argv: Sequence[str], program: str) -> tuple[T, list[str]]:
    """What the arguments make of the default, and those arguments that say nothing of it."""
    message = io.StringIO()
    try:
        with bad_input(), contextlib.redirect_stdout(message), contextlib.redirect_stderr(message):
            return tyro.cli(kind, default=default, args=argv, prog=program, return_unknown_args=True)
    except SystemExit:
        raise UsageError(f"{_message(message.getvalue())} (see {program} --help)") from None


# tyro and Python, in the words of this program.
_REWORDED = (
    (r"^Error parsing (experiment\.)?", ""),
    (r"no type matching (.+?) could be instantiated from \[(.*)\]\.", r"wanted \1, got \2"),
    (r"\{None\}\|INT\|\{all\}", "None, all or an integer"),
    (r"\{None\}\|INT", "None or an integer"),
    (r"\{None\}\|\{\[FLOAT \[FLOAT \.\.\.\]\]\}", "None or numbers"),
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
    if option.partition("=")[0] in setting_options(Processes):
        return f"{option} is of run: each run of a sweep can be one of many processes, the sweep cannot"
    known = (*setting_options(Experiment), *setting_options(Defaults), *setting_options(Processes))
    known += ("--out", "--seeds", "--over")
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
