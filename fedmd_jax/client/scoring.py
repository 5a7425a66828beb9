"""Scores of one client: the logits of its network in inference mode."""

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.checks import check_count, check_numbers
from fedmd_jax.types import Architecture, ClientState, PrivateDataset

SCORE_BATCH = {"cpu": 32}  # by platform; 1024 elsewhere


def score(
    architecture: Architecture, state: ClientState, inputs: chex.Array, *, batch_size: int | None = None
) -> chex.Array:
    """Class scores (raw logits) of one client in inference mode: no dropout, moving batch statistics.

    Args:
      architecture: the client's network.
      state: the client, or any record with its `params` and `model_state`.
      inputs: [M, ...].
      batch_size: number of examples scored at once. It bounds memory and does not change the scores. The default is the
        fastest size for the platform: on a CPU the activations of a small batch stay in the cache.

    Returns:
      Scores, [M, C].

    Raises:
      ValueError: inputs that are not numbers of this shape, a batch size below 1, or a network that gives something
        else than logits [M, C].

    References:
      Li and Wang 2019, Algorithm 1, "Communicate"; supplement: "without applying the softmax activation layer".

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> client = fmd.ClientState(jnp.array([[1.0, 2.0], [0.0, 3.0]]), {}, (), ())
      >>> fmd.score(linear, client, jnp.eye(2)).tolist()
      [[1.0, 2.0], [0.0, 3.0]]
    """
    check_numbers("inputs", inputs)
    if len(inputs.shape) < 2 or inputs.shape[0] == 0:
        raise ValueError(f"inputs must have shape [M, ...], M at least 1, got {inputs.shape}")
    if batch_size is not None:
        check_count("batch_size", batch_size)
    num_rows = inputs.shape[0]
    batch_size = min(batch_size or SCORE_BATCH.get(jax.default_backend(), 1024), num_rows)
    num_batches = -(-num_rows // batch_size)

    def score_batch(batch):
        logits = architecture.apply(state.params, state.model_state, batch, train=False)[0]
        check_logits(logits, len(batch))
        return logits

    if num_batches == 1:
        return score_batch(inputs)
    padded = _pad_rows(inputs, num_batches * batch_size).reshape(num_batches, batch_size, *inputs.shape[1:])
    scores = jax.lax.map(score_batch, padded)
    return scores.reshape(num_batches * batch_size, -1)[:num_rows]


def check_logits(logits: chex.ArrayTree, num_rows: int, where: str = "") -> None:
    """A `ValueError` if the result of a network is not one array of floats, [num_rows, C].

    Args:
      logits: an array, or its shape.
      num_rows: number of examples.
      where: prefix of the error message.
    """
    is_array = isinstance(logits, (jax.Array, jax.ShapeDtypeStruct))
    rank_2 = is_array and logits.ndim == 2
    if not rank_2 or logits.shape[0] != num_rows or not jnp.issubdtype(logits.dtype, jnp.floating):
        found = f"{logits.dtype} of shape {logits.shape}" if is_array else jax.tree.map(jnp.shape, logits)
        raise ValueError(
            f"{where}the network must give logits [B, C] alone, floats for each of the {num_rows} examples, got "
            f"{found}: wrap it in a module whose `__call__` returns the logits only, such as `self.network(x)[0]`"
        )


def scores_size(scores: chex.Array) -> chex.Array:
    """The size of scores [M, C], []: the mean distance of a score from the mean over the classes of its example.

    >>> scores_size(jnp.array([[5.0, 1.0], [2.0, 2.0]])).item()
    1.0
    """
    return jnp.mean(jnp.abs(scores - jnp.mean(scores, axis=-1, keepdims=True)))


def compute_accuracy(logits: chex.Array, test: PrivateDataset) -> chex.Array:
    """Accuracy of scores [N, C] over the real examples, [], 0..1; 0 if there is none."""
    real = jnp.arange(test.labels.shape[0]) < test.num_examples
    correct = jnp.argmax(logits, axis=-1) == test.labels
    return jnp.sum(correct & real) / jnp.maximum(test.num_examples, 1)


def _pad_rows(rows, num_rows):
    """Pads with copies of the last row, whose scores are finite if those of the real rows are."""
    return jnp.pad(rows, [(0, num_rows - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1), mode="edge")
