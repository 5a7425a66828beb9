"""Agreement with the numbers of the authors' code, by the benchmark script."""

import json
import pathlib

import numpy as np
import pytest
import reference_agreement as script

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "reference_a.npz"


@pytest.fixture(scope="module")
def replayed():
    """All computed values; shared, since they take long."""
    return list(script.replayed(script.read(GOLDEN)))


@pytest.fixture
def once(replayed, monkeypatch):
    """Reuses the computed values for files with other expected values."""
    monkeypatch.setattr(script, "replayed", lambda arrays: replayed)


@pytest.mark.usefixtures("once")
def test_the_library_agrees_with_the_reference(capsys):
    assert script.main([str(GOLDEN), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert report["agrees"]
    assert set(script.TOLERANCES) <= set(stages)
    # Tighter than the README of the file, since rounding changes these little.
    for stage in ("after_digest1/head", "after_digest1/bn", "after_revisit1/head"):
        assert stages[stage]["largest"] < 5e-5


@pytest.mark.usefixtures("once")
def test_a_deviation_is_reported(tmp_path, capsys):
    arrays = dict(np.load(GOLDEN))
    for name in ("round1/scores", "round1/client1/revisit_loss"):
        arrays[name] = arrays[name] + 1e-2
    np.savez(tmp_path / "other.npz", **arrays)
    assert script.main([str(tmp_path / "other.npz")]) == 1
    out = capsys.readouterr().out
    assert out.count("TOO FAR") == 2
    assert "DOES NOT AGREE" in out


def test_other_files_are_refused(tmp_path, capsys):
    arrays = dict(np.load(GOLDEN))
    del arrays["round1/consensus"]
    np.savez(tmp_path / "incomplete.npz", **arrays)
    (tmp_path / "truncated.npz").write_bytes(GOLDEN.read_bytes()[:1000])
    for name in ("incomplete.npz", "truncated.npz", "missing.npz"):
        assert script.main([str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
