"""Letters with skewed labels: MNIST is public, every client owns 60 letters a to f, mostly of one or two classes.

Command:   fedmd-jax run letters-dirichlet [--width 0.25] [--data.alpha 1]
Data:      fedmd-jax data prepare mnist; fedmd-jax data prepare emnist/letters
Paper:     none. The split is that of Hsu et al. 2019 (arXiv 1909.06335); other papers of the family divide each class
           among the clients, which skews quantities, too. Two networks of the supplement's Table 1 of Li and Wang 2019,
           five clients each, so that weights can be averaged within each group.
Expected:  not run at full width. benchmarks/methods.py compares all algorithms on smaller networks and less data.

All clients are tested on the same images, as many of each letter: what is measured is what a client has learned of the
letters that it does not have.
"""

import dataclasses

from fedmd_jax.experiments.presets import letters_iid
from fedmd_jax.experiments.settings import Phase

EXPERIMENT = dataclasses.replace(
    letters_iid.PAPER,
    networks=(letters_iid.PAPER.networks[0],) * 5 + (letters_iid.PAPER.networks[5],) * 5,
    data=dataclasses.replace(letters_iid.PAPER.data, split="dirichlet", alpha=0.1, examples_per_class=10),
    digest=Phase(num_epochs=1, batch_size=64),
    revisit=Phase(num_epochs=4, batch_size=10),
)
