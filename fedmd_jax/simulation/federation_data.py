"""Public, private and test data of a federation: made of arrays, and checked against its networks and settings."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedmd_jax.checks import (
    as_array,
    check_examples,
    check_inputs,
    check_labels_in_head,
    check_one_dtype,
    describe_value,
)
from fedmd_jax.client.optimizers import is_hyperparameter, is_key
from fedmd_jax.client.scoring import check_logits
from fedmd_jax.client.training import TrainingConfig
from fedmd_jax.mapping.groups import Groups
from fedmd_jax.types import Architecture, PrivateDataset, PublicDataset

Private = Mapping[str, PrivateDataset]


def public_dataset(inputs: Any, labels: Any = None) -> PublicDataset:
    """Makes the public dataset of arrays.

    Args:
      inputs: one array, [P, ...]: integers, such as token ids, are stored in int32; float16, bfloat16 and float32 keep
        their dtype, float64 becomes float32.
      labels: [P], integers from 0. Without labels clients cannot be pretrained, but rounds can run.

    Raises:
      ValueError: no rows, NaN, integers beyond int32, bool, a pytree, images [N, C, H, W], lengths that differ, labels
        that are not integers from 0.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> public = fmd.public_dataset(np.zeros((3, 8, 8, 1)), labels=[2, 0, 1])
      >>> public.inputs.shape, str(public.inputs.dtype), public.labels.tolist()
      ((3, 8, 8, 1), 'float32', [2, 0, 1])
    """
    if labels is None:
        return PublicDataset(jnp.asarray(check_inputs("public dataset", inputs)), None)
    return PublicDataset(*map(jnp.asarray, check_examples("public dataset", inputs, labels)))


def labelled_dataset(inputs: Any, labels: Any) -> PrivateDataset:
    """Makes one unstacked labelled dataset, such as a test set, of arrays.

    Args:
      inputs: one array, [N, ...], as in `public_dataset`.
      labels: [N], integers from 0.

    Raises:
      ValueError: as in `public_dataset`.

    Example:
      >>> import numpy as np, fedmd_jax as fmd
      >>> test = fmd.labelled_dataset(np.zeros((3, 8, 8, 1)), labels=[2, 0, 1])
      >>> test.inputs.shape, test.labels.tolist(), int(test.num_examples)
      ((3, 8, 8, 1), [2, 0, 1], 3)
    """
    inputs, labels = check_examples("labelled dataset", inputs, labels)
    return PrivateDataset(jnp.asarray(inputs), jnp.asarray(labels), jnp.int32(len(labels)))


def num_outputs(groups: Groups, inputs: chex.Array) -> int:
    """C, the number of scores that the networks of all groups give; a `ValueError` if they do not agree.

    Args:
      groups: the architecture groups.
      inputs: any batch, [B, ...]; only shape and dtype are used, nothing is computed.

    Raises:
      ValueError: a network gives something else than scores [B, C], or the networks do not agree on C. What a network
        itself raises is raised as it is, with a note that names the group.
    """
    sizes = {name: _num_outputs(name, group.architecture, inputs) for name, group in groups.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"all networks must have the same number of outputs, got {sizes}")
    return next(iter(sizes.values()))


def _num_outputs(name: str, architecture: Architecture, inputs: chex.Array) -> int:
    def forward(inputs):
        params, model_state = architecture.init(jax.random.key(0), inputs)
        return architecture.apply(params, model_state, inputs, train=False)[0]

    try:
        logits = jax.eval_shape(forward, jax.ShapeDtypeStruct(inputs.shape, inputs.dtype))
    except Exception as error:
        error.add_note(f"group {name!r}: raised by the network for inputs {describe_value(inputs)}")
        raise
    check_logits(logits, inputs.shape[0], f"group {name!r}: ")
    return logits.shape[1]


def check_data(
    groups: Groups, subset_size: int, public: PublicDataset, private: Private, *others: PrivateDataset | Private
) -> None:
    """Raises ValueError if data does not fit the networks or the settings.

    Args:
      groups: the architecture groups.
      subset_size: number of public examples per round.
      public: the public dataset.
      private: per group, stacked.
      *others: test or pooled data, unstacked, or per group stacked.
    """
    if not isinstance(public, PublicDataset):
        raise ValueError(f"a PublicDataset is needed, got {describe_value(public)}")
    if public.labels is None:
        inputs = check_inputs("public dataset", public.inputs)
    else:
        inputs, _ = check_examples("public dataset", public.inputs, public.labels)
    num_public, *shape = inputs.shape
    if subset_size > num_public:
        raise ValueError(
            f"the public subset of a round must be at most the public dataset, {num_public} examples, got {subset_size}"
        )
    dtypes = {"public dataset": public.inputs.dtype}
    num_classes = num_outputs(groups, public.inputs[:2])
    if public.labels is not None:
        check_labels_in_head("public dataset", public.labels, num_classes)
    for number, dataset in enumerate((private, *others)):
        if number > 0 and isinstance(dataset, PrivateDataset):
            what = f"labelled dataset {number}, shared"
            dtypes[what] = _check_labelled(what, dataset, None, tuple(shape), num_classes)
            continue
        if not isinstance(dataset, Mapping) or set(dataset) != set(groups):
            found = sorted(dataset, key=str) if isinstance(dataset, Mapping) else dataset
            wanted = f"labelled dataset {number}: one PrivateDataset, or one per group," if number else "private data"
            raise ValueError(f"{wanted} is needed for the groups {sorted(groups)}, got {describe_value(found)}")
        for name, group in groups.items():
            what = f"labelled dataset {number}, {name}" if number else f"group {name!r}"
            dtypes[what] = _check_labelled(what, dataset[name], group.num_clients, tuple(shape), num_classes)
    check_one_dtype(dtypes)


def _check_labelled(
    what: str, dataset: PrivateDataset, num_clients: int | None, shape: tuple[int, ...], num_classes: int
) -> np.dtype:
    """The dtype of the inputs of one dataset, stacked unless `num_clients` is None; empty clients pass, as padding."""
    if not isinstance(dataset, PrivateDataset):
        raise ValueError(f"{what}: a PrivateDataset is needed, got {describe_value(dataset)}")
    inputs, labels, num_examples = map(as_array, (f"{what}: {part}" for part in dataset._fields), dataset)
    rank = 1 if num_clients is None else 2
    if num_examples.dtype.kind not in "iu" or labels.ndim != rank:
        raise ValueError(
            f"{what}: integers are needed, labels of rank {rank} and num_examples, got labels {describe_value(labels)} "
            f"and num_examples {describe_value(num_examples)}"
        )
    if num_clients is not None and len(labels) != num_clients:
        raise ValueError(f"{what}: {num_clients} clients, but data of {len(labels)}")
    if inputs.shape[labels.ndim :] != shape:
        raise ValueError(f"{what}: inputs must have shape (..., N, {str(shape)[1:-1]}), got {inputs.shape}")
    if inputs.shape[: labels.ndim] != labels.shape:
        raise ValueError(f"{what}: inputs of shape {inputs.shape} do not go with labels of shape {labels.shape}")
    if num_examples.shape != labels.shape[:-1] or (num_examples < 0).any() or (num_examples > labels.shape[-1]).any():
        raise ValueError(f"{what}: num_examples must be between 0 and {labels.shape[-1]}, got {num_examples.tolist()}")
    check_examples(what, inputs.reshape(-1, *shape), labels.reshape(-1))
    check_labels_in_head(what, labels, num_classes)
    return inputs.dtype


def check_optimizers(
    groups: Groups, inputs: chex.Array, digest: TrainingConfig, revisit: TrainingConfig, *sharing: TrainingConfig
) -> None:
    """A `ValueError` if an optimizer cannot keep its state between phases, or share it with another.

    Private and pooled training share the state of the revisits. Both optimizers must have the same state after a step
    with the same gradient, except for hyperparameters and random keys: then a number in it means the same to both. They
    may differ in the learning rate that is applied after the memory.

    Args:
      groups: the architecture groups.
      inputs: any batch, [B, ...]; only shape and dtype are used.
      digest: settings of the digests.
      revisit: settings of the revisits.
      *sharing: settings of other phases that use the optimizer state of the revisits.
    """
    for group in groups.values():
        shapes, _ = jax.eval_shape(group.architecture.init, jax.random.key(0), inputs[:1])
        # One number for each array is enough, and compiles once for all networks.
        zeros, ones = (
            jax.tree.map(lambda leaf, fill=fill: jnp.full((1,) * leaf.ndim, fill, leaf.dtype), shapes)
            for fill in (0, 1)
        )
        for name, training in (("revisit", revisit), ("digest", digest)):
            if _first_difference(training.optimizer.init(zeros), training.optimizer.init(ones)):
                raise ValueError(
                    f"the optimizer of {name} keeps a copy of the parameters, which other phases move in between: "
                    "it can be used in public training only"
                )
        for training in sharing:
            if training.optimizer is not revisit.optimizer:
                _check_shared_memory(training.optimizer, revisit.optimizer, zeros)


def _check_shared_memory(ours, theirs, params):
    """A `ValueError` if a number in the state of two optimizers does not mean the same to both."""
    shared = "private, pooled and revisit training share one optimizer memory, so their optimizers must "
    if jax.tree.structure(ours.init(params)) != jax.tree.structure(theirs.init(params)):
        raise ValueError(f"{shared}be of the same kind, got different ones")
    if difference := _first_difference(_after_a_step(ours, params), _after_a_step(theirs, params)):
        raise ValueError(f"{shared}remember the same of a gradient, got {difference}")


def _after_a_step(optimizer, params):
    """The memory of a small gradient, which is below the bound of any clipping."""
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-4), params)
    extra = {"value": jnp.float32(1), "grad": gradient, "value_fn": lambda _: jnp.float32(1)}
    update = optax.with_extra_args_support(optimizer).update
    return update(gradient, optimizer.init(params), params, **extra)[1]


def _first_difference(one: chex.ArrayTree, other: chex.ArrayTree) -> str | None:
    """The first leaf in which two optimizer states differ, except random keys and hyperparameters."""
    for (path, leaf), theirs in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        if is_key(leaf) or is_hyperparameter(path):
            continue
        if jnp.shape(leaf) != jnp.shape(theirs) or leaf.dtype != theirs.dtype or not np.array_equal(leaf, theirs):
            return f"{describe_value(leaf)} and {describe_value(theirs)} in {jax.tree_util.keystr(path)}"
    return None
