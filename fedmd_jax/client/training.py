"""The training loop of one client.

Every training phase, on public or on private data, is the same loop `fit` with another loss; a `TrainingConfig` holds
what differs between phases.
"""

import dataclasses
import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedmd_jax.checks import check_count, describe_value
from fedmd_jax.client.early_stopping import EarlyStopping, initial_patience, update_patience
from fedmd_jax.client.guards import all_finite, zero_where_not_finite_before
from fedmd_jax.client.losses import at_least_float32
from fedmd_jax.client.optimizers import adam, scale_updates, with_hyperparameters_of
from fedmd_jax.client.scoring import check_logits, compute_accuracy, score
from fedmd_jax.types import Architecture, PrivateDataset, TrainingInfo

Distance = Callable[[chex.Array, Any], chex.Array]  # (logits [B, C], targets [B, ...]) -> [B]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of one phase of local training. They are closed over and never passed through jit.

    Attributes:
      num_epochs: passes over the data.
      batch_size: number of examples per step; a smaller last batch is kept, as in the reference.
      optimizer: any optax optimizer. Its state belongs to the client and continues from round to round: Adam's moments,
        momentum, and the step count of a schedule. Hyperparameters in the state (`optax.inject_hyperparams`) are reset
        to those of this optimizer at the start of each phase. `update` is also given `value` and `grad`, the loss of
        the batch and its gradient, and `value_fn`, the loss as a function of the parameters.
      shuffle: whether to draw a new permutation in each epoch; otherwise batches are taken in order.
      early_stopping: rule for stopping before the last epoch, which needs validation data; None for no such rule.

    Raises:
      ValueError: a count is not an integer of at least 1, or the optimizer or the early stopping is of another type.

    Example:
      >>> import optax, fedmd_jax as fmd
      >>> fmd.TrainingConfig(num_epochs=2, optimizer=optax.sgd(0.1, momentum=0.9))
      TrainingConfig(num_epochs=2, batch_size=32, shuffle=True, early_stopping=None)
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
            raise ValueError(f"optimizer must be one of optax, got {describe_value(self.optimizer)}")
        if not isinstance(self.early_stopping, (EarlyStopping, type(None))):
            raise ValueError(
                f"early_stopping must be an EarlyStopping or None, got {describe_value(self.early_stopping)}"
            )


def scale_learning_rate(training: TrainingConfig, factor: chex.Numeric | None) -> TrainingConfig:
    """The phase with all updates multiplied by a factor, [], which may be traced; unchanged if it is None."""
    if factor is None:
        return training
    return dataclasses.replace(training, optimizer=scale_updates(training.optimizer, factor))


class Learner(NamedTuple):
    """The carry of a training step: a client's network and the state of the active optimizer."""

    params: chex.ArrayTree
    model_state: chex.ArrayTree
    opt_state: chex.ArrayTree


def fit(
    architecture: Architecture,
    example_loss: Distance,
    learner: Learner,
    inputs: chex.Array,
    targets: chex.ArrayTree,
    num_examples: int | chex.Array,
    key: chex.PRNGKey,
    *,
    training: TrainingConfig,
    validation: PrivateDataset | None = None,
) -> tuple[Learner, TrainingInfo]:
    """Minimizes the mean of `example_loss` plus the penalty of the architecture by mini-batch steps.

    Args:
      architecture: the network.
      example_loss: (logits [B, C], targets [B, ...]) -> [B], one loss per example.
      learner: parameters, model state and optimizer state.
      inputs: [N, ...].
      targets: [N, ...], or a tree of such arrays, of which the loss is given the rows of the batch.
      num_examples: number of real rows. The integer N says at trace time that there is no padding, and so no empty
        batch; with an array, clients with different numbers of examples share one program. The content of padding rows
        does not matter.
      key: shuffling and dropout.
      training: epochs, batches and optimizer.
      validation: of early stopping, if there is any.

    Returns:
      The learner, and a `TrainingInfo`, whose losses are means over the real examples of each epoch.

    Raises:
      ValueError: early stopping without validation data, validation data without early stopping, inputs and targets of
        different numbers of examples, an optimizer state of another optimizer, or an `example_loss` of another shape.

    Example:
      >>> import jax, jax.numpy as jnp, optax, fedmd_jax as fmd
      >>> from fedmd_jax.client.training import Learner
      >>> linear = fmd.Architecture(
      ...     lambda key, inputs: (jnp.zeros((inputs.shape[1], 2)), {}),
      ...     lambda params, state, inputs, **_: (inputs @ params, state))
      >>> training = fmd.TrainingConfig(num_epochs=3, optimizer=optax.sgd(1.0))
      >>> params, inputs, targets = jnp.zeros((2, 2)), jnp.eye(2), jnp.ones((2, 2))
      >>> learner = Learner(params, {}, training.optimizer.init(params))
      >>> learner, info = fmd.client.fit(
      ...     linear, fmd.mse, learner, inputs, targets, 2, jax.random.key(0), training=training)
      >>> info.loss.tolist()  # halves the distance in each epoch
      [1.0, 0.25, 0.0625]
    """
    check_validation(training, validation)
    inputs, targets = jax.tree.map(jnp.asarray, (inputs, targets))  # NumPy arrays cannot be indexed by traced rows
    lengths = {leaf.shape[:1] for leaf in jax.tree.leaves((inputs, targets))}
    if len(lengths) != 1 or lengths & {(), (0,)} or not jax.tree.leaves(targets):
        raise ValueError(
            f"inputs and targets must be of one number of examples, at least 1, got shapes {inputs.shape} and "
            f"{jax.tree.map(jnp.shape, targets)}"
        )
    optimizer = optax.with_extra_args_support(training.optimizer)
    start = learner._replace(opt_state=with_hyperparameters_of(optimizer, learner.opt_state, learner.params))
    indices, mask, keys = draw_batches(key, inputs.shape[0], num_examples, training=training)

    def step(learner, batch):
        rows, real, key_step = batch

        def batch_loss(params):
            data = inputs[rows], jax.tree.map(itemgetter(rows), targets), real
            return _batch_loss(architecture, example_loss, params, learner.model_state, *data, key_step)

        (loss, model_state), grads = jax.value_and_grad(batch_loss, has_aux=True)(learner.params)
        extra = {"value": loss, "grad": grads, "value_fn": lambda params: batch_loss(params)[0]}
        updates, opt_state = optimizer.update(grads, learner.opt_state, learner.params, **extra)
        moved = Learner(_apply_updates(learner.params, updates), model_state, opt_state)
        num_real = jnp.sum(real)
        if not (isinstance(num_examples, int) and num_examples == inputs.shape[0]):
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

        learner, loss, num_run = _fit_until_stopped(architecture, epoch, start, training, validation)
    finite = all_finite(jax.tree.map(zero_where_not_finite_before, learner, start))
    return learner, TrainingInfo(loss, num_run, finite)


def check_validation(training: TrainingConfig, validation: object | None, where: str = "") -> None:
    """Raises ValueError for early stopping without validation data, or validation data without early stopping.

    Args:
      training: settings of the phase.
      validation: the validation data, in any form, or None.
      where: prefix of the error message.

    Raises:
      ValueError: one is given without the other.
    """
    if training.early_stopping is not None and validation is None:
        raise ValueError(f"{where}early stopping needs validation data, got none")
    if training.early_stopping is None and validation is not None:
        raise ValueError(f"{where}validation data is for early stopping, but this training has none")


def _fit_until_stopped(architecture, epoch, learner, training, validation):
    """Trains until the rule stops. Under `vmap` the loop runs until all clients have stopped."""

    def continues(carry):
        number, _, _, patience = carry
        return (number < training.num_epochs) & ~patience.stopped

    def step(carry):
        number, learner, losses, patience = carry
        learner, loss = epoch(learner, number)
        accuracy = compute_accuracy(score(architecture, learner, validation.inputs), validation)
        patience = update_patience(training.early_stopping, patience, accuracy)
        return number + 1, learner, losses.at[number].set(loss.astype(losses.dtype)), patience

    start = jnp.int32(0), learner, jnp.zeros(training.num_epochs, jnp.float32), initial_patience()
    num_run, learner, losses, _ = jax.lax.while_loop(continues, step, start)
    return learner, losses, num_run


def draw_batches(
    key: chex.PRNGKey, num_rows: int, num_examples: int | chex.Array, *, training: TrainingConfig
) -> tuple[chex.Array, chex.Array, chex.PRNGKey]:
    """Draws the rows of every batch of every epoch: each real row once per epoch, padding rows masked.

    Args:
      key: key of the whole phase; it is consumed.
      num_rows: number of rows N, including padding.
      num_examples: number of real rows, which come first.
      training: epochs, batch size, and whether to shuffle.

    Returns:
      Indices [E, S, B] into the rows, the mask [S, B] of real entries, the same in every epoch, and a key for each step
      [E, S]. Masked entries repeat the first real row of their batch (row 0 if it has none): a row of padding may give
      NaN in a network that divides, and a mask of zeros does not keep NaN out of a gradient.
    """
    batch_size = min(training.batch_size, num_rows)
    num_steps = -(-num_rows // batch_size)
    # A single draw, since each call of the generator costs up to a second of compilation on a CPU (and more in several
    # dimensions). It is drawn row by row, so that a client's numbers do not depend on the padding of its group.
    shape = (num_rows, training.num_epochs, 1 + jax.random.key_data(key).shape[-1])
    words = jax.random.bits(key, (math.prod(shape),), jnp.uint32).reshape(shape)
    priority = words[:, :, 0].T
    keys = jax.random.wrap_key_data(words[:num_steps, :, 1:].swapaxes(0, 1), impl=jax.random.key_impl(key))

    position = jnp.arange(num_rows)
    indices = jnp.broadcast_to(position, priority.shape)
    if training.shuffle:
        # Real rows in random order. One bit is dropped so that padding sorts behind all real rows.
        real = jnp.broadcast_to(position < num_examples, priority.shape)
        indices = jnp.argsort(jnp.where(real, priority >> 1, jnp.uint32(0xFFFFFFFF)), axis=1)
    indices = jnp.pad(indices, ((0, 0), (0, num_steps * batch_size - num_rows)))
    indices = indices.reshape(training.num_epochs, num_steps, batch_size)
    mask = (jnp.arange(num_steps * batch_size) < num_examples).reshape(num_steps, batch_size)
    first = jnp.where(mask[:, :1], indices[:, :, :1], 0)
    return jnp.where(mask, indices, first), mask, keys


def _batch_loss(architecture, example_loss, params, model_state, inputs, targets, mask, key):
    logits, model_state = architecture.apply(params, model_state, inputs, train=True, mask=mask, key=key)
    check_logits(logits, len(inputs))
    _check_example_loss(example_loss, logits, targets)
    losses = example_loss(logits, targets)
    losses = jnp.where(mask, at_least_float32(losses), 0.0)
    mean = jnp.sum(losses) / jnp.maximum(jnp.sum(mask), 1).astype(losses.dtype)
    penalty = architecture.penalty(params)
    if not isinstance(penalty, (int, float, np.generic, jax.Array)) or jnp.shape(penalty) != ():
        raise ValueError(f"the penalty of an architecture must be one number, got {jax.tree.map(jnp.shape, penalty)}")
    return mean + penalty, model_state


def _check_example_loss(example_loss, logits, targets):
    """Refuses losses of another shape than [B]: the mask of padding rows would be broadcast against them.

    It is asked for a number of rows that is the size of no other axis, so that [C] is not taken for [B].
    """
    num_rows = max(size for rows in jax.tree.leaves((logits, targets)) for size in rows.shape) + 1

    def with_rows(leaf):
        return jax.ShapeDtypeStruct((num_rows, *leaf.shape[1:]), leaf.dtype)

    losses = jax.eval_shape(example_loss, *jax.tree.map(with_rows, (logits, targets)))
    shape = getattr(losses, "shape", None)
    if shape != (num_rows,) or jnp.issubdtype(losses.dtype, jnp.complexfloating):
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
