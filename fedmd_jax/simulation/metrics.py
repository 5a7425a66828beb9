"""Metrics of each client after a round, fetched from the devices."""

from collections import UserList
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import chex
import numpy as np

from fedmd_jax.client.evaluation import Evaluation
from fedmd_jax.mapping.groups import Groups
from fedmd_jax.mapping.sharding import fetch_to_host
from fedmd_jax.types import RoundInfo, TrainingInfo, TransferInfo

OK = "ok"
PUBLIC_FAULT, PRIVATE_FAULT = "public training not finite", "private training not finite"
DROPPED, STRAGGLER = "dropped", "straggler"
SCORES_FAULT, DIGEST_FAULT, REVISIT_FAULT = "scores not finite", "digest not finite", "revisit not finite"


class ClientMetrics(NamedTuple):
    """Metrics of one client after one round. Losses are those of the last epoch, including the penalty.

    Example:
      >>> from fedmd_jax.simulation import ClientMetrics
      >>> client = ClientMetrics(7, "cnn", accuracy=0.75, digest_loss=0.5, revisit_loss=0.25)
      >>> client.client_id, client.accuracy, client.status
      (7, 0.75, 'ok')
    """

    client_id: int  #: its id in the federation
    architecture: str  #: name of its architecture group
    accuracy: float  #: on the test examples, 0..1
    digest_loss: float | None  #: None in round 0 and without a digest
    revisit_loss: float | None  #: None in round 0 and without a revisit
    #: "ok", or a comma-separated list of "dropped", "straggler" (digest and revisit discarded), "scores not finite"
    #: (excluded from the consensus), "digest not finite", "revisit not finite" (reverted), and those of `with_faults`.
    status: str = OK


class RoundMetrics(NamedTuple):
    """Metrics after one round; round 0 is after transfer learning, before any collaboration.

    Example:
      >>> from fedmd_jax.simulation import ClientMetrics, RoundMetrics
      >>> clients = (ClientMetrics(7, "cnn", 0.75, 0.5, 0.25), ClientMetrics(8, "mlp", 0.25, 0.5, 0.25))
      >>> metrics = RoundMetrics(1, clients, digested=True)
      >>> metrics.mean_accuracy, metrics.to_dicts()[0]["client_id"]
      (0.5, 7)
    """

    round: int  #: number of the round
    clients: tuple[ClientMetrics, ...]  #: the candidates of the round, ordered by client id
    digested: bool  #: False if all clients were excluded from the consensus
    server_accuracy: float | None = None  #: accuracy of the server's network; None if it has none
    consensus_size: float | None = None  #: as in `RoundInfo`; None in round 0 and in a round without consensus

    @property
    def mean_accuracy(self) -> float:
        """Mean accuracy over clients."""
        return float(np.mean([client.accuracy for client in self.clients]))

    def to_dicts(self) -> list[dict[str, Any]]:
        """One record for each client, with the keys of the lines of `metrics.jsonl`.

        These are `round`, those of `ClientMetrics`, and `consensus_size` if it is known.
        """
        size = {} if self.consensus_size is None else {"consensus_size": self.consensus_size}
        return [{"round": self.round, **client._asdict(), **size} for client in self.clients]

    def server_dicts(self) -> list[dict[str, Any]]:
        """The record of the server's network, with the keys of its line of `metrics.jsonl`; none if it has none."""
        if self.server_accuracy is None:
            return []
        return [{"event": "server", "round": self.round, "accuracy": self.server_accuracy}]


class History(UserList[RoundMetrics]):
    """The metrics of each round: a list of `RoundMetrics`. `fmd.plot.accuracy(history)` draws it.

    Example:
      >>> from fedmd_jax.simulation import ClientMetrics, History, RoundMetrics
      >>> def after(round_, accuracy):
      ...     return RoundMetrics(round_, (ClientMetrics(7, "cnn", accuracy, None, None),), digested=True)
      >>> history = History([after(0, 0.5), after(1, 0.75)])
      >>> history
      History(rounds 0 to 1, 1 client, mean accuracy 0.500 to 0.750)
      >>> history[-1].mean_accuracy
      0.75
      >>> history.to_dicts()[1]["accuracy"]  # pandas.DataFrame(history.to_dicts()) is a table
      0.75
    """

    def __repr__(self) -> str:
        if not self:
            return "History(no rounds)"
        first, last = self[0], self[-1]
        clients = f"{len(last.clients)} client{'s' * (len(last.clients) != 1)}"
        accuracies = f"mean accuracy {first.mean_accuracy:.3f} to {last.mean_accuracy:.3f}"
        return f"History(rounds {first.round} to {last.round}, {clients}, {accuracies})"

    def to_dicts(self) -> list[dict[str, Any]]:
        """One record for each round and client, see `RoundMetrics.to_dicts`."""
        return [record for metrics in self for record in metrics.to_dicts()]


def round_metrics(
    groups: Groups, round_: int, evaluations: Mapping[str, Evaluation], info: RoundInfo | None
) -> RoundMetrics:
    """Fetches the results of a round from the devices and sorts them by client id.

    Args:
      groups: the architecture groups.
      round_: number of the round.
      evaluations: per group, from `Federation.evaluate`.
      info: from `Federation.round`; None in round 0 and without collaboration.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> groups = {"a": fmd.ArchitectureGroup(None, (8, 3))}
      >>> evaluations = {"a": fmd.client.Evaluation(np.array([0.75, 0.25]), np.array([0.5, 1.5]))}
      >>> metrics = fmd.simulation.round_metrics(groups, 0, evaluations, None)
      >>> [(client.client_id, client.accuracy) for client in metrics.clients]
      [(3, 0.25), (8, 0.75)]
    """
    evaluations, info = fetch_to_host((evaluations, info))
    clients = []
    client_ids = {name: group.client_ids for name, group in groups.items()} if info is None else info.client_ids
    for name, ids in client_ids.items():
        for position, client_id in enumerate(map(int, ids)):
            accuracy = float(evaluations[name].accuracy[position])
            of_round = (None, None) if info is None else _client_of_round(info, name, position)
            clients.append(ClientMetrics(client_id, name, accuracy, *of_round))
    size = None
    if info is not None and info.consensus_size is not None and info.digested and np.isfinite(info.consensus_size):
        size = float(info.consensus_size)
    return RoundMetrics(round_, tuple(sorted(clients)), bool(info is None or info.digested), consensus_size=size)


def reverted_clients(
    client_ids: Mapping[str, chex.Array],
    info: Mapping[str, TrainingInfo],
    completed: Mapping[str, chex.Array] | None = None,
) -> list[int]:
    """The ids of the clients whose training was reverted because it ended in NaN or infinity, in order.

    Args:
      client_ids: per group [K], of the clients that were trained.
      info: per group, from `pretrain`, `train_private`, `train_pooled` or `revisit`.
      completed: per group [K], which clients completed the round; by default all.
    """
    finite = {name: of_group.finite for name, of_group in info.items()}
    client_ids, finite, completed = fetch_to_host((dict(client_ids), finite, completed))
    reverted = []
    for name, of_group in finite.items():
        is_reverted = ~of_group if completed is None else ~of_group & completed[name]
        reverted += [int(client_id) for client_id in np.asarray(client_ids[name])[is_reverted]]
    return sorted(reverted)


def reverted_halves(
    client_ids: Mapping[str, chex.Array], transfer: TransferInfo[Mapping[str, TrainingInfo]]
) -> dict[str, list[int]]:
    """The halves of transfer learning that were reverted, as `with_faults` takes them: fault -> ids of the clients.

    Args:
      client_ids: per group [K].
      transfer: per group, from `Federation.transfer_learn`.
    """
    found = {
        PUBLIC_FAULT: reverted_clients(client_ids, transfer.public),
        PRIVATE_FAULT: reverted_clients(client_ids, transfer.private),
    }
    return {fault: ids for fault, ids in found.items() if ids}


def with_server(metrics: RoundMetrics, evaluation: Evaluation | None) -> RoundMetrics:
    """The metrics with the accuracy of the server's network, if it was evaluated."""
    return metrics if evaluation is None else metrics._replace(server_accuracy=float(evaluation.accuracy))


def with_faults(metrics: RoundMetrics, faults: Mapping[str, Collection[int]]) -> RoundMetrics:
    """Adds faults that occurred before the round to the status of the clients.

    Args:
      metrics: metrics of a round.
      faults: fault -> ids of the clients.
    """

    def status(client):
        faults_of_client = [what for what, ids in faults.items() if client.client_id in ids]
        return ", ".join([*faults_of_client, *([] if faults_of_client and client.status == OK else [client.status])])

    return metrics._replace(clients=tuple(client._replace(status=status(client)) for client in metrics.clients))


def _client_of_round(info: RoundInfo, name: str, position: int) -> tuple[float | None, float | None, str]:
    """Digest loss, revisit loss and status of one client; a loss is None if the training was discarded."""

    def of_client(field):
        return field[name][position]

    available, completed = map(of_client, info.participation)
    scores, digest, revisit = map(of_client, (info.scores_finite, info.digest_finite, info.revisit_finite))
    happened = {
        DROPPED: not available,
        STRAGGLER: available and not completed,
        SCORES_FAULT: available and not scores,
        DIGEST_FAULT: completed and not digest,
        REVISIT_FAULT: completed and not revisit,
    }
    digest_losses = info.digest_loss[name][position]  # none if the algorithm has no digest
    has_digested = info.digested and completed and digest and digest_losses.size
    digest_loss = float(digest_losses[-1]) if has_digested else None
    revisit_loss = float(info.revisit_loss[name][position, -1]) if completed and revisit else None
    return digest_loss, revisit_loss, ", ".join(what for what, holds in happened.items() if holds) or OK
