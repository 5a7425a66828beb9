"""One experiment from its settings to its run directory: train loop, checkpoints, presets, results."""

from fedmd_jax.experiments.presets import EXPERIMENTS as EXPERIMENTS
from fedmd_jax.experiments.settings import Experiment as Experiment, settings_from as settings_from, smoke as smoke
