"""Partial participation: who takes part in a round, and how their rows leave and enter the stacks of everybody."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.checks import as_array, check_clients, check_count, told
from fedmd_jax.clients import Groups

CohortSize = int | Mapping[str, int]


class Cohort(NamedTuple):
    """Some of the clients, per group [n]: what a round wants to know of them beside their states and private data."""

    rows: dict[str, np.ndarray]  # where they are in their group
    client_ids: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]  # in the consensus, which divides them by their sum


def cohort_of(groups: Groups, rows: Mapping[str, Sequence[int]]) -> Cohort:
    """The clients at these rows, of all or of some of the groups."""
    rows = {name: np.asarray(those, dtype=np.int32) for name, those in rows.items()}

    def pick(of_group, dtype):
        return {name: np.asarray([of_group(groups[name])[k] for k in those], dtype) for name, those in rows.items()}

    return Cohort(rows, pick(lambda group: group.client_ids, np.uint32), pick(lambda group: group.weights, np.float32))


def draw_cohort(key: chex.PRNGKey, groups: Groups, cohort_size: CohortSize) -> Cohort:
    """Draws the clients of one round without repetition, those of a group equally likely.

    A client's luck hangs on the key and on its id, so the order of a group does not matter. Rows come in ascending
    order: a cohort of everybody is everybody as they are.

    Args:
      key: the round's; the key is consumed.
      groups: everybody.
      cohort_size: of all groups together or of each; see `cohort_sizes`.

    Returns:
      The cohort, as many clients of a group each time.

    Raises:
      ValueError: a size that the groups cannot give.

    References:
      Partial participation is not in Li and Wang 2019; the sampling is that of McMahan et al., 2017, Algorithm 1.
    """
    sizes = cohort_sizes(groups, cohort_size)
    return cohort_of(groups, {name: _draw_rows(key, group.client_ids, sizes[name]) for name, group in groups.items()})


def cohort_sizes(groups: Groups, cohort_size: CohortSize) -> dict[str, int]:
    """How many clients of each group take part in a round: the same in each, so that one program serves all rounds.

    Args:
      groups: everybody.
      cohort_size: for each group; or of all groups together, which share it by their sizes, at least one each.

    Raises:
      ValueError: sizes of other groups, or more clients than there are, or a group without any.

    >>> from fedmd_jax.clients import ArchitectureGroup
    >>> groups = {"a": ArchitectureGroup(None, range(70)), "b": ArchitectureGroup(None, range(70, 100))}
    >>> cohort_sizes(groups, 10)
    {'a': 7, 'b': 3}
    """
    if isinstance(cohort_size, Mapping):
        _check_sizes(groups, cohort_size)
        return {name: int(cohort_size[name]) for name in groups}
    check_count("cohort_size", cohort_size)
    num_clients = sum(group.num_clients for group in groups.values())
    if not len(groups) <= cohort_size <= num_clients:
        raise ValueError(
            f"a cohort must have at least one client of each of the {len(groups)} groups and at most all "
            f"{num_clients} clients, got {cohort_size}"
        )
    sizes = dict.fromkeys(groups, 1)
    for _ in range(cohort_size - len(groups)):  # each seat to the group with most clients per seat; names break ties
        sizes[max(sizes, key=lambda name: (groups[name].num_clients / sizes[name], name))] += 1
    return sizes


def take_clients(tree: chex.ArrayTree, rows: chex.Array) -> chex.ArrayTree:
    """The clients at these rows of a stacked tree, copied.

    Args:
      tree: leaves [K, ...], NumPy arrays on the host or JAX arrays on the device.
      rows: [n], below K.

    Returns:
      Leaves [n, ...] of the same kind: only these rows are read, whatever K is.

    Raises:
      ValueError: rows that are none.

    >>> take_clients({"a": np.arange(10, 15)}, [1, 3])
    {'a': array([11, 13])}
    """
    rows = _check_rows(tree, rows)
    return jax.tree.map(lambda leaf: leaf[rows] if _on_host(leaf) else _gather(leaf, jnp.asarray(rows)), tree)


def put_clients(tree: chex.ArrayTree, rows: chex.Array, new: chex.ArrayTree) -> chex.ArrayTree:
    """Puts clients back into a stacked tree, in place; the rows of all others are not touched.

    Args:
      tree: leaves [K, ...], written to where they are NumPy arrays, consumed (donated) where they are JAX arrays.
      rows: [n], below K, no row twice.
      new: leaves [n, ...], on the host or on the device.

    Returns:
      The tree to go on with.

    Raises:
      ValueError: rows that are none or come twice, or clients of another shape or kind of numbers.

    >>> put_clients({"a": np.arange(10, 15)}, [1, 3], {"a": jnp.array([0, 1])})
    {'a': array([10,  0, 12,  1, 14])}
    """
    rows = _check_rows(tree, rows, unique=True)

    def put(leaf, new):
        _check_new(leaf, rows, new)
        if not _on_host(leaf):
            return _scatter(leaf, jnp.asarray(rows), new)
        leaf[rows] = new
        return leaf

    return jax.tree.map(put, tree, new)


def _check_rows(tree, rows, *, unique=False):
    """Rows as an array, [n]: out of bounds JAX would read some other row, and write none."""
    num_clients = check_clients("stacked clients", tree)
    if isinstance(rows, jax.core.Tracer):
        return rows
    rows = as_array("rows", rows)
    rows = rows.astype(np.int32) if rows.shape == (0,) else rows  # of no list NumPy makes floats
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ValueError(f"rows must be integers [n], got {told(rows)}")
    if rows.size and num_clients is not None and not 0 <= rows.min() <= rows.max() < num_clients:
        raise ValueError(f"rows must be from 0 to {num_clients - 1}, got {told(rows.tolist())}")
    if unique and len(np.unique(rows)) < len(rows):
        raise ValueError(f"no row may come twice, got {told(rows.tolist())}")
    return rows


def _check_new(leaf, rows, new):
    wanted, found = (*rows.shape, *leaf.shape[1:]), getattr(new, "shape", None)
    if found != wanted or (_on_host(leaf) and not np.can_cast(new.dtype, leaf.dtype, "same_kind")):
        raise ValueError(f"clients of shape {wanted} and dtype {leaf.dtype} are wanted, got {told(new)}")


def _draw_rows(key, client_ids, size):
    ids = np.asarray(client_ids, dtype=np.uint32)
    luck = np.asarray(_luck(key, ids))
    return np.sort(np.lexsort((ids, luck))[:size])  # the id decides where two have the same luck


@jax.jit
def _luck(key, client_ids):
    return jax.vmap(lambda client_id: jax.random.bits(jax.random.fold_in(key, client_id)))(client_ids)


def _check_sizes(groups: Groups, sizes: Mapping[str, int]) -> None:
    if set(sizes) != set(groups):
        raise ValueError(f"a cohort size is needed for the groups {sorted(groups)}, got {told(sorted(sizes, key=str))}")
    for name, group in groups.items():
        check_count(f"the cohort size of group {name!r}", sizes[name])
        if sizes[name] > group.num_clients:
            raise ValueError(f"group {name!r}: a cohort of {sizes[name]} clients of {group.num_clients}")


def _on_host(leaf):
    return isinstance(leaf, np.ndarray)


@jax.jit
def _gather(leaf, rows):
    return leaf.at[rows].get(mode="promise_in_bounds")


@partial(jax.jit, donate_argnums=0)
def _scatter(leaf, rows, new):
    return leaf.at[rows].set(new, mode="promise_in_bounds", unique_indices=True)
