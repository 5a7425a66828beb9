"""One experiment from its settings to its run directory: train loop, checkpoints, presets, results."""

from fedmd_jax.experiments.presets import EXPERIMENTS
from fedmd_jax.experiments.settings import Experiment, smoke

__all__ = ["EXPERIMENTS", "Experiment", "smoke"]
