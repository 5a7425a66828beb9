"""Whole experiments: settings, the procedure, the run directory and its report."""

from fedmd_jax.experiments.quickstart import QUICKSTART
from fedmd_jax.experiments.settings import Experiment

EXPERIMENTS: dict[str, Experiment] = {"quickstart": QUICKSTART}

__all__ = ["EXPERIMENTS", "Experiment"]
