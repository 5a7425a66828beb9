"""What can be set of an experiment: frozen dataclasses, from which the command line takes its options and its help."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

from fedmd_jax.hints import one_line
from fedmd_jax.local import Distance, Training
from fedmd_jax.losses import kl, mae, mse
from fedmd_jax.optimizers import adam
from fedmd_jax.stopping import EarlyStopping
from fedmd_jax.subset import draw_public_subset, draw_stratified_subset

_LARGEST = sys.float_info.max  # JSON has integers beyond it

Subset = Literal["random", "stratified"]
Monitor = Literal["validation", "test"]
Split = Literal["classes", "superclasses", "writers"]
EvaluateOn = Literal["test", "validation"]
Devices = int | Literal["all"] | None
DistanceName = Literal["mae", "mse", "kl"]


# The checks stand first because the defaults below are made of checked settings.


def _check_counts(minimum: int, **values: Any) -> None:
    for name, value in values.items():
        if type(value) is not int or value < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r:.80}")
        if value >= 2**32:  # no program can count so far
            raise ValueError(f"{name} must be below 2**32, got {value!r:.80}")


def _check_positive(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not 0 < value <= _LARGEST:
            raise ValueError(f"{name} must be positive and finite, got {value!r:.80}")


def _check_not_negative(**lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if not all(isinstance(value, (int, float)) and 0 <= value <= _LARGEST for value in values):
            raise ValueError(f"{name} must be finite and not negative, got {_listed(values)}")


def _check_probabilities(**lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in values):
            raise ValueError(f"{name} must be between 0 and 1, got {_listed(values)}")


def _check_choices(choices: Any, **values: Any) -> None:
    for name, value in values.items():
        if value not in get_args(choices):
            raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r:.80}")


def _listed(values: Sequence[Any]) -> str:
    return one_line(", ".join(map(str, values)), longest=200) or "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of local training, with Adam as in the paper.

    Attributes:
      num_epochs: Passes over the data.
      batch_size: Examples in a training step; a last, smaller batch is kept.
      learning_rate: Step size of Adam.
      patience: Early stopping, of transfer learning and the upper bound only: after so many epochs without a better
        accuracy training ends, and the last weights are kept. None or 0: all epochs are run.
      min_delta: How much better than the best so far an accuracy must be for early stopping.
      monitor: Whose accuracy early stopping looks at: validation, a part of the data that is held out for it, or test,
        the test set, as in the released code.

    Raises:
      ValueError: a count below 1, a learning rate that is not positive and finite, or a min_delta that is negative.
    """

    num_epochs: int
    batch_size: int
    learning_rate: float = 1e-3
    patience: int | None = None
    min_delta: float = 1e-3
    monitor: Monitor = "validation"

    def __post_init__(self):
        _check_counts(1, num_epochs=self.num_epochs, batch_size=self.batch_size)
        _check_positive(learning_rate=self.learning_rate)
        if self.patience is not None:
            _check_counts(0, patience=self.patience)
        _check_not_negative(min_delta=[self.min_delta])
        _check_choices(Monitor, monitor=self.monitor)

    @property
    def monitored(self) -> Monitor | None:
        """What early stopping looks at, None without it."""
        return self.monitor if self.patience else None

    def training(self) -> Training:
        """The same for the functions of the library."""
        stopping = EarlyStopping(patience=self.patience, min_delta=self.min_delta) if self.patience else None
        return Training(
            num_epochs=self.num_epochs,
            batch_size=self.batch_size,
            optimizer=adam(self.learning_rate),
            early_stopping=stopping,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Which images are public, which are private, and who gets how many.

    Attributes:
      public: The public dataset D_0, labelled, seen by every client: embedded/digits, or a name in the data folder such
        as mnist or cifar10.
      private: Where the clients' private datasets D_k and the test set come from: embedded/letters, or a name in the
        data folder such as emnist/letters.
      data_dir: The data folder, with arrays, original files or prepared TensorFlow Datasets. None: the
        environment variable FEDMD_JAX_DATA, else the directory of TensorFlow Datasets.
      num_public: Examples of the public dataset that are used, drawn with the seed.
      private_classes: Classes of the private dataset that take part (a to f in the paper). Their outputs follow those
        of the public classes in the one head that all share.
      split: Who owns what. classes: every client the same number of images of every class. superclasses (of cifar100):
        private_classes are superclasses, and a client owns one fine class of each, as in the paper's non-iid CIFAR.
        writers (of leaf/femnist): a client is a writer and owns all images of theirs; the test set is of the others.
      examples_per_class: Private examples that each client owns of each class; no two clients share one. Not with
        writers.
      min_examples: Private examples, of all classes together, that a writer must have to be a client.
      evaluate_on: What accuracy is measured on: test, the test split; or validation, private training images of no
        client, with which settings can be chosen without a look at the test set. Not with writers.
      num_test: How many images that is, the same for every client; drawn with the seed.
      validation_share: Part of the public examples, and of the pooled private ones, that is held out of training where
        early stopping looks at validation data; drawn with the seed. Rounds use all public examples.

    Raises:
      ValueError: a count below 1, a share that is not between 0 and 1, no private class, a class twice, or one that is
        no integer from 0, validation images with writers.
    """

    public: str = "embedded/digits"
    private: str = "embedded/letters"
    data_dir: str | None = None
    num_public: int = 5000
    private_classes: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    split: Split = "classes"
    examples_per_class: int = 3
    min_examples: int = 12
    evaluate_on: EvaluateOn = "test"
    num_test: int = 1200
    validation_share: float = 0.1

    def __post_init__(self):
        _check_counts(1, num_public=self.num_public, examples_per_class=self.examples_per_class, num_test=self.num_test)
        _check_counts(1, min_examples=self.min_examples)
        _check_choices(Split, split=self.split)
        _check_choices(EvaluateOn, evaluate_on=self.evaluate_on)
        if self.split == "writers" and self.evaluate_on == "validation":
            raise ValueError("evaluate_on must be test with writers, whose images are too few to hold out others")
        if not isinstance(self.validation_share, (int, float)) or not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share!r}")
        classes = self.private_classes
        if not classes or len(set(classes)) < len(classes):
            raise ValueError(f"private_classes must be at least one class and no class twice, got {_listed(classes)}")
        if not all(type(label) is int and 0 <= label < 2**31 for label in classes):
            raise ValueError(f"private_classes must be integers from 0, got {_listed(classes)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A federation from transfer learning to the last round.

    Attributes:
      networks: The independently designed network of each client, one name per client: 2conv:n1=8,n2=16 (n1, n2 are
        filters; also 3conv, 4conv), mlp:n1=64 (hidden units), resnet8:width=0.5,norm=group, resnet20; all but the
        residual ones take dropout=0.2. The length of the list is the number of clients; those with equal networks run
        as one group.
      width: Multiplies the filters and hidden units of all networks; 0.25 makes the paper's a CPU's size.
      weights: What each client's scores weigh in the consensus, one number per client (c_k in the paper's supplement).
        None: all weigh the same.
      data: Public and private images.
      public_training: Transfer learning, first half: each client trains on the public dataset.
      pretrained_dir: Folder where clients are kept after that half; another run takes from there those of networks that
        it has, too, for the same clients, with the same width, head penalty, public training and public data, seed,
        versions and device; on several devices those of all networks or none. None: nothing is kept.
      private_training: Transfer learning, second half: then on its own private dataset.
      pooled_training: The upper bound: each network, after its public half, trained on the private datasets of all
        clients pooled together.
      local: Compute the control, what the same networks reach with the private steps of the rounds and no digest.
      pooled: Compute the upper bound, what the same networks reach on pooled private data, after the rounds.
      num_rounds: Collaboration rounds of communicate, aggregate, distribute, digest, revisit.
      subset_size: Public examples that are scored in a round, a new subset each time (5000 in the paper).
      subset: How the public subset of a round is drawn: random, as in the paper, or stratified, every class in its
        share, as in the released code.
      distance: What digest minimises between own scores and consensus: mae, as in the released code, mse, the
        mean of the squares, or kl, the divergence of their softmaxes.
      temperature: Divides the scores before the softmax of kl.
      digest: Digest: each client trains its network to approach the consensus on the public subset.
      revisit: Revisit: each client trains its network on its own private dataset for a few epochs.
      availability: How likely a client takes part in a round, one number for all clients or one per client; who does
        not neither scores nor trains.
      completion: How likely a client that takes part completes the round, one number for all clients or one per client;
        of one that does not the scores count, but its digest and its revisit are lost.
      score_bound: Scores are clipped to this size before they are averaged, which limits what one client can do to the
        consensus. None: they are averaged as they are.
      clients_per_chunk: How many clients of a group (those with equal networks) are trained at once, the others chunk
        after chunk. Bounds memory; changes results by rounding. None: as many as run fastest.
      devices: Over how many devices the clients are spread, or all. Moves results by rounding. None: all GPUs or TPUs;
        a CPU is one device.
      seeds_at_once: How many of several seeds are trained side by side in one program, on one device. Changes results
        by rounding. None: up to 8 on a GPU or TPU, fewer where its memory does not hold them; one on a CPU, which gains
        nothing by more.
      head_penalty: L2 penalty on the weights of the last layer, in every loss (1e-3 in the released code).
      checkpoint_every: Rounds between two checkpoints, from which an interrupted run goes on; 0 writes none. Rounds
        that end while a checkpoint is being written go without.
      seed: Decides everything that is random: data split, networks, shuffling, dropout, subsets.

    Raises:
      ValueError: a setting that is out of its range, or two that do not fit each other.
    """

    networks: tuple[str, ...]
    width: float = 1.0
    weights: tuple[float, ...] | None = None
    data: Data = Data()
    public_training: Phase = Phase(num_epochs=20, batch_size=128)
    pretrained_dir: str | None = None
    private_training: Phase = Phase(num_epochs=25, batch_size=32)
    pooled_training: Phase = Phase(num_epochs=50, batch_size=32)
    local: bool = True
    pooled: bool = True
    num_rounds: int = 20
    subset_size: int = 5000
    subset: Subset = "random"
    distance: DistanceName = "mae"
    temperature: float = 1.0
    digest: Phase = Phase(num_epochs=1, batch_size=256)
    revisit: Phase = Phase(num_epochs=2, batch_size=5)
    availability: tuple[float, ...] = (1.0,)
    completion: tuple[float, ...] = (1.0,)
    score_bound: float | None = None
    clients_per_chunk: int | None = None
    devices: Devices = None
    seeds_at_once: int | None = None
    head_penalty: float = 1e-3
    checkpoint_every: int = 1
    seed: int = 0

    def __post_init__(self):
        _check_counts(0, num_rounds=self.num_rounds, seed=self.seed, checkpoint_every=self.checkpoint_every)
        _check_counts(1, subset_size=self.subset_size)
        if self.clients_per_chunk is not None:
            _check_counts(1, clients_per_chunk=self.clients_per_chunk)
        if self.seeds_at_once is not None:
            _check_counts(1, seeds_at_once=self.seeds_at_once)
        if self.score_bound is not None:
            _check_positive(score_bound=self.score_bound)
        if self.devices not in (None, "all"):
            _check_counts(1, devices=self.devices)
        _check_positive(temperature=self.temperature, width=self.width)
        _check_not_negative(head_penalty=[self.head_penalty], weights=self.weights or [])
        _check_probabilities(availability=self.availability, completion=self.completion)
        _check_choices(Subset, subset=self.subset)
        _check_choices(DistanceName, distance=self.distance)
        self._check_together()

    def _check_together(self):
        if not self.networks or isinstance(self.networks, str):
            raise ValueError(f"networks must be a list of names, one per client, got {self.networks or 'none'!r}")
        if self.weights is not None and len(self.weights) != len(self.networks):
            raise ValueError(f"weights must be one per client, {len(self.networks)}, or None, got {len(self.weights)}")
        for name in ("availability", "completion"):
            values = getattr(self, name)
            if len(values) not in (1, len(self.networks)):
                raise ValueError(
                    f"{name} must be one number, or one per client, {len(self.networks)}, got {len(values)}"
                )
        if self.subset_size > self.data.num_public:
            raise ValueError(
                f"subset_size must be at most the public dataset, num_public = {self.data.num_public} examples, "
                f"got {self.subset_size}"
            )
        if self.distance != "kl" and self.temperature != 1:
            raise ValueError(f"temperature is of distance kl, but distance is {self.distance}, got {self.temperature}")
        for name in ("digest", "revisit"):
            if getattr(self, name).patience:
                raise ValueError(f"{name} has no early stopping, but its patience is {getattr(self, name).patience}")
        if self.private_training.monitored == "validation":
            raise ValueError(
                "private_training has too few examples to hold out any: its early stopping can only monitor test, "
                "got validation"
            )

    def probabilities(self) -> dict[str, dict[int, float]] | None:
        """Availability and completion by client id; None where everybody always takes part to the end."""
        if all(value == 1 for value in (*self.availability, *self.completion)):
            return None
        num_clients = len(self.networks)
        both = {"availability": self.availability, "completion": self.completion}
        return {
            name: dict(enumerate(values * num_clients if len(values) == 1 else values)) for name, values in both.items()
        }

    def subset_function(self) -> Callable:
        """`draw_public_subset` or `draw_stratified_subset`."""
        return {"random": draw_public_subset, "stratified": draw_stratified_subset}[self.subset]

    def distance_function(self) -> Distance:
        """`mae`, `mse`, or `kl` at the temperature."""
        return {"mae": mae, "mse": mse, "kl": partial(kl, temperature=self.temperature)}[self.distance]
