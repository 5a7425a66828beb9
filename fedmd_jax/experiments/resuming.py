"""What an interrupted run says of itself, and whether the same bits can come of it here."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shlex
import types
import typing
from typing import Any, Literal, NamedTuple, TypeVar

import jax

from fedmd_jax.experiments import run_directory as files
from fedmd_jax.experiments import together
from fedmd_jax.experiments.errors import UsageError
from fedmd_jax.experiments.kept import difference
from fedmd_jax.experiments.prepared import Prepared, clients_at_once
from fedmd_jax.experiments.pretrained import fingerprint
from fedmd_jax.experiments.run_directory import Record, RunDirectoryError
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.hints import one_line

Settings = TypeVar("Settings")
USAGE = "run --resume DIR [--elsewhere] wants the directory of an interrupted run, and takes all settings from there"


class Interrupted(NamedTuple):
    """A run, or a run of several seeds, as its directory has it."""

    path: pathlib.Path
    name: str
    experiment: Experiment  # of the first seed
    command: str
    num_seeds: int | None
    elsewhere: bool  # it may go on with other versions and on other devices, to the same results but for rounding


def find(argv: list[str]) -> Interrupted:
    """The run of `--resume DIR [--seeds N] [--elsewhere]`.

    Args:
      argv: all options.

    Raises:
      UsageError: another option.
      RunDirectoryError: no run, a damaged one, or, but with `--elsewhere`, one of other versions or devices.
    """
    given, num_seeds, elsewhere = _options(argv)
    path = pathlib.Path(os.path.normpath(os.path.expanduser(given)))
    files.check_path(path)
    first = _first_seed(path)
    if first is None and num_seeds is not None:
        raise UsageError(f"--seeds is of a directory of several seeds, but {path} has none")
    config = files.read_config(first or path)
    here = json.loads(json.dumps(files.origin()))
    for part in () if elsewhere else ("versions", "device"):
        if told := difference(here[part], config[part], part):
            hint = "--elsewhere goes on to results that are the same but for rounding"
            raise RunDirectoryError(one_line(f"cannot go on in {path} with the same bits: {told}; {hint}"))
    try:
        experiment = settings_from(Experiment, config["settings"])
    except ValueError as error:
        raise RunDirectoryError(one_line(f"cannot read {(first or path) / files.CONFIG}: {error}")) from error
    if elsewhere:
        experiment = _of_this_machine(experiment)
    if first is not None and num_seeds is None:
        num_seeds = _num_seeds(config["command"])
    return Interrupted(path, config["experiment"], experiment, config["command"], num_seeds, elsewhere)


def find_together(argv: list[str]) -> Interrupted:
    """What `find` finds, in all processes; process 0 looks for it. The data may be in another folder elsewhere."""

    def record() -> list:
        found = find(argv)
        return [str(found.path), found.name, dataclasses.asdict(found.experiment), *found[3:]]

    if not together.are_many():
        return find(argv)
    path, name, settings, *others = together.tell(record)
    experiment = settings_from(Experiment, settings)
    data = dataclasses.replace(experiment.data, data_dir=_if_there(experiment.data.data_dir))
    return Interrupted(pathlib.Path(path), name, dataclasses.replace(experiment, data=data), *others)


def _of_this_machine(experiment: Experiment) -> Experiment:
    """The same with as many devices as there are, at most, and without folders that are not there."""
    devices = experiment.devices
    if isinstance(devices, int) and devices > jax.device_count():
        devices = "all"
    data = dataclasses.replace(experiment.data, data_dir=_if_there(experiment.data.data_dir))
    kept = _if_there(experiment.pretrained_dir)
    return dataclasses.replace(experiment, devices=devices, seeds_at_once=None, data=data, pretrained_dir=kept)


def _if_there(folder: str | None) -> str | None:
    return folder if folder is not None and pathlib.Path(folder).expanduser().is_dir() else None


def settings_from(kind: type[Settings], content: Any, where: str = "settings") -> Settings:
    """The inverse of `dataclasses.asdict`, after JSON.

    Args:
      kind: a dataclass of settings.
      content: of a file.
      where: how messages name it.

    Raises:
      ValueError: a setting that is unknown, missing, of another type, or that its class refuses.

    >>> from fedmd_jax.experiments.settings import Phase
    >>> settings_from(Phase, {**dataclasses.asdict(Phase(num_epochs=1, batch_size=2)), "num_epochs": "x"})
    Traceback (most recent call last):
    ValueError: settings.num_epochs must be of type int, got 'x'
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be settings by name, got {content!r:.40}")
    known = typing.get_type_hints(kind)
    for names, problem in ((content.keys() - known, "unknown"), (known.keys() - content, "missing")):
        if names:
            raise ValueError(f"{where}.{min(names)} is {problem}")
    return kind(**{name: _value(known[name], content[name], f"{where}.{name}") for name in known})


def _value(kind: Any, value: Any, where: str) -> Any:
    """A value as a setting of this type; a number without a point will do for a float."""
    if dataclasses.is_dataclass(kind):
        return settings_from(kind, value, where)
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        *others, last = [option for option in options if option is not type(None)]
        for option in others:
            with contextlib.suppress(ValueError):
                return _value(option, value, where)
        return _value(last, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(options[0], item, f"{where}[{place}]") for place, item in enumerate(value))
    if origin is Literal and value in options:
        return value
    if isinstance(kind, type) and type(value) in ((int, float) if kind is float else (kind,)):
        return value
    raise ValueError(f"{where} must be of type {getattr(kind, '__name__', kind)}, got {value!r:.40}")


def identity(prepared: Prepared) -> Record:
    """What decides the bits of a run, as JSON gives it back; of many processes all put together what they know."""
    settings = dataclasses.asdict(prepared.experiment)
    del settings["checkpoint_every"], settings["pretrained_dir"], settings["data"]["data_dir"]  # decide no bit
    origin, groups = files.origin(), prepared.federation.groups
    # What is held out and what is pooled follow from these and the settings.
    data = (prepared.datasets.public, prepared.datasets.test)
    own = {str(client_id): fingerprint(None, examples) for client_id, examples in prepared.datasets.private.items()}
    private = {client_id: known for part in together.collect(own) for client_id, known in part.items()}
    known = {
        "devices": settings.pop("devices"),
        "seeds_at_once": settings.pop("seeds_at_once") or 1,
        "settings": settings,
        "groups": {name: group.client_ids for name, group in groups.items()},
        "clients_at_once": clients_at_once(prepared),
        "versions": origin["versions"],
        "device": origin["device"],
        "xla_flags": origin["environment"].get("XLA_FLAGS"),
        "data": fingerprint(private, data),
    }
    return json.loads(json.dumps(known))


def _options(argv: list[str]) -> tuple[str, int | None, bool]:
    """DIR, N and a flag of `--resume DIR --seeds N --elsewhere`, in any order, also with equals signs."""
    elsewhere, argv = "--elsewhere" in argv, [word for word in argv if word != "--elsewhere"]
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    given = dict(zip(words[::2], words[1::2], strict=False))
    if len(words) % 2 or len(given) * 2 < len(words) or not given.keys() <= {"--resume", "--seeds"}:
        raise UsageError(f"{USAGE}; got {shlex.join(argv)}")
    num_seeds = given.get("--seeds")
    if num_seeds is not None and not re.fullmatch("[1-9][0-9]{0,8}", num_seeds):
        raise UsageError(f"seeds must be an integer of at least 1, got {num_seeds}")
    return given["--resume"], None if num_seeds is None else int(num_seeds), elsewhere


def _first_seed(path: pathlib.Path) -> pathlib.Path | None:
    """The directory of the first of several seeds; None where it is one run."""
    if (path / files.CONFIG).exists() or not path.is_dir():
        return None
    seeds = {int(entry.name[4:]): entry for entry in path.iterdir() if re.fullmatch("seed[0-9]+", entry.name)}
    return seeds[min(seeds)] if seeds else None


def _num_seeds(command: str) -> int:
    """How many there were to be; a run with seeds has been told so."""
    found = re.search(r" --seeds[ =]([0-9]{1,9})(?![0-9])", command)
    if found is None:
        raise UsageError(f"how many seeds are wanted? fedmd-jax run --resume DIR --seeds N (it was {command})")
    return int(found[1])
