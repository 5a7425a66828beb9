"""Which client is computed on which device: large groups in equal parts, all others balanced by cost."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from fedmd_jax.checks import check_count, check_not_negative, told

Seat = tuple[str, int]  # a group, and the position of one of its clients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the clients of some groups are; hashable, since programs are compiled for it.

    A group with at least as many clients as there are devices is `stacked`: each device has as many of its clients, and
    the last ones may be padding. Clients of smaller groups sit in `rows`, one on each device, each with a network of
    its own; a row that is not full has empty seats.

    Attributes:
      num_devices: D.
      sizes: every group and its number of clients, K, by name.
      rows: for each device a client of a small group, or None.
    """

    num_devices: int
    sizes: tuple[tuple[str, int], ...]
    rows: tuple[tuple[Seat | None, ...], ...]

    @property
    def stacked(self) -> dict[str, int]:
        """The large groups and their numbers of clients, padding included: multiples of D."""
        d = self.num_devices
        return {name: -(-size // d) * d for name, size in self.sizes if size >= d}

    def seats(self, name: str) -> list[tuple[int, int]]:
        """Row and device of each client of a small group."""
        found = {
            seat[1]: (row, device)
            for row, seats in enumerate(self.rows)
            for device, seat in enumerate(seats)
            if seat is not None and seat[0] == name
        }
        return [found[position] for position in sorted(found)]


def place_clients(sizes: Mapping[str, int], num_devices: int, *, costs: Mapping[str, float] | None = None) -> Placement:
    """A place for every client.

    Args:
      sizes: clients of each group, K.
      num_devices: D.
      costs: of one client of each group, in any unit; all the same by default.

    Raises:
      ValueError: no device, a group without a cost, or a cost that is negative or not finite.

    >>> placement = place_clients({"a": 1, "b": 1, "c": 1, "many": 5}, 2, costs={"a": 1, "b": 5, "c": 2, "many": 1})
    >>> placement.rows
    ((('b', 0), ('c', 0)), (None, ('a', 0)))
    >>> placement.stacked
    {'many': 6}
    """
    check_count("num_devices", num_devices)
    costs = dict.fromkeys(sizes, 1.0) if costs is None else costs
    check_costs(costs, sizes)
    in_order = tuple(sorted(sizes.items()))  # as `jax.tree` sorts: the same inside and outside of a program
    clients = [(name, k) for name, size in in_order if size < num_devices for k in range(size)]
    shares = balance([costs[name] for name, _ in clients], num_devices)
    rows = tuple(
        tuple(clients[share[row]] if row < len(share) else None for share in shares)
        for row in range(max(map(len, shares)))
    )
    return Placement(num_devices=num_devices, sizes=in_order, rows=rows)


def check_costs(costs: Mapping[str, float], groups: Collection[str]) -> None:
    """A `ValueError` where a group has no cost, or one that is negative or not finite."""
    if not isinstance(costs, Mapping):
        raise ValueError(f"costs must be one for each group, got {told(costs)}")
    for name in groups:
        check_not_negative(f"group {name!r}: the cost of a client", costs.get(name))


def balance(costs: Sequence[float], num_devices: int) -> list[list[int]]:
    """Shares out jobs so that no device has much more to do than the others.

    The dearest first, each to the device that has least to do (then to the one with fewest jobs): at most 4/3 of the
    best possible maximum.

    Args:
      costs: of each job.
      num_devices: D.

    Returns:
      The jobs of each device, dearest first.

    References:
      Graham, Bounds on Multiprocessing Timing Anomalies, 1969: longest processing time first.

    >>> balance([1, 5, 2, 2], 2)
    [[1], [2, 3, 0]]
    """
    shares: list[list[int]] = [[] for _ in range(num_devices)]
    loads = [0.0] * num_devices
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        device = min(range(num_devices), key=lambda device: (loads[device], len(shares[device]), device))
        shares[device].append(job)
        loads[device] += costs[job]
    return shares
