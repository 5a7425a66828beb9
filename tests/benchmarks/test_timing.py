"""Contenders, interleaving and JSON lines."""

import collections
import json

import pytest
import timing


def test_contenders_are_interleaved_in_their_own_processes():
    contenders = {"first": timing.Contender(collections.Counter, "aab"), "second": timing.Contender(dict)}
    try:
        assert contenders["first"]("most_common")[1] == [("a", 2), ("b", 1)]
        samples = timing.interleave(contenders, ["copy", "clear"], repeats=3)
        assert contenders["first"]("copy")[1] == {}
        assert contenders["first"]("peak_bytes")[1] > 1e6
    finally:
        for contender in contenders.values():
            contender.close()
    assert set(samples) == {"first", "second"}
    assert set(samples["second"]) == {"copy", "clear"}
    assert all(
        0 <= sample.low <= sample.median <= sample.high for found in samples.values() for sample in found.values()
    )


class Pair:
    """A subject that has contenders itself."""

    def __init__(self):
        self.parts = [timing.Contender(list, part) for part in ("ab", "c")]

    def lengths(self):
        for part in self.parts:
            part.begin("__len__")
        return [part.end("__len__")[1] for part in self.parts]

    def close(self):
        for part in self.parts:
            part.close()


def test_contenders_can_run_concurrently():
    pair = Pair()
    try:
        assert pair.lengths() == [2, 1]
    finally:
        pair.close()


def test_errors_in_a_contender_are_raised():
    with pytest.raises(RuntimeError, match="construction: ValueError: invalid literal"):
        timing.Contender(int, "x")
    contender = timing.Contender(list)
    with pytest.raises(RuntimeError, match="pop: IndexError"):
        contender("pop")
    contender.close()


def test_a_line_has_device_versions_and_commit(tmp_path):
    timing.append_json(None, {})
    for _ in range(2):
        timing.append_json(tmp_path / "lines.jsonl", {"benchmark": "toy", "python": "its own"})
    first, second = map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines())
    assert first == second
    assert {"device", "platform", "jax", "commit"} < set(first)
    assert first["python"] == "its own"
