"""Settings of an experiment: frozen dataclasses, which are also the options and the help of the command line."""

import dataclasses
import itertools
import types
import typing
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import tyro

from fedmd_jax.algorithms import Algorithm
from fedmd_jax.algorithms.augmentation import cut_images, draw_augmented_subset, warp_images
from fedmd_jax.algorithms.public_subset import draw_public_subset, draw_stratified_subset
from fedmd_jax.checks import check_count, check_not_negative, check_positive, check_share, describe_value, is_number
from fedmd_jax.client.early_stopping import EarlyStopping
from fedmd_jax.client.losses import kl, mae, mse
from fedmd_jax.client.optimizers import adam
from fedmd_jax.client.training import Distance, TrainingConfig
from fedmd_jax.experiments.algorithms import ALGORITHMS, AlgorithmOptions, describe_options, make_algorithm

Settings = TypeVar("Settings")

Monitor = Literal["validation", "test"]
Devices = int | Literal["all"] | None


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
        check_count("num_epochs", self.num_epochs)
        check_count("batch_size", self.batch_size)
        check_positive("learning_rate", self.learning_rate)

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
            check_count("patience", self.patience, minimum=0)
        check_not_negative("min_delta", self.min_delta)

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
      public: Public dataset, labelled: embedded/digits, a name in the data folder such as mnist or cifar10, or a folder
        of images by class, DIR/CLASS/*.png.
      private: Source of the clients' private datasets and of the test set: embedded/letters, a name in the data folder
        such as emnist/letters, or a folder with DIR/train/CLASS/*.png and DIR/test/CLASS/*.png.
      data_dir: Data folder, with arrays, original files or prepared TensorFlow Datasets. None: the environment
        variable FEDMD_JAX_DATA, else the directory of TensorFlow Datasets.
      num_public: Examples of the public dataset that are used, drawn with the seed.
      private_classes: Classes of the private dataset that are used (a to f in the paper). Their outputs follow those of
        the public classes in one head.
      split: How private images are assigned to clients. classes: every client the same number of images of every
        class; superclasses (cifar100): private_classes are superclasses, and a client owns one fine class of each, as
        in the paper's non-iid CIFAR; writers (leaf/femnist): each client is a writer, the test set has other writers;
        dirichlet: every client the same number of images, in class proportions of its own.
      examples_per_class: Private examples of each class per client, with dirichlet the mean over the classes; no two
        clients share one. Not with writers.
      alpha: Concentration of the Dirichlet distribution of the class proportions of a client: with 0.1 most clients
        have one or two classes, with 100 all classes evenly. Only with dirichlet.
      min_examples: Smallest number of private examples with which a writer is a client.
      evaluate_on: Data on which accuracy is measured: test, the test split; or validation, private training images of
        no client, to choose settings without the test set. Not with writers.
      num_test: Number of these images, the same for every client; drawn with the seed.
      validation_share: Share of the public and of the pooled private examples that is held out of training if early
        stopping monitors validation data; drawn with the seed. Rounds use all public examples.

    Raises:
      ValueError: a count below 1, an alpha that is not positive and finite, a share that is not between 0 and 1, no
        private class, a repeated class, a class that is not an integer from 0, or validation images with writers.
    """

    public: str = "embedded/digits"
    private: str = "embedded/letters"
    data_dir: str | None = None
    num_public: int = 5000
    private_classes: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    split: Literal["classes", "superclasses", "writers", "dirichlet"] = "classes"
    examples_per_class: int = 3
    alpha: float = 0.1
    min_examples: int = 12
    evaluate_on: Literal["test", "validation"] = "test"
    num_test: int = 1200
    validation_share: float = 0.1

    def __post_init__(self):
        for name in ("num_public", "examples_per_class", "min_examples", "num_test"):
            check_count(name, getattr(self, name))
        check_positive("alpha", self.alpha)
        if self.split == "writers" and self.evaluate_on == "validation":
            raise ValueError("evaluate_on must be test with writers, whose images are too few to hold out others")
        if not is_number(self.validation_share) or not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share!r}")
        classes = self.private_classes
        for label in classes:
            check_count("private_classes", label, minimum=0)
        if not classes or len(set(classes)) < len(classes):
            raise ValueError(f"private_classes must be at least one class and no class twice, got {classes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A federation from transfer learning to the last round.

    Attributes:
      networks: Network of each client, one name per client: 2conv:n1=8,n2=16 (n1, n2 are filters; also 3conv, 4conv),
        mlp:n1=64 (hidden units), resnet8:width=0.5,norm=group, resnet20; all but the residual ones take dropout=0.2.
        The length of the list is the number of clients; clients with equal networks form a group.
      width: Factor of the filters and hidden units of all networks; 0.25 suits a CPU.
      dtype: Type of activations, convolutions and matrix products; parameters, batch statistics, scores and losses stay
        in float32. bfloat16 halves the memory traffic of a GPU or TPU and is slower on a CPU.
      weights: Weight of each client's scores in the consensus, one number per client. None: equal weights.
      data: Public and private images.
      public_training: Transfer learning, first half: training on the public dataset.
      pretrained_dir: Folder in which clients are kept after the first half. Another run reuses those with the same
        network, client ids, width, dtype, head penalty, public training, public data, seed, versions and device (on
        several devices: the same networks). None: nothing is kept.
      private_training: Transfer learning, second half: training on the client's own private dataset.
      pooled_training: Pooled upper bound: after its public half, each network trains on the private datasets of all
        clients.
      local: Also train the local-only baseline: the private steps of every round, without digest.
      pooled: Also train the pooled upper bound, after the rounds.
      algorithm: What a round does, FedMD or one of its relatives, which `fedmd-jax list` describes. They differ in
        nothing else: data, networks, transfer learning, numbers of steps, seeds.
      algorithm_options: Options of the algorithm, on the command line --algorithm.temperature and so on.
      batch_statistics: Statistics of batch norms with which clients score the public subset. moving: those that follow
        training, as in the paper; public: those of the public subset, computed before each scoring, which the client
        keeps; public-scores: the same for the scores only. They cost one more forward pass and send nothing, and stop
        the growth of scores from round to round.
      server_network: Network of the server, such as 2conv:n1=8,n2=16, of algorithms whose clients send predictions.
        It is trained on the public dataset first, digests as the clients do, and is evaluated after each round. None:
        no network.
      num_rounds: Collaboration rounds: communicate, aggregate, distribute, digest, revisit.
      subset_size: Public examples that are scored in a round, a new subset each time (5000 in the paper).
      subset: How the public subset of a round is drawn: random, as in the paper, or stratified, each class in its
        share, as in the released code.
      subset_augmentation: Random changes of the images of the public subset, one after the other, the same for all
        clients. warp: turned by any angle, scaled and sheared; cut: joined along a line from two images. Nothing more
        is sent. Without a name the images are as they are, as in the paper.
      distance: Distance between scores and consensus in the digest of fedmd: mae, as in the released code, mse, or kl
        of their softmaxes.
      temperature: Divides the scores before the softmax of kl, in fedmd.
      learning_rate_decay: How the learning rates of digest and revisit change over the rounds. none: not at all, as in
        the paper; cosine: they fall along half a cosine and would be zero after the last round. The local-only baseline
        has the same.
      digest: Digest: training towards the consensus on the public subset.
      revisit: Revisit: training on the private dataset.
      availability: Probability that a client takes part in a round, one number or one per client.
      completion: Probability that a client that takes part completes the round, one number or one per client. The
        scores of a client that does not complete it count; its digest and its revisit are discarded.
      score_clip: Scores are clipped to this size before fedmd averages them, which limits the influence of one client.
        None: no clipping.
      clients_per_chunk: Clients of a group that are trained at once; bounds memory, changes results by rounding. None:
        what is fastest.
      devices: Number of devices over which clients are sharded, or all; changes results by rounding. None: all GPUs or
        TPUs; a CPU is one device.
      vmap_seeds: Number of seeds that are trained at once in one program, on one device; changes results by rounding.
        None: up to 8 on one GPU or TPU, 1 on a CPU, where more gain nothing.
      head_penalty: L2 penalty on the weights of the last layer, in every loss (1e-3 in the released code).
      checkpoint_every: Rounds between two checkpoints; 0: only after the last round, for load_run; None: no checkpoints
        of rounds at all. Rounds that end while a checkpoint is being written have none.
      seed: Decides everything that is random: data split, networks, shuffling, dropout, subsets.

    Raises:
      ValueError: a setting out of its range, or two that do not go together.
    """

    networks: tuple[str, ...]
    width: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: tuple[float, ...] | None = None
    data: Data = Data()
    public_training: StoppablePhase = StoppablePhase(num_epochs=20, batch_size=128)
    pretrained_dir: str | None = None
    private_training: StoppablePhase = StoppablePhase(num_epochs=25, batch_size=32)
    pooled_training: StoppablePhase = StoppablePhase(num_epochs=50, batch_size=32)
    local: bool = True
    pooled: bool = True
    algorithm: Literal[tuple(ALGORITHMS)] = "fedmd"
    algorithm_options: Annotated[AlgorithmOptions, tyro.conf.arg(name="algorithm")] = AlgorithmOptions()
    batch_statistics: Literal["moving", "public", "public-scores"] = "moving"
    server_network: str | None = None
    num_rounds: int = 20
    subset_size: int = 5000
    subset: Literal["random", "stratified"] = "random"
    subset_augmentation: tuple[Literal["warp", "cut"], ...] = ()
    distance: Literal["mae", "mse", "kl"] = "mae"
    temperature: float = 1.0
    learning_rate_decay: Literal["none", "cosine"] = "none"
    digest: Phase = Phase(num_epochs=1, batch_size=256)
    revisit: Phase = Phase(num_epochs=2, batch_size=5)
    availability: tuple[float, ...] = (1.0,)
    completion: tuple[float, ...] = (1.0,)
    score_clip: float | None = None
    clients_per_chunk: int | None = None
    devices: Devices = None
    vmap_seeds: int | None = None
    head_penalty: float = 1e-3
    checkpoint_every: int | None = 1
    seed: int = 0

    def __post_init__(self):
        check_count("num_rounds", self.num_rounds, minimum=0)
        check_count("seed", self.seed, minimum=0, bits=32)
        if self.checkpoint_every is not None:
            check_count("checkpoint_every", self.checkpoint_every, minimum=0)
        for name in ("subset_size", "clients_per_chunk", "vmap_seeds", "devices"):
            value = getattr(self, name)
            if value is not None and (name, value) != ("devices", "all"):
                check_count(name, value)
        check_positive("temperature", self.temperature)
        check_positive("width", self.width)
        if self.score_clip is not None:
            check_positive("score_clip", self.score_clip)
        check_not_negative("head_penalty", self.head_penalty)
        self._check_clients()
        self._check_together()

    def _check_clients(self):
        if not self.networks or isinstance(self.networks, str):
            raise ValueError(f"networks must be a list of names, one per client, got {self.networks or 'none'!r}")
        num_clients = len(self.networks)
        weights = [1.0] * num_clients if self.weights is None else self.weights
        per_client = {
            "weights": (check_not_negative, (num_clients,), weights),
            "availability": (check_share, (1, num_clients), self.availability),
            "completion": (check_share, (1, num_clients), self.completion),
        }
        for name, (check, sizes, values) in per_client.items():
            if len(values) not in sizes:
                wanted = " or ".join(map(str, sizes))
                raise ValueError(f"{name} must be {wanted} numbers for {num_clients} clients, got {len(values)}")
            for value in values:
                check(name, value)

    def _check_together(self):
        if self.subset_size > self.data.num_public:
            raise ValueError(
                f"subset_size must be at most the public dataset, num_public = {self.data.num_public} examples, "
                f"got {self.subset_size}"
            )
        if self.algorithm != "fedmd":
            for name in ("distance", "temperature", "score_clip"):
                if (value := getattr(self, name)) != getattr(Experiment, name):
                    found = f"{self.algorithm}, {describe_options(self.algorithm)}"
                    raise ValueError(f"{name} is of algorithm fedmd, but algorithm is {found}, got {value}")
        algorithm = self.make_algorithm()
        if self.subset_augmentation and not (algorithm.takes_server_model or self.algorithm == "feddf"):
            raise ValueError(
                f"clients of {self.algorithm} use no public subset, so subset_augmentation must be empty, "
                f"got {' '.join(self.subset_augmentation)}"
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
        both = {"availability": self.availability, "completion": self.completion}
        if all(set(values) == {1} for values in both.values()):
            return None
        client_ids = range(len(self.networks))
        return {name: dict(zip(client_ids, itertools.cycle(values), strict=False)) for name, values in both.items()}

    def make_algorithm(self) -> Algorithm:
        """The algorithm with its options; `ValueError` if they do not go together."""
        own = {"distance": self.distance_function()} if self.algorithm == "fedmd" else {}
        return make_algorithm(self.algorithm, self.algorithm_options, **own)

    def subset_function(self) -> Callable:
        """`draw_public_subset` or `draw_stratified_subset`, perhaps within `draw_augmented_subset`."""
        draw_subset = {"random": draw_public_subset, "stratified": draw_stratified_subset}[self.subset]
        if not self.subset_augmentation:
            return draw_subset
        augmentations = [{"warp": warp_images, "cut": cut_images}[name] for name in self.subset_augmentation]
        return partial(draw_augmented_subset, augmentations=augmentations, draw_subset=draw_subset)

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
    """The inverse of `dataclasses.asdict`, after JSON. A setting that is missing has the default of its class.

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
    needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    for names, problem in ((content.keys() - known, "unknown"), (needed - content.keys(), "missing")):
        if names:
            raise ValueError(f"{where}.{min(names)} is {problem}")
    return kind(**{name: _value(known[name], content[name], f"{where}.{name}") for name in content})


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return settings_from(kind, value, where)
    value = tuple(value) if isinstance(value, list) else value
    if not _is_of(kind, value):
        name = kind.__name__ if isinstance(kind, type) else kind
        raise ValueError(f"{where} must be of type {name}, got {describe_value(value)}")
    return value


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value is of the type of a setting; an integer is a float, too."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_is_of(option, value) for option in options)
    if origin is Literal:
        return value in options
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of(options[0], item) for item in value)
    return type(value) in ((int, float) if kind is float else (kind,))
