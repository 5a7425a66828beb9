"""An experiment made tiny: every part of it runs, and its accuracy means nothing."""

import dataclasses

from fedmd_jax.experiments.settings import Experiment


def smoke(experiment: Experiment) -> Experiment:
    """Two clients with the narrowed network of the first, few images, one epoch of everything and one round.

    Two networks would take twice as long to compile, and the paper's last ones have more layers.

    >>> from fedmd_jax.experiments import EXPERIMENTS
    >>> len(smoke(EXPERIMENTS["letters-iid"]).networks)
    2
    """
    phases = ("public_training", "private_training", "pooled_training", "digest", "revisit")
    return dataclasses.replace(
        experiment,
        networks=experiment.networks[:1] * 2,
        weights=experiment.weights and experiment.weights[:2],
        width=experiment.width / 32,
        data=dataclasses.replace(experiment.data, num_public=200, num_test=50),
        **{phase: dataclasses.replace(getattr(experiment, phase), num_epochs=1) for phase in phases},
        num_rounds=1,
        subset_size=100,
    )
