"""Public, private and test data of a federation: made of arrays, and checked against its networks and settings."""

from collections.abc import Mapping, Sequence
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
from fedmd_jax.mapping.groups import Groups
from fedmd_jax.mapping.sharding import group_sizes
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
    shapes = {name: _output_shape(name, group.architecture, inputs) for name, group in groups.items()}
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[0] != inputs.shape[0]:
            raise ValueError(
                f"group {name!r}: the network must give scores of shape [{inputs.shape[0]}, C] for "
                f"{inputs.shape[0]} examples, got {shape}"
            )
    if len({shape[1] for shape in shapes.values()}) > 1:
        sizes = {name: shape[1] for name, shape in shapes.items()}
        raise ValueError(f"all networks must have the same number of outputs, got {sizes}")
    return next(iter(shapes.values()))[1]


def _output_shape(name: str, architecture: Architecture, inputs: chex.Array) -> tuple[int, ...]:
    def forward(inputs):
        params, model_state = architecture.init(jax.random.key(0), inputs)
        return architecture.apply(params, model_state, inputs, train=False)[0]

    try:
        scores = jax.eval_shape(forward, jax.ShapeDtypeStruct(inputs.shape, inputs.dtype))
    except Exception as error:
        error.add_note(f"group {name!r}: raised by the network for inputs {describe_value(inputs)}")
        raise
    if not isinstance(scores, jax.ShapeDtypeStruct):
        raise ValueError(
            f"group {name!r}: the network must give logits [B, C] alone, got {jax.tree.map(jnp.shape, scores)}: "
            "wrap it in a module whose `__call__` returns the logits only, such as `self.network(x)[0]`"
        )
    return scores.shape


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
    if not isinstance(private, Mapping) or set(private) != set(groups):
        found = sorted(private, key=str) if isinstance(private, Mapping) else private
        raise ValueError(f"private data is needed for the groups {sorted(groups)}, got {describe_value(found)}")
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
        shared = isinstance(dataset, PrivateDataset)
        if not shared and not isinstance(dataset, Mapping):
            raise ValueError(
                f"labelled dataset {number}: a PrivateDataset, or one per group, is needed, got "
                f"{describe_value(dataset)}"
            )
        if not shared and set(dataset) != set(groups):
            found = describe_value(sorted(dataset, key=str))
            raise ValueError(f"labelled dataset {number}: one per group is needed, {sorted(groups)}, got {found}")
        parts = {"shared": dataset} if shared else dict(dataset)
        for name, part in parts.items():
            what = _what(number, name)
            dtypes[what] = _check_labelled(what, part, tuple(shape), num_classes)
        for name, size in ({} if shared else group_sizes(dataset)).items():
            if size != groups[name].num_clients:
                raise ValueError(f"{_what(number, name)}: {groups[name].num_clients} clients, but data of {size}")
    check_one_dtype(dtypes)


def _what(number: int, name: str) -> str:
    """Name of a part of the data in an error message; part 0 is the private data."""
    return f"group {name!r}" if number == 0 else f"labelled dataset {number}, {name}"


def _check_labelled(what: str, dataset: PrivateDataset, shape: tuple[int, ...], num_classes: int) -> np.dtype:
    """The dtype of the inputs of one dataset, stacked or not; a client without examples is padding, and passes."""
    if not isinstance(dataset, PrivateDataset):
        raise ValueError(f"{what}: a PrivateDataset is needed, got {describe_value(dataset)}")
    inputs, labels, num_examples = map(as_array, (f"{what}: {part}" for part in dataset._fields), dataset)
    if num_examples.dtype.kind not in "iu" or labels.ndim not in (1, 2):
        raise ValueError(
            f"{what}: integers are needed, labels of rank 1 or 2 and num_examples, got labels {describe_value(labels)} "
            f"and "
            f"num_examples {describe_value(num_examples)}"
        )
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
    groups: Groups,
    inputs: chex.Array,
    *,
    before: Sequence[optax.GradientTransformation],
    revisit: optax.GradientTransformation,
    digest: optax.GradientTransformation,
) -> None:
    """A `ValueError` if an optimizer cannot keep its state between phases, or share it with another.

    Private and pooled training share the state of the revisits. Both optimizers must start with the same state, and
    have the same state after a step with the same gradient, but for hyperparameters and random keys: a number in it
    means the same to both then. They may differ in the learning rate that is applied after the memory.

    Args:
      groups: the architecture groups.
      inputs: any batch, [B, ...]; only shape and dtype are used.
      before: of the phases before the rounds that share the state of `revisit`.
      revisit: of the rounds.
      digest: of the rounds.
    """
    for group in groups.values():
        shapes, _ = jax.eval_shape(group.architecture.init, jax.random.key(0), inputs[:1])
        # One number for each array will do, and compiles once for all networks.
        zeros, ones = (
            jax.tree.map(lambda leaf, fill=fill: jnp.full((1,) * leaf.ndim, fill, leaf.dtype), shapes)
            for fill in (0, 1)
        )
        for name, optimizer in (("revisit", revisit), ("digest", digest)):
            if _first_difference(optimizer.init(zeros), optimizer.init(ones)):
                raise ValueError(
                    f"the optimizer of {name} keeps a copy of the parameters, which other phases move in between: "
                    "it can be used in public training only"
                )
        for optimizer in (each for each in before if each is not revisit):
            _check_shared_memory(optimizer, revisit, zeros)


def _check_shared_memory(ours, theirs, params):
    """A `ValueError` if a number in the state of two optimizers does not mean the same to both."""
    own, memory = ours.init(params), theirs.init(params)
    shared = "private, pooled and revisit training share one optimizer memory, so their optimizers must "
    if jax.tree.structure(own) != jax.tree.structure(memory):
        raise ValueError(f"{shared}be of the same kind, got different ones")
    if difference := _first_difference(own, memory):
        raise ValueError(f"{shared}start with the same one, got {difference}")
    if difference := _first_difference(_after_a_step(ours, own, params), _after_a_step(theirs, memory, params)):
        raise ValueError(f"{shared}remember the same of a gradient, got {difference}")


def _after_a_step(optimizer, state, params):
    """The memory of a small gradient, which is below the bound of any clipping."""
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-4), params)
    optimizer = optax.with_extra_args_support(optimizer)
    extra = {"value": jnp.float32(1), "grad": gradient, "value_fn": lambda _: jnp.float32(1)}
    return optimizer.update(gradient, state, params, **extra)[1]


def _first_difference(one: chex.ArrayTree, other: chex.ArrayTree) -> str | None:
    """The first leaf in which two fresh optimizer states differ, random keys and hyperparameters left out."""
    for (path, leaf), theirs in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        if is_key(leaf) or is_hyperparameter(path):
            continue
        if jnp.shape(leaf) != jnp.shape(theirs) or leaf.dtype != theirs.dtype or not np.array_equal(leaf, theirs):
            return f"{describe_value(leaf)} and {describe_value(theirs)} in {jax.tree_util.keystr(path)}"
    return None
