"""A whole federation: every phase compiled once, and the loop that runs the rounds."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmd_jax.attendance import AttendancePolicy, all_clients, complete_participants
from fedmd_jax.checks import check_count
from fedmd_jax.clients import Groups, check_groups, group_client_ids, group_keys
from fedmd_jax.consensus import Aggregator, weighted_mean
from fedmd_jax.datasets import Private, check_data, check_optimizers
from fedmd_jax.devices import map_groups
from fedmd_jax.evaluate import Evaluation, evaluate
from fedmd_jax.isolation import unless_broken
from fedmd_jax.local import Distance, Training, check_validation, init_client, pretrain, revisit
from fedmd_jax.losses import mae
from fedmd_jax.mapping import ClientsPerChunk, check_chunks
from fedmd_jax.metrics import RoundMetrics, reverted_clients, round_metrics, undone_clients, with_faults
from fedmd_jax.placement import check_costs
from fedmd_jax.round import Transform, fedmd_round, learn, report, round_keys
from fedmd_jax.spread import share_with_clients, spread_clients
from fedmd_jax.subset import draw_public_subset
from fedmd_jax.types import (
    ClientState,
    Participants,
    PrivateDataset,
    PublicDataset,
    RoundInfo,
    TrainingInfo,
    TransferInfo,
)

States = Mapping[str, ClientState]
Validation = PrivateDataset | Private  # one for everybody, or per group a stacked one


# The compiled functions of a federation, in the order in which a run goes through them.
PROGRAMS = ("new_states", "pretrain", "personalize", "round", "evaluate", "revisit", "pool", "score", "learn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Federation:
    """Compiled functions over all groups; all but `pool`, `score` and `evaluate` donate their `states` argument.

    `pretrain`, `personalize`, `pool`, `revisit`, `round`, `score` and `learn` take `participants=`: the clients that
    are given, if these are not all clients of the groups, and how far each gets in a round. `new_states` takes
    `client_ids=`, per group [n]. On one device all clients of some of the groups may be trained without it.

    A client that ends a phase of training with NaN or infinity is reverted: it stays as it was before that phase, and
    `finite` of that phase's `TrainingInfo` is False.

    Where `pretrain`, `personalize` or `pool` stops early, it takes a last argument, the validation data: one unstacked
    dataset for everybody, or per group a stacked one; where it does not, that is refused.

    Attributes:
      check: (public, private, *others) -> None. Raises `ValueError` where the data does not fit the networks or the
        settings; `others` are test or pooled data, which nothing else checks but `run_federation` its test data.
      init: (key, public, private) -> states, after `check`.
      new_states: (key, inputs [B, ...]) -> states, without a check.
      pretrain: (states, public, key) -> (states, TrainingInfo per group): transfer learning, public half.
      personalize: (states, private, key) -> (states, TrainingInfo per group): transfer learning, private half.
      pool: (states, pooled, key) -> (states, TrainingInfo per group): every client trains on ONE unstacked dataset, the
        private examples of all clients together; from pretrained states this is the upper bound of the paper.
      revisit: (states, private, key) -> (states, TrainingInfo per group): the private half of the round with this key.
      round: (states, public, private, key) -> (states, RoundInfo): `fedmd_round`.
      score: (states, public, key) -> scores per group [K, M, C]: what the clients send in the round with this key, on
        the public subset that the key draws.
      learn: (states, public, private, consensus [M, C], key) -> (states, RoundInfo): the other half of that round, from
        the consensus on. `score`, an average of your own and `learn` are a round; a client that is deployed alone is a
        federation of one client.
      evaluate: (states, test) -> Evaluation per group, [K]; `test` is one unstacked dataset for everybody, or per group
        a stacked one.
      spread: (what is per group, [K, ...]) -> the same on the devices of its clients, a `Spread` where there is a mesh:
        states, such as those of a checkpoint, or private data. Results are spread already; `gather_clients` is the way
        back.
      groups: who takes part.
      mesh: over which devices, or None.
      public_training: of `pretrain`.
      private_training: of `personalize`.
    """

    check: Callable[..., None]
    init: Callable[[chex.PRNGKey, PublicDataset, Private], States]
    new_states: Callable[[chex.PRNGKey, chex.Array], States]
    pretrain: Callable[[States, PublicDataset, chex.PRNGKey], tuple[States, Mapping[str, TrainingInfo]]]
    personalize: Callable[[States, Private, chex.PRNGKey], tuple[States, Mapping[str, TrainingInfo]]]
    pool: Callable[[States, PrivateDataset, chex.PRNGKey], tuple[States, Mapping[str, TrainingInfo]]]
    revisit: Callable[[States, Private, chex.PRNGKey], tuple[States, Mapping[str, TrainingInfo]]]
    round: Callable[[States, PublicDataset, Private, chex.PRNGKey], tuple[States, RoundInfo]]
    score: Callable[[States, PublicDataset, chex.PRNGKey], Mapping[str, chex.Array]]
    learn: Callable[[States, PublicDataset, Private, chex.Array, chex.PRNGKey], tuple[States, RoundInfo]]
    evaluate: Callable[[States, PrivateDataset | Private], Mapping[str, Evaluation]]
    spread: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    groups: Groups
    mesh: Mesh | None
    public_training: Training
    private_training: Training

    def put(self, data: Any) -> Any:
        """Data, or its shapes, where the programs want it: as it is where there is no mesh.

        Args:
          data: what is per group, [K, ...], goes to the devices of its clients, all else to every device.
        """
        return self.spread(data) if isinstance(data, Mapping) else share_with_clients(data, self.mesh)

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
        """Both halves of transfer learning: the public dataset, then each client's own.

        Args:
          states: clients as `init` makes them; consumed.
          public: the public dataset, labelled.
          private: per group, stacked private datasets.
          key: shuffling and dropout.
          public_validation: where the first half stops early, what it looks at: one unstacked dataset for everybody, or
            per group a stacked one.
          private_validation: the same for the second half.
          participants: the clients that are given, if these are not all clients.

        Returns:
          The clients, and the `TrainingInfo` of each half, per group. `run_federation(..., transfer=info)` takes note
          of it in its history.

        Raises:
          ValueError: a half has early stopping without validation data or the reverse, or the states were donated to an
            earlier call; nothing is consumed then.

        Warns:
          UserWarning: the training of a client ended in NaN or infinity and was reverted.
        """
        check_validation(self.public_training, public_validation, "public_training: ")
        check_validation(self.private_training, private_validation, "private_training: ")
        key_public, key_private = jax.random.split(key)
        states, first = self.pretrain(states, public, key_public, public_validation, participants=participants)
        states, second = self.personalize(states, private, key_private, private_validation, participants=participants)
        info = TransferInfo(first, second)
        ids = group_client_ids(self.groups) if participants is None else participants.client_ids
        for phase, reverted in reverted_clients(ids, info).items():
            warnings.warn(f"{phase} for clients {reverted}: they stay as they were before it", stacklevel=2)
        return states, info


def fedmd(
    groups: Groups,
    *,
    subset_size: int = 5000,
    public_training: Training = Training(num_epochs=20, batch_size=128),
    private_training: Training = Training(num_epochs=25, batch_size=32),
    pooled_training: Training = Training(num_epochs=50, batch_size=32),
    digest_training: Training = Training(num_epochs=1, batch_size=256),
    revisit_training: Training = Training(num_epochs=2, batch_size=5),
    distance: Distance = mae,
    draw_subset: Callable = draw_public_subset,
    transforms: Sequence[Transform] = (),
    aggregator: Aggregator = weighted_mean,
    clients_per_chunk: ClientsPerChunk = "auto",
    mesh: Mesh | None = None,
    costs: Mapping[str, float] | None = None,
) -> Federation:
    """A federation of these groups, each of its phases one jit-compiled program.

    Args:
      groups: name -> architecture, client ids and consensus weights.
      subset_size: public examples per round.
      public_training: transfer learning on the public dataset.
      private_training: transfer learning on private data; shares its optimizer memory with the revisits.
      pooled_training: the upper bound.
      digest_training: towards the consensus, each round.
      revisit_training: towards the private labels, each round.
      distance: `mae`, `kl` or any (logits [B, C], targets [B, C]) -> [B].
      draw_subset: which public subset a round uses.
      transforms: what each client does to its scores before they leave it, in this order: (scores [M, C], key) ->
        scores. `partial(bound_scores, bound=10.0)` is one.
      aggregator: how the scores of all clients become the consensus; see `consensus`.
      clients_per_chunk: in every phase, how many clients of a group run at once on a device, the others one chunk after
        the other: one number for all groups, or per group; None is all, "auto" what is fastest (`choose_chunk`).
        Bounds memory, changes no more than rounding.
      mesh: devices over which the clients are spread: those of a group with at least as many clients as devices in
        equal parts, of smaller groups whole clients, each device with networks of its own.
      costs: what a client of each group costs, in any unit, as `client_costs` counts it: balances the clients of small
        groups over the devices. All the same by default.

    Returns:
      The federation. Defaults are those of the released code for letters (iid), without its early stopping.

    Raises:
      ValueError: no group, a client in two groups, early stopping in a round, a subset size below 1, a score bound
        that is not positive, a chunk of no client or of no group, a group without a cost.

    References:
      Li and Wang 2019, Algorithm 1; settings from the configurations of the released code.
    """
    check_groups(groups)
    check_count("subset_size", subset_size)
    check_chunks(clients_per_chunk, groups)
    if digest_training.early_stopping or revisit_training.early_stopping:
        raise ValueError("early stopping is of transfer learning and of the pooled bound, not of digest and revisit")
    if costs is not None:
        check_costs(costs, groups)
    init_one = partial(init_client, digest=digest_training, revisit=revisit_training)

    def check(public, private, *others):
        check_data(groups, subset_size, public, private, *others)
        check_optimizers(
            groups,
            public.inputs,
            before=[private_training.optimizer, pooled_training.optimizer],
            revisit=revisit_training.optimizer,
            digest=digest_training.optimizer,
        )

    everybody = {"groups": groups, "mesh": mesh, "clients_per_chunk": clients_per_chunk}

    def spread(clients):
        of_groups = None if costs is None else {name: costs[name] for name in clients}
        return spread_clients(clients, mesh, costs=of_groups)

    def new_states(key, inputs, client_ids=None):
        client_ids = group_client_ids(groups) if client_ids is None else client_ids
        init_clients = map_groups(init_one, (0, None), groups=groups, mesh=mesh)
        return init_clients(spread(group_keys(key, client_ids)), inputs)

    def train(one_client, data_axis, training, *, losses_count=False):
        """One training phase of every client of every group; `data` is shared, or per group and client."""

        def train_one(architecture, *arguments):
            # Before the rounds an epoch may have a non-finite loss, if the client recovers from it.
            one = unless_broken(partial(one_client, architecture, training=training), losses_count=losses_count)
            return one(*arguments)

        def train_groups(states, data, key, validation=None, *, participants=None):
            completed_axis, completed = None, jnp.array(True)
            if participants is not None and participants.completed is not None:
                participants = complete_participants(participants, groups, mesh)
                completed_axis, completed = 0, participants.completed
            given = {name: groups[name] for name in states}
            client_ids = group_client_ids(given) if participants is None else participants.client_ids
            validation_axis = None if validation is None or isinstance(validation, PrivateDataset) else 0
            in_axes = (completed_axis, 0, data_axis, 0, validation_axis)
            train_clients = map_groups(train_one, in_axes, **everybody)
            return train_clients(completed, states, data, group_keys(key, client_ids), validation)

        return train_groups

    def revisit_groups(states, private, key, participants=None):
        revisit_as_in_rounds = train(revisit, 0, revisit_training, losses_count=True)
        return revisit_as_in_rounds(states, private, round_keys(key).revisit, participants=participants)

    to_learn = {"digest_training": digest_training, "revisit_training": revisit_training, "distance": distance}
    to_report = {"transforms": transforms}
    round_ = partial(
        fedmd_round,
        subset_size=subset_size,
        draw_subset=draw_subset,
        aggregator=aggregator,
        **to_report,
        **to_learn,
        **everybody,
    )

    def score_groups(states, public, key, participants=None):
        participants, keys = complete_participants(participants, groups, mesh), round_keys(key)
        subset = draw_subset(keys.subset, public, subset_size)
        score_clients = map_groups(partial(report, **to_report), (0, None, 0), **everybody)
        return score_clients(states, subset.inputs, group_keys(keys.transform, participants.client_ids))

    def learn_groups(states, public, private, consensus, key, participants=None):
        participants, keys = complete_participants(participants, groups, mesh), round_keys(key)
        inputs = draw_subset(keys.subset, public, subset_size).inputs
        half = partial(learn, **to_learn, **everybody)
        return half(states, inputs, consensus, jnp.array(True), private, keys, participants)

    def evaluate_groups(states, test):
        evaluate_clients = map_groups(evaluate, (0, None if isinstance(test, PrivateDataset) else 0), **everybody)
        return evaluate_clients(states, test)

    programs = {
        "new_states": new_states,
        "pretrain": train(pretrain, None, public_training),
        "personalize": train(revisit, 0, private_training),
        "pool": train(revisit, None, pooled_training),
        "revisit": revisit_groups,
        "round": round_,
        "evaluate": evaluate_groups,
        "score": score_groups,
        "learn": learn_groups,
    }
    programs = {name: compile_program(name, program) for name, program in programs.items()}

    def init(key, public, private):
        check(public, private)
        return programs["new_states"](key, public.inputs[:1])

    return Federation(
        check=check,
        init=init,
        **programs,
        spread=spread,
        groups=groups,
        mesh=mesh,
        public_training=public_training,
        private_training=private_training,
    )


def vmap_federation(federation: Federation) -> Federation:
    """The same programs for several federations at once, which differ in seeds and data: one program for all of them.

    Everything that `new_states`, `pretrain`, `personalize`, `pool`, `revisit`, `round` and `evaluate` take and give has
    a leading axis [S, ...] then: keys, states, public and private data. On a GPU small federations fill the device that
    way; a CPU gains nothing. `check`, `init`, `put` and `transfer_learn` are of one federation, as before; keys must be
    JAX's own (`threefry2x32`), since what others give depends on the whole batch.

    Args:
      federation: from `fedmd`, without a mesh.

    Returns:
      A federation whose results differ from those of one after the other by rounding at most.

    Raises:
      ValueError: it is spread over the devices of a mesh.

    >>> import fedmd_jax as fmd
    >>> def init(key, inputs):
    ...     return jax.random.normal(key, (inputs.shape[1], 2)), {}
    >>> linear = fmd.Architecture(init, lambda params, state, inputs, **_: (inputs @ params, state))
    >>> federation = fmd.fedmd({"linear": fmd.ArchitectureGroup(linear, (0, 1, 2))}, subset_size=4)
    >>> keys = jax.random.split(jax.random.key(0), 5)
    >>> states = vmap_federation(federation).new_states(keys, jnp.zeros((5, 1, 3)))
    >>> states["linear"].params.shape  # seeds, clients, inputs, outputs
    (5, 3, 3, 2)
    """
    if federation.mesh is not None:
        raise ValueError(f"federations are batched on one device, got one on a mesh of {federation.mesh.size}")
    # What `jax.jit` has wrapped: it takes compiler options of the outermost only.
    one = {name: getattr(federation, name).__wrapped__ for name in PROGRAMS}
    several = {name: compile_program(name, jax.vmap(program)) for name, program in one.items()}
    return dataclasses.replace(federation, **several)


def compile_program(name: str, fn: Callable) -> Callable:
    """One of `PROGRAMS`, compiled when it is called first; it refuses states that an earlier call has consumed."""
    compiled = jax.jit(fn, **_jit_options(name))
    return compiled if name == "new_states" else TakesStates(compiled)


class TakesStates:
    """A jit-compiled function of states that refuses those which an earlier call has consumed.

    Attributes:
      lower: as that of `jax.jit`.
    """

    def __init__(self, compiled: Callable):
        self._compiled = compiled
        self.__wrapped__ = compiled.__wrapped__
        self.lower = compiled.lower

    def __call__(self, states, *arguments, **settings):
        """Compiles the function for these shapes, if needed, and calls it."""
        if not isinstance(states, Mapping):
            raise ValueError(f"the states of each group are needed, in a mapping, got a {type(states).__name__}")
        check_not_donated(states)
        return self._compiled(states, *arguments, **settings)


def check_not_donated(states: chex.ArrayTree) -> None:
    """A `ValueError` if the arrays of states were donated to a call before, as by running a notebook cell twice."""
    leaves = [leaf for leaf in jax.tree.leaves(states) if isinstance(leaf, jax.Array)]
    if any(leaf.is_deleted() for leaf in leaves if not isinstance(leaf, jax.core.Tracer)):
        raise ValueError(
            "these states were donated to an earlier call (transfer_learn, pretrain, personalize, revisit, round or a "
            "run of them): use what it returned, or copy them first with jax.tree.map(jnp.copy, states)"
        )


def _jit_options(program: str) -> dict[str, Any]:
    """How each program of a federation is compiled, of one or of several."""
    donates = program in ("pretrain", "personalize", "revisit", "round", "learn")
    once = program == "new_states"
    return ({"donate_argnums": 0} if donates else {}) | ({"compiler_options": _run_once()} if once else {})


def _run_once() -> dict[str, Any]:
    """Compiler options of a program that runs once: on a CPU random initialisers take six times as long to compile."""
    return {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}


def _check_num_rounds(num_rounds: int) -> None:
    check_count("num_rounds", num_rounds, minimum=0)


def _participants(federation: Federation, attendance: AttendancePolicy | None, round_: int) -> Participants | None:
    if attendance is None:
        return None
    return all_clients(federation.groups, attendance(round_, group_client_ids(federation.groups)))


def run_federation(
    federation: Federation,
    states: States,
    public: PublicDataset,
    private: Private,
    key: chex.PRNGKey,
    *,
    num_rounds: int,
    test: PrivateDataset | Private,
    first_round: int = 1,
    transfer: TransferInfo | None = None,
    attendance: AttendancePolicy | None = None,
    callback: Callable[[RoundMetrics, States], Any] | None = None,
) -> tuple[States, list[RoundMetrics]]:
    """Runs the rounds, evaluating before each digest, so that the history has one entry more than there are rounds.

    Args:
      federation: from `fedmd`.
      states: clients after transfer learning; consumed (donated), use the result instead.
      public: the public dataset.
      private: per group, stacked private datasets.
      key: of the rounds, another one than for `init` and `transfer_learn`; round r uses `fold_in(key, r)`.
      num_rounds: R.
      test: one dataset for everybody, or per group a stacked one.
      first_round: the number of the first of these rounds; 1 + r goes on where r rounds have been run, and ends with
        the same bits as if it had not been interrupted.
      transfer: what `transfer_learn` returned beside the states: the status of a client in round 0 tells whether a half
        of its transfer learning was reverted.
      attendance: (round, client ids per group) -> who takes part, such as `simulate_attendance` makes; by default
        everybody.
      callback: called with the metrics and the states after each of the R + 1 evaluations. The next round consumes
        those states: copy what you keep.

    Returns:
      The clients and the history, [R + 1]; [R] where it goes on, since the clients have been evaluated before.

    Raises:
      ValueError: a negative number of rounds, a first round below 1, or data that does not fit the networks.
    """
    _check_num_rounds(num_rounds)
    check_count("first_round", first_round)
    federation.check(public, private, test)
    public, private, test = map(federation.put, (public, private, test))
    client_ids = group_client_ids(federation.groups)
    history = []
    for round_ in range(0 if first_round == 1 else first_round, first_round + num_rounds):
        info = None
        if round_ > 0:
            participants = (
                None if attendance is None else all_clients(federation.groups, attendance(round_, client_ids))
            )
            states, info = federation.round(
                states, public, private, jax.random.fold_in(key, round_), participants=participants
            )
        metrics = round_metrics(federation.groups, round_, federation.evaluate(states, test), info)
        if round_ == 0 and transfer is not None:
            metrics = with_faults(metrics, reverted_clients(client_ids, transfer))
        history.append(metrics)
        if callback is not None:
            callback(metrics, states)
    return states, history


def run_local(
    federation: Federation,
    states: States,
    private: Private,
    key: chex.PRNGKey,
    *,
    num_rounds: int,
    first_round: int = 1,
    attendance: AttendancePolicy | None = None,
    on_undone: Callable[[int, list[int]], Any] | None = None,
    callback: Callable[[int, States], Any] | None = None,
) -> States:
    """The control of `run_federation`: the same rounds without digests, so that nobody learns from anybody.

    Every client makes the private steps that it would make there, on the same batches with the same dropout, and in
    the same rounds, if it is given the same attendance. What FedMD gains over this is not just more training.

    Args:
      federation: from `fedmd`.
      states: clients after transfer learning; consumed (donated), use the result instead.
      private: per group, stacked private datasets.
      key: that of `run_federation`.
      num_rounds: R.
      first_round: the number of the first of these rounds; 1 + r goes on where r rounds have been run.
      attendance: that of `run_federation`.
      on_undone: called with the number of a round and the ids of the clients whose training was undone in it, since it
        did not end in finite numbers; before `callback`, and only where there are any.
      callback: called with the number of each round and the states after it, which the next round consumes.

    Returns:
      The clients.

    Raises:
      ValueError: a negative number of rounds, or a first round below 1.
    """
    _check_num_rounds(num_rounds)
    check_count("first_round", first_round)
    private = federation.put(private)
    client_ids = group_client_ids(federation.groups)
    for round_ in range(first_round, first_round + num_rounds):
        participants = _participants(federation, attendance, round_)
        states, info = federation.revisit(states, private, jax.random.fold_in(key, round_), participants=participants)
        if on_undone is not None:
            # What an absent client would have done is thrown away in any case.
            completed = None if participants is None else participants.completed
            if undone := undone_clients(client_ids, info, completed):
                on_undone(round_, undone)
        if callback is not None:
            callback(round_, states)
    return states
