"""Made-up results of a federation, and the run directory they make."""

from fedmd_jax.experiments.results.report import summarize
from fedmd_jax.experiments.run_directory import Writer, round_records
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.experiments.train import write_summary
from fedmd_jax.simulation.communication import CommunicationCost
from fedmd_jax.simulation.metrics import OK, REVISIT_FAULT, ClientMetrics, RoundMetrics

SENT = CommunicationCost(3200, 3200, 19200, 23560.0)
SECONDS = {"compile": 3.0, "transfer": 1.25, "rounds": 2.0, "total": 7.5}


def experiment(num_clients=3, num_rounds=2, num_networks=2):
    names = tuple(f"mlp:n1={client_id % num_networks + 1}" for client_id in range(num_clients))
    return Experiment(networks=names, num_rounds=num_rounds, seed=7)


def round_metrics(experiment, round_, *, accuracy=None, digest_loss=0.5, digested=True, status=None):
    """By default client k has an accuracy of 0.1 + k / 100 + r / 500; `status` by client id if it is not ok."""
    status = status or {}
    digest_loss, revisit_loss = (digest_loss, 0.25) if round_ > 0 else (None, None)
    clients = (
        ClientMetrics(
            client_id,
            name,
            min(1.0, 0.1 + client_id / 100 + round_ / 500) if accuracy is None else accuracy,
            digest_loss,
            revisit_loss,
            status.get(client_id, OK),
        )
        for client_id, name in enumerate(experiment.networks)
    )
    return RoundMetrics(round_, tuple(clients), digested)


def write(path, experiment, *, num_done=None, local=0.05, failed=None, pooled=0.9, status=None, continued=()):
    """A run directory and its summary; the run is interrupted where fewer rounds are done than it should have.

    `status` is by round and client id, where it is not ok; `failed` the rounds of the local-only baseline by client id.
    """
    status, failed, num_clients = status or {}, failed or {}, len(experiment.networks)
    writer = Writer.create(path, "made-up", experiment, command="fedmd-jax run made-up")
    num_done = experiment.num_rounds if num_done is None else num_done
    for round_ in range(num_done + 1):
        reverted = {i: REVISIT_FAULT for i in failed if round_ in failed[i]}
        baseline = round_metrics(experiment, round_, accuracy=local, status=reverted) if local is not None else None
        writer.append(round_records(round_metrics(experiment, round_, status=status.get(round_)), baseline))
    summary = summarize(
        "made-up",
        experiment,
        writer.metrics,
        pooled=None if pooled is None else dict.fromkeys(range(num_clients), pooled),
        communication=SENT,
        seconds=SECONDS,
        interrupted=num_done < experiment.num_rounds,
        continued=continued,
    )
    write_summary(path, summary, writer.metrics)
    return summary
