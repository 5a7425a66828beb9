"""Tables with a row for each class, for methods that need no public data: FD, FedProto and FedTGP.

Each client sends the means of some output of its network over its private examples of each class, and each of its
private examples is then trained towards the row of its label.
"""

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.algorithms.exchange import Mean, Report
from fedmd_jax.client import phases
from fedmd_jax.client.losses import at_least_float32
from fedmd_jax.client.statistics import estimate_statistics
from fedmd_jax.client.training import Distance, TrainingConfig
from fedmd_jax.types import Architecture, ClientState, PrivateDataset, PublicDataset, TrainingInfo


def with_private_statistics(architecture: Architecture, state: ClientState, private: PrivateDataset) -> ClientState:
    """The client with the batch statistics of its private examples, for the outputs that it sends.

    In the papers these are outputs in training mode. Moving statistics follow the weights with a delay: with them
    examples would be trained towards outputs that are far from those of training. Unchanged if the network has none, or
    does not say how to compute them.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> linear = fmd.Architecture(None, lambda params, state, inputs, **_: (inputs @ params, state))
      >>> state, private = fmd.ClientState(jnp.ones((4, 3)), {}, (), ()), fmd.labelled_dataset(jnp.eye(4), [0, 1, 2, 0])
      >>> fmd.algorithms.with_private_statistics(linear, state, private) is state
      True
    """
    if architecture.statistics is None:
        return state
    return estimate_statistics(architecture, state, private.inputs, private.num_examples)


def class_means(outputs: chex.Array, private: PrivateDataset, num_classes: int) -> Report:
    """The mean of the outputs of each class, with the number of its examples as weight.

    Args:
      outputs: [N, D], of the private examples; those of padding rows do not matter.
      private: the private dataset, of which labels and number of examples are used.
      num_classes: number of rows, C.

    Returns:
      Values [C, D] and weights [C]; both are zero for a class without examples.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> private = fmd.labelled_dataset(jnp.zeros((3, 1)), jnp.array([2, 0, 2]))
      >>> table = fmd.algorithms.class_means(jnp.array([[1.0], [5.0], [3.0]]), private, num_classes=3)
      >>> table.values.tolist(), table.weights.tolist()
      ([[5.0], [0.0], [2.0]], [1.0, 0.0, 2.0])
    """
    real = jnp.arange(len(outputs)) < private.num_examples
    outputs = at_least_float32(outputs)
    of_class = (private.labels[:, None] == jnp.arange(num_classes)[None]) & real[:, None]
    of_class, outputs = of_class.astype(outputs.dtype), jnp.where(real[:, None], outputs, 0.0)
    counts = of_class.sum(axis=0)
    sums = jnp.matmul(of_class.T, outputs, precision=jax.lax.Precision.HIGHEST)
    return Report(sums / jnp.maximum(counts, 1.0)[:, None], counts)


def send_table(
    mean: Mean, subset: PublicDataset, memory: chex.ArrayTree, key: chex.PRNGKey
) -> tuple[Mean, chex.ArrayTree]:
    """The server: the mean of the tables of all clients, and the weights of its rows, 0 for classes of no client.

    Example:
      >>> import jax.numpy as jnp, fedmd_jax as fmd
      >>> mean = fmd.algorithms.Mean(jnp.ones((2, 3)), jnp.array([4.0, 0.0]))
      >>> table, memory = fmd.algorithms.send_table(mean, None, (), None)
      >>> table.values.shape, table.weights.tolist()
      ((2, 3), [4.0, 0.0])
    """
    del subset, key
    return mean, memory


def revisit_with_table(
    architecture: Architecture,
    state: ClientState,
    private: PrivateDataset,
    table: Mean,
    key: chex.PRNGKey,
    *,
    training: TrainingConfig,
    loss: Distance,
) -> tuple[ClientState, TrainingInfo]:
    """The revisit of one client, in which each example has the row of its label beside its label.

    Args:
      architecture: the client's network.
      state: the client.
      private: the private dataset.
      table: values [C, D] and weights [C].
      key: shuffling and dropout.
      training: epochs, batches and the revisit optimizer.
      loss: (outputs [B, ...], (labels [B], (rows [B, D], known [B]))) -> [B]; `known` says whether the row has a
        weight.

    Returns:
      The client, and the losses of the epochs.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> training = fmd.TrainingConfig()
      >>> client = fmd.init_client(linear, jax.random.key(0), jnp.zeros((1, 2)), digest=training, revisit=training)
      >>> private = fmd.labelled_dataset(jnp.eye(2), jnp.array([0, 1]))
      >>> def loss(logits, targets):
      ...     labels, (rows, known) = targets
      ...     return fmd.cross_entropy(logits, labels) + jnp.where(known, fmd.mse(logits, rows), 0.0)
      >>> table = fmd.algorithms.Mean(jnp.eye(2), jnp.array([2.0, 0.0]))
      >>> client, info = fmd.algorithms.revisit_with_table(
      ...     linear, client, private, table, jax.random.key(1), training=training, loss=loss)
      >>> round(float(info.loss[0]), 4)  # log 2, and 1/2 for one of the two examples
      0.9431
    """
    beside = table.values[private.labels], table.weights[private.labels] > 0
    return phases.revisit(architecture, state, private, key, training=training, loss=loss, beside_labels=beside)
