"""Several seeds in one program: each goes through the procedure in a thread of its own, and their calls meet.

A run asks for one program after the other. Where all runs wait, those that wait for the same program are computed at
once, as one call of it with everything stacked [S, ...]. So neither the procedure nor what is written of a run knows of
the others, and seeds may go on from different places: those that are ahead wait before the next phase.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedmd_jax.federation import PROGRAMS, Federation
from fedmd_jax.types import PrivateDataset

_SECONDS_BETWEEN_CHECKS = 0.2


class _Stopped(BaseException):
    """Ends the thread of a run, where another has failed or all were interrupted; a run catches `Exception`s only."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """What a run waits for."""

    run: int
    program: str
    fn: Callable[..., Any]
    arguments: tuple[tuple, dict]
    result: Future


class _Over(NamedTuple):
    """The thread of a run has ended."""

    error: BaseException | None


@dataclasses.dataclass
class _Stacked:
    """Arrays of several runs as one tree."""

    leaves: list[Any]
    tree: Any
    last_used: int = 0


class Meeting:
    """Where the calls of several runs meet.

    Where fewer runs than the size ask for a program one of them is computed several times, so that there is one program
    only, and the bits of a run do not depend on who else is there.

    Attributes:
      size: S, how many runs are computed at once; half of it when that has been too much for the memory of the device,
        which is another program, and changes results by rounding.

    >>> meeting = Meeting(2)
    >>> double = partial(meeting.call, "round", jax.jit(jax.vmap(lambda x: 2 * x)))
    >>> results = []
    >>> def run(x):
    ...     results.append(float(double(double(jnp.float32(x)))))
    >>> meeting.hold([partial(run, x) for x in (1, 10)])
    >>> sorted(results)
    [4.0, 40.0]
    """

    def __init__(self, size: int):
        self.size = size
        self._events: queue.SimpleQueue[_Call | _Over] = queue.SimpleQueue()
        self._here = threading.local()
        self._stacks: dict[tuple[int, ...], _Stacked] = {}
        self._num_computed = 0
        self._groups: list[str] = []

    def attend(self, federation: Federation) -> Federation:
        """The federation as the runs are to have it.

        Args:
          federation: whose programs take and give everything stacked, [S, ...].
        """
        self._groups = list(federation.groups)
        meet = {name: partial(self.call, name, getattr(federation, name)) for name in PROGRAMS}
        return dataclasses.replace(federation, **meet)

    def call(self, program: str, fn: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """What `fn` gives for this run, once all others wait, too; in the thread of a run.

        Args:
          program: its name in the federation.
          fn: of everything stacked.
          *args: of this run.
          **named: of this run.
        """
        call = _Call(self._here.run, program, fn, (args, named), Future())
        self._events.put(call)
        return call.result.result()

    def hold(
        self,
        runs: Sequence[Callable[[], Any]],
        *,
        held: Callable[[], AbstractContextManager] = nullcontext,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Returns when all runs are over.

        Args:
          runs: at least one; each calls programs through `call`.
          held: holds Ctrl-C back within its block.
          check: raises the Ctrl-C that has come.

        Raises:
          BaseException: what one of the runs, `check` or a program has raised; then no other run gets further than to
            its next program.
        """
        active, waiting, stop = len(runs), [], None
        threads = [threading.Thread(target=self._run, args=each, daemon=True) for each in enumerate(runs)]
        try:
            with held():
                for thread in threads:
                    thread.start()
            while active:
                try:
                    with held():
                        if stop is not None:
                            _dismiss(waiting)
                        event = self._next_event()
                        if isinstance(event, _Call):
                            waiting.append(event)
                        elif event is not None:
                            active -= 1
                            stop = stop or event.error
                    if stop is None:
                        check()
                        if waiting and len(waiting) == active:
                            self._compute(waiting, held)
                except BaseException as error:
                    stop = stop or error
            if stop is not None:
                raise stop
        finally:
            with held():  # whatever has come in between the blocks above, nobody stays behind
                started = [thread for thread in threads if thread.ident is not None]
                active -= len(threads) - len(started)
                while active:
                    _dismiss(waiting)
                    event = self._events.get()
                    waiting += [event] if isinstance(event, _Call) else []
                    active -= isinstance(event, _Over)
                for thread in started:
                    thread.join()
            self._stacks.clear()

    def _run(self, number: int, run: Callable[[], Any]) -> None:
        self._here.run, error = number, None
        try:
            run()
        except _Stopped:
            pass
        except BaseException as failed:
            error = failed
        self._events.put(_Over(error))

    def _next_event(self) -> _Call | _Over | None:
        try:
            return self._events.get(timeout=_SECONDS_BETWEEN_CHECKS)
        except queue.Empty:
            return None

    def _compute(self, waiting: list[_Call], held: Callable[[], AbstractContextManager]) -> None:
        """Those of the program that comes first in the procedure, and of the same shapes; they wait no longer."""
        first = min(waiting, key=self._place)
        calls = [call for call in waiting if (call.fn, _types(call)) == (first.fn, _types(first))]
        calls.sort(key=lambda call: call.run)  # each time the same arrays at the same place
        while calls:
            results = self._compute_at_once(calls)
            with held():
                for call, result in zip(calls, results, strict=False):
                    waiting.remove(call)
                    call.result.set_result(result)
            calls = calls[len(results) :]
        # What two programs in a row have not been given is not of these rounds any more.
        self._num_computed += 1
        self._stacks = {key: each for key, each in self._stacks.items() if self._num_computed - each.last_used < 3}

    def _place(self, call: _Call) -> tuple[int, int]:
        """In the procedure: programs in their order, and of `pretrain`, which may be of one group, groups in theirs."""
        states = call.arguments[0][0]
        names = states if isinstance(states, Mapping) else ()
        return PROGRAMS.index(call.program), min((self._groups.index(name) for name in names), default=0)

    def _compute_at_once(self, calls: Sequence[_Call]) -> list[Any]:
        """The results of the first of them, as many as the memory of the device allows."""
        while True:
            batch = [calls[min(place, len(calls) - 1)] for place in range(self.size)]
            try:
                args, named = self._stacked(batch)
                results = batch[0].fn(*args, **named)
                return _unstack(results, self.size)[: len(calls)]
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or self.size == 1:
                    raise
                self._stacks.clear()
                self.size = -(-self.size // 2)
                print(f"not enough memory for all seeds at once: {self.size} at a time", flush=True)

    def _stacked(self, batch: Sequence[_Call]) -> tuple[tuple, dict]:
        """The arguments of all; data that are given again and again are stacked once, states (the first) are others."""
        first, *others = zip(*(call.arguments[0] for call in batch), strict=True)
        named = _stack([call.arguments[1] for call in batch])
        return (_stack(list(first)), *(self._stacked_once(list(each)) for each in others)), named

    def _stacked_once(self, trees: list[Any]) -> Any:
        leaves = jax.tree.leaves(trees)
        key = tuple(map(id, leaves))  # of arrays that live as long as they are in here
        if key not in self._stacks:
            self._stacks[key] = _Stacked(leaves, _stack(trees))
        self._stacks[key].last_used = self._num_computed
        return self._stacks[key].tree


def pad_alike(data: Sequence[Any]) -> list[Any]:
    """The private datasets of several runs, padded to the same number of rows, which changes no number.

    Args:
      data: of each run the same tree, with datasets [N, ...] or stacked ones [K, N, ...] in it.

    >>> def dataset(n):
    ...     return PrivateDataset(jnp.zeros((n, 2)), jnp.zeros(n, int), jnp.int32(n))
    >>> [each["test"].inputs.shape for each in pad_alike([{"test": dataset(3)}, {"test": dataset(5)}])]
    [(5, 2), (5, 2)]
    """

    def pad(*datasets: PrivateDataset) -> list[PrivateDataset]:
        most = max(each.labels.shape[-1] for each in datasets)
        return [_pad_rows(each, most) for each in datasets]

    def is_dataset(node: Any) -> bool:
        return isinstance(node, PrivateDataset)

    leaves, trees = zip(*(jax.tree.flatten(tree, is_leaf=is_dataset) for tree in data), strict=True)
    padded = [pad(*datasets) for datasets in zip(*leaves, strict=True)]
    return [tree.unflatten(datasets) for tree, datasets in zip(trees, zip(*padded, strict=True), strict=True)]


def _pad_rows(dataset: PrivateDataset, num_rows: int) -> PrivateDataset:
    axis = dataset.labels.ndim - 1

    if dataset.labels.shape[axis] == num_rows:
        return dataset

    def pad(leaf):
        widths = [(0, num_rows - leaf.shape[axis] if place == axis else 0) for place in range(leaf.ndim)]
        return jnp.pad(leaf, widths, mode="edge")  # as `stack_private` does it

    return dataset._replace(inputs=pad(dataset.inputs), labels=pad(dataset.labels))


def _types(call: _Call) -> tuple:
    types = jax.tree.map(jax.typeof, call.arguments)
    return (*jax.tree.leaves(types), jax.tree.structure(types))


def _dismiss(waiting: list[_Call]) -> None:
    while waiting:
        waiting.pop().result.set_exception(_Stopped())


@jax.jit
def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@partial(jax.jit, static_argnums=1)
def _unstack(tree: Any, size: int) -> list[Any]:
    def take(place):
        return jax.tree.map(lambda leaf: leaf[place], tree)

    return [take(place) for place in range(size)]
