"""The authors' own numbers, replayed by the script that users run."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "reference_a.npz"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("reference_agreement", ROOT / "benchmarks" / "reference_agreement.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def replayed(script):
    """What comes out of the golden file; it takes its time."""
    return list(script.replayed(script.read(GOLDEN)))


@pytest.fixture
def once(script, replayed, monkeypatch):
    """For files that differ from the golden one in what is expected only."""
    monkeypatch.setattr(script, "replayed", lambda arrays: replayed)


@pytest.mark.usefixtures("once")
def test_we_agree_with_the_reference(script, capsys):
    assert script.main([str(GOLDEN), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert report["agrees"]
    assert set(script.TOLERANCES) <= set(stages)
    # What rounding cannot move much is held closer than the file's README asks.
    for stage in ("after_digest1/head", "after_digest1/bn", "after_revisit1/head"):
        assert stages[stage]["largest"] < 5e-5


@pytest.mark.usefixtures("once")
def test_a_deviation_is_told(script, tmp_path, capsys):
    arrays = dict(np.load(GOLDEN))
    for name in ("round1/scores", "round1/client1/revisit_loss"):
        arrays[name] = arrays[name] + 1e-2
    np.savez(tmp_path / "other.npz", **arrays)
    assert script.main([str(tmp_path / "other.npz")]) == 1
    out = capsys.readouterr().out
    assert out.count("TOO FAR") == 2
    assert "DOES NOT AGREE" in out


def test_what_is_not_such_a_file_is_refused(script, tmp_path, capsys):
    arrays = dict(np.load(GOLDEN))
    del arrays["round1/consensus"]
    np.savez(tmp_path / "incomplete.npz", **arrays)
    (tmp_path / "truncated.npz").write_bytes(GOLDEN.read_bytes()[:1000])
    for name in ("incomplete.npz", "truncated.npz", "missing.npz"):
        assert script.main([str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
