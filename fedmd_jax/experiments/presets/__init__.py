"""The experiments that have a name: the quickstart and the paper's four, one file each."""

from fedmd_jax.experiments.presets import cifar_iid, cifar_superclass, letters_iid, letters_writers
from fedmd_jax.experiments.presets.quickstart import QUICKSTART
from fedmd_jax.experiments.settings import Experiment

_PAPER = {
    "letters-iid": letters_iid,
    "letters-writers": letters_writers,
    "cifar-iid": cifar_iid,
    "cifar-superclass": cifar_superclass,
}
# The paper's, and under other names the released code's, and what did best on validation data.
EXPERIMENTS: dict[str, Experiment] = {
    "quickstart": QUICKSTART,
    **{name: module.PAPER for name, module in _PAPER.items()},
    **{f"{name}-released": module.RELEASED for name, module in _PAPER.items()},
    "letters-iid-tuned": letters_iid.TUNED,
}

__all__ = ["EXPERIMENTS"]
