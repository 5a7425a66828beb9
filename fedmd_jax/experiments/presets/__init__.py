"""The experiments that have a name: the quickstart, the paper's four and `letters-dirichlet`, one file each."""

from fedmd_jax.experiments.presets import (
    cifar_iid,
    cifar_superclass,
    letters_dirichlet,
    letters_iid,
    letters_writers,
    quickstart,
)
from fedmd_jax.experiments.settings import Experiment

EXPERIMENTS: dict[str, Experiment] = {"quickstart": quickstart.QUICKSTART}
for _module in (letters_iid, letters_writers, cifar_iid, cifar_superclass):
    _name = _module.__name__.rpartition(".")[2].replace("_", "-")
    EXPERIMENTS |= {_name: _module.PAPER, f"{_name}-released": _module.RELEASED, f"{_name}-tuned": _module.TUNED}
EXPERIMENTS["letters-dirichlet"] = letters_dirichlet.EXPERIMENT
