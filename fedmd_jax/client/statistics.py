"""Batch statistics of a client's network, estimated anew instead of moved."""

from functools import partial

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.checks import check_count
from fedmd_jax.types import Architecture, ClientState


def estimate_statistics(
    architecture: Architecture,
    state: ClientState,
    inputs: chex.Array,
    num_examples: int | chex.Array | None = None,
    *,
    batch_size: int = 256,
) -> ClientState:
    """The client with the batch statistics of these inputs instead of its moving ones.

    Moving statistics follow the weights with a delay of some hundred steps. In FedMD with batch normalization the
    scores may then grow from round to round, until accuracies fall. Statistics of the public subset stop that, at no
    communication.

    Every layer gets the mean and the variance of its inputs over all examples. Each batch is normalized by its own
    statistics, as in training, but without dropout. With one batch they are exact; with several the layers above the
    first see activations that were normalized batch by batch, as in training.

    Args:
      architecture: the client's network.
      state: the client.
      inputs: [M, ...].
      num_examples: number of real rows, which come first, [], possibly traced; None for all.
      batch_size: number of examples at once; it bounds memory.

    Returns:
      The client; parameters and optimizer states are unchanged, and so is a client without batch statistics.

    Raises:
      ValueError: a network with a model state that does not say how to compute its statistics.

    References:
      Wu and Johnson 2021, Rethinking "Batch" in BatchNorm (arXiv 2105.07576), section 3, "PreciseBN".

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> network = fmd.architecture_from_linen(fmd.models.CNN((2, 3), num_classes=4))
      >>> inputs = 5.0 + jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
      >>> state = fmd.ClientState(*network.init(jax.random.key(1), inputs), (), ())
      >>> new = fmd.client.estimate_statistics(network, state, inputs)
      >>> state.model_state["batch_stats"]["bn1"]["mean"].tolist()
      [0.0, 0.0]
      >>> bool(jnp.all(jnp.abs(new.model_state["batch_stats"]["bn1"]["mean"]) > 0.1))
      True
    """
    check_count("batch_size", batch_size)
    if not jax.tree.leaves(state.model_state):
        return state
    if architecture.statistics is None:
        raise ValueError("the network has a model state but does not say how its batch statistics are computed")
    num_rows = inputs.shape[0]
    num_batches = -(-num_rows // batch_size)
    size = -(-num_rows // num_batches)  # batches of nearly one size
    num_examples = num_rows if num_examples is None else num_examples
    last = jnp.maximum(num_examples, 1) - 1  # instead of padding, which may give NaN
    rows = jnp.minimum(jnp.arange(num_batches * size), last).reshape(num_batches, size)
    mask = (jnp.arange(num_batches * size) < num_examples).reshape(num_batches, size)

    def of_batch(batch):
        rows, real = batch
        return architecture.statistics(state.params, state.model_state, inputs[rows], mask=real)

    found = jax.lax.map(of_batch, (rows, mask))
    return state._replace(
        model_state=_pooled(state.model_state, found, jnp.sum(mask, axis=1) / jnp.maximum(num_examples, 1))
    )


def _pooled(old, found, weights):
    """The model state in which mean and variance are those of all examples, from those of batches of given weights."""
    if not isinstance(old, dict):
        return old
    if not {"mean", "var"} <= set(old):
        return {name: _pooled(leaf, found[name], weights) for name, leaf in old.items()}
    average = partial(jnp.tensordot, weights, axes=1, precision=jax.lax.Precision.HIGHEST)
    mean = average(found["mean"])
    var = average(found["var"] + jnp.square(found["mean"] - mean[None]))
    return {**old, "mean": mean.astype(old["mean"].dtype), "var": var.astype(old["var"].dtype)}
