"""Metrics of each client after a round, fetched from the devices."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import chex
import numpy as np

from fedmd_jax.client.evaluation import Evaluation
from fedmd_jax.mapping.groups import Groups
from fedmd_jax.mapping.sharding import fetch_to_host
from fedmd_jax.types import RoundInfo, TrainingInfo, TransferInfo

OK = "ok"
PUBLIC_FAULT, PRIVATE_FAULT = "public training not finite", "private training not finite"


class ClientMetrics(NamedTuple):
    """Metrics of one client after one round. Losses are those of the last epoch, including the penalty."""

    client_id: int
    architecture: str
    accuracy: float
    digest_loss: float | None  #: None in round 0 and without a digest
    revisit_loss: float | None  #: None in round 0 and without a revisit
    #: "ok", or a comma-separated list of "dropped", "straggler" (digest and revisit discarded), "scores not finite"
    #: (excluded from the consensus), "digest not finite", "revisit not finite" (reverted), and those of `with_faults`.
    status: str = OK


class RoundMetrics(NamedTuple):
    """Metrics after one round; round 0 is after transfer learning, before any collaboration."""

    round: int
    clients: tuple[ClientMetrics, ...]  #: the candidates of the round, ordered by client id
    digested: bool  #: False if all clients were excluded from the consensus

    @property
    def mean_accuracy(self) -> float:
        """Mean accuracy over clients."""
        return float(np.mean([client.accuracy for client in self.clients]))


def round_metrics(
    groups: Groups, round_: int, evaluations: Mapping[str, Evaluation], info: RoundInfo | None
) -> RoundMetrics:
    """Fetches the results of a round from the devices and sorts them by client id."""
    evaluations, info = fetch_to_host((evaluations, info))
    clients = []
    client_ids = {name: group.client_ids for name, group in groups.items()} if info is None else info.client_ids
    for name, ids in client_ids.items():
        for position, client_id in enumerate(map(int, ids)):
            accuracy = float(evaluations[name].accuracy[position])
            of_round = (None, None) if info is None else _client_of_round(info, name, position)
            clients.append(ClientMetrics(client_id, name, accuracy, *of_round))
    return RoundMetrics(round_, tuple(sorted(clients)), bool(info is None or info.digested))


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


def reverted_halves(client_ids: Mapping[str, chex.Array], transfer: TransferInfo) -> dict[str, list[int]]:
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
        "dropped": not available,
        "straggler": available and not completed,
        "scores not finite": available and not scores,
        "digest not finite": completed and not digest,
        "revisit not finite": completed and not revisit,
    }
    digest_loss = float(info.digest_loss[name][position, -1]) if info.digested and completed and digest else None
    revisit_loss = float(info.revisit_loss[name][position, -1]) if completed and revisit else None
    return digest_loss, revisit_loss, ", ".join(what for what, holds in happened.items() if holds) or OK
