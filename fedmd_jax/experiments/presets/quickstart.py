"""FedMD on the images that come with the package: two minutes on two CPU cores, no download.

Command:  fedmd-jax run quickstart
Paper:    FEMNIST iid (Li and Wang 2019, Table 3), smaller: MNIST digits are public, each client owns three images of
          each of the letters a to f; networks of 8 to 24 filters instead of 64 to 512.
"""

from fedmd_jax.experiments.settings import Data, Experiment, Phase, StoppablePhase

QUICKSTART = Experiment(
    networks=(
        *("2conv:n1=8,n2=16",) * 3,
        *("3conv:n1=8,n2=16,n3=24",) * 2,
        *("mlp:n1=64,dropout=0.2",) * 2,
    ),
    data=Data(num_public=4000, num_test=1200),
    public_training=StoppablePhase(num_epochs=2, batch_size=64),
    private_training=StoppablePhase(num_epochs=25, batch_size=6),
    pooled_training=StoppablePhase(num_epochs=25, batch_size=18),
    num_rounds=8,
    subset_size=1000,
    digest=Phase(num_epochs=1, batch_size=64),
    revisit=Phase(num_epochs=4, batch_size=5),
)
