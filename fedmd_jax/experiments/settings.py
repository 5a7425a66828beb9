"""Settings of an experiment: frozen dataclasses, which are also the options and the help of the command line."""

import contextlib
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

from fedmd_jax.algorithms.public_subset import draw_public_subset, draw_stratified_subset
from fedmd_jax.checks import one_line
from fedmd_jax.client.early_stopping import EarlyStopping
from fedmd_jax.client.losses import kl, mae, mse
from fedmd_jax.client.optimizers import adam
from fedmd_jax.client.training import Distance, TrainingConfig

Settings = TypeVar("Settings")
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


def _check_range(low: float, high: float = _LARGEST, **lists: Sequence[Any]) -> None:
    for name, values in lists.items():
        if not all(isinstance(value, (int, float)) and low <= value <= high for value in values):
            upper = "finite" if high == _LARGEST else f"at most {high}"
            raise ValueError(f"{name} must be at least {low} and {upper}, got {_listed(values)}")


def _check_positive(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not 0 < value <= _LARGEST:
            raise ValueError(f"{name} must be positive and finite, got {value!r:.80}")


def _listed(values: Sequence[Any]) -> str:
    return one_line(", ".join(map(str, values)), longest=200) or "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of local training, with Adam as in the paper.

    Attributes:
      num_epochs: Passes over the data.
      batch_size: Examples per training step; a smaller last batch is kept.
      learning_rate: Step size of Adam.

    Raises:
      ValueError: a count below 1, or a learning rate that is not positive and finite.
    """

    num_epochs: int
    batch_size: int
    learning_rate: float = 1e-3

    def __post_init__(self):
        _check_counts(1, num_epochs=self.num_epochs, batch_size=self.batch_size)
        _check_positive(learning_rate=self.learning_rate)

    def training(self) -> TrainingConfig:
        """The same settings for the functions of the library."""
        return TrainingConfig(
            num_epochs=self.num_epochs, batch_size=self.batch_size, optimizer=adam(self.learning_rate)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoppablePhase(Phase):
    """A phase of training that may stop early.

    Attributes:
      num_epochs: Passes over the data.
      batch_size: Examples per training step; a smaller last batch is kept.
      learning_rate: Step size of Adam.
      patience: Early stopping: training ends after this many epochs without a better accuracy, and the last weights
        are kept. None or 0: no early stopping.
      min_delta: Early stopping: smallest increase over the best accuracy so far that counts as better.
      monitor: Early stopping: where accuracy is measured. validation: a part of the data that is held out of this
        training; test: the test set, as in the released code.

    Raises:
      ValueError: as in `Phase`, or a min_delta that is negative.
    """

    patience: int | None = None
    min_delta: float = 1e-3
    monitor: Monitor = "validation"

    def __post_init__(self):
        super().__post_init__()
        if self.patience is not None:
            _check_counts(0, patience=self.patience)
        _check_range(0, min_delta=[self.min_delta])

    @property
    def monitored(self) -> Monitor | None:
        """The data that early stopping monitors; None without early stopping."""
        return self.monitor if self.patience else None

    def training(self) -> TrainingConfig:
        """The same settings for the functions of the library."""
        stopping = EarlyStopping(patience=self.patience, min_delta=self.min_delta) if self.patience else None
        return dataclasses.replace(super().training(), early_stopping=stopping)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Public and private images, and how the private ones are split among the clients.

    Attributes:
      public: Public dataset, labelled: embedded/digits, or a name in the data folder such as mnist or cifar10.
      private: Source of the clients' private datasets and of the test set: embedded/letters, or a name in the data
        folder such as emnist/letters.
      data_dir: Data folder, with arrays, original files or prepared TensorFlow Datasets. None: the environment
        variable FEDMD_JAX_DATA, else the directory of TensorFlow Datasets.
      num_public: Examples of the public dataset that are used, drawn with the seed.
      private_classes: Classes of the private dataset that are used (a to f in the paper). Their outputs follow those of
        the public classes in one head.
      split: How private images are assigned to clients. classes: every client the same number of images of every
        class; superclasses (cifar100): private_classes are superclasses, and a client owns one fine class of each, as
        in the paper's non-iid CIFAR; writers (leaf/femnist): each client is a writer, the test set has other writers.
      examples_per_class: Private examples of each class per client; no two clients share one. Not with writers.
      min_examples: Smallest number of private examples with which a writer is a client.
      evaluate_on: Data on which accuracy is measured: test, the test split; or validation, private training images of
        no client, to choose settings without the test set. Not with writers.
      num_test: Number of these images, the same for every client; drawn with the seed.
      validation_share: Share of the public and of the pooled private examples that is held out of training if early
        stopping monitors validation data; drawn with the seed. Rounds use all public examples.

    Raises:
      ValueError: a count below 1, a share that is not between 0 and 1, no private class, a repeated class, a class that
        is not an integer from 0, or validation images with writers.
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
      networks: Network of each client, one name per client: 2conv:n1=8,n2=16 (n1, n2 are filters; also 3conv, 4conv),
        mlp:n1=64 (hidden units), resnet8:width=0.5,norm=group, resnet20; all but the residual ones take dropout=0.2.
        The length of the list is the number of clients; clients with equal networks form a group.
      width: Factor of the filters and hidden units of all networks; 0.25 suits a CPU.
      weights: Weight of each client's scores in the consensus, one number per client. None: equal weights.
      data: Public and private images.
      public_training: Transfer learning, first half: training on the public dataset.
      pretrained_dir: Folder in which clients are kept after the first half. Another run reuses those with the same
        network, client ids, width, head penalty, public training, public data, seed, versions and device (on several
        devices: the same networks). None: nothing is kept.
      private_training: Transfer learning, second half: training on the client's own private dataset.
      pooled_training: Pooled upper bound: after its public half, each network trains on the private datasets of all
        clients.
      local: Also train the local-only baseline: the private steps of every round, without digest.
      pooled: Also train the pooled upper bound, after the rounds.
      num_rounds: Collaboration rounds: communicate, aggregate, distribute, digest, revisit.
      subset_size: Public examples that are scored in a round, a new subset each time (5000 in the paper).
      subset: How the public subset of a round is drawn: random, as in the paper, or stratified, each class in its
        share, as in the released code.
      distance: Distance between scores and consensus in digest: mae, as in the released code, mse, or kl of their
        softmaxes.
      temperature: Divides the scores before the softmax of kl.
      digest: Digest: training towards the consensus on the public subset.
      revisit: Revisit: training on the private dataset.
      availability: Probability that a client takes part in a round, one number or one per client.
      completion: Probability that a client that takes part completes the round, one number or one per client. The
        scores of a client that does not complete it count; its digest and its revisit are discarded.
      score_clip: Scores are clipped to this size before they are averaged, which limits the influence of one client.
        None: no clipping.
      clients_per_chunk: Clients of a group that are trained at once; bounds memory, changes results by rounding. None:
        what is fastest.
      devices: Number of devices over which clients are sharded, or all; changes results by rounding. None: all GPUs or
        TPUs; a CPU is one device.
      vmap_seeds: Number of seeds that are trained at once in one program, on one device; changes results by rounding.
        None: up to 8 on one GPU or TPU, 1 on a CPU, where more gain nothing.
      head_penalty: L2 penalty on the weights of the last layer, in every loss (1e-3 in the released code).
      checkpoint_every: Rounds between two checkpoints; 0: no checkpoints of rounds. Rounds that end while a checkpoint
        is being written have none.
      seed: Decides everything that is random: data split, networks, shuffling, dropout, subsets.

    Raises:
      ValueError: a setting out of its range, or two that do not go together.
    """

    networks: tuple[str, ...]
    width: float = 1.0
    weights: tuple[float, ...] | None = None
    data: Data = Data()
    public_training: StoppablePhase = StoppablePhase(num_epochs=20, batch_size=128)
    pretrained_dir: str | None = None
    private_training: StoppablePhase = StoppablePhase(num_epochs=25, batch_size=32)
    pooled_training: StoppablePhase = StoppablePhase(num_epochs=50, batch_size=32)
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
    score_clip: float | None = None
    clients_per_chunk: int | None = None
    devices: Devices = None
    vmap_seeds: int | None = None
    head_penalty: float = 1e-3
    checkpoint_every: int = 1
    seed: int = 0

    def __post_init__(self):
        _check_counts(0, num_rounds=self.num_rounds, seed=self.seed, checkpoint_every=self.checkpoint_every)
        _check_counts(1, subset_size=self.subset_size)
        devices = None if self.devices == "all" else self.devices
        optional = {"clients_per_chunk": self.clients_per_chunk, "vmap_seeds": self.vmap_seeds, "devices": devices}
        _check_counts(1, **{name: value for name, value in optional.items() if value is not None})
        if self.score_clip is not None:
            _check_positive(score_clip=self.score_clip)
        _check_positive(temperature=self.temperature, width=self.width)
        _check_range(0, head_penalty=[self.head_penalty], weights=self.weights or [])
        _check_range(0, 1, availability=self.availability, completion=self.completion)
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
        if self.private_training.monitored == "validation":
            raise ValueError(
                "private_training has too few examples to hold out any: its early stopping can only monitor test, "
                "got validation"
            )

    def probabilities(self) -> dict[str, dict[int, float]] | None:
        """Availability and completion by client id; None if all clients complete all rounds."""
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


def smoke(experiment: Experiment) -> Experiment:
    """A tiny version, in which every part runs and accuracies mean nothing: two clients, few images, one round.

    Both clients have the first network, narrowed: two networks would take twice as long to compile.

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


def settings_from(kind: type[Settings], content: Any, where: str = "settings") -> Settings:
    """The inverse of `dataclasses.asdict`, after JSON.

    Args:
      kind: dataclass of settings.
      content: parsed JSON.
      where: name of the content in messages.

    Raises:
      ValueError: a setting that is unknown, missing, of another type, or refused by its class.

    >>> settings_from(Phase, {**dataclasses.asdict(Phase(num_epochs=1, batch_size=2)), "num_epochs": "x"})
    Traceback (most recent call last):
    ValueError: settings.num_epochs must be of type int, got 'x'
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be settings by name, got {content!r:.40}")
    known = typing.get_type_hints(kind)
    for names, problem in ((content.keys() - known, "unknown"), (known.keys() - content, "missing")):
        if names:
            raise ValueError(f"{where}.{min(names)} is {problem}")
    return kind(**{name: _value(known[name], content[name], f"{where}.{name}") for name in known})


def _value(kind: Any, value: Any, where: str) -> Any:
    """Converts a value of JSON to the type of a setting; an integer is accepted as a float."""
    if dataclasses.is_dataclass(kind):
        return settings_from(kind, value, where)
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        *others, last = [option for option in options if option is not type(None)]
        for option in others:
            with contextlib.suppress(ValueError):
                return _value(option, value, where)
        return _value(last, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(options[0], item, f"{where}[{place}]") for place, item in enumerate(value))
    if origin is Literal and value in options:
        return value
    if isinstance(kind, type) and type(value) in ((int, float) if kind is float else (kind,)):
        return value
    raise ValueError(f"{where} must be of type {getattr(kind, '__name__', kind)}, got {value!r:.40}")
