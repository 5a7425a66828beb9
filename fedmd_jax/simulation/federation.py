"""A federation: compiled functions for each phase, and the loop over the rounds."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmd_jax.aggregators.base import Aggregator
from fedmd_jax.aggregators.mean import weighted_mean
from fedmd_jax.algorithms.base import Algorithm, split_states
from fedmd_jax.algorithms.exchange import fedmd as fedmd_algorithm
from fedmd_jax.algorithms.fedmd import learn, report, round_keys
from fedmd_jax.algorithms.participation import ParticipationPolicy, all_clients, complete_participants
from fedmd_jax.algorithms.public_subset import draw_public_subset
from fedmd_jax.checks import check_count
from fedmd_jax.client.evaluation import Evaluation, evaluate
from fedmd_jax.client.guards import keep_if_finite
from fedmd_jax.client.losses import mae
from fedmd_jax.client.phases import init_client, pretrain, revisit
from fedmd_jax.client.training import Distance, TrainingConfig, check_validation, scale_learning_rate
from fedmd_jax.mapping.chunking import ClientsPerChunk, check_chunks
from fedmd_jax.mapping.grouped import map_groups
from fedmd_jax.mapping.groups import Groups, check_groups, group_client_ids, group_keys
from fedmd_jax.mapping.packing import check_costs
from fedmd_jax.mapping.sharding import constrain_replicated, gather_clients, replicate, shard_clients
from fedmd_jax.simulation.federation_data import Private, check_data, check_optimizers
from fedmd_jax.simulation.metrics import (
    REVISIT_FAULT,
    History,
    RoundMetrics,
    reverted_clients,
    reverted_halves,
    round_metrics,
    with_faults,
    with_server,
)
from fedmd_jax.simulation.progress import show_rounds
from fedmd_jax.transforms.clipping import Transform
from fedmd_jax.types import (
    Architecture,
    FederationState,
    Participants,
    PrivateDataset,
    PublicDataset,
    RoundInfo,
    States,
    TrainingInfo,
    TransferInfo,
)

AnyStates = TypeVar("AnyStates", bound=States | FederationState)
Trained = tuple[States, Mapping[str, TrainingInfo]]
Validation = PrivateDataset | Private  # one for all clients, or a stacked one per group

_DONATING = ("pretrain", "train_private", "revisit", "round", "learn")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Federation:
    """All clients of all groups; each method is one program, compiled at its first call.

    States are donated, except to `train_pooled`, `score` and `evaluate`: do not reuse them after a call. A client that
    ends a training phase with NaN or infinity is reverted to its state before that phase, and `finite` of the
    `TrainingInfo` is False.

    Shapes and records that several methods take:

    * states: per group, stacked clients [K, ...], from `init`;
    * private: per group, stacked private datasets [K, N, ...], from `stack_private`;
    * validation: for a phase with early stopping, one unstacked dataset for all clients, or a stacked one per group;
      refused if the phase has no early stopping;
    * participants: the clients that the states hold, if these are not all clients of the groups, and how far each gets
      in the round. On one device states may also hold all clients of some of the groups, without it;
    * learning_rate_factor: [], by which all updates of digest and revisit are multiplied; by default they are not.

    Attributes:
      groups: the architecture groups.
      mesh: the mesh over which clients are sharded, or None.
      algorithm: the algorithm of `round`.
      server: the network of the server, or None.
      programs: the compiled functions by the name of the method; each has `lower`, as `jax.jit` has.
      public_training: settings of `pretrain`.
      private_training: settings of `train_private`.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> groups = {"linear": fmd.ArchitectureGroup(linear, client_ids=(0, 1))}
      >>> public = fmd.public_dataset(np.eye(4))
      >>> private = fmd.stack_private(groups, {0: (np.eye(4)[:3], [0, 1, 1]), 1: (np.eye(4)[2:], [1, 0])})
      >>> test = fmd.labelled_dataset(np.eye(4), [0, 1, 1, 0])
      >>> federation = fmd.fedmd(groups, subset_size=2)
      >>> states = federation.init(jax.random.key(0), public, private)
      >>> federation
      Federation(clients={'linear': 2})
      >>> federation.evaluate(states, test)["linear"].accuracy.tolist()  # without training all examples get class 0
      [0.5, 0.5]
    """

    groups: Groups
    mesh: Mesh | None
    algorithm: Algorithm
    server: Architecture | None
    programs: Mapping[str, jax.stages.Wrapped]
    public_training: TrainingConfig
    private_training: TrainingConfig
    _check: Callable[..., None]
    _shard: Callable[[Mapping[str, Any]], Mapping[str, Any]]

    def __repr__(self) -> str:
        sizes = {name: group.num_clients for name, group in self.groups.items()}
        algorithm = "" if self.algorithm.name == "fedmd" else f", algorithm={self.algorithm.name!r}"
        devices = "" if self.mesh is None else f", devices={self.mesh.size}"
        return f"Federation(clients={sizes}{algorithm}{devices})"

    def check(self, public: PublicDataset, private: Private, *others: PrivateDataset | Private) -> None:
        """Raises ValueError if the data does not fit the networks or the settings; `others` are test or pooled data."""
        self._check(public, private, *others)

    def init(self, key: chex.PRNGKey, public: PublicDataset, private: Private) -> States:
        """Fresh clients, after `check`."""
        self.check(public, private)
        return self.new_states(key, public.inputs[:1])

    def new_states(
        self, key: chex.PRNGKey, inputs: chex.Array, client_ids: Mapping[str, chex.Array] | None = None
    ) -> States:
        """Fresh clients without `check`, for inputs [B, ...]; of a cohort if `client_ids`, [n] per group, are given."""
        return self.programs["new_states"](key, inputs, client_ids)

    def pretrain(
        self, states: States, public: PublicDataset, key: chex.PRNGKey, validation: Validation | None = None
    ) -> Trained:
        """The public half of transfer learning: every client trains on the labelled public dataset."""
        return self._call("pretrain", states, public, key, validation)

    def train_private(
        self, states: States, private: Private, key: chex.PRNGKey, validation: Validation | None = None
    ) -> Trained:
        """The private half of transfer learning: every client trains on its own dataset."""
        return self._call("train_private", states, private, key, validation)

    def train_pooled(
        self, states: States, pooled: PrivateDataset, key: chex.PRNGKey, validation: Validation | None = None
    ) -> Trained:
        """Every client trains on ONE unstacked dataset, the private examples of all clients together.

        From pretrained states this is the upper bound of the paper. The states are not donated.
        """
        return self._call("train_pooled", states, pooled, key, validation)

    def revisit(
        self,
        states: States,
        private: Private,
        key: chex.PRNGKey,
        participants: Participants | None = None,
        learning_rate_factor: chex.Numeric | None = None,
    ) -> Trained:
        """The private half of the round with this key: the local-only baseline."""
        return self._call("revisit", states, private, key, participants, **_given_factor(learning_rate_factor))

    @property
    def has_server_state(self) -> bool:
        """Whether the server remembers something between rounds or has a network, so that rounds need `start`."""
        return self.server is not None or self.algorithm.new_memory is not None

    def start(self, states: States, public: PublicDataset, key: chex.PRNGKey) -> Any:
        """The states before the first round: the clients, and what the server has then, if it has something.

        A network of the server is initialized, and trained on the public dataset as the clients are, if it has labels.
        `run_federation` calls it.
        """
        if not self.has_server_state:
            return states
        # Replicated as a round returns it, which is then compiled once.
        return FederationState(states, *replicate(self.programs["new_server"](public, key), self.mesh))

    def round(
        self,
        states: AnyStates,
        public: PublicDataset,
        private: Private,
        key: chex.PRNGKey,
        participants: Participants | None = None,
        learning_rate_factor: chex.Numeric | None = None,
    ) -> tuple[AnyStates, RoundInfo]:
        """One round of the algorithm, see `fedmd_round` and `algorithms`; states are those of `start`."""
        if self.has_server_state and not isinstance(states, FederationState):
            raise ValueError("the server has a state in this algorithm: call federation.start before the first round")
        factor = _given_factor(learning_rate_factor)
        return self._call("round", states, public, private, key, participants=participants, **factor)

    def score(
        self, states: States, public: PublicDataset, key: chex.PRNGKey, participants: Participants | None = None
    ) -> Mapping[str, chex.Array]:
        """The first half of the round with this key: what each client sends, per group [K, M, C], after `transforms`.

        All clients draw the same public subset from the key. `score`, an average of your own and `learn` make a round;
        a client that is deployed alone is a federation of one client.
        """
        return self._call("score", states, public, key, participants)

    def learn(
        self,
        states: States,
        public: PublicDataset,
        private: Private,
        consensus: chex.Array,
        key: chex.PRNGKey,
        participants: Participants | None = None,
        learning_rate_factor: chex.Numeric | None = None,
    ) -> tuple[States, RoundInfo]:
        """The second half of the round with this key: digest of a consensus [M, C], then revisit."""
        factor = _given_factor(learning_rate_factor)
        return self._call("learn", states, public, private, consensus, key, participants, **factor)

    def evaluate(
        self, states: States | FederationState, test: PrivateDataset | Private, *, confusion: bool = False
    ) -> Mapping[str, Evaluation]:
        """Accuracy and loss per group [K], on one unstacked dataset for all clients or a stacked one per group.

        With `confusion` also the number of examples by label and predicted class, [K, C, C]: which classes a client
        mistakes for which others. `Evaluation.class_accuracy`, [K, C], is the accuracy of each client on each class;
        `fmd.plot.confusion_matrix` draws the counts.
        """
        return self._call("confusion" if confusion else "evaluate", split_states(states).clients, test)

    def evaluate_server(self, states: States | FederationState, test: PrivateDataset | Private) -> Evaluation | None:
        """Accuracy and loss of the server's network, []; None if it has none or each client has its own test data."""
        if self.server is None or isinstance(test, Mapping):
            return None
        return self.programs["evaluate_server"](split_states(states).model, test)

    def shard(self, clients: Mapping[str, Any]) -> Mapping[str, Any]:
        """Moves stacked clients or data, [K, ...] per group, to their devices; returns them unchanged without a mesh.

        The result is a `ShardedClients`. For private data and for states from a checkpoint; results of the methods are
        sharded already. `gather_clients` is its inverse.
        """
        return self._shard(clients)

    def put(self, data: Any) -> Any:
        """Moves data, or its shapes, to the devices that need it; returns it unchanged without a mesh.

        Args:
          data: a mapping of groups, [K, ...], which is sharded, or any other tree, which is replicated.
        """
        return self.shard(data) if isinstance(data, Mapping) else replicate(data, self.mesh)

    def transfer_learn(
        self,
        states: States,
        public: PublicDataset,
        private: Private,
        key: chex.PRNGKey,
        public_validation: Validation | None = None,
        private_validation: Validation | None = None,
        *,
        participants: Participants | None = None,
    ) -> tuple[States, TransferInfo]:
        """Both halves of transfer learning: training on the public dataset, then on the private datasets.

        Args:
          states: clients from `init`; donated.
          public: the public dataset, labelled.
          private: per group, stacked private datasets.
          key: key for shuffling and dropout.
          public_validation: validation data, if the first half has early stopping: one unstacked dataset for all
            clients, or a stacked one per group.
          private_validation: the same for the second half.
          participants: the clients that are given, if these are not all clients.

        Returns:
          The clients, and the `TrainingInfo` of each half, per group. `run_federation(..., transfer=info)` records it
          in the history.

        Raises:
          ValueError: a half has early stopping without validation data or the reverse, or the states were donated to an
            earlier call; nothing is consumed then.

        Warns:
          UserWarning: the training of a client ended in NaN or infinity and was reverted.
        """
        check_validation(self.public_training, public_validation, "public_training: ")
        check_validation(self.private_training, private_validation, "private_training: ")
        key_public, key_private = jax.random.split(key)
        of_cohort = {"participants": participants}
        states, first = self._call("pretrain", states, public, key_public, public_validation, **of_cohort)
        states, second = self._call("train_private", states, private, key_private, private_validation, **of_cohort)
        info = TransferInfo(first, second)
        ids = group_client_ids(self.groups) if participants is None else participants.client_ids
        for phase, reverted in reverted_halves(ids, info).items():
            warnings.warn(f"{phase} for clients {reverted}: they stay as they were before it", stacklevel=2)
        return states, info

    def _call(self, program: str, states: States | FederationState, *arguments: Any, **settings: Any) -> Any:
        """Calls a program, and refuses states that were donated to an earlier call."""
        if program not in self.programs:
            raise ValueError(
                f"{program} is a half of a round of FedMD: only federations of `fmd.fedmd` without `statistics` have it"
            )
        if isinstance(states, FederationState) and (program != "round" or not self.has_server_state):
            raise ValueError(
                f"{program} takes the clients alone, `states.clients`, got them with the state of the server"
            )
        if not isinstance(split_states(states).clients, Mapping):
            raise ValueError(f"the states of each group are needed, in a mapping, got a {type(states).__name__}")
        check_not_donated(states)
        return self.programs[program](states, *arguments, **settings)


def check_not_donated(states: chex.ArrayTree) -> None:
    """A `ValueError` if the arrays of states were donated to a call before, as by running a notebook cell twice."""
    arrays = [leaf for leaf in jax.tree.leaves(states) if isinstance(leaf, jax.Array)]
    if any(leaf.is_deleted() for leaf in arrays if not isinstance(leaf, jax.core.Tracer)):
        raise ValueError(
            "these states were donated to an earlier call (transfer_learn, pretrain, train_private, revisit, round or "
            "a run of them): use what it returned, or copy them first with jax.tree.map(jnp.copy, states)"
        )


def fedmd(
    groups: Groups,
    *,
    subset_size: int = 5000,
    public_training: TrainingConfig = TrainingConfig(num_epochs=20, batch_size=128),
    private_training: TrainingConfig = TrainingConfig(num_epochs=25, batch_size=32),
    pooled_training: TrainingConfig = TrainingConfig(num_epochs=50, batch_size=32),
    digest_training: TrainingConfig = TrainingConfig(num_epochs=1, batch_size=256),
    revisit_training: TrainingConfig = TrainingConfig(num_epochs=2, batch_size=5),
    distance: Distance = mae,
    draw_subset: Callable = draw_public_subset,
    transforms: Sequence[Transform] = (),
    aggregator: Aggregator = weighted_mean,
    statistics: Callable | None = None,
    keep_statistics: bool = True,
    clients_per_chunk: ClientsPerChunk = "auto",
    mesh: Mesh | None = None,
    costs: Mapping[str, float] | None = None,
) -> Federation:
    """Makes a federation of architecture groups. Each phase is one jit-compiled program.

    Args:
      groups: name -> architecture, client ids and consensus weights.
      subset_size: number of public examples per round.
      public_training: settings of transfer learning on the public dataset.
      private_training: settings of transfer learning on private data, which shares its optimizer state with the
        revisits.
      pooled_training: settings of the pooled upper bound.
      digest_training: settings of the digest of each round.
      revisit_training: settings of the revisit of each round.
      distance: `mae`, `kl` or any (logits [B, C], targets [B, C]) -> [B].
      draw_subset: (key, public, size) -> the public subset of a round.
      transforms: functions that each client applies to its scores before it sends them, in this order: (scores [M, C],
        key) -> scores. `partial(clip_scores, bound=10.0)` is one.
      aggregator: combines the scores of all clients into the consensus, see `aggregators`.
      statistics: as in `make_federation`. With them there are no `Federation.score` and `Federation.learn`.
      keep_statistics: as in `make_federation`.
      clients_per_chunk: number of clients of a group that run at once on a device, in every phase; chunks run one after
        the other. One number for all groups, or one per group; None for all clients, "auto" for the fastest
        (`choose_chunk`). It bounds memory and changes results by rounding only.
      mesh: devices over which the clients are sharded: groups with at least as many clients as devices in equal parts,
        smaller groups client by client.
      costs: cost of a client of each group, in any unit, as from `client_costs`, to balance the clients of small groups
        over the devices. Equal by default.

    Returns:
      The federation. Defaults are those of the released code for letters (iid), without its early stopping.

    Raises:
      ValueError: no group, a client in two groups, early stopping in a round, a subset size below 1, an invalid
        `clients_per_chunk`, a group without a cost.

    References:
      Li and Wang 2019, Algorithm 1; settings from the configurations of the released code.

    Example:
      >>> from functools import partial
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> small, large = (fmd.architecture_from_linen(fmd.models.MLP((n,), num_classes=3)) for n in (4, 8))
      >>> groups = {"small": fmd.ArchitectureGroup(small, (0, 1)), "large": fmd.ArchitectureGroup(large, (2,))}
      >>> federation = fmd.fedmd(
      ...     groups,
      ...     subset_size=100,
      ...     revisit_training=fmd.TrainingConfig(num_epochs=1),
      ...     distance=partial(fmd.kl, temperature=2.0))
      >>> federation
      Federation(clients={'small': 2, 'large': 1})
      >>> federation.new_states(jax.random.key(0), jnp.zeros((1, 4)))["small"].params["head"]["kernel"].shape
      (2, 4, 3)
    """
    algorithm = fedmd_algorithm(distance=distance, aggregator=aggregator)
    federation = make_federation(
        groups,
        algorithm,
        statistics=statistics,
        keep_statistics=keep_statistics,
        subset_size=subset_size,
        public_training=public_training,
        private_training=private_training,
        pooled_training=pooled_training,
        digest_training=digest_training,
        revisit_training=revisit_training,
        draw_subset=draw_subset,
        transforms=transforms,
        clients_per_chunk=clients_per_chunk,
        mesh=mesh,
        costs=costs,
    )
    if statistics is not None:
        return federation
    over: dict = {"groups": groups, "mesh": mesh, "clients_per_chunk": clients_per_chunk}

    def score_groups(states, public, key, participants=None):
        participants, keys = complete_participants(participants, groups, mesh), round_keys(key)
        subset = draw_subset(keys.subset, public, subset_size)
        score_clients = map_groups(partial(report, transforms=transforms), (0, None, 0), **over)
        return score_clients(states, subset.inputs, group_keys(keys.transform, participants.client_ids))

    def learn_groups(states, public, private, consensus, key, participants=None, learning_rate_factor=None):
        participants, keys = complete_participants(participants, groups, mesh), round_keys(key)
        inputs = draw_subset(keys.subset, public, subset_size).inputs
        trainings = _round_trainings(digest_training, revisit_training, learning_rate_factor)
        half = partial(learn, **trainings, distance=distance, **over)
        return half(states, inputs, consensus, jnp.array(True), private, keys, participants)

    halves = _compiled({"score": score_groups, "learn": learn_groups})
    return dataclasses.replace(federation, programs={**federation.programs, **halves})


def make_federation(
    groups: Groups,
    algorithm: Algorithm,
    *,
    server: Architecture | None = None,
    statistics: Callable | None = None,
    keep_statistics: bool = True,
    subset_size: int = 5000,
    public_training: TrainingConfig = TrainingConfig(num_epochs=20, batch_size=128),
    private_training: TrainingConfig = TrainingConfig(num_epochs=25, batch_size=32),
    pooled_training: TrainingConfig = TrainingConfig(num_epochs=50, batch_size=32),
    digest_training: TrainingConfig = TrainingConfig(num_epochs=1, batch_size=256),
    revisit_training: TrainingConfig = TrainingConfig(num_epochs=2, batch_size=5),
    draw_subset: Callable = draw_public_subset,
    transforms: Sequence[Transform] = (),
    clients_per_chunk: ClientsPerChunk = "auto",
    mesh: Mesh | None = None,
    costs: Mapping[str, float] | None = None,
) -> Federation:
    """Makes a federation whose rounds are those of an algorithm, such as `fmd.algorithms.ds_fl(temperature=0.1)`.

    Args:
      groups: name -> architecture, client ids and weights.
      algorithm: a member of the family, see `algorithms`.
      server: network of the server, one more client without private data; None for none.
      statistics: how clients compute batch statistics from the public subset before they score it, such as
        `fmd.client.estimate_statistics`; None: they score with their moving statistics.
      keep_statistics: whether these statistics replace the moving ones; otherwise they are for the scores only.
      subset_size: as in `fedmd`, and so are the other arguments.
      public_training: settings of transfer learning on the public dataset, also of the server's network.
      private_training: settings of transfer learning on private data.
      pooled_training: settings of the pooled upper bound.
      digest_training: settings of the digest of each round, also of the server's network.
      revisit_training: settings of the private training of each round.
      draw_subset: (key, public, size) -> the public subset of a round.
      transforms: functions that each client applies to what it sends.
      clients_per_chunk: number of clients of a group that run at once on a device.
      mesh: devices over which the clients are sharded.
      costs: cost of a client of each group.

    Returns:
      The federation.

    Raises:
      ValueError: as in `fedmd`, or a network of the server or statistics that the algorithm has no use for.

    Example:
      >>> import fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.MLP((4,), num_classes=3))
      >>> groups = {"small": fmd.ArchitectureGroup(network, (0, 1))}
      >>> fmd.make_federation(groups, fmd.algorithms.ds_fl(temperature=0.1), subset_size=100)
      Federation(clients={'small': 2}, algorithm='ds-fl')
    """
    check_groups(groups)
    check_count("subset_size", subset_size)
    check_chunks(clients_per_chunk, groups)
    if digest_training.early_stopping or revisit_training.early_stopping:
        raise ValueError("early stopping is for transfer learning and the pooled bound, not for digest and revisit")
    if statistics is not None and not algorithm.takes_server_model:
        raise ValueError(f"clients of {algorithm.name} do not score a public subset, so there are no statistics of it")
    if server is not None and not algorithm.takes_server_model:
        raise ValueError(f"{algorithm.name} has no use for a network of the server, got one")
    if costs is not None:
        check_costs(costs, groups)
    over: dict = {"groups": groups, "mesh": mesh, "clients_per_chunk": clients_per_chunk}

    def check(public, private, *others):
        check_data(groups, subset_size, public, private, *others)
        # What it refuses is refused before anything is trained.
        jax.eval_shape(lambda key, public: draw_subset(key, public, subset_size), jax.random.key(0), public)
        if algorithm.check is not None:
            algorithm.check(groups, public.inputs)
        check_optimizers(groups, public.inputs, digest_training, revisit_training, private_training, pooled_training)

    def shard(clients):
        of_groups = None if costs is None else {name: costs[name] for name in clients}
        return shard_clients(clients, mesh, costs=of_groups)

    def start_keys(key, client_ids):
        """Keys of networks that the public dataset alone trains."""
        first = {name: jnp.full_like(ids, groups[name].client_ids[0]) for name, ids in client_ids.items()}
        return group_keys(key, first if algorithm.common_start else client_ids)

    def new_states(key, inputs, client_ids=None):
        client_ids = group_client_ids(groups) if client_ids is None else client_ids
        init_one = partial(init_client, digest=digest_training, revisit=revisit_training)
        init_clients = map_groups(init_one, (0, None, 0), groups=groups, mesh=mesh)
        return init_clients(shard(start_keys(key, client_ids)), inputs, shard(group_keys(key, client_ids)))

    def new_server(public, key):
        """What the server remembers, and its network."""
        memory = ()
        if algorithm.new_memory is not None:
            memory = algorithm.new_memory(
                groups, gather_clients(jax.eval_shape(new_states, key, public.inputs)), public
            )
        model: Any = ()
        if server is not None:
            key_init, key_train = jax.random.split(key)
            how: dict = {"digest": digest_training, "revisit": revisit_training}
            model = init_client(server, key_init, public.inputs[:1], **how)
            if public.labels is not None:
                training = dataclasses.replace(public_training, early_stopping=None)
                train_server = keep_if_finite(partial(pretrain, training=training), losses_count=False)
                model, _ = train_server(server, jnp.array(True), model, public, key_train)
        return constrain_replicated((memory, model), mesh)  # as the rounds take them

    def train(one_client, data_axis, training, *, losses_count=False, keys=group_keys):
        """One training phase of all clients; `data` is shared (`data_axis` None), or per group and client (0)."""
        # Before the rounds an epoch may have a non-finite loss, if the client recovers from it.
        train_one = keep_if_finite(partial(one_client, training=training), losses_count=losses_count)

        def train_groups(states, data, key, validation=None, *, participants=None):
            given = {name: groups[name] for name in states}
            client_ids, _, _, completed = complete_participants(participants, given, mesh)
            validation_axis = None if validation is None or isinstance(validation, PrivateDataset) else 0
            train_clients = map_groups(train_one, (0, 0, data_axis, 0, validation_axis), **over)
            return train_clients(completed, states, data, keys(key, client_ids), validation)

        return train_groups

    def revisit_groups(states, private, key, participants=None, learning_rate_factor=None):
        training = scale_learning_rate(revisit_training, learning_rate_factor)
        revisit_as_in_rounds = train(revisit, 0, training, losses_count=True)
        return revisit_as_in_rounds(states, private, round_keys(key).revisit, participants=participants)

    of_rounds: dict = {"subset_size": subset_size, "draw_subset": draw_subset, "transforms": transforms, **over}
    if server is not None:
        of_rounds |= {"server": server}
    if statistics is not None:
        of_rounds |= {"statistics": statistics, "keep_statistics": keep_statistics}

    def round_groups(states, public, private, key, participants=None, learning_rate_factor=None):
        trainings = _round_trainings(digest_training, revisit_training, learning_rate_factor)
        one_round = partial(algorithm.round, **of_rounds, **trainings)
        return one_round(states, public, private, key, participants=participants)

    def estimate_groups(states, public, key):
        """The clients with the batch statistics with which they score in the round with this key."""
        subset = draw_subset(round_keys(key).subset, public, subset_size)
        return map_groups(statistics, (0, None), **over)(states, subset.inputs)

    def evaluate_groups(states, test, confusion):
        evaluate_one = partial(evaluate, confusion=confusion)
        evaluate_clients = map_groups(evaluate_one, (0, None if isinstance(test, PrivateDataset) else 0), **over)
        return evaluate_clients(states, test)

    programs = {
        "new_states": new_states,
        "new_server": new_server,
        "pretrain": train(pretrain, None, public_training, keys=start_keys),
        "train_private": train(revisit, 0, private_training),
        "train_pooled": train(revisit, None, pooled_training),
        "revisit": revisit_groups,
        "round": round_groups,
        "evaluate": partial(evaluate_groups, confusion=False),
        "confusion": partial(evaluate_groups, confusion=True),
    }
    if server is not None:
        programs["evaluate_server"] = partial(evaluate, server)
    if statistics is not None:
        programs["estimate_statistics"] = estimate_groups
    return Federation(
        groups=groups,
        mesh=mesh,
        algorithm=algorithm,
        server=server,
        programs=_compiled(programs),
        public_training=public_training,
        private_training=private_training,
        _check=check,
        _shard=shard,
    )


def _round_trainings(
    digest_training: TrainingConfig, revisit_training: TrainingConfig, factor: chex.Numeric | None
) -> dict[str, Any]:
    """The settings of digest and revisit in a round with this factor of the learning rate."""
    return {
        "digest_training": scale_learning_rate(digest_training, factor),
        "revisit_training": scale_learning_rate(revisit_training, factor),
    }


def _given_factor(factor: chex.Numeric | None) -> dict[str, chex.Array]:
    """The argument of a program; without a factor it is another program, which has no multiplication."""
    return {} if factor is None else {"learning_rate_factor": jnp.asarray(factor, jnp.float32)}


def vmap_federation(federation: Federation) -> Federation:
    """Maps the functions of a federation over several seeds, which may differ in their data.

    All arguments and results of `new_states`, `pretrain`, `train_private`, `train_pooled`, `revisit`, `round` and
    `evaluate` get a leading axis [S, ...]: keys, states, public and private data, and a factor of the learning rate.
    This fills a GPU with small federations; it is not faster on a CPU. `check`, `init`, `put` and `transfer_learn`
    still take one federation. Keys must be JAX's default keys (`threefry2x32`), since those of other generators depend
    on the whole batch.

    Args:
      federation: from `fedmd`, without a mesh.

    Returns:
      A federation whose results are those of the seeds one after the other, up to rounding.

    Raises:
      ValueError: the federation has a mesh.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> federation = fmd.fedmd({"linear": fmd.ArchitectureGroup(linear, (0, 1, 2))}, subset_size=4)
      >>> keys = jax.random.split(jax.random.key(0), 5)
      >>> states = fmd.vmap_federation(federation).new_states(keys, jnp.zeros((5, 1, 3)))
      >>> states["linear"].params.shape  # seeds, clients, inputs, outputs
      (5, 3, 3, 2)
    """
    if federation.mesh is not None:
        raise ValueError(f"federations are vmapped on one device, got one on a mesh of {federation.mesh.size}")
    # The functions inside `jax.jit`, which takes compiler options of the outermost call only.
    several = {name: jax.vmap(program.__wrapped__) for name, program in federation.programs.items()}  # type: ignore[attr-defined]
    return dataclasses.replace(federation, programs=_compiled(several))


def _compiled(programs: Mapping[str, Callable]) -> dict[str, jax.stages.Wrapped]:
    """The functions of a federation, each compiled at its first call."""
    compiled: dict[str, jax.stages.Wrapped] = {
        name: jax.jit(fn, donate_argnums=0 if name in _DONATING else ()) for name, fn in programs.items()
    }
    if (
        jax.default_backend() == "cpu" and "new_states" in programs
    ):  # it runs once, and random initializers compile six times faster so
        options = {"xla_backend_optimization_level": 1}
        compiled["new_states"] = jax.jit(programs["new_states"], compiler_options=options)
    return compiled


def check_rounds(num_rounds: int, first_round: int) -> None:
    """Raises ValueError if the number of rounds or of the first one is impossible."""
    check_count("num_rounds", num_rounds, minimum=0)
    check_count("first_round", first_round)


def server_key(key: chex.PRNGKey) -> chex.PRNGKey:
    """The key of `Federation.start`, from the key of the rounds; cohorts have the other keys of `fold_in(key, 0)`."""
    return jax.random.fold_in(jax.random.fold_in(key, 0), 0)


def _participants(federation: Federation, policy: ParticipationPolicy | None, round_: int) -> Participants | None:
    groups = federation.groups
    return None if policy is None else all_clients(groups, policy(round_, group_client_ids(groups)))


def run_federation(
    federation: Federation,
    states: AnyStates,
    public: PublicDataset,
    private: Private,
    key: chex.PRNGKey,
    *,
    num_rounds: int,
    test: PrivateDataset | Private,
    first_round: int = 1,
    transfer: TransferInfo | None = None,
    participation: ParticipationPolicy | None = None,
    learning_rate_schedule: Callable[[int], chex.Numeric] | None = None,
    callback: Callable[[RoundMetrics, States], Any] | None = None,
    progress: bool = False,
) -> tuple[AnyStates, History]:
    """Runs rounds and evaluates the clients before the first round and after each round.

    Args:
      federation: from `fedmd`.
      states: clients after transfer learning; donated, do not use them after the call.
      public: the public dataset.
      private: per group, stacked private datasets.
      key: key of the rounds, different from those of `init` and `transfer_learn`; round r uses `fold_in(key, r)`.
      num_rounds: number of rounds.
      test: one dataset for all clients, or a stacked one per group.
      first_round: number of the first of these rounds; 1 + r continues after r rounds, with bitwise the same results as
        an uninterrupted run.
      transfer: the `TransferInfo` of `transfer_learn`. If given, the status of a client in round 0 says whether a half
        of its transfer learning was reverted.
      participation: (round, client ids per group) -> participation record, such as `simulate_participation` makes; by
        default all clients take part.
      learning_rate_schedule: round -> factor of the learning rates of digest and revisit, such as `cosine_decay(20)`.
      callback: called with the metrics and the states after each evaluation. The next round donates those states: copy
        what you keep. `fmd.loggers` has some.
      progress: whether to show a bar over the rounds, with the mean accuracy; it says when a program is compiled.

    Returns:
      The clients and the history, [R + 1]; [R] if `first_round` is above 1, since the clients have been evaluated
      before. `fmd.plot.accuracy(history)` draws it, `history.to_dicts()` makes a table of it. Why a client is bad on a
      class: `federation.evaluate(states, test, confusion=True)`.

    Raises:
      ValueError: a negative number of rounds, a first round below 1, or data that does not fit the networks.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> groups = {"linear": fmd.ArchitectureGroup(linear, client_ids=(0, 1))}
      >>> public = fmd.public_dataset(np.eye(4))
      >>> private = fmd.stack_private(groups, {0: (np.eye(4)[:3], [0, 1, 1]), 1: (np.eye(4)[2:], [1, 0])})
      >>> test = fmd.labelled_dataset(np.eye(4), [0, 1, 1, 0])
      >>> training = fmd.TrainingConfig(batch_size=4, shuffle=False)
      >>> federation = fmd.fedmd(groups, subset_size=2, digest_training=training, revisit_training=training)
      >>> states = federation.init(jax.random.key(0), public, private)
      >>> states, history = fmd.run_federation(
      ...     federation, states, public, private, jax.random.key(1), num_rounds=2, test=test)
      >>> [(metrics.round, len(metrics.clients)) for metrics in history]
      [(0, 2), (1, 2), (2, 2)]
    """
    check_rounds(num_rounds, first_round)
    federation.check(public, private, test)
    public, private = map(federation.put, (public, private))
    if first_round == 1 and not isinstance(states, FederationState):
        states = federation.start(states, public, server_key(key))

    def step(states, key, participants, factor):
        return federation.round(states, public, private, key, participants, factor)

    def metrics_of(round_, evaluations, info):
        return round_metrics(federation.groups, round_, evaluations, info)

    rounds: dict[str, Any] = {
        "num_rounds": num_rounds,
        "first_round": first_round,
        "test": test,
        "transfer": transfer,
    }
    how: dict[str, Any] = {"participation": participation, "callback": callback, "progress": progress}
    how |= {"learning_rate_schedule": learning_rate_schedule}
    return _run(federation, states, key, step, metrics_of, **rounds, **how)


def cosine_decay(num_rounds: int) -> Callable[[int], float]:
    """Factors of the learning rate that fall along half a cosine: 1 in round 1, and 0 would follow the last round.

    Args:
      num_rounds: number of all rounds, at least 1, also of those before `first_round` of `run_federation`.

    Returns:
      round -> factor; a round that is not from 1 to `num_rounds` is a `ValueError`.

    Raises:
      ValueError: a number below 1.

    Example:
      >>> import fedmd_jax as fmd
      >>> factor = fmd.simulation.cosine_decay(4)
      >>> [round(factor(round_), 2) for round_ in (1, 2, 3, 4)]
      [1.0, 0.85, 0.5, 0.15]
    """
    check_count("num_rounds", num_rounds)

    def factor(round_: int) -> float:
        if not 1 <= round_ <= num_rounds:
            raise ValueError(f"learning rates decay over rounds 1 to {num_rounds}, got round {round_}")
        return 0.5 * (1 + math.cos(math.pi * (round_ - 1) / num_rounds))

    return factor


def _run(
    federation: Federation,
    states: Any,
    key: chex.PRNGKey,
    step: Callable[[Any, chex.PRNGKey, Participants | None, chex.Numeric | None], tuple[Any, Any]],
    metrics_of: Callable[[int, Mapping[str, Evaluation], Any], RoundMetrics],
    *,
    num_rounds: int,
    first_round: int,
    test: PrivateDataset | Private,
    transfer: TransferInfo | None,
    participation: ParticipationPolicy | None,
    learning_rate_schedule: Callable[[int], chex.Numeric] | None,
    callback: Callable[[RoundMetrics, Any], Any] | None,
    progress: bool,
) -> tuple[Any, History]:
    """Runs rounds of a kind: `step` makes one, `metrics_of` gives what is recorded of it."""
    test, history = federation.put(test), History()
    with show_rounds(progress, first_round, num_rounds) as shown:
        for round_ in range(0 if first_round == 1 else first_round, first_round + num_rounds):
            info = None
            if round_ <= first_round:
                shown.phase("compiling ...")
            if round_ > 0:
                participants = _participants(federation, participation, round_)
                factor = None if learning_rate_schedule is None else learning_rate_schedule(round_)
                states, info = step(states, jax.random.fold_in(key, round_), participants, factor)
            evaluations, server = federation.evaluate(states, test), federation.evaluate_server(states, test)
            shown.phase("rounds")
            metrics = with_server(metrics_of(round_, evaluations, info), server)
            if round_ == 0 and transfer is not None:
                metrics = with_faults(metrics, reverted_halves(group_client_ids(federation.groups), transfer))
            history.append(metrics)
            shown.round(metrics)
            if callback is not None:
                callback(metrics, states)
    return states, history


def run_local_only(
    federation: Federation,
    states: States,
    private: Private,
    key: chex.PRNGKey,
    *,
    num_rounds: int,
    test: PrivateDataset | Private,
    first_round: int = 1,
    transfer: TransferInfo | None = None,
    participation: ParticipationPolicy | None = None,
    learning_rate_schedule: Callable[[int], chex.Numeric] | None = None,
    callback: Callable[[RoundMetrics, States], Any] | None = None,
    progress: bool = False,
) -> tuple[States, History]:
    """The local-only baseline of `run_federation`: the same rounds without digests.

    Every client makes the same private steps as there, on the same batches with the same dropout, and in the same
    rounds, if `participation` and `learning_rate_schedule` are the same. A gain of FedMD over this baseline is not due
    to more training.

    Args:
      federation: from `fedmd`.
      states: clients after transfer learning; donated, do not use them after the call.
      private: per group, stacked private datasets.
      key: the key given to `run_federation`.
      num_rounds: number of rounds.
      test: as in `run_federation`, and so are the other arguments.
      first_round: number of the first of these rounds; 1 + r continues after r rounds.
      transfer: the `TransferInfo` of `transfer_learn`.
      participation: the policy given to `run_federation`.
      learning_rate_schedule: the one given to `run_federation`.
      callback: called with the metrics and the states after each evaluation.
      progress: whether a bar is shown.

    Returns:
      The clients and the history, as `run_federation`. A client whose training ended in NaN or infinity and was
      reverted has the status "revisit not finite". `fmd.plot.accuracy(history, local=...)` draws it.

    Raises:
      ValueError: a negative number of rounds, or a first round below 1.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> groups = {"linear": fmd.ArchitectureGroup(linear, client_ids=(0, 1))}
      >>> public, test = fmd.public_dataset(np.eye(4)), fmd.labelled_dataset(np.eye(4), [0, 1, 1, 0])
      >>> private = fmd.stack_private(groups, {0: (np.eye(4)[:3], [0, 1, 1]), 1: (np.eye(4)[2:], [1, 0])})
      >>> federation = fmd.fedmd(groups, subset_size=2)
      >>> states = federation.init(jax.random.key(0), public, private)
      >>> states, history = fmd.run_local_only(
      ...     federation, states, private, jax.random.key(1), num_rounds=2, test=test)
      >>> states["linear"].revisit_opt_state.count.tolist(), states["linear"].digest_opt_state.count.tolist()
      ([4, 4], [0, 0])
      >>> [metrics.round for metrics in history]
      [0, 1, 2]
    """
    check_rounds(num_rounds, first_round)
    private, client_ids = federation.put(private), group_client_ids(federation.groups)

    def step(states, key, participants, factor):
        states, info = federation.revisit(states, private, key, participants, factor)
        # The training of a dropped client is discarded in any case.
        return states, reverted_clients(client_ids, info, None if participants is None else participants.completed)

    def metrics_of(round_, evaluations, reverted):
        return with_faults(round_metrics(federation.groups, round_, evaluations, None), {REVISIT_FAULT: reverted or []})

    rounds: dict[str, Any] = {
        "num_rounds": num_rounds,
        "first_round": first_round,
        "test": test,
        "transfer": transfer,
    }
    how: dict[str, Any] = {"participation": participation, "callback": callback, "progress": progress}
    how |= {"learning_rate_schedule": learning_rate_schedule}
    return _run(federation, states, key, step, metrics_of, **rounds, **how)
