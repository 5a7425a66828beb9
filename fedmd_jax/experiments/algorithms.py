"""Algorithms and their options by name, for the command line and for files."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any, Literal

from fedmd_jax import algorithms
from fedmd_jax.algorithms import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "fedmd": algorithms.fedmd,
    "ds-fl": algorithms.ds_fl,
    "scarlet": algorithms.scarlet,
    "kt-pfl": algorithms.kt_pfl,
    "selective-fd": algorithms.selective_fd,
    "cfd": algorithms.cfd,
    "fd": algorithms.fd,
    "fedproto": algorithms.fedproto,
    "fedtgp": algorithms.fedtgp,
    "fedavg": algorithms.fedavg,
    "fedprox": algorithms.fedprox,
    "feddf": algorithms.feddf,
}
_NUMBERS = (int, float, int | None, float | None)


def option_types(name: str) -> dict[str, Any]:
    """The options of an algorithm: those arguments of its function that are numbers, or None.

    >>> option_types("ds-fl")
    {'temperature': float | None}
    """
    parameters, hints = inspect.signature(ALGORITHMS[name]).parameters, typing.get_type_hints(ALGORITHMS[name])
    return {option: hints[option] for option in parameters if hints[option] in _NUMBERS}


def descriptions(docstring: str) -> dict[str, str]:
    """What a docstring says of each argument or attribute.

    >>> descriptions(algorithms.fedmd.__doc__)["distance"]
    'distance of scores and consensus in the digest.'
    """
    # Python 3.13 removes the indentation that all lines of a docstring share, and `cleandoc` does so in any version.
    described = re.findall(r"^ {2}(\w+): (.*(?:\n {4}.*)*)", inspect.cleandoc(docstring), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in described}


def option_defaults(name: str) -> dict[str, Any]:
    """The options of an algorithm with their defaults.

    >>> option_defaults("ds-fl")
    {'temperature': 0.1}
    """
    parameters = inspect.signature(ALGORITHMS[name]).parameters
    return {option: parameters[option].default for option in option_types(name)}


def _options_class() -> Any:
    """A dataclass with the options of all algorithms, each of which has the default of its algorithm by default."""
    kinds: dict[str, Any] = {}
    told: dict[str, dict[str, str]] = {}  # option -> algorithm -> description
    for name, make in ALGORITHMS.items():
        for option, kind in option_types(name).items():
            kinds[option] = kinds.get(option, Literal["default"]) | kind
            told.setdefault(option, {})[name] = descriptions(make.__doc__ or "")[option]
    lines = ["Options of the algorithms.", "", "    Attributes:"]
    for option, texts in told.items():
        users = ", ".join(f"{name} ({option_defaults(name)[option]})" for name in texts)
        lines.append(
            f"      {option}: Option of {users}. {' '.join(f'{name}: {text}' for name, text in texts.items())}"
        )
    fields = [(option, kind, "default") for option, kind in kinds.items()]
    known = {"__doc__": "\n".join(lines), "__module__": __name__}
    return dataclasses.make_dataclass("AlgorithmOptions", fields, frozen=True, kw_only=True, namespace=known)


AlgorithmOptions = _options_class()


def make_algorithm(name: str, options: AlgorithmOptions, **functions: Any) -> Algorithm:
    """Makes an algorithm.

    Args:
      name: of the algorithm.
      options: those that are given replace the algorithm's defaults.
      **functions: more arguments.

    Raises:
      ValueError: an option that the algorithm does not have, or a value that it refuses.

    >>> make_algorithm("ds-fl", AlgorithmOptions(temperature=0.5)).name
    'ds-fl'
    """
    given = {option: value for option, value in dataclasses.asdict(options).items() if value != "default"}
    for option in given.keys() - option_types(name):
        raise ValueError(f"{flag(option)} is not an option of {name}, {describe_options(name)}")
    try:
        return ALGORITHMS[name](**given, **functions)
    except ValueError as error:
        raise ValueError(f"algorithm {name}: {error}") from error


def describe_options(name: str) -> str:
    """The options of an algorithm as the end of a sentence.

    >>> describe_options("ds-fl")
    'which has algorithm.temperature'
    """
    return f"which has {', '.join(map(flag, option_types(name))) or 'no options'}"


def flag(option: str) -> str:
    """An option as it is written on the command line, without the hyphens before it.

    >>> flag("down_bits")
    'algorithm.down-bits'
    """
    return f"algorithm.{option.replace('_', '-')}"
