"""The trained clients in the checkpoints of a run, without its data."""

import pathlib

import jax
import numpy as np

from fedmd_jax.experiments.checkpoint import CLIENTS, load_checkpoint, read_record
from fedmd_jax.experiments.run_directory import CHECKPOINTS
from fedmd_jax.experiments.settings import Experiment
from fedmd_jax.experiments.setup import group_clients
from fedmd_jax.simulation.federation import fedmd
from fedmd_jax.simulation.trained import Preprocessing, TrainedClient, trained_clients


def find_checkpoint(path: pathlib.Path, seed: int) -> pathlib.Path | None:
    """The latest checkpoint of a run; None if there is none.

    Seeds that were trained at once have their checkpoints in the directory of the first of them.

    Args:
      path: the run directory.
      seed: of the run.

    Raises:
      CheckpointError: a checkpoint is damaged.
    """
    path = path.resolve()
    siblings = sorted(path.parent.glob("seed*")) if path.name == f"seed{seed}" else []
    for run in (path, *siblings):
        checkpoints = [each for each in (run / CHECKPOINTS / "rounds").glob("*") if each.name.isdecimal()]
        if checkpoints:
            latest = max(checkpoints, key=lambda each: int(each.name))
            seeds = read_record(latest)["identity"]["seeds"]
            if seed in seeds and run.name in (path.name, f"seed{seeds[0]}"):
                return latest
    return None


def load_clients(path: pathlib.Path, experiment: Experiment) -> dict[int, TrainedClient]:
    """The clients of the algorithm in a checkpoint, by client id.

    Args:
      path: the checkpoint.
      experiment: the settings of the run, with its seed.

    Raises:
      CheckpointError: it is damaged, or of other clients.
    """
    record = read_record(path)
    seeds, batched = record["identity"]["seeds"], record["identity"]["environment"]["batched"]
    seed = seeds.index(experiment.seed)
    preprocess = Preprocessing.from_record(record["inputs"]["preprocessing"][seed])
    groups = group_clients(experiment, record["inputs"]["num_classes"])
    inputs = np.zeros((1, *preprocess.mean.shape), np.float32)

    federation = fedmd(
        groups, digest_training=experiment.digest.training(), revisit_training=experiment.revisit.training()
    )
    shapes = jax.eval_shape(federation.programs["new_states"], jax.random.key(0), inputs)
    if batched:
        shapes = jax.tree.map(lambda leaf: leaf.update(shape=(len(seeds), *leaf.shape)), shapes)
    trees, _ = load_checkpoint(path, {CLIENTS: shapes})
    of_seed = jax.tree.map(lambda leaf: leaf[seed], trees[CLIENTS]) if batched else trees[CLIENTS]
    return trained_clients(groups, of_seed, inputs, preprocess=preprocess)
