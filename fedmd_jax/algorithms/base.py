"""What an algorithm is: the record of functions that a federation and the command line need of it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.mapping.groups import Groups
from fedmd_jax.types import ClientState, FederationState, States


class Sizes(NamedTuple):
    """What decides how many bytes a client sends in a round.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> states = {"a": fmd.ClientState(jnp.zeros((2, 4, 3)), {}, (), ())}  # two clients, 12 parameters each
      >>> fmd.algorithms.Sizes(None, states, None, subset_size=10, num_classes=3).num_clients
      2
    """

    groups: Any  #: the architecture groups; None if only bytes of scores or parameters are wanted
    states: States  #: per group, stacked clients [K, ...], or their shapes
    inputs: Any  #: inputs [B, ...], or their shape
    subset_size: int
    num_classes: int

    @property
    def num_clients(self) -> int:
        """Number of clients of all groups."""
        return sum(jax.tree.leaves(state.params)[0].shape[0] for state in self.states.values())

    @property
    def network_bytes(self) -> float:
        """Bytes of the parameters and batch statistics of a network; the mean over the clients."""
        leaves = jax.tree.leaves([(state.params, state.model_state) for state in self.states.values()])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / self.num_clients


class Traffic(NamedTuple):
    """Bytes of one client in one round, float32 unless the algorithm says otherwise; the mean over the clients.

    Example:
      >>> import fedmd_jax as fmd
      >>> fmd.algorithms.Traffic(up=320_000, down=320_000)
      Traffic(up=320000, down=320000)
    """

    up: float  #: from a client to the server
    down: float  #: from the server to a client


def scores_traffic(sizes: Sizes) -> Traffic:
    """The bytes of an exchange of [M, C] floats in both directions, as in FedMD.

    Example:
      >>> import fedmd_jax as fmd
      >>> fmd.algorithms.scores_traffic(fmd.algorithms.Sizes(None, {}, None, subset_size=5000, num_classes=16))
      Traffic(up=320000, down=320000)
    """
    return Traffic(*2 * (4 * sizes.subset_size * sizes.num_classes,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """An algorithm, for `make_federation(groups, algorithm)`.

    Each member of the family is a function in a file of its own that returns one, such as `ds_fl(temperature=0.1)`. An
    algorithm whose clients send reports that the server averages is `exchange_algorithm(...)` of a few functions; see
    `exchange`.

    Attributes:
      name: as on the command line, such as "ds-fl".
      round: one round: `(states, public, private, key, *, groups, subset_size, digest_training, revisit_training,
        draw_subset, transforms, participants, clients_per_chunk, mesh, server) -> (states, RoundInfo)`, the arguments
        of `fedmd_round` and the architecture of the server model, or None. If the server remembers something, states
        are a `FederationState`.
      traffic: bytes of one client in one round, from `Sizes`.
      new_memory: `(groups, states, public) -> tree of arrays`, what the server remembers before the first round; None
        if it remembers nothing. The states are shapes of arrays, stacked clients [K, ...] per group.
      common_start: whether the clients of a group start from the same network, trained on the public dataset in the
        same way. Averages of parameters mean nothing otherwise.
      takes_server_model: whether the server may have a network of its own.
      check: `(groups, inputs [P, ...])`, raises ValueError for networks that the algorithm cannot use; called before
        anything is trained. None if it can use all.

    Example:
      >>> import fedmd_jax as fmd
      >>> fmd.algorithms.ds_fl(temperature=0.1).name
      'ds-fl'
    """

    name: str
    round: Callable
    traffic: Callable[[Sizes], Traffic]
    new_memory: Callable[[Groups, States, Any], chex.ArrayTree] | None = None
    common_start: bool = False
    takes_server_model: bool = False
    check: Callable[[Groups, Any], Any] | None = None


def split_states(states: States | FederationState) -> FederationState:
    """The states as a record, also if the server remembers nothing.

    >>> split_states({"a": None})
    FederationState(clients={'a': None}, memory=(), model=())
    """
    return states if isinstance(states, FederationState) else FederationState(states, (), ())


def join_states(clients: States, memory: chex.ArrayTree, model: ClientState | tuple) -> States | FederationState:
    """The inverse of `split_states`: the clients alone if there is nothing else.

    >>> join_states({"a": None}, (), ())
    {'a': None}
    """
    nothing = not jax.tree.leaves((memory, model))
    return clients if nothing else FederationState(clients, memory, model)


def with_names(groups: Groups) -> dict[str, Any]:
    """The groups, with (name, architecture) as architecture, for functions of one client that need the group's name.

    >>> from fedmd_jax.mapping.groups import ArchitectureGroup
    >>> with_names({"a": ArchitectureGroup("network", (0,))})["a"].architecture
    ('a', 'network')
    """
    named: dict[str, Any] = {name: (name, group.architecture) for name, group in groups.items()}
    return {name: dataclasses.replace(group, architecture=named[name]) for name, group in groups.items()}


def keep_unless(changed: chex.Array, new: chex.ArrayTree, old: chex.ArrayTree) -> chex.ArrayTree:
    """`new` if `changed`, [], else `old`: trees of arrays of the same shapes.

    >>> keep_unless(jnp.array(False), jnp.ones(2), jnp.zeros(2)).tolist()
    [0.0, 0.0]
    """
    return jax.tree.map(lambda leaf, before: jnp.where(changed, leaf, before), new, old)
