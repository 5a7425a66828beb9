"""The work of ONE client: arrays in, arrays out.

Clients are added outside, by `clients.map_clients`. Every training phase, on public or on private data, is the same
loop `fit` with another loss; what differs between phases is said by a `Training`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedmd_jax.checks import check_count, check_numbers, told
from fedmd_jax.isolation import all_finite, zero_where_not_finite_before
from fedmd_jax.losses import cross_entropy, mae
from fedmd_jax.optimizers import adam, init_optimizer, with_hyperparameters_of
from fedmd_jax.stopping import EarlyStopping, full_patience, wait
from fedmd_jax.types import (
    Architecture,
    ClientState,
    PrivateDataset,
    PublicDataset,
    TrainingInfo,
    TransferInfo,
)

Distance = Callable[[chex.Array, chex.Array], chex.Array]
SCORE_BATCH = {"cpu": 64}  # by platform; 1024 elsewhere


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How one phase of local training runs: closed over, never passed through jit.

    Attributes:
      num_epochs: passes over the data.
      batch_size: examples in a step; a last, smaller batch is kept, as in the reference.
      optimizer: any optax optimizer. Its state belongs to the client and continues from round to round: Adam's moments,
        momentum, and the step count of a schedule. Hyperparameters in the state (`optax.inject_hyperparams`) are reset
        to those of this optimizer at the start of each phase. `update` is also given `value` and `grad`, the loss of
        the batch and its gradient, and `value_fn`, the loss as a function of the parameters.
      shuffle: a new permutation each epoch; off, batches are taken in order.
      early_stopping: when to stop before the last epoch, for which the phase needs validation data; None is never.

    Raises:
      ValueError: a count is not an integer of at least 1, or the optimizer or the early stopping is none.
    """

    num_epochs: int = 1
    batch_size: int = 32
    optimizer: optax.GradientTransformation = dataclasses.field(default_factory=adam, repr=False)
    shuffle: bool = True
    early_stopping: EarlyStopping | None = None

    def __post_init__(self):
        for name in ("num_epochs", "batch_size"):
            check_count(name, getattr(self, name))
        if not isinstance(self.optimizer, tuple) or not all(map(callable, self.optimizer)):
            raise ValueError(f"optimizer must be one of optax, got {told(self.optimizer)}")
        if not isinstance(self.early_stopping, (EarlyStopping, type(None))):
            raise ValueError(f"early_stopping must be an EarlyStopping or None, got {told(self.early_stopping)}")


class Learner(NamedTuple):
    """What a training step carries: a client's network and the memory of the optimizer at work."""

    params: chex.ArrayTree
    model_state: chex.ArrayTree
    opt_state: chex.ArrayTree


def init_client(
    architecture: Architecture, key: chex.PRNGKey, inputs: chex.Array, *, digest: Training, revisit: Training
) -> ClientState:
    """A client with fresh parameters and two fresh optimizers.

    Args:
      architecture: the client's network.
      key: seeds the parameters.
      inputs: [B, ...], of which only shape and dtype are used.
      digest: whose optimizer follows the consensus.
      revisit: whose optimizer follows the labels.

    Returns:
      The client. Random keys in the states of its optimizers are its own: those of the optimizer, folded with `key`.
    """
    params, model_state = architecture.init(key, inputs)
    optimizers = [init_optimizer(training.optimizer, params, key) for training in (digest, revisit)]
    return ClientState(params, model_state, *optimizers)


def score(
    architecture: Architecture, state: ClientState, inputs: chex.Array, *, batch_size: int | None = None
) -> chex.Array:
    """Class scores (raw logits) of one client in inference mode: no dropout, moving batch statistics.

    Args:
      architecture: the client's network.
      state: the client, or what has its `params` and `model_state`.
      inputs: [M, ...].
      batch_size: how many examples are scored at once; bounds memory and changes nothing else. By default as many as
        run fastest: the activations of a few stay in a CPU's cache.

    Returns:
      Scores, [M, C].

    Raises:
      ValueError: inputs that are no numbers of this shape, or a batch of no example.

    References:
      Li and Wang 2019, Algorithm 1, "Communicate"; supplement: "without applying the softmax activation layer".
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
        return architecture.apply(state.params, state.model_state, batch, train=False)[0]

    if num_batches == 1:
        return score_batch(inputs)
    padded = _pad_rows(inputs, num_batches * batch_size).reshape(num_batches, batch_size, *inputs.shape[1:])
    scores = jax.lax.map(score_batch, padded)
    return scores.reshape(num_batches * batch_size, -1)[:num_rows]


def digest(
    architecture: Architecture,
    state: ClientState,
    inputs: chex.Array,
    consensus: chex.Array,
    key: chex.PRNGKey,
    *,
    training: Training,
    distance: Distance = mae,
) -> tuple[ClientState, TrainingInfo]:
    """Trains one client to approach the consensus on the public subset.

    Dropout is on and batch statistics move, as in the reference.

    Args:
      architecture: the client's network.
      state: the client.
      inputs: the public subset, [M, ...].
      consensus: targets, [M, C]; fixed during the whole digest.
      key: shuffling and dropout.
      training: epochs, batches and the digest optimizer.
      distance: loss of (logits [B, C], targets [B, C]) -> [B], such as `mae` or `partial(kl, temperature=2.0)`.

    Returns:
      The client, and the losses of the epochs.

    References:
      Li and Wang 2019, Algorithm 1, "Digest".
    """
    check_numbers("consensus", consensus, kind=jnp.floating, rank=2)
    learner = Learner(state.params, state.model_state, state.digest_opt_state)
    learner, info = fit(architecture, distance, learner, inputs, consensus, inputs.shape[0], key, training=training)
    return state._replace(
        params=learner.params, model_state=learner.model_state, digest_opt_state=learner.opt_state
    ), info


def revisit(
    architecture: Architecture,
    state: ClientState,
    private: PrivateDataset,
    key: chex.PRNGKey,
    validation: PrivateDataset | None = None,
    *,
    training: Training,
) -> tuple[ClientState, TrainingInfo]:
    """Trains one client on its own labelled examples.

    Args:
      architecture: the client's network.
      state: the client.
      private: inputs [N, ...], labels [N] and the number of rows that are real; `labelled_dataset` makes one of arrays.
      key: shuffling and dropout.
      validation: of early stopping, if there is any.
      training: epochs, batches and the revisit optimizer.

    Returns:
      The client, and the losses of the epochs.

    References:
      Li and Wang 2019, Algorithm 1, "Revisit".
    """
    learner = Learner(state.params, state.model_state, state.revisit_opt_state)
    learner, info = fit(
        architecture,
        cross_entropy,
        learner,
        private.inputs,
        private.labels,
        private.num_examples,
        key,
        training=training,
        validation=validation,
    )
    return state._replace(
        params=learner.params, model_state=learner.model_state, revisit_opt_state=learner.opt_state
    ), info


def pretrain(
    architecture: Architecture,
    state: ClientState,
    public: PublicDataset,
    key: chex.PRNGKey,
    validation: PrivateDataset | None = None,
    *,
    training: Training,
) -> tuple[ClientState, TrainingInfo]:
    """Trains one client on the labelled public dataset, with an optimizer of its own that is then forgotten.

    Args:
      architecture: the client's network.
      state: the client.
      public: inputs [P, ...] and labels [P].
      key: shuffling and dropout.
      validation: of early stopping, if there is any; not among the public examples.
      training: epochs, batches and optimizer.

    Returns:
      The client, and the losses of the epochs.

    Raises:
      ValueError: the public dataset has no labels.

    References:
      Li and Wang 2019, Algorithm 1, "Transfer learning", first half.
    """
    if public.labels is None:
        raise ValueError("transfer learning needs the labels of the public dataset, got none")
    opt_state = init_optimizer(training.optimizer, state.params, key)
    learner = Learner(state.params, state.model_state, opt_state)
    learner, info = fit(
        architecture,
        cross_entropy,
        learner,
        public.inputs,
        public.labels,
        public.inputs.shape[0],
        key,
        training=training,
        validation=validation,
    )
    return state._replace(params=learner.params, model_state=learner.model_state), info


def transfer_learn(
    architecture: Architecture,
    state: ClientState,
    public: PublicDataset,
    private: PrivateDataset,
    key: chex.PRNGKey,
    public_validation: PrivateDataset | None = None,
    private_validation: PrivateDataset | None = None,
    *,
    public_training: Training,
    private_training: Training,
    client_id: int | chex.Array | None = None,
) -> tuple[ClientState, TransferInfo]:
    """What each client does before the first round: the public dataset, then its own.

    The second half is a long `revisit`: its optimizer memory is the one that the rounds go on with, as in the
    reference, so `private_training` and the revisit of the rounds need the same kind of optimizer.

    Args:
      architecture: the client's network.
      state: the client.
      public: inputs [P, ...] and labels [P].
      private: the client's own examples.
      key: shuffling and dropout.
      public_validation: of early stopping in the first half, if there is any.
      private_validation: of that in the second half.
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


def fit(
    architecture: Architecture,
    example_loss: Distance,
    learner: Learner,
    inputs: chex.Array,
    targets: chex.Array,
    num_examples: int | chex.Array,
    key: chex.PRNGKey,
    *,
    training: Training,
    validation: PrivateDataset | None = None,
) -> tuple[Learner, TrainingInfo]:
    """Minimises the mean of `example_loss` plus the architecture's penalty by mini-batch steps.

    Args:
      architecture: the network.
      example_loss: (logits [B, C], targets [B, ...]) -> [B], one loss per example.
      learner: what is trained.
      inputs: [N, ...].
      targets: [N, ...].
      num_examples: how many of the N rows are real. An integer promises at trace time that no batch is empty; an array
        lets clients with different numbers of examples share one program. What padding rows hold does not matter.
      key: shuffling and dropout.
      training: epochs, batches and optimizer.
      validation: of early stopping, if there is any.

    Returns:
      The learner, and the losses of the epochs: batches weigh by their real examples.

    Raises:
      ValueError: early stopping without validation data, validation data without early stopping, inputs and targets of
        different numbers of examples, an optimizer state of another optimizer, or an `example_loss` of another shape.
    """
    check_validation(training, validation)
    inputs, targets = jnp.asarray(inputs), jnp.asarray(targets)  # NumPy arrays cannot be indexed by traced rows
    if not inputs.shape or inputs.shape[:1] != targets.shape[:1] or inputs.shape[0] == 0:
        raise ValueError(
            f"inputs and targets must be of one number of examples, at least 1, got shapes {inputs.shape} and "
            f"{targets.shape}"
        )
    optimizer = optax.with_extra_args_support(training.optimizer)
    start = learner._replace(opt_state=with_hyperparameters_of(optimizer, learner.opt_state, learner.params))
    indices, mask, keys = draw_batches(key, inputs.shape[0], num_examples, training=training)

    def step(learner, batch):
        rows, real, key_step = batch

        def batch_loss(params):
            data = inputs[rows], targets[rows], real
            return _batch_loss(architecture, example_loss, params, learner.model_state, *data, key_step)

        (loss, model_state), grads = jax.value_and_grad(batch_loss, has_aux=True)(learner.params)
        updates, opt_state = optimizer.update(
            grads,
            learner.opt_state,
            learner.params,
            value=loss,
            grad=grads,
            value_fn=lambda params: batch_loss(params)[0],
        )
        moved = Learner(_apply_updates(learner.params, updates), model_state, opt_state)
        num_real = jnp.sum(real)
        if not isinstance(num_examples, int):
            # A client with few examples skips the last batches of the others: even a zero gradient would move it,
            # through the momentum of its optimizer.
            moved = jax.tree.map(lambda new, old: jnp.where(num_real > 0, new, old), moved, learner)
        return moved, (loss, num_real.astype(loss.dtype))

    num_epochs, num_steps, _ = indices.shape
    if training.early_stopping is None:
        # One scan over all epochs, so that the step is compiled once.
        batches = (indices.reshape(num_epochs * num_steps, -1), jnp.tile(mask, (num_epochs, 1)), keys.reshape(-1))
        learner, (loss, num_real) = jax.lax.scan(step, start, batches)
        total = jnp.sum((loss * num_real).reshape(num_epochs, num_steps), axis=1)
        loss, num_run = total / jnp.maximum(num_examples, 1).astype(total.dtype), jnp.int32(num_epochs)
    else:

        def epoch(learner, number):
            learner, (loss, num_real) = jax.lax.scan(step, learner, (indices[number], mask, keys[number]))
            return learner, jnp.sum(loss * num_real) / jnp.maximum(num_examples, 1).astype(loss.dtype)

        learner, loss, num_run = _fit_until_stopped(
            architecture, epoch, start, num_epochs, training.early_stopping, validation
        )
    finite = all_finite(jax.tree.map(zero_where_not_finite_before, learner, start))
    return learner, TrainingInfo(loss, num_run, finite)


def check_validation(training: Training, validation: object | None, where: str = "") -> None:
    """Refuses early stopping without validation data, and validation data that nobody looks at.

    Args:
      training: of the phase.
      validation: in whatever form.
      where: in front of the complaint.

    Raises:
      ValueError: one is there without the other.
    """
    if training.early_stopping is not None and validation is None:
        raise ValueError(f"{where}early stopping needs validation data, got none")
    if training.early_stopping is None and validation is not None:
        raise ValueError(f"{where}validation data is for early stopping, but this training has none")


def _fit_until_stopped(architecture, epoch, learner, num_epochs, early_stopping, validation):
    """Under `vmap` a `while_loop` goes on until all clients have stopped, and leaves those that have as they are."""

    def goes_on(carry):
        number, _, _, patience = carry
        return (number < num_epochs) & ~patience.stopped

    def step(carry):
        number, learner, losses, patience = carry
        learner, loss = epoch(learner, number)
        accuracy = share_correct(score(architecture, learner, validation.inputs), validation)
        return (
            number + 1,
            learner,
            losses.at[number].set(loss.astype(losses.dtype)),
            wait(early_stopping, patience, accuracy),
        )

    losses = jnp.zeros(num_epochs, jnp.float32)
    num_run, learner, losses, _ = jax.lax.while_loop(goes_on, step, (jnp.int32(0), learner, losses, full_patience()))
    return learner, losses, num_run


def share_correct(logits: chex.Array, test: PrivateDataset) -> chex.Array:
    """Accuracy of scores [N, C] over the real examples, [], 0..1; 0 where there is none."""
    real = jnp.arange(test.labels.shape[0]) < test.num_examples
    correct = jnp.argmax(logits, axis=-1) == test.labels
    return jnp.sum(correct & real) / jnp.maximum(test.num_examples, 1)


def draw_batches(
    key: chex.PRNGKey, num_rows: int, num_examples: int | chex.Array, *, training: Training
) -> tuple[chex.Array, chex.Array, chex.PRNGKey]:
    """The rows of every batch of every epoch: each real row once an epoch, padding rows masked.

    Args:
      key: seeds everything; the key is consumed.
      num_rows: N, padding included.
      num_examples: how many of them are real; these come first.
      training: epochs, batch size, and whether to shuffle.

    Returns:
      Indices [E, S, B] into the rows, the mask [S, B] of the entries that count, the same in every epoch, and a key
      for each step [E, S]. Masked entries repeat the first real row of their batch (row 0 if it has none): a row of
      padding may give NaN in a network that divides, and a mask of zeros does not keep NaN out of a gradient.
    """
    batch_size = min(training.batch_size, num_rows)
    num_steps = -(-num_rows // batch_size)
    # One draw for everything, since each call of the generator costs a CPU up to a second of compilation (and more in
    # several dimensions); row by row, so that a client's numbers do not depend on how far its group is padded.
    shape = (num_rows, training.num_epochs, 1 + jax.random.key_data(key).shape[-1])
    words = jax.random.bits(key, (math.prod(shape),), jnp.uint32).reshape(shape)
    priority = words[:, :, 0].T
    keys = jax.random.wrap_key_data(words[:num_steps, :, 1:].swapaxes(0, 1), impl=jax.random.key_impl(key))

    position = jnp.arange(num_rows)
    indices = jnp.broadcast_to(position, priority.shape)
    if training.shuffle:
        # Real rows in random order; one bit is given up so that padding sorts behind all of them.
        real = jnp.broadcast_to(position < num_examples, priority.shape)
        indices = jnp.argsort(jnp.where(real, priority >> 1, jnp.uint32(0xFFFFFFFF)), axis=1)
    indices = jnp.pad(indices, ((0, 0), (0, num_steps * batch_size - num_rows)))
    indices = indices.reshape(training.num_epochs, num_steps, batch_size)
    mask = (jnp.arange(num_steps * batch_size) < num_examples).reshape(num_steps, batch_size)
    first = jnp.where(mask[:, :1], indices[:, :, :1], 0)
    return jnp.where(mask, indices, first), mask, keys


def _batch_loss(architecture, example_loss, params, model_state, inputs, targets, mask, key):
    logits, model_state = architecture.apply(params, model_state, inputs, train=True, mask=mask, key=key)
    _check_example_loss(example_loss, logits, targets)
    losses = example_loss(logits, targets)
    losses = jnp.where(mask, losses.astype(jnp.promote_types(losses.dtype, jnp.float32)), 0.0)
    mean = jnp.sum(losses) / jnp.maximum(jnp.sum(mask), 1).astype(losses.dtype)
    return mean + architecture.penalty(params), model_state


def _check_example_loss(example_loss, logits, targets):
    """Refuses losses of another shape than [B]: the mask of padding rows would be broadcast against them.

    It is asked for a number of rows that is the size of no other axis, so that [C] is not taken for [B].
    """
    num_rows = max(*logits.shape, *targets.shape) + 1
    logits, targets = (jax.ShapeDtypeStruct((num_rows, *rows.shape[1:]), rows.dtype) for rows in (logits, targets))
    shape = getattr(jax.eval_shape(example_loss, logits, targets), "shape", None)
    if shape != (num_rows,):
        raise ValueError(
            f"the loss or distance must give one number per example, shape [B], got {shape} for logits of shape "
            f"{logits.shape}: reduce the class axis, as in jnp.mean(..., axis=-1), and no other axis"
        )


def _apply_updates(params, updates):
    """`optax.apply_updates`, which would broadcast updates of other shapes."""
    for param, update in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        if jnp.shape(param) != jnp.shape(update):
            raise ValueError(
                "the optimizer must return updates of the shapes of the parameters, got "
                f"{jnp.shape(update)} for {jnp.shape(param)}"
            )
    return optax.apply_updates(params, updates)


def _pad_rows(rows, num_rows):
    """Repeats the last row, which gives finite scores if the real rows do."""
    return jnp.pad(rows, [(0, num_rows - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1), mode="edge")
