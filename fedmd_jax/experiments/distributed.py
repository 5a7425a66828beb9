"""A run in many processes: `jax.distributed` and Orbax on one shared folder; process 0 writes the run directory.

Each process runs the same program on the devices of all. If one ends, the others end with an error: a collective fails
at once, else the heartbeat notices within 30 seconds. `--resume` continues from the last checkpoint.
"""

import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from fedmd_jax.experiments.checkpoint import fingerprint
from fedmd_jax.experiments.errors import UsageError

_HEARTBEAT_SECONDS = 30


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process to the others.

    Args:
      coordinator: HOST:PORT of process 0. None on Slurm, TPU pods, Open MPI and Kubernetes, where JAX finds all three.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      UsageError: the processes do not find each other, or only some of the three are given.
    """
    by_hand = (coordinator, num_processes, process_id)
    if None in by_hand and by_hand != (None, None, None):
        raise UsageError("processes started by hand need all of --coordinator, --num-processes and --process-id")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the processes do not find each other: {error}") from error


def is_first() -> bool:
    """Whether this process writes the run directory and prints: process 0, or the only one."""
    return jax.process_index() == 0


def check_same(what: str, known: object) -> None:
    """A `UsageError` if the processes differ in JSON content that must be the same in all; a barrier, too."""
    words = np.frombuffer(bytes.fromhex(fingerprint(known)), np.uint8)
    if jax.process_count() > 1 and not (multihost_utils.process_allgather(words) == words).all():
        raise UsageError(f"{what} must be the same in all processes")


def preemption_requested(round_: int) -> bool:
    """Whether a process has received SIGTERM: True in all processes after the same round."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(round_)


def exit_now(code: int) -> None:
    """Ends this process at once, so that the others fail: a normal exit would wait for them, and they for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
