"""Operation counts of `round_time.py`, and missing peers."""

import importlib.util

import pytest
import round_time

from fedmd_jax.models import TABLE_1, paper_cnn


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (0, 2 * (28 * 28 * 9 * 128 + 13 * 13 * 9 * 128 * 256 + 13 * 13 * 256 * 16)),
        (5, 2 * (28 * 28 * 9 * 64 + 14 * 14 * 4 * 64 * 128 + 3 * 3 * 9 * 128 * 256 + 3 * 3 * 256 * 16)),
    ],
)
def test_operations_of_an_image(row, expected):
    assert round_time.forward_flops(paper_cnn(TABLE_1[row])) == expected


def test_a_round_is_scoring_digest_and_revisit():
    work = round_time.Work(networks=(0, 5), num_public=100, digest=(2, 8))
    flops = round_time.work_flops(work)
    assert flops["digest"] == pytest.approx(6 * flops["score"])
    assert flops["round"] == pytest.approx(flops["score"] + flops["digest"] + flops["revisit"])


def test_a_peer_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install keras"):
        round_time.main(["--against", "keras"])
