"""What can be set of an experiment: frozen dataclasses, from which the command line takes its options and its help."""

import dataclasses
import math
from functools import partial
from typing import Literal

from fedmd_jax.local import Distance, Training, adam
from fedmd_jax.losses import kl, mae


def _at_least(minimum, **values):
    for name, value in values.items():
        if not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of local training, with Adam as in the paper.

    Attributes:
      num_epochs: Passes over the data.
      batch_size: Examples in a training step; a last, smaller batch is kept.
      learning_rate: Of Adam.
    """

    num_epochs: int
    batch_size: int
    learning_rate: float = 1e-3

    def __post_init__(self):
        _at_least(1, num_epochs=self.num_epochs, batch_size=self.batch_size)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")

    def training(self) -> Training:
        """The same for the functions of the library."""
        return Training(num_epochs=self.num_epochs, batch_size=self.batch_size, optimizer=adam(self.learning_rate))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Which images are public, which are private, and who gets how many.

    Attributes:
      public: The public dataset D_0, labelled, seen by everybody: embedded/digits, or a name in the data folder such as
        mnist or cifar10.
      private: Where the clients' own examples and the test set come from: embedded/letters, or a name in the data
        folder such as emnist/letters.
      data_dir: The data folder, with arrays, original files or prepared TensorFlow Datasets. Default: the environment
        variable FEDMD_JAX_DATA, else the directory of TensorFlow Datasets.
      num_public: Examples of the public dataset that are used, drawn with the seed.
      private_classes: Classes of the private dataset that take part (a to f in the paper). Their outputs follow those
        of the public classes in the one head that all share.
      examples_per_class: Private examples that each client owns of each class; no two clients share one.
      num_test: Examples of the private test split on which every client is evaluated, drawn with the seed.
    """

    public: str = "embedded/digits"
    private: str = "embedded/letters"
    data_dir: str | None = None
    num_public: int = 5000
    private_classes: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    examples_per_class: int = 3
    num_test: int = 1200

    def __post_init__(self):
        _at_least(1, num_public=self.num_public, examples_per_class=self.examples_per_class, num_test=self.num_test)
        if not self.private_classes or len(set(self.private_classes)) < len(self.private_classes):
            raise ValueError(
                f"private_classes must be at least one class and no class twice, got {self.private_classes}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A federation from transfer learning to the last round.

    Attributes:
      networks: The network of each client, privately designed: 2conv:n1=8,n2=16 (also 3conv, 4conv), mlp:n1=64,
        resnet8:width=0.5,norm=group, resnet20; all take dropout=0.2. Clients with equal networks run as one group.
      weights: What each client's scores weigh in the consensus (c_k in the paper's supplement); all equal by default.
      data: Public and private images.
      public_training: Transfer learning, first half: each client trains on the public dataset.
      private_training: Transfer learning, second half: then on its own private examples.
      pooled_training: The upper bound: each network trained on the private examples of all clients together.
      pooled: Whether to compute that upper bound.
      num_rounds: Rounds of communicate, aggregate, distribute, digest, revisit.
      subset_size: Public examples that are scored in a round, a new random subset each time (5000 in the paper).
      subset: Whether the subset is drawn at random, as in the paper, or keeps the share of every class, as in the
        released code.
      distance: What digest minimises between own scores and consensus: mae as in the released code, or kl.
      temperature: Of kl.
      digest: Digest: each client trains to approach the consensus on the public subset.
      revisit: Revisit: each client trains on its own private examples for a few epochs.
      head_penalty: L2 penalty on the last layer's weights, in every loss (1e-3 in the released code).
      seed: Decides everything that is random: data split, networks, shuffling, dropout, subsets.
    """

    networks: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    data: Data = Data()
    public_training: Phase = Phase(num_epochs=20, batch_size=128)
    private_training: Phase = Phase(num_epochs=25, batch_size=32)
    pooled_training: Phase = Phase(num_epochs=50, batch_size=32)
    pooled: bool = True
    num_rounds: int = 20
    subset_size: int = 5000
    subset: Literal["random", "stratified"] = "random"
    distance: Literal["mae", "kl"] = "mae"
    temperature: float = 1.0
    digest: Phase = Phase(num_epochs=1, batch_size=256)
    revisit: Phase = Phase(num_epochs=2, batch_size=5)
    head_penalty: float = 1e-3
    seed: int = 0

    def __post_init__(self):
        _at_least(1, subset_size=self.subset_size)
        _at_least(0, num_rounds=self.num_rounds, head_penalty=self.head_penalty, seed=self.seed)
        if not self.networks:
            raise ValueError("networks must name the network of at least one client, got none")
        if self.weights is not None and len(self.weights) != len(self.networks):
            raise ValueError(f"weights must be one per client, {len(self.networks)}, got {len(self.weights)}")
        if self.weights is not None and not all(0 <= weight < math.inf for weight in self.weights):
            raise ValueError(f"weights must be finite and not negative, got {self.weights}")
        if self.subset_size > self.data.num_public:
            raise ValueError(
                f"subset_size must be at most the public dataset, {self.data.num_public} examples, "
                f"got {self.subset_size}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    def distance_function(self) -> Distance:
        """`mae`, or `kl` at the temperature."""
        return mae if self.distance == "mae" else partial(kl, temperature=self.temperature)
