"""Events of TensorBoard are read back; Weights & Biases runs offline."""

import sys

import events
import pytest

import fedmd_jax as fmd
from fedmd_jax.simulation import ClientMetrics, RoundMetrics


def after(round_):
    losses = (None, None) if round_ == 0 else (0.5, 0.25)
    clients = (ClientMetrics(i, "cnn", 0.25 * i + round_ / 8, *losses) for i in range(2))
    return RoundMetrics(round_, tuple(clients), digested=True)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    for rounds in (range(2), range(2, 3)):  # the second continues the first
        with fmd.loggers.TensorBoard(tmp_path, first_round=rounds[0]) as logger:
            for round_ in rounds:
                logger(after(round_), {})
    found, whole = events.scalars(tmp_path), {"client_0", "client_1", "mean"}
    names = {f"{what}/{of}" for what in ("accuracy", "digest_loss", "revisit_loss") for of in whole}
    assert {name: set(steps) for name, steps in found.items()} == {
        name: {0, 1, 2} if name.startswith("accuracy") else {1, 2} for name in names
    }
    assert found["accuracy/mean"] == {0: 0.125, 1: 0.25, 2: 0.375}
    assert found["digest_loss/client_1"] == {1: 0.5, 2: 0.5}


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    with fmd.loggers.WandB(tmp_path / "seed0", project="p") as first, fmd.loggers.WandB(tmp_path / "seed1") as second:
        first(after(0))
        second(after(0))
    with fmd.loggers.WandB(tmp_path / "seed0") as continued:
        continued(after(1))
    runs = {seed: sorted((tmp_path / seed / "wandb").glob("offline-run-*/run-*.wandb")) for seed in ("seed0", "seed1")}
    ids = {seed: {file.stem for file in files} for seed, files in runs.items()}
    assert [len(ids["seed0"]), len(ids["seed1"])] == [1, 1]  # one run each, the first in two parts
    assert ids["seed0"] != ids["seed1"]


@pytest.mark.parametrize("logger", [fmd.loggers.TensorBoard, fmd.loggers.WandB])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, logger):
    monkeypatch.setitem(sys.modules, logger.package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{logger.package}: pip install 'fedmd_jax\[{logger.extra}\]'"):
        logger(tmp_path)
