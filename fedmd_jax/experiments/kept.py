"""The clients that a run keeps: for its later phases, and to go on after it was interrupted."""

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from fedmd_jax.checkpoint import CheckpointError, Checkpoints
from fedmd_jax.experiments import together
from fedmd_jax.experiments.run_directory import CHECKPOINTS, Record, writing
from fedmd_jax.federation import States
from fedmd_jax.hints import one_line
from fedmd_jax.processes import on_host

# What decides the bits of a run, and not what it is: another machine may differ in it.
LOCAL_PARTS = ("versions", "device", "devices", "xla_flags", "clients_at_once", "seeds_at_once")
# The phases after which, and within which, clients are kept.
PRETRAINED, TRANSFERRED, ROUNDS, LOCAL = PHASES = ("pretrained", "transferred", "rounds", "local")


class Kept(Protocol):
    """Clients by phase and round.

    The rounds of `pretrained` are groups, as many as are done with the public half; a phase without rounds has round 0.
    """

    def last(self, phase: str) -> int | None:
        """The last round of a phase of which clients are kept, None where there is none."""

    def save(
        self, phase: str, round_: int, states: States, *, score: float | None = None, note: Record | None = None
    ) -> None:
        """Keeps a copy, if it is worth it, with a note of what was found on the way."""

    def load(self, phase: str, shapes: States) -> States:
        """The clients of the last round of a phase, on whatever devices."""

    def note(self, phase: str) -> Record:
        """What was noted with them."""


class InMemory:
    """Keeps what later phases begin with on the device; nobody can go on from there."""

    def __init__(self, wanted: Collection[str]):
        """Keeps nothing yet.

        Args:
          wanted: the phases whose clients are asked for later, once each.
        """
        self._wanted, self._kept = wanted, {}

    def last(self, phase: str) -> int | None:
        """The last that was saved."""
        return self._kept[phase][0] if phase in self._kept else None

    def save(
        self, phase: str, round_: int, states: States, *, score: float | None = None, note: Record | None = None
    ) -> None:
        """Keeps what is wanted."""
        if phase in self._wanted:
            self._kept.pop(phase, None)  # before there is another copy
            self._kept[phase] = round_, jax.tree.map(jnp.copy, states)

    def load(self, phase: str, shapes: States) -> States:
        """Gives the copy away."""
        return self._kept.pop(phase)[1]

    def note(self, phase: str) -> Record:
        """Nothing that the run would not know."""
        return {}


class OnDisk:
    """Keeps clients in the run directory, with what is needed to go on from them.

    `transferred` is written once; of `rounds`, the last two and the best of those that were written stay, and of
    `pretrained` and `local` the last two.

    Attributes:
      continued: where the run went on with other versions or devices, in this order: the parts of the identity that
        are of the machine, and after which round. Kept with the clients, as what they have been through.
    """

    def __init__(
        self,
        path: pathlib.Path,
        identity: Record,
        *,
        every: int,
        num_rounds: int,
        position: Callable[[], Record],
        held: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        """Reads nothing yet.

        Args:
          path: of the run.
          identity: what decides the bits of this run, as JSON gives it back.
          every: rounds between checkpoints, at least 1.
          num_rounds: R; the last is always kept.
          position: how far the results are that go with the clients.
          held: within it a save is not interrupted.
        """
        self._folders = {phase: Checkpoints(path / CHECKPOINTS / phase) for phase in PHASES}
        self._identity, self._every, self._num_rounds = identity, every, num_rounds
        self._position, self._held = position, held
        self._before: Record | None = None  # the parts of the identity that are of the machine, of the last clients
        self.continued: list[Record] = []

    def check(self, shapes: States, *, ignored: Collection[str] = ()) -> Record | None:
        """Reads everything that there is.

        Args:
          shapes: of the clients.
          ignored: parts of the identity that may be others.

        Returns:
          The position of where the run goes on; None where that is the beginning.

        Raises:
          CheckpointError: a checkpoint is damaged, of another format, or of another run.
        """
        position = {}
        for phase, folder in self._folders.items():
            if (round_ := folder.latest) is None:
                continue
            try:
                folder.check(round_, shapes)
            except CheckpointError as error:
                earlier = folder.rounds[:-1] if phase in (ROUNDS, LOCAL) else []
                hint = f"; remove it to go on after round {earlier[-1]}" if earlier else "; remove it to do it again"
                raise CheckpointError(f"{error}{hint}") from error
            record = folder.record(round_)
            wanted, found = (_without(ignored, run) for run in (self._identity, record.get("run")))
            if different := difference(wanted, found):
                portable = (_without(LOCAL_PARTS, run) for run in (self._identity, record.get("run")))
                hint = "" if difference(*portable) else "; --elsewhere goes on to the same but for rounding"
                raise CheckpointError(
                    one_line(f"the checkpoint {folder.path / str(round_)} is of another run: {different}{hint}")
                )
            if not _is_position(record.get("position")):
                raise CheckpointError(f"the checkpoint {folder.path / str(round_)} does not say where its run was")
            # Where the last round's is removed by hand, the control may be ahead of it.
            position |= {k: v for k, v in record["position"].items() if phase != LOCAL or k != "num_bytes"}
            self._before, self.continued = _of_machine(record["run"]), list(record.get("continued", []))
        return position or None

    def go_on(self, num_rounds_done: int | None) -> None:
        """Notes where the run goes on, if that is not where the clients that `check` has found were kept.

        Args:
          num_rounds_done: None before round 0.
        """
        here = _of_machine(self._identity)
        if self._before not in (None, here):
            self.continued.append({"after_round": num_rounds_done, **here})

    def last(self, phase: str) -> int | None:
        """The last that is on disk."""
        self._wait(phase)
        return self._folders[phase].latest

    def save(
        self, phase: str, round_: int, states: States, *, score: float | None = None, note: Record | None = None
    ) -> None:
        """Begins to write; not a round that is none of every so many, nor one that would have to wait for another.

        Raises:
          WriteError: the clients before could not be written.
        """
        if not self.is_due(phase, round_):
            return
        folder = self._folders[phase]
        record = {"run": self._identity, "phase": phase, "position": self._position(), "note": note or {}}
        if self.continued:
            record["continued"] = self.continued
        with self._held(), writing():
            for other in self._folders.values():
                if other is not folder:
                    other.wait()  # what is on disk of a phase says that those before are
            folder.save(round_, states, score=score, record=record)

    def is_due(self, phase: str, round_: int) -> bool:
        """Whether these clients are written, if they are given now."""
        optional = phase in (ROUNDS, LOCAL) and round_ < self._num_rounds
        return not (optional and (round_ % self._every or self._folders[phase].busy))

    def load(self, phase: str, shapes: States) -> States:
        """The last that is on disk."""
        round_ = self.last(phase)
        return self._folders[phase].load(round_, shapes)

    def note(self, phase: str) -> Record:
        """What was noted with the last that is on disk."""
        return self._folders[phase].record(self.last(phase))["note"]

    def close(self) -> None:
        """Returns when everything is on disk; `WriteError` where that has failed."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(writing())
            for folder in self._folders.values():
                stack.callback(folder.close)

    def finish(self) -> None:
        """Removes what only a run that goes on needs: of a finished one the last rounds and the best stay."""
        for phase in (PRETRAINED, TRANSFERRED, LOCAL):
            shutil.rmtree(self._folders[phase].path, ignore_errors=True)

    def _wait(self, phase: str) -> None:
        with writing():
            self._folders[phase].wait()


class OfFirst:
    """What process 0 keeps on disk, in all processes: all of them go on from there, and all give it what is kept."""

    def __init__(self, kept: OnDisk | None):
        """Asks nothing yet.

        Args:
          kept: in process 0; None in the others.
        """
        self._kept = kept

    @property
    def continued(self) -> list[Record]:
        """Where the run went on, as process 0 has it, which alone writes it down."""
        return [] if self._kept is None else self._kept.continued

    def last(self, phase: str) -> int | None:
        """The last that is on disk."""
        return together.tell(lambda: self._kept.last(phase))

    def save(
        self, phase: str, round_: int, states: States, *, score: float | None = None, note: Record | None = None
    ) -> None:
        """Begins to write what `OnDisk` would."""
        if together.tell(lambda: self._kept.is_due(phase, round_)):
            states = on_host(states)
            if self._kept is not None:
                self._kept.save(phase, round_, states, score=score, note=note)

    def load(self, phase: str, shapes: States) -> States:
        """The last that is on disk."""
        return together.tell_arrays(lambda: self._kept.load(phase, shapes), shapes)

    def note(self, phase: str) -> Record:
        """What was noted with the last that is on disk."""
        return together.tell(lambda: self._kept.note(phase))

    def close(self) -> None:
        """Returns when everything is on disk."""
        if self._kept is not None:
            self._kept.close()

    def finish(self) -> None:
        """Removes what only a run that goes on needs."""
        if self._kept is not None:
            self._kept.finish()


def _is_position(position: Any) -> bool:
    """Bytes of results and seconds by phase, as `session` notes them."""
    if not isinstance(position, dict) or not isinstance(position.get("seconds"), dict):
        return False
    seconds = position["seconds"].values()
    num_bytes = position.get("num_bytes")
    return type(num_bytes) is int and num_bytes >= 0 and all(type(part) in (int, float) for part in seconds)


def difference(wanted: Any, found: Any, where: str = "") -> str | None:
    """The first thing in which two trees of dictionaries differ, in words; None where there is none.

    >>> difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    'a.c is 3 there, 2 here'
    """
    if not (isinstance(wanted, dict) and isinstance(found, dict)):
        return None if wanted == found else f"{where or 'it'} is {found!r:.80} there, {wanted!r:.80} here"
    for key in {**wanted, **found}:
        place = f"{where}.{key}" if where else key
        if key not in found or key not in wanted:
            return f"{place} is known {'here' if key in wanted else 'there'} only"
        if told := difference(wanted[key], found[key], place):
            return told
    return None


def _of_machine(run: Record) -> Record:
    return {part: run.get(part) for part in LOCAL_PARTS}


def _without(ignored: Collection[str], run: Any) -> Any:
    return {key: part for key, part in run.items() if key not in ignored} if isinstance(run, dict) else run
