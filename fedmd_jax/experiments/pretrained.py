"""Clients kept after the public half of transfer learning, for every run that has some that begin in the same way.

That half is most of the work of an experiment, and the same for all that is varied after it: losses, epochs, subsets,
weights, even private data. Each group of clients is kept on its own, since they know nothing of each other yet.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import numpy as np

from fedmd_jax.checkpoint import load_tree, save_tree
from fedmd_jax.experiments import together
from fedmd_jax.experiments.run_directory import origin, writing
from fedmd_jax.processes import on_host
from fedmd_jax.types import ClientState


class Pretrained(NamedTuple):
    """Where the clients of a group are kept, whether or not they are there."""

    path: pathlib.Path
    found: bool  # whether they were there when the run began, of many processes where process 0 is

    def load(self, shapes: ClientState) -> ClientState:
        """The clients, stacked, of these shapes."""
        return load_tree(self.path, shapes)

    def save(self, states: ClientState) -> None:
        """Keeps the clients, of many processes in the first; `WriteError` where that cannot be."""
        states = on_host(states)
        if not together.is_first() or self.path.is_dir():  # another run may have been faster, and a third may read it
            return
        with writing("cannot keep pretrained clients"):
            try:
                save_tree(self.path, states)
            except OSError:
                if not self.path.is_dir():
                    raise


def places(folder: pathlib.Path, settings: Mapping[str, object], data: chex.ArrayTree) -> dict[str, Pretrained]:
    """Where clients are kept that come of these settings and data with these versions on this device.

    Args:
      folder: of all that is kept.
      settings: per group everything that decides its clients, as JSON and dataclasses know it.
      data: the arrays that all see.
    """
    seen = fingerprint({name: origin()[name] for name in ("versions", "device")}, data)
    paths = {name: folder / fingerprint({"settings": of_it, "seen": seen}, ()) for name, of_it in settings.items()}
    found = together.tell(lambda: {name: path.is_dir() for name, path in paths.items()})
    return {name: Pretrained(path, found[name]) for name, path in paths.items()}


def fingerprint(known: object, data: chex.ArrayTree) -> str:
    """A name that no other content has.

    Args:
      known: what JSON and dataclasses know.
      data: arrays.
    """
    text = json.dumps(known, default=dataclasses.asdict, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for leaf in jax.tree.leaves(data):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(array.data)
    return digest.hexdigest()
