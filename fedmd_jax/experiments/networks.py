"""Networks by name, for the command line and for files: `2conv:n1=8,n2=16,dropout=0.2`."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp

from fedmd_jax import models
from fedmd_jax.checks import one_line
from fedmd_jax.types import Architecture

_NUM_CONVOLUTIONS = {"2conv": 2, "3conv": 3, "4conv": 4}
_RESNETS = {"resnet8": models.resnet8, "resnet20": models.resnet20}
_NORMS = {"batch": models.BatchNorm, "group": models.GroupNorm}
_MOST = 10**6  # filters and hidden units
# Each kind with its settings.
KINDS = {
    "2conv": "the paper's, 2conv:n1=128,n2=256: numbers of filters; dropout=0.2",
    "3conv": "the paper's, 3conv:n1=64,n2=64,n3=64: numbers of filters; dropout=0.2",
    "4conv": "the paper's, 4conv:n1=64,n2=64,n3=64,n4=64: numbers of filters; dropout=0.2",
    "mlp": "mlp:n1=64,n2=32: hidden units, any number of layers, also none; dropout=0",
    "resnet8": "residual network of 8 layers, resnet8:width=1,norm=batch or group",
    "resnet20": "the same of 20 layers",
}


def architecture_from_name(
    name: str,
    num_classes: int,
    *,
    head_penalty: float = 0.0,
    dropout: float | None = None,
    width: float = 1.0,
    dtype: str = "float32",
) -> Architecture:
    """The architecture that a name describes.

    Args:
      name: a kind and its settings, `KIND:setting=value,...`. Kinds are `2conv`, `3conv`, `4conv` (the paper's; n1, n2,
        ... are filters, dropout is 0.2 by default), `mlp` (n1, ... are hidden units, dropout is 0 by default),
        `resnet8` and `resnet20` (width, norm=batch or group; they have no dropout).
      num_classes: number of scores per example.
      head_penalty: factor of the L2 penalty on the head.
      dropout: instead of the name's own.
      width: multiplies filters and hidden units.
      dtype: of activations and products, such as "bfloat16"; parameters, batch statistics and scores are in float32.

    Returns:
      The architecture.

    Raises:
      ValueError: an unknown kind or setting, a setting that is missing or given twice, or an invalid value.

    >>> architecture = architecture_from_name("3conv:n1=4,n2=6,n3=8", 16)
    """
    kind, _, text = name.partition(":")
    if kind not in KINDS:
        raise ValueError(f"network {name!r:.80}: the kind must be one of {', '.join(KINDS)}, got {kind!r:.80}")
    try:
        settings = _parse_settings(text)
        if dropout is not None:
            settings["dropout"] = dropout
        make = _residual if kind in _RESNETS else _plain
        module = make(kind, settings, num_classes, width).clone(dtype=jnp.dtype(dtype))
    except ValueError as error:
        raise ValueError(f"network {name!r:.80}: {one_line(str(error), longest=400)}") from None
    return models.architecture_from_linen(module, penalty=models.head_l2(head_penalty))


def paper_name(network: models.PaperNetwork) -> str:
    """The name of a row of the paper's tables.

    >>> paper_name(models.PaperNetwork((128, 256), 0.2))
    '2conv:n1=128,n2=256,dropout=0.2'
    """
    filters = [f"n{number}={count}" for number, count in enumerate(network.filters, start=1)]
    return f"{len(network.filters)}conv:{','.join(filters)},dropout={network.dropout}"


def _parse_settings(text: str) -> dict[str, Any]:
    settings = {}
    for item in text.split(",") if text else []:
        key, equals, value = item.partition("=")
        if not equals or key in settings:
            raise ValueError(f"settings are written setting=value, each once, got {item!r}")
        settings[key] = _parse_value(key, value)
    return settings


def _parse_value(key: str, value: str) -> Any:
    if key == "norm":
        if value not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {value!r}")
        return _NORMS[value]
    wanted, number = ("an integer", int) if re.fullmatch(r"n\d+", key) else ("a number", float)
    try:
        parsed = number(value)
    except ValueError:
        raise ValueError(f"{key} must be {wanted}, got {value!r}") from None
    if not abs(parsed) <= _MOST:  # NaN neither
        raise ValueError(f"{key} must be at most {_MOST}, got {value!r:.40}")
    return parsed


def _plain(kind: str, settings: dict[str, Any], num_classes: int, width: float) -> Any:
    num_sizes = _NUM_CONVOLUTIONS.get(kind, len(settings.keys() - {"dropout"}))
    sizes = [f"n{i}" for i in range(1, num_sizes + 1)]
    _check_keys(settings, needed=sizes, optional=["dropout"])
    network = models.MLP if kind == "mlp" else models.CNN
    options = {key: value for key, value in settings.items() if key not in sizes}
    make = partial(network, num_classes=num_classes, **options)
    asked_for = tuple(settings[size] for size in sizes)
    make(asked_for)  # checks the sizes before they are scaled
    return make(models.scale_width(asked_for, width))


def _residual(kind: str, settings: dict[str, Any], num_classes: int, width: float) -> Any:
    _check_keys(settings, needed=[], optional=["width", "norm"])
    return _RESNETS[kind](num_classes, **{**settings, "width": width * settings.get("width", 1.0)})


def _check_keys(settings: dict[str, Any], *, needed: Sequence[str], optional: Sequence[str]) -> None:
    if not set(needed) <= settings.keys() <= {*needed, *optional}:
        wanted = ", ".join([*needed, *(f"[{key}]" for key in optional)])
        raise ValueError(f"its settings must be {wanted}, got {', '.join(settings) or 'none'}")
