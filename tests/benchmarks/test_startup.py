"""Times of `startup.py`."""

import pytest
import startup


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [([], 0), ([(1, 2)], 1), ([(0, 2), (1, 3)], 3), ([(0, 4), (1, 2)], 4), ([(3, 4), (0, 1)], 2)],
)
def test_overlapping_times_count_once(intervals, expected):
    assert startup.covered(intervals) == expected
