"""A few cases of every target; `benchmarks/fuzz.py` tries ten thousand."""

import time

import pytest
from fuzzing import harness, odd
from fuzzing.harness import Target, TooSlow, UnclearError, fuzz, outcome
from fuzzing.targets import TARGETS
from hypothesis import strategies as st

from fedmd_jax.checks import check_count


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_case_ends_in_a_result_or_in_one_clear_line(target):
    assert fuzz(target, target.few, seed=0).cases > 0


def test_targets_have_names_of_their_own():
    assert len({target.name for target in TARGETS}) == len(TARGETS)


# The harness itself: what it must not take for a complaint.


def hang(_):
    while True:
        time.sleep(0.001)


def fill(_):
    return bytes(2**33)


def deep(_):
    int("x")


def two_lines(_):
    check_count("a\nb", 0)


def undocumented(_):
    check_count("a", 0)


@pytest.mark.parametrize(
    ("check", "errors", "kind"),
    [
        (hang, (ValueError,), TooSlow),
        (fill, (ValueError,), MemoryError),
        (deep, (ValueError,), UnclearError),
        (two_lines, (ValueError,), UnclearError),
        (undocumented, (Exception,), UnclearError),
        (undocumented, (), ValueError),
    ],
)
def test_what_is_no_complaint_fails(check, errors, kind, monkeypatch):
    monkeypatch.setattr(harness, "SECONDS", 0.1)
    with pytest.raises(kind):
        outcome(Target(name="bad", case=st.none(), check=check, errors=errors), None)


def test_edits_reach_every_part():
    assert odd.edited({"a": [1, {"b": 2}]}, [(4, ...)]) == {"a": [1, {}]}
    assert odd.edited({"a": [1]}, [(2, "x")]) == {"a": ["x"]}
    assert odd.edited({"a": [1]}, [(0, 7)]) == 7
    assert odd.damaged(b"abc", [("flip", 1, 0, b""), ("cut", 2, 0, b"")]) == b"ac"
