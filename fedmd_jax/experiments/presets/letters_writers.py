"""FEMNIST non-iid: MNIST is public, every client owns the letters a to f of one writer.

Command:   fedmd-jax run letters-writers[-released|-tuned] [--width 0.25]
Data:      fedmd-jax data prepare mnist; fedmd-jax data prepare leaf/femnist --from FOLDER, where FOLDER has
           what LEAF's preprocess.sh makes, train/ and test/
Paper:     Li and Wang 2019, section 4 and Table 3; networks of the supplement's Table 1. Rounds, epochs and batches are
           in the released configuration only; all variants have them.
Expected:  at full width .53-.56 after transfer learning, .74-.81 at the end, .83-.90 pooled, on the released code's
           data. What was measured here is in benchmarks/README.md.

The released code has writers of EMNIST with at least 18 images, and tests on the letters of all writers. EMNIST's
ordinary files do not name writers; here LEAF names them; they have fewer images: at least 12. The test set has
the letters of the writers that are not clients. LEAF's letters are cut out and centred as MNIST's digits are.
"""

import dataclasses

from fedmd_jax.experiments.presets import letters_iid
from fedmd_jax.experiments.settings import Data, Phase

PAPER = dataclasses.replace(
    letters_iid.PAPER,
    data=Data(
        public="mnist", private="leaf/femnist", num_public=60_000, split="writers", min_examples=12, num_test=900
    ),
    revisit=Phase(num_epochs=4, batch_size=5),
)
RELEASED = letters_iid.as_released(PAPER, min_delta=1e-3)
TUNED = letters_iid.as_tuned(PAPER)
