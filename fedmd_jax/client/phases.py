"""The phases of FedMD for ONE client, arrays in, arrays out: transfer learning, digest, revisit.

`mapping` maps these functions over many clients.
"""

import chex
import jax
import jax.numpy as jnp

from fedmd_jax.checks import check_numbers
from fedmd_jax.client.losses import cross_entropy, mae
from fedmd_jax.client.optimizers import init_optimizer
from fedmd_jax.client.training import Distance, Learner, TrainingConfig, check_validation, fit
from fedmd_jax.types import Architecture, ClientState, PrivateDataset, PublicDataset, TrainingInfo, TransferInfo


def init_client(
    architecture: Architecture,
    key: chex.PRNGKey,
    inputs: chex.Array,
    key_optimizers: chex.PRNGKey | None = None,
    *,
    digest: TrainingConfig,
    revisit: TrainingConfig,
) -> ClientState:
    """A client with fresh parameters and two fresh optimizers.

    Args:
      architecture: the client's network.
      key: seeds the parameters.
      inputs: [B, ...], of which only shape and dtype are used.
      key_optimizers: makes the random keys in the states of its optimizers the client's own; `key` by default. Clients
        that start with equal parameters need different ones.
      digest: settings of digest, with the optimizer of the distillation steps.
      revisit: settings of revisit, with the optimizer of the private steps.

    Returns:
      The client. Random keys in the states of its optimizers are those of the optimizer folded with `key_optimizers`.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> training = fmd.TrainingConfig(batch_size=4)
      >>> client = fmd.init_client(linear, jax.random.key(0), jnp.zeros((1, 2)), digest=training, revisit=training)
      >>> client.params.shape, int(client.digest_opt_state.count)
      ((2, 2), 0)
    """
    params, model_state = architecture.init(key, inputs)
    own = key if key_optimizers is None else key_optimizers
    optimizers = [init_optimizer(training.optimizer, params, own) for training in (digest, revisit)]
    return ClientState(params, model_state, *optimizers)


def digest(
    architecture: Architecture,
    state: ClientState,
    inputs: chex.Array,
    consensus: chex.ArrayTree,
    key: chex.PRNGKey,
    *,
    training: TrainingConfig,
    distance: Distance = mae,
    num_examples: int | chex.Array | None = None,
) -> tuple[ClientState, TrainingInfo]:
    """Distils the consensus on the public subset into one client.

    Dropout is active and batch statistics are updated, as in the reference.

    Args:
      architecture: the client's network.
      state: the client.
      inputs: the public subset, [M, ...].
      consensus: targets, [M, C], constant during the digest; or a tuple of arrays [M, ...], if the distance takes one.
      key: shuffling and dropout.
      training: epochs, batches and the digest optimizer.
      distance: loss of (logits [B, C], targets [B, C]) -> [B], such as `mae` or `partial(kl, temperature=2.0)`.
      num_examples: number of rows, from the first, that are digested, as in `fit`; by default all M.

    Returns:
      The client, and the losses of the epochs.

    References:
      Li and Wang 2019, Algorithm 1, "Digest".

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> training = fmd.TrainingConfig(batch_size=4)
      >>> client = fmd.init_client(linear, jax.random.key(0), jnp.zeros((1, 2)), digest=training, revisit=training)
      >>> inputs, consensus = jnp.eye(2), jnp.array([[1.0, -1.0], [1.0, -1.0]])
      >>> client, info = fmd.digest(linear, client, inputs, consensus, jax.random.key(1), training=training)
      >>> info.loss.tolist(), jnp.sign(client.params).tolist()  # one epoch; the scores move towards the consensus
      ([1.0], [[1.0, -1.0], [1.0, -1.0]])
    """
    if not isinstance(consensus, tuple):
        check_numbers("consensus", consensus, kind=jnp.floating, rank=2)
    learner = Learner(state.params, state.model_state, state.digest_opt_state)
    num_examples = inputs.shape[0] if num_examples is None else num_examples
    learner, info = fit(architecture, distance, learner, inputs, consensus, num_examples, key, training=training)
    return ClientState(learner.params, learner.model_state, learner.opt_state, state.revisit_opt_state), info


def revisit(
    architecture: Architecture,
    state: ClientState,
    private: PrivateDataset,
    key: chex.PRNGKey,
    validation: PrivateDataset | None = None,
    *,
    training: TrainingConfig,
    loss: Distance = cross_entropy,
    beside_labels: chex.ArrayTree = None,
) -> tuple[ClientState, TrainingInfo]:
    """Trains one client on its own labelled examples.

    Args:
      architecture: the client's network.
      state: the client.
      private: inputs [N, ...], labels [N] and the number of real rows; `labelled_dataset` makes one of arrays.
      key: key for shuffling and dropout.
      validation: validation data, if there is early stopping.
      training: epochs, batches and the revisit optimizer.
      loss: (logits [B, C], labels [B]) -> [B].
      beside_labels: more targets, a tree of [N, ...], such as a distribution for each example; `loss` is then given
        (logits, (labels, tree of [B, ...])).

    Returns:
      The client, and the losses of the epochs.

    References:
      Li and Wang 2019, Algorithm 1, "Revisit".

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> training = fmd.TrainingConfig(batch_size=4)
      >>> client = fmd.init_client(linear, jax.random.key(0), jnp.zeros((1, 2)), digest=training, revisit=training)
      >>> private = fmd.labelled_dataset(jnp.eye(2), jnp.array([0, 1]))
      >>> client, info = fmd.revisit(linear, client, private, jax.random.key(1), training=training)
      >>> round(float(info.loss[0]), 4), jnp.sign(client.params).tolist()
      (0.6931, [[1.0, -1.0], [-1.0, 1.0]])
    """
    learner = Learner(state.params, state.model_state, state.revisit_opt_state)
    inputs, labels, num_examples = private
    targets = labels if beside_labels is None else (labels, beside_labels)
    how: dict = {"training": training, "validation": validation}
    learner, info = fit(architecture, loss, learner, inputs, targets, num_examples, key, **how)
    return ClientState(learner.params, learner.model_state, state.digest_opt_state, learner.opt_state), info


def pretrain(
    architecture: Architecture,
    state: ClientState,
    public: PublicDataset,
    key: chex.PRNGKey,
    validation: PrivateDataset | None = None,
    *,
    training: TrainingConfig,
) -> tuple[ClientState, TrainingInfo]:
    """Trains one client on the labelled public dataset, with an optimizer state that is discarded afterwards.

    Args:
      architecture: the client's network.
      state: the client.
      public: inputs [P, ...] and labels [P].
      key: shuffling and dropout.
      validation: validation data, if there is early stopping; disjoint from the public examples.
      training: epochs, batches and optimizer.

    Returns:
      The client, and the losses of the epochs.

    Raises:
      ValueError: the public dataset has no labels.

    References:
      Li and Wang 2019, Algorithm 1, "Transfer learning", first half.

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> training = fmd.TrainingConfig(batch_size=4)
      >>> client = fmd.init_client(linear, jax.random.key(0), jnp.zeros((1, 2)), digest=training, revisit=training)
      >>> public = fmd.public_dataset(jnp.eye(2), jnp.array([0, 1]))
      >>> client, info = fmd.pretrain(linear, client, public, jax.random.key(1), training=training)
      >>> jnp.sign(client.params).tolist(), int(client.revisit_opt_state.count)  # the optimizer state is as before
      ([[1.0, -1.0], [-1.0, 1.0]], 0)
    """
    if public.labels is None:
        raise ValueError("transfer learning needs the labels of the public dataset, got none")
    fresh = state._replace(revisit_opt_state=init_optimizer(training.optimizer, state.params, key))
    data = PrivateDataset(public.inputs, public.labels, public.inputs.shape[0])
    trained, info = revisit(architecture, fresh, data, key, validation, training=training)
    return trained._replace(revisit_opt_state=state.revisit_opt_state), info


def transfer_learn(
    architecture: Architecture,
    state: ClientState,
    public: PublicDataset,
    private: PrivateDataset,
    key: chex.PRNGKey,
    public_validation: PrivateDataset | None = None,
    private_validation: PrivateDataset | None = None,
    *,
    public_training: TrainingConfig,
    private_training: TrainingConfig,
    client_id: int | chex.Array | None = None,
) -> tuple[ClientState, TransferInfo]:
    """Transfer learning of one client: training on the public dataset, then on its private dataset.

    The second half is a long `revisit`. The rounds continue with its optimizer state, as in the reference, so that
    `private_training` and the revisits of the rounds need the same kind of optimizer.

    Args:
      architecture: the client's network.
      state: the client.
      public: inputs [P, ...] and labels [P].
      private: the client's private dataset.
      key: shuffling and dropout.
      public_validation: validation data, if the first half has early stopping.
      private_validation: validation data, if the second half has early stopping.
      public_training: epochs, batches and optimizer of the first half.
      private_training: those of the second half.
      client_id: of a client of a federation: with the key of `Federation.transfer_learn` it trains as it does there.
        None if `key` is this client's alone.

    Returns:
      The client, and the losses of the two halves.

    Raises:
      ValueError: the public dataset has no labels, or a half has early stopping without validation data or the reverse.

    References:
      Li and Wang 2019, Algorithm 1, "Transfer learning".

    Example:
      >>> import jax, jax.numpy as jnp, fedmd_jax as fmd
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> training = fmd.TrainingConfig(batch_size=4)
      >>> client = fmd.init_client(linear, jax.random.key(0), jnp.zeros((1, 2)), digest=training, revisit=training)
      >>> public = fmd.public_dataset(jnp.eye(2), jnp.array([0, 1]))
      >>> private = fmd.labelled_dataset(jnp.ones((3, 2)), jnp.array([0, 1, 1]))
      >>> client, info = fmd.transfer_learn(
      ...     linear, client, public, private, jax.random.key(1), public_training=training, private_training=training)
      >>> info.public.loss.shape, info.private.loss.shape
      ((1,), (1,))
    """
    check_validation(public_training, public_validation, "public_training: ")
    check_validation(private_training, private_validation, "private_training: ")
    keys = jax.random.split(key)
    key_public, key_private = keys if client_id is None else (jax.random.fold_in(each, client_id) for each in keys)
    state, public_info = pretrain(architecture, state, public, key_public, public_validation, training=public_training)
    state, private_info = revisit(
        architecture, state, private, key_private, private_validation, training=private_training
    )
    return state, TransferInfo(public_info, private_info)
