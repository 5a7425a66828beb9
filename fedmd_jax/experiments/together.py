"""A run in many processes: how they start, what process 0 decides for all, and how they end.

`start` makes this process one of several. Where it has not been called all functions do what one process does alone.
Process 0 reads and writes the run directory, and speaks; the others compute their clients.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import chex
import jax
import jaxlib
import numpy as np
import tyro

import fedmd_jax
from fedmd_jax.experiments.errors import UsageError
from fedmd_jax.experiments.relay import relay
from fedmd_jax.experiments.team import LOST_CODE, News, Team, TeamError, free_port, is_loopback, meet, split_address
from fedmd_jax.hints import one_line
from fedmd_jax.mapping import client_mesh, shard_clients
from fedmd_jax.processes import on_host

_PATIENCE = 5.0  # seconds to hear why arrays of other processes cannot be had
_HOW = "--coordinator HOST:PORT --num-processes N --process-id I"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """How this process finds the others of a run.

    Attributes:
      distributed: One of many processes of one run, on Slurm, a TPU pod, Open MPI or Kubernetes, where each finds out
        by itself which it is. The clients are spread over the devices of all; process 0 writes the results.
      coordinator: HOST:PORT of process 0, where processes that are started by hand find each other. Needs the next two.
      num_processes: How many there are; started by hand.
      process_id: Which one this is, from 0; started by hand.
      wait: Seconds to wait at the start for all to come.
    """

    distributed: tyro.conf.FlagCreatePairsOff[bool] = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    wait: float = 300.0

    def __post_init__(self):
        by_hand = (self.coordinator, self.num_processes, self.process_id)
        if by_hand != (None, None, None) and None in by_hand:
            raise ValueError(f"processes started by hand need all of {_HOW}")
        if self.coordinator is not None:
            split_address(self.coordinator)
            if self.num_processes < 1:
                raise ValueError(f"num_processes must be an integer of at least 1, got {self.num_processes}")
            if not 0 <= self.process_id < self.num_processes:
                raise ValueError(
                    f"process_id must be from 0 to {self.num_processes - 1}, for --num-processes "
                    f"{self.num_processes}, got {self.process_id}"
                )
        if not 0 < self.wait < 1e6:
            raise ValueError(f"wait must be positive and less than a million seconds, got {self.wait}")

    @property
    def wanted(self) -> bool:
        """Whether there are others at all."""
        return self.distributed or self.coordinator is not None

    def options(self) -> str:
        """What a process is started with again."""
        by_hand = ("coordinator", "num_processes", "process_id")
        given = {f"--{name.replace('_', '-')}": getattr(self, name) for name in by_hand}
        words = [str(word) for name, value in given.items() if value is not None for word in (name, value)]
        return shlex.join(["--distributed"] * self.distributed + words)


class _Now:
    """What is known of the others; there is one JAX in a process, and one of these."""

    team: Team | None = None
    options: str = ""  # what makes this process one of them
    hint: str = ""  # how to go on where this ends early
    reason: str = "was interrupted"  # why it does
    stopped: bool = False  # whether another was sent a signal


def start(processes: Processes, hand_over: Callable[[Callable[[int], None]], None]) -> None:
    """Waits for the others, and makes the devices of all known to JAX; does nothing where there are to be no others.

    Args:
      processes: where they are.
      hand_over: called, but in process 0, with what is to be called with the number of any signal from here on: that
        one stops for all.

    Raises:
      UsageError: nothing says which process this is, one is missing or does not belong here, or JAX is in use already.
    """
    if not processes.wanted:
        return
    from jax._src.xla_bridge import backends_are_initialized  # what `jax.distributed.initialize` asks, too late here

    if jax.distributed.is_initialized() or backends_are_initialized():
        raise UsageError("many processes must find each other before JAX is used, but it is in use in this process")
    address, num_processes, process_id, local_devices = _who(processes)
    versions = ", ".join(f"{each.__name__} {each.__version__}" for each in (fedmd_jax, jax, jaxlib))
    try:
        connections = meet(address, process_id, num_processes, seconds=processes.wait, known=versions)
    except TeamError as error:
        raise UsageError(str(error)) from error
    _Now.options, _Now.hint = processes.options(), ""
    _Now.team = Team(connections, process_id, num_processes, on_news=_end, on_signal=_stop)
    if process_id > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end of the process
        hand_over(_Now.team.signal)
    _initialize(address, num_processes, process_id, local_devices)


def _who(processes: Processes) -> tuple[str, int, int, list[int] | None]:
    """Address of process 0, number of processes, number of this one, and which local devices are its own."""
    if processes.coordinator is not None:
        return processes.coordinator, processes.num_processes, processes.process_id, None
    from jax._src.clusters import ClusterEnv  # what `jax.distributed.initialize` asks, who would not tell

    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(processes.wait))
    if None in found[:3]:
        raise UsageError(
            f"--distributed finds neither Slurm nor a TPU pod, Open MPI or Kubernetes here; by hand it is {_HOW}"
        )
    return found


def _initialize(address: str, num_processes: int, process_id: int, local_devices: list[int] | None) -> None:
    host, _ = split_address(address)
    port = tell(lambda: free_port(host))
    bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.distributed.initialize(
        bind if process_id == 0 else f"127.0.0.1:{relay(host, port)}",
        num_processes,
        process_id,
        local_device_ids=local_devices,
        cluster_detection_method="deactivate",
        coordinator_bind_address=bind if is_loopback(host) else None,
    )
    # Devices of CPUs find each other within half a minute, or never: now all are here. Later they wait for each other.
    on_host(shard_clients(np.arange(jax.device_count()), client_mesh()))


def is_first() -> bool:
    """Whether this process writes and speaks: process 0, or the only one."""
    return _Now.team is None or _Now.team.is_first


def are_many() -> bool:
    """Whether there are other processes."""
    return _Now.team is not None


def tell(find: Callable[[], Any]) -> Any:
    """What process 0 finds, which JSON knows, in all processes; the others do not look.

    >>> tell(lambda: (1, 2))
    (1, 2)
    """
    return find() if _Now.team is None else json.loads(_Now.team.tell(lambda: json.dumps(find()).encode()))


def tell_arrays(load: Callable[[], chex.ArrayTree], shapes: chex.ArrayTree) -> chex.ArrayTree:
    """Arrays that process 0 loads, in all processes.

    Args:
      load: gives them.
      shapes: of them, known to all.
    """
    if _Now.team is None:
        return load()

    def content() -> bytes:
        return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(load()))

    told, offset, leaves = _Now.team.tell(content), 0, []
    for shape in jax.tree.leaves(shapes):
        leaves.append(np.frombuffer(told, shape.dtype, shape.size, offset).reshape(shape.shape))
        offset += leaves[-1].nbytes
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def collect(value: Any) -> list[Any]:
    """What each process has, which JSON knows, by process, in all processes.

    >>> collect("mine")
    ['mine']
    """
    return [value] if _Now.team is None else _Now.team.collect(value)


def check_same(what: str, value: Any) -> None:
    """A `UsageError` where processes differ in what they must have in common; all of them raise it."""
    values = collect(value)
    for process_id, other in enumerate(values):
        if other != values[0]:
            raise UsageError(f"{what} must be the same in all processes, got another in process {process_id} than in 0")


def go_on_with(hint: str) -> None:
    """What to say where a process ends early.

    Args:
      hint: the command that goes on, without how the processes find each other.
    """
    _Now.hint = hint


def hint_options() -> str:
    """The options that make this process one of these, with a space before them; nothing where it is alone."""
    return f" {_Now.options}" if _Now.options else ""


def failed(reason: str) -> None:
    """Why this process is about to end early, for the others."""
    _Now.reason = f"has failed: {reason}"


def end_together(run: Callable[[], int]) -> int:
    """No process goes on when one has ended, and none ends well before all do.

    Args:
      run: calls `start`, where there are others; gives the exit code.

    Returns:
      The exit code. Where there are others, and it is not 0, or there is an exception, this process ends here.
    """
    try:
        code = run()
    except Exception as error:
        if _Now.team is None:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            threading.Event().wait(_PATIENCE)  # mostly another has ended, which is said and done elsewhere
        traceback.print_exc()
        failed(one_line(f"{type(error).__name__}: {error}", longest=200))
        code = 1
    if _Now.team is None:
        return code
    if code == 0:
        _Now.team.part()
        jax.distributed.shutdown()
        return 0
    _Now.team.leave(_Now.reason, code if code > 128 else LOST_CODE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a normal exit would wait for the others


def _end(news: News) -> None:
    """Another process has ended; so does this one, whatever it is doing."""
    team = _Now.team
    of = f" of {team.num_processes}" if team else ""  # none where it is still being made
    hint = f"; to go on, here and there: {_Now.hint}{hint_options()}" if _Now.hint else ""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        print(f"\nfedmd-jax: process {news.process}{of} {news.what}{hint}", file=sys.stderr, flush=True)
    os._exit(news.code)


def _stop(number: int) -> None:
    """As if process 0 had been sent the signal, once: a terminal sends Ctrl-C to all, who all pass it on."""
    if _Now.stopped:
        return
    _Now.stopped = True
    signal.pthread_kill(threading.main_thread().ident, number)
