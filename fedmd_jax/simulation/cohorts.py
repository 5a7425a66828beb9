"""Cohorts: sampling the clients of a round, and reading and writing their rows of stacked arrays."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedmd_jax.checks import as_array, check_clients, check_count, describe_value
from fedmd_jax.mapping.groups import Groups

CohortSize = int | Mapping[str, int]


class Cohort(NamedTuple):
    """The clients sampled for a round, per group [n].

    Example:
      >>> import jax, fedmd_jax as fmd
      >>> groups = {"a": fmd.ArchitectureGroup(None, client_ids=(5, 6), weights=(1.0, 2.0))}
      >>> cohort = fmd.simulation.draw_cohort(jax.random.key(0), groups, 2)  # both clients
      >>> cohort.rows["a"].tolist(), cohort.client_ids["a"].tolist(), cohort.weights["a"].tolist()
      ([0, 1], [5, 6], [1.0, 2.0])
    """

    rows: dict[str, np.ndarray]  #: their positions in the group
    client_ids: dict[str, np.ndarray]  #: their ids, uint32
    weights: dict[str, np.ndarray]  #: in the consensus; they need not sum to one


def cohort_of(groups: Groups, rows: Mapping[str, Sequence[int]]) -> Cohort:
    """The cohort of the clients at these rows of some or all groups."""
    positions = {name: np.asarray(those, dtype=np.int32) for name, those in rows.items()}

    def pick(of_group, dtype):
        return {
            name: np.asarray([of_group(groups[name])[k] for k in those], dtype) for name, those in positions.items()
        }

    return Cohort(
        positions, pick(lambda group: group.client_ids, np.uint32), pick(lambda group: group.weights, np.float32)
    )


def draw_cohort(key: chex.PRNGKey, groups: Groups, cohort_size: CohortSize) -> Cohort:
    """Draws the clients of one round without replacement, each client of a group with the same probability.

    The draw depends on the key and the client ids, not on the order of a group. Rows are in ascending order, so that a
    cohort of all clients keeps their order.

    Args:
      key: key of the round; it is consumed.
      groups: the architecture groups of the population.
      cohort_size: number of clients of all groups together, or per group; see `cohort_sizes`.

    Returns:
      The cohort, with the same number of clients of each group in every round.

    Raises:
      ValueError: the groups are too small for the size.

    References:
      Partial participation is not in Li and Wang 2019; the sampling is that of McMahan et al., 2017, Algorithm 1.

    Example:
      >>> import jax, fedmd_jax as fmd
      >>> groups = {"a": fmd.ArchitectureGroup(None, range(70)), "b": fmd.ArchitectureGroup(None, range(70, 100))}
      >>> cohort = fmd.simulation.draw_cohort(jax.random.key(0), groups, 10)
      >>> {name: len(set(ids.tolist())) for name, ids in cohort.client_ids.items()}
      {'a': 7, 'b': 3}
    """
    sizes = cohort_sizes(groups, cohort_size)
    return cohort_of(groups, {name: _draw_rows(key, group.client_ids, sizes[name]) for name, group in groups.items()})


def cohort_sizes(groups: Groups, cohort_size: CohortSize) -> dict[str, int]:
    """The number of clients of each group in a cohort. It is the same in all rounds, so that one program serves them.

    Args:
      groups: the architecture groups of the population.
      cohort_size: number of clients per group; or of all groups together, divided in proportion to their sizes with at
        least one client per group.

    Raises:
      ValueError: sizes for other groups, more clients than there are, or a group without any.

    Example:
      >>> import fedmd_jax as fmd
      >>> groups = {"a": fmd.ArchitectureGroup(None, range(70)), "b": fmd.ArchitectureGroup(None, range(70, 100))}
      >>> fmd.simulation.cohort_sizes(groups, 10)
      {'a': 7, 'b': 3}
    """
    if isinstance(cohort_size, Mapping):
        if set(cohort_size) != set(groups):
            found = describe_value(sorted(cohort_size, key=str))
            raise ValueError(f"a cohort size is needed for the groups {sorted(groups)}, got {found}")
        for name, group in groups.items():
            check_count(f"the cohort size of group {name!r}", cohort_size[name])
            if cohort_size[name] > group.num_clients:
                raise ValueError(f"group {name!r}: a cohort of {cohort_size[name]} clients of {group.num_clients}")
        return {name: int(cohort_size[name]) for name in groups}
    check_count("cohort_size", cohort_size)
    num_clients = sum(group.num_clients for group in groups.values())
    if not len(groups) <= cohort_size <= num_clients:
        raise ValueError(
            f"a cohort must have at least one client of each of the {len(groups)} groups and at most all "
            f"{num_clients} clients, got {cohort_size}"
        )
    sizes = dict.fromkeys(groups, 1)
    for _ in range(cohort_size - len(groups)):  # each place to the group with most clients per place; names break ties
        sizes[max(sizes, key=lambda name: (groups[name].num_clients / sizes[name], name))] += 1
    return sizes


def get_rows(tree: chex.ArrayTree, rows: chex.Array) -> chex.ArrayTree:
    """Copies these rows of a stacked tree.

    Args:
      tree: leaves [K, ...], NumPy arrays on the host or JAX arrays on the device.
      rows: [n], below K.

    Returns:
      Leaves [n, ...] of the same kind. Only these rows are read.

    Raises:
      ValueError: rows that are out of bounds or not integers.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> fmd.simulation.get_rows({"a": np.arange(10, 15)}, [1, 3])
      {'a': array([11, 13])}
    """
    rows = _check_rows(tree, rows)
    return jax.tree.map(lambda leaf: leaf[rows] if _is_numpy(leaf) else _gather(leaf, jnp.asarray(rows)), tree)


def set_rows(tree: chex.ArrayTree, rows: chex.Array, new: chex.ArrayTree) -> chex.ArrayTree:
    """Writes rows of a stacked tree in place.

    Args:
      tree: leaves [K, ...]. NumPy arrays are modified, JAX arrays are donated.
      rows: [n], below K, without repetition.
      new: leaves [n, ...], on the host or on the device.

    Returns:
      The updated tree.

    Raises:
      ValueError: rows that are out of bounds, not integers or repeated, or new leaves of another shape or kind of
        numbers.

    Example:
      >>> import jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> fmd.simulation.set_rows({"a": np.arange(10, 15)}, [1, 3], {"a": jnp.array([0, 1])})
      {'a': array([10,  0, 12,  1, 14])}
    """
    rows = _check_rows(tree, rows, unique=True)

    def put(leaf, new):
        wanted, found = (*rows.shape, *leaf.shape[1:]), getattr(new, "shape", None)
        if found != wanted or (_is_numpy(leaf) and not np.can_cast(new.dtype, leaf.dtype, "same_kind")):
            raise ValueError(f"clients of shape {wanted} and dtype {leaf.dtype} are wanted, got {describe_value(new)}")
        if not _is_numpy(leaf):
            return _scatter(leaf, jnp.asarray(rows), new)
        leaf[rows] = new
        return leaf

    return jax.tree.map(put, tree, new)


def _check_rows(tree, rows, *, unique=False):
    """Rows as an array, [n]. Out of bounds JAX would read another row and write none."""
    num_clients = check_clients("stacked clients", tree)
    rows = as_array("rows", rows)
    rows = rows.astype(np.int32) if rows.shape == (0,) else rows  # NumPy makes floats of an empty list
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ValueError(f"rows must be integers [n], got {describe_value(rows)}")
    if rows.size and num_clients is not None and not 0 <= rows.min() <= rows.max() < num_clients:
        raise ValueError(f"rows must be from 0 to {num_clients - 1}, got {describe_value(rows.tolist())}")
    if unique and len(np.unique(rows)) < len(rows):
        raise ValueError(f"no row may come twice, got {describe_value(rows.tolist())}")
    return rows


def _draw_rows(key, client_ids, size):
    ids = np.asarray(client_ids, dtype=np.uint32)
    bits = np.asarray(_bits_per_client(key, ids))
    return np.sort(np.lexsort((ids, bits))[:size])  # the id breaks ties


@jax.jit
def _bits_per_client(key, client_ids):
    return jax.vmap(lambda client_id: jax.random.bits(jax.random.fold_in(key, client_id)))(client_ids)


def _is_numpy(leaf):
    return isinstance(leaf, np.ndarray)


@jax.jit
def _gather(leaf, rows):
    return leaf.at[rows].get(mode="promise_in_bounds")


@partial(jax.jit, donate_argnums=0)
def _scatter(leaf, rows, new):
    return leaf.at[rows].set(new, mode="promise_in_bounds", unique_indices=True)
