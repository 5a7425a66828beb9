"""Whole experiments: settings, the procedure, the run directory and its report."""

from fedmd_jax.experiments import cifar_iid, cifar_superclass, letters_iid, letters_writers
from fedmd_jax.experiments.quickstart import QUICKSTART
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.experiments.smoke import smoke

_PAPER = {
    "letters-iid": letters_iid,
    "letters-writers": letters_writers,
    "cifar-iid": cifar_iid,
    "cifar-superclass": cifar_superclass,
}
# The paper's, and under another name the released code's.
EXPERIMENTS: dict[str, Experiment] = {
    "quickstart": QUICKSTART,
    **{name: module.PAPER for name, module in _PAPER.items()},
    **{f"{name}-released": module.RELEASED for name, module in _PAPER.items()},
}

__all__ = ["EXPERIMENTS", "Experiment", "smoke"]
