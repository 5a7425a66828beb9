"""The round of all algorithms in which clients send reports and the server sends targets back.

A report has rows: of the public subset (FedMD, DS-FL), or one for each class (FD, FedProto). What one client does and
what the server does are functions, from which `exchange_algorithm` makes an algorithm:

```
report(architecture, state, subset, private) -> Report                      # one client: values [R, D], weights [R]
aggregate(mean, subset, memory, key) -> (targets, memory)                   # server, from the mean over all clients
aggregate_all(reports, subset, memory, key) -> (targets, memory)            # or from all reports, [K, R, ...]
personal_target(targets, own, mean) -> targets                              # one client, such as the mean of the others
digest(architecture, state, inputs, targets, key, *, training)              # one client, on the public subset
revisit(architecture, state, private, targets, key, *, training)            # one client, on its private data
answer(server, model, subset, targets) -> targets                           # server, after its network's digest
```

All are pure functions of arrays; `exchange_round` maps those of a client over groups, chunks and devices. The defaults
are FedMD, and then this round is `fedmd_round` to the bit.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmd_jax.aggregators.base import Aggregator, concatenate_clients
from fedmd_jax.aggregators.mean import scale_weights, weighted_mean
from fedmd_jax.algorithms.base import (
    Algorithm,
    Sizes,
    Traffic,
    join_states,
    keep_unless,
    scores_traffic,
    split_states,
)
from fedmd_jax.algorithms.fedmd import fedmd_round, round_keys
from fedmd_jax.algorithms.participation import complete_participants
from fedmd_jax.algorithms.public_subset import draw_public_subset
from fedmd_jax.client import phases
from fedmd_jax.client.guards import keep_if_finite
from fedmd_jax.client.losses import at_least_float32, mae
from fedmd_jax.client.scoring import score, scores_size
from fedmd_jax.client.training import Distance, TrainingConfig
from fedmd_jax.mapping.chunking import ClientsPerChunk, all_reduce
from fedmd_jax.mapping.grouped import map_groups, sum_groups
from fedmd_jax.mapping.groups import Groups, group_keys
from fedmd_jax.mapping.sharding import constrain_replicated
from fedmd_jax.transforms.clipping import Transform
from fedmd_jax.types import (
    Architecture,
    ClientState,
    FederationState,
    Participants,
    Participation,
    PrivateDataset,
    PublicDataset,
    RoundInfo,
    States,
    TrainingInfo,
)


class Report(NamedTuple):
    """What one client sends.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> table = fmd.algorithms.Report(values=jnp.zeros((3, 3)), weights=jnp.array([5, 0, 2]))  # no example of class 1
      >>> table.values.shape
      (3, 3)
    """

    values: chex.Array  #: [R, D]
    weights: chex.Array  #: [R]: how much each row counts beside the same row of other clients; 0: not at all


class Mean(NamedTuple):
    """The weighted mean of the reports: each row counts with the weight of its client times its own.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> mean = fmd.algorithms.Mean(values=jnp.zeros((3, 3)), weights=jnp.array([5.0, 0.0, 2.0]))
      >>> (mean.weights > 0).tolist()  # whether any client sent this row
      [True, False, True]
    """

    values: chex.Array  #: [R, D]; zeros in rows of weight 0
    weights: chex.Array  #: [R]: sum of the weights


def scores_report(
    architecture: Architecture, state: ClientState, subset: PublicDataset, private: PrivateDataset | None
) -> Report:
    """The logits of the public subset, [M, C], as in FedMD.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> linear = fmd.Architecture(None, lambda params, state, inputs, **_: (inputs @ params, state))
      >>> client, subset = fmd.ClientState(jnp.ones((4, 3)), {}, (), ()), fmd.public_dataset(jnp.eye(4)[:2])
      >>> fmd.algorithms.scores_report(linear, client, subset, None).values.shape
      (2, 3)
    """
    del private
    scores = score(architecture, state, subset.inputs)
    return Report(scores, jnp.ones(len(scores)))


def probabilities_report(
    architecture: Architecture,
    state: ClientState,
    subset: PublicDataset,
    private: PrivateDataset | None,
    *,
    temperature: float = 1.0,
) -> Report:
    """The softmax of the logits of the public subset over a temperature, [M, C].

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> linear = fmd.Architecture(None, lambda params, state, inputs, **_: (inputs @ params, state))
      >>> client, subset = fmd.ClientState(jnp.zeros((4, 2)), {}, (), ()), fmd.public_dataset(jnp.eye(4)[:1])
      >>> fmd.algorithms.probabilities_report(linear, client, subset, None).values.tolist()
      [[0.5, 0.5]]
    """
    report = scores_report(architecture, state, subset, private)
    return report._replace(values=jax.nn.softmax(at_least_float32(report.values) / temperature))


def send_mean(
    mean: Mean, subset: PublicDataset, memory: chex.ArrayTree, key: chex.PRNGKey
) -> tuple[chex.Array, chex.ArrayTree]:
    """The server of FedMD: the targets are the mean, [R, D].

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> targets, memory = fmd.algorithms.send_mean(fmd.algorithms.Mean(jnp.ones((2, 3)), jnp.ones(2)), None, (), None)
      >>> targets.shape, memory
      ((2, 3), ())
    """
    del subset, key
    return mean.values, memory


def digest_by(distance: Distance) -> Callable:
    """The digest of one client that minimizes a distance of logits and targets.

    Example:
      >>> import fedmd_jax as fmd
      >>> digest = fmd.algorithms.digest_by(fmd.kl)
    """
    return partial(phases.digest, distance=distance)


def revisit_alone(
    architecture: Architecture,
    state: ClientState,
    private: PrivateDataset,
    targets: chex.ArrayTree,
    key: chex.PRNGKey,
    *,
    training: TrainingConfig,
) -> tuple[ClientState, TrainingInfo]:
    """The revisit of FedMD: private training to which the targets of the server do not matter.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> training = fmd.TrainingConfig()
      >>> client = fmd.init_client(linear, jax.random.key(0), jnp.zeros((1, 2)), digest=training, revisit=training)
      >>> private = fmd.labelled_dataset(jnp.eye(2), jnp.array([0, 1]))
      >>> client, info = fmd.algorithms.revisit_alone(
      ...     linear, client, private, None, jax.random.key(1), training=training)
      >>> info.loss.shape
      (1,)
    """
    del targets
    return phases.revisit(architecture, state, private, key, training=training)


def exchange_algorithm(
    name: str,
    *,
    report: Callable = scores_report,
    traffic: Callable[[Sizes], Traffic] = scores_traffic,
    new_memory: Callable | None = None,
    **functions: Any,
) -> Algorithm:
    """Makes an algorithm whose round is `exchange_round`.

    Args:
      name: as on the command line.
      report: what one client sends.
      traffic: bytes of one client in one round.
      new_memory: what the server remembers before the first round, see `Algorithm`.
      **functions: `aggregate` or `aggregate_all`, `personal_target`, `digest`, `revisit`, `answer` of `exchange_round`.

    Example:
      >>> import fedmd_jax as fmd
      >>> softmax_fedmd = fmd.algorithms.exchange_algorithm(
      ...     "softmax-fedmd", report=fmd.algorithms.probabilities_report)
      >>> softmax_fedmd.name
      'softmax-fedmd'
    """
    round_ = partial(exchange_round, report=report, **functions)
    digests = functions.get("digest", digest_by) is not None  # a server model learns as the clients do
    return Algorithm(name=name, round=round_, traffic=traffic, new_memory=new_memory, takes_server_model=digests)


def fedmd(*, distance: Distance = mae, aggregator: Aggregator = weighted_mean) -> Algorithm:
    """FedMD: each client digests the mean of the clients' logits.

    The round of this `Algorithm` is `fedmd_round`, or `exchange_round` if the server has a network.

    Args:
      distance: distance of scores and consensus in the digest.
      aggregator: combines the scores, see `aggregators`.

    References:
      Li and Wang 2019, Algorithm 1.

    Example:
      >>> import fedmd_jax as fmd
      >>> fmd.algorithms.fedmd(distance=fmd.kl).name
      'fedmd'
    """

    def round_(*arguments, server=None, statistics=None, **settings):
        if server is None and statistics is None:
            return fedmd_round(*arguments, distance=distance, aggregator=aggregator, **settings)
        if aggregator is not weighted_mean:
            raise ValueError("a server model and statistics of the public subset need the weighted mean as aggregator")
        how = {"digest": digest_by(distance), "server": server, "statistics": statistics}
        return exchange_round(*arguments, **how, **settings)

    return Algorithm(name="fedmd", round=round_, traffic=scores_traffic, takes_server_model=True)


def exchange_round(
    states: States | FederationState,
    public: PublicDataset,
    private: Mapping[str, PrivateDataset],
    key: chex.PRNGKey,
    *,
    groups: Groups,
    subset_size: int,
    digest_training: TrainingConfig,
    revisit_training: TrainingConfig,
    report: Callable = scores_report,
    aggregate: Callable = send_mean,
    aggregate_all: Callable | None = None,
    personal_target: Callable | None = None,
    digest: Callable | None = phases.digest,
    revisit: Callable = revisit_alone,
    answer: Callable | None = None,
    server: Architecture | None = None,
    statistics: Callable | None = None,
    keep_statistics: bool = True,
    draw_subset: Callable = draw_public_subset,
    transforms: Sequence[Transform] = (),
    participants: Participants | None = None,
    clients_per_chunk: ClientsPerChunk = "auto",
    mesh: Mesh | None = None,
) -> tuple[States | FederationState, RoundInfo]:
    """One round: communicate, aggregate, distribute, digest, revisit, with the functions of an algorithm.

    What holds for `fedmd_round` holds here: a client with non-finite reports is excluded from the mean; a digest or a
    revisit that ends in NaN or infinity is reverted; dropped clients and stragglers do not change. If all clients are
    excluded, no client digests and the server keeps its memory.

    The mean over clients is streamed: no device holds the reports of all clients, and the only collective is one
    all-reduce of [R, D + 1]. With `personal_target` the report of each client stays where it was made. With
    `aggregate_all` all reports are gathered on every device, [K, R, D + 1].

    Args:
      states: per group, stacked clients [K, ...], or a `FederationState`.
      public: the public dataset, [P, ...].
      private: per group, stacked private datasets [K, N, ...].
      key: key of the round; it is consumed.
      groups: architecture, client ids and weights of each group.
      subset_size: number of public examples in this round, M.
      digest_training: epochs, batches and optimizer of the digests, also of the server model.
      revisit_training: epochs, batches and optimizer of the revisits.
      report: (architecture, state, subset, private) -> `Report` of one client.
      aggregate: (`Mean`, subset, memory, key) -> (targets, memory). Targets are a tree of arrays [R, ...].
      aggregate_all: (reports, subset, memory, key) -> (targets, memory), instead of `aggregate`. The weights [K, R] are
        those of the rows times those of the clients; an excluded client has weights and values 0. Targets are personal,
        [K, R, ...], in the order of the groups.
      personal_target: (targets, own report, `Mean`) -> targets of one client; by default all have the same. The weights
        of the own report are times that of the client.
      digest: `(architecture, state, inputs [M, ...], targets, key, *, training) -> (state, TrainingInfo)`; None for
        algorithms without.
      revisit: `(architecture, state, private, targets, key, *, training) -> (state, TrainingInfo)`.
      answer: (server, model, subset, targets) -> targets that the server sends, after the digest of its own network
        if it has one; without, `server` is None and `model` (). By default the targets themselves.
      server: architecture of the server's own network, which digests as the clients do, the common targets or, with
        `aggregate_all`, the mean of the reports; None if it has none.
      statistics: (architecture, state, inputs) -> state, such as `estimate_statistics`: each client reports with the
        batch statistics of the public subset. None: with its moving ones, as in the paper.
      keep_statistics: whether these statistics replace the moving ones, so that digest and evaluation have them, too;
        otherwise they are for the report only.
      draw_subset: (key, public, size) -> the public subset.
      transforms: functions that each client applies to the values of its report before it sends them, in this order.
      participants: as in `fedmd_round`.
      clients_per_chunk: as in `fedmd_round`.
      mesh: as in `fedmd_round`.

    Returns:
      The states after the round, and a `RoundInfo`.

    Example:
      >>> from functools import partial
      >>> import jax, jax.numpy as jnp, numpy as np, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> groups = {"linear": fmd.ArchitectureGroup(linear, client_ids=(0, 1))}
      >>> public = fmd.public_dataset(np.eye(4))
      >>> private = fmd.stack_private(groups, {0: (np.eye(4)[:3], [0, 1, 1]), 1: (np.eye(4)[2:], [1, 0])})
      >>> training = fmd.TrainingConfig(batch_size=4, shuffle=False)
      >>> states = fmd.fedmd(groups).new_states(jax.random.key(0), public.inputs)
      >>> one_round = partial(
      ...     fmd.algorithms.exchange_round, groups=groups, subset_size=2, digest_training=training,
      ...     revisit_training=training, report=fmd.algorithms.probabilities_report)
      >>> states, info = jax.jit(one_round)(states, public, private, jax.random.key(1))
      >>> info.digest_loss["linear"].shape
      (2, 1)
    """
    over: dict = {"groups": groups, "mesh": mesh, "clients_per_chunk": clients_per_chunk}
    clients, memory, model = split_states(states)
    participants = complete_participants(participants, groups, mesh)
    client_ids, _, available, completed = participants
    keys, key_server = round_keys(key), jax.random.fold_in(key, 4)
    subset = draw_subset(keys.subset, public, subset_size)

    estimated, estimated_axis = None, None  # batch statistics of the clients
    if statistics is not None:
        estimate = map_groups(partial(_estimate, statistics=statistics), (0, None), **over)
        estimated, estimated_axis = estimate(clients, subset.inputs), 0
    # 1. communicate
    send = partial(_send, report=report, transforms=transforms)
    sent = clients, estimated, subset, private, group_keys(keys.transform, client_ids)
    weights = constrain_replicated(scale_weights(participants.weights), mesh)
    sent_axes = (0, estimated_axis, None, 0, 0)
    own: Any = None
    mean = None
    if aggregate_all is not None or personal_target is not None:
        own = map_groups(send, sent_axes, **over)(*sent)
    # 2. aggregate
    if aggregate_all is not None:
        every, of_clients, finite = concatenate_clients(own, weights, list(client_ids))
        reports = Report(*_unpack(every, of_clients[:, None]))
        exists = jnp.any(reports.weights > 0)
        targets, new_memory = aggregate_all(reports, subset, memory, key_server)
        consensus = of_server = _mean_of_all(reports)
    else:
        if own is None:
            sums = sum_groups(send, sent_axes, **over)(weights, *sent)
        else:
            sums = sum_groups(lambda _, sent: sent, (0,), **over)(weights, own)
        mean, finite = _unpack(all_reduce(sums.total, mesh)), sums.finite
        exists = jnp.any(mean.weights > 0)
        targets, new_memory = aggregate(mean, subset, memory, key_server)
        consensus, of_server = mean.values, targets
    memory = keep_unless(exists, new_memory, memory)
    if server is not None and digest is not None:
        digest_server = partial(keep_if_finite(partial(digest, training=digest_training)), server)
        model, _ = digest_server(exists, model, subset.inputs, of_server, jax.random.fold_in(key_server, 1))
    targets = targets if answer is None else answer(server, model, subset, targets)
    # 3. distribute
    targets, axis = constrain_replicated(targets, mesh), None
    if aggregate_all is not None:
        targets, axis = _split(targets, client_ids), 0
    elif personal_target is not None:
        personal = map_groups(partial(_personal, personal_target=personal_target), (None, 0, 0, None), **over)
        targets, axis = personal(targets, own, weights, mean), 0
    # 4. digest
    digest_loss, digest_finite = no_digest(client_ids)
    if digest is not None:
        digest_one = partial(digest_completed, digest=partial(digest, training=digest_training))
        kept, kept_axis = (estimated, estimated_axis) if keep_statistics else (None, None)
        digest_clients = map_groups(digest_one, (0, 0, None, axis, None, 0, kept_axis), **over)
        digest_keys = group_keys(keys.digest, client_ids)
        clients, digest_loss, digest_finite = digest_clients(
            completed, clients, subset.inputs, targets, exists, digest_keys, kept
        )
    # 5. revisit
    revisit_one = partial(revisit_completed, revisit=partial(revisit, training=revisit_training))
    revisit_clients = map_groups(revisit_one, (0, 0, 0, axis, 0), **over)
    revisit_keys = group_keys(keys.revisit, client_ids)
    clients, revisit_loss, revisit_finite = revisit_clients(completed, clients, private, targets, revisit_keys)

    participation = Participation(available, completed)  # type: ignore[arg-type]  # the record is complete
    size = scores_size(consensus) if report is scores_report else None
    results = finite, digest_finite, revisit_finite, size
    info = RoundInfo(digest_loss, revisit_loss, client_ids, exists, participation, *results)
    memory, model = constrain_replicated((memory, model), mesh)  # as the next round takes them
    return join_states(clients, memory, model), info


def _estimate(architecture, state, inputs, *, statistics):
    """The batch statistics of one client on the public subset, as a client without anything else."""
    return ClientState((), statistics(architecture, state, inputs).model_state, (), ())


def _with_statistics(state, estimated):
    """The client with these batch statistics; None: with its own."""
    return state if estimated is None else state._replace(model_state=estimated.model_state)


def _send(architecture, state, estimated, subset, private, key, *, report, transforms):
    """What one client sends: [R, D + 1], its values times their weights, and the weights, which are summed alike."""
    values, weights = report(architecture, _with_statistics(state, estimated), subset, private)
    values, weights = at_least_float32(values), at_least_float32(weights)
    for number, transform in enumerate(transforms):
        values = transform(values, jax.random.fold_in(key, number))
    weights = weights[:, None]
    counted = jnp.where(weights == 0, 0.0, values * weights)  # a row that does not count may have any value
    return jnp.concatenate([counted, weights], axis=1)


def _unpack(sent, weight=1.0):
    """The report in what a client of this weight has sent, or the mean in the sum over all clients."""
    values, weights = sent[..., :-1], sent[..., -1]
    return Mean(values / jnp.where(weights > 0, weights, 1.0)[..., None], weights * weight)


def _mean_of_all(reports):
    """The weighted mean of all reports, [R, D]."""
    weights = reports.weights.sum(axis=0)
    total = jnp.einsum("kr,krd->rd", reports.weights, reports.values, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.where(weights > 0, weights, 1.0)[:, None]


def _split(targets, client_ids):
    """Targets of all clients [K, ...], per group."""
    split, first = {}, 0
    for name, ids in client_ids.items():
        split[name] = jax.tree.map(itemgetter(slice(first, first + len(ids))), targets)
        first += len(ids)
    return split


def _personal(architecture, targets, sent, weight, mean, *, personal_target):
    sent = jnp.where(jnp.isfinite(sent).all(), sent, 0.0)  # as in the mean, from which it is excluded
    return personal_target(targets, Report(*_unpack(sent, weight)), mean)


def no_digest(client_ids):
    """The digest losses, of no epoch, [K, 0] per group, and whether they are finite, of a round without digests."""
    sizes = {name: len(ids) for name, ids in client_ids.items()}
    losses = {name: jnp.zeros((size, 0)) for name, size in sizes.items()}
    return losses, {name: jnp.ones(size, bool) for name, size in sizes.items()}


def digest_completed(architecture, completed, state, inputs, targets, exists, key, estimated=None, *, digest):
    """The digest of one client; without targets the client does not change, and its losses are zero.

    It starts with the batch statistics of `estimated`, if given. It is reverted if it does not complete: (state, losses
    [E], whether finite).
    """

    def digest_one(architecture, state, *arguments):
        return digest(architecture, _with_statistics(state, estimated), *arguments)

    state, info = keep_if_finite(digest_one)(architecture, completed & exists, state, inputs, targets, key)
    return state, jnp.where(exists, info.loss, 0.0), info.finite | ~exists


def revisit_completed(architecture, completed, state, private, targets, key, *, revisit):
    """The private training of one client, reverted if it does not complete: (state, losses [E], whether finite)."""
    state, info = keep_if_finite(revisit)(architecture, completed, state, private, targets, key)
    return state, info.loss, info.finite
