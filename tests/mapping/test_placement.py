import itertools

import pytest
from hypothesis import given, settings, strategies as st

from fedmd_jax.mapping.packing import balance, place_clients

SIZES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 9), min_size=1)


@given(SIZES, st.integers(1, 6), st.lists(st.floats(0, 100), min_size=8, max_size=8))
@settings(max_examples=100, deadline=None)
def test_every_client_has_one_place(sizes, num_devices, costs):
    placement = place_clients(sizes, num_devices, costs=dict(zip("abcdefgh", costs, strict=True)))
    assert dict(placement.sizes) == sizes
    for name, padded in placement.stacked.items():
        assert padded % num_devices == 0
        assert num_devices <= sizes[name] <= padded < sizes[name] + num_devices
    slots = [slot for row in placement.device_rows for slot in row if slot is not None]
    small = {name: size for name, size in sizes.items() if name not in placement.stacked}
    assert sorted(slots) == [(name, k) for name in sorted(small) for k in range(small[name])]
    assert all(len(row) == num_devices and any(row) for row in placement.device_rows)
    for name, size in small.items():
        assert [placement.device_rows[row][device] for row, device in placement.slots(name)] == [
            (name, k) for k in range(size)
        ]


@given(SIZES, st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_the_order_of_groups_does_not_matter(sizes, num_devices):
    """A program sees them sorted, its caller as they were given."""
    assert place_clients(sizes, num_devices) == place_clients(dict(reversed(sizes.items())), num_devices)


@given(st.lists(st.integers(1, 20), max_size=7), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_no_device_has_much_more_to_do_than_it_must(costs, num_devices):
    """The bound of Graham, 4/3 - 1/3D, against all ways to share out the jobs."""
    shares = balance(costs, num_devices)
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
    assert all(costs[first] >= costs[second] for share in shares for first, second in itertools.pairwise(share))

    def longest(shares):
        return max(sum(costs[job] for job in share) for share in shares)

    ways = itertools.product(range(num_devices), repeat=len(costs))
    best = min(
        longest([[j for j, d in enumerate(way) if d == device] for device in range(num_devices)]) for way in ways
    )
    assert longest(shares) <= best * (4 / 3 - 1 / (3 * num_devices)) + 1e-9


@pytest.mark.parametrize(
    ("num_devices", "costs", "message"),
    [
        (0, None, "num_devices must be an integer of at least 1, got 0"),
        (2, {"a": 1.0}, "group 'b': the cost of a client must be finite and not negative, got None"),
        (2, {"a": 1.0, "b": float("nan")}, "group 'b': the cost of a client must be .* got nan"),
        (2, {"a": -1.0, "b": 1.0}, "group 'a': the cost of a client must be .* got -1.0"),
    ],
)
def test_what_cannot_be_placed_is_refused(num_devices, costs, message):
    with pytest.raises(ValueError, match=message):
        place_clients({"a": 1, "b": 3}, num_devices, costs=costs)
