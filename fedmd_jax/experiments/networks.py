"""Networks by name, for the command line and for files: `2conv:n1=8,n2=16,dropout=0.2`."""

from fedmd_jax.models import CNN, MLP, BatchNorm, GroupNorm, architecture_from_linen, head_l2, resnet8, resnet20
from fedmd_jax.types import Architecture

KINDS = ("2conv", "3conv", "4conv", "mlp", "resnet8", "resnet20")
_NORMS = {"batch": BatchNorm, "group": GroupNorm}


def architecture_from_name(
    name: str, num_classes: int, *, head_penalty: float = 0.0, dropout: float | None = None
) -> Architecture:
    """The architecture that a name describes.

    Args:
      name: a kind and its settings, `KIND:setting=value,...`. Kinds are `2conv`, `3conv`, `4conv` (the paper's; n1, n2,
        ... are filters), `mlp` (n1, ... are hidden units), `resnet8` and `resnet20` (width, norm=batch or group). All
        but the residual networks take `dropout`.
      num_classes: C.
      head_penalty: factor of the L2 penalty on the head.
      dropout: instead of the name's own.

    Returns:
      The architecture.

    Raises:
      ValueError: an unknown kind or setting, or a value that is none.

    >>> architecture = architecture_from_name("3conv:n1=4,n2=6,n3=8", 16)
    """
    kind, _, text = name.partition(":")
    if kind not in KINDS:
        raise ValueError(f"network {name!r}: the kind must be one of {', '.join(KINDS)}, got {kind!r}")
    try:
        settings = dict(_setting(item) for item in text.split(",") if item)
        if dropout is not None:
            settings["dropout"] = dropout
        module = _residual(kind, settings, num_classes) if "resnet" in kind else _plain(kind, settings, num_classes)
    except ValueError as error:
        raise ValueError(f"network {name!r}: {error}") from None
    return architecture_from_linen(module, penalty=head_l2(head_penalty))


def _setting(item):
    key, equals, value = item.partition("=")
    if not equals:
        raise ValueError(f"settings are written setting=value, got {item!r}")
    if key == "norm":
        if value not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {value!r}")
        return key, _NORMS[value]
    try:
        return key, int(value) if key.startswith("n") else float(value)
    except ValueError:
        raise ValueError(f"{key} must be a number, got {value!r}") from None


def _plain(kind, settings, num_classes):
    keys = [f"n{i}" for i in range(1, len(settings) + 1)]
    num_sizes = sum(key in settings for key in keys) if kind == "mlp" else int(kind[0])
    wanted = [f"n{i}" for i in range(1, num_sizes + 1)]
    _check_settings(settings, needed=wanted, known=[*wanted, "dropout"])
    sizes = tuple(settings[key] for key in wanted)
    network = MLP if kind == "mlp" else CNN
    return network(sizes, num_classes, **{"dropout": settings["dropout"]} if "dropout" in settings else {})


def _residual(kind, settings, num_classes):
    _check_settings(settings, needed=[], known=["width", "norm"])
    return (resnet8 if kind == "resnet8" else resnet20)(num_classes, **settings)


def _check_settings(settings, *, needed, known):
    missing, unknown = sorted(set(needed) - set(settings)), sorted(set(settings) - set(known))
    if missing or unknown:
        raise ValueError(f"settings must be of {', '.join(known)}: missing {missing}, unknown {unknown}")
