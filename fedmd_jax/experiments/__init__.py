"""Whole experiments: settings and presets, the procedure, the run directory and what is told of the results."""

from fedmd_jax.experiments.presets import EXPERIMENTS
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.experiments.smoke import smoke

__all__ = ["EXPERIMENTS", "Experiment", "smoke"]
