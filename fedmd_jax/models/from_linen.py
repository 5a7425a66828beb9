"""From a `flax.linen` module to an `Architecture`."""

import inspect
from collections.abc import Callable

import jax
from flax import linen as nn

from fedmd_jax.models.layers import BatchNorm
from fedmd_jax.models.masking import keep_if_all_padding, row_mask
from fedmd_jax.types import Architecture, no_penalty

_BATCH_NORMS = (nn.BatchNorm, BatchNorm)


def architecture_from_linen(module: nn.Module, *, penalty: Callable = no_penalty) -> Architecture:
    """Makes pure functions of a linen module.

    The module is called as `module(inputs, train=..., mask=...)`, with those of the two arguments that its `__call__`
    has. `train` switches dropout and batch-norm, as usual: `nn.BatchNorm(use_running_average=not train)`,
    `nn.Dropout(rate, deterministic=not train)`. A module without `train` behaves in training as in inference.

    The module need not know of `mask`: wherever it calls `nn.BatchNorm` on [B, ...], the mask is handed in, so that
    the padding of a partial batch cannot reach the statistics. A `mask` that the module itself gives is left alone.

    Every variable collection but `params` is the model state; the collections that the module sows into are dropped.
    Random streams (`dropout` and any other) come from `key`, and exist in training only.

    Args:
      module: an unbound linen module that returns raw scores [B, C].
      penalty: params -> scalar, added to the digest and to the revisit loss.

    Returns:
      The architecture.

    Raises:
      ValueError: if `module` is no linen module; `init` raises it for batch statistics in a module without `train`.

    >>> import jax.numpy as jnp
    >>> from fedmd_jax.models import MLP
    >>> architecture = architecture_from_linen(MLP((8,), num_classes=3))
    >>> params, model_state = architecture.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> logits, model_state = architecture.apply(params, model_state, jnp.ones((5, 4)), train=False)
    >>> logits.shape, model_state
    ((5, 3), {})
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"wanted a flax.linen module, got {module}")
    accepted = inspect.signature(type(module).__call__).parameters

    def keywords(train, mask):
        return {name: value for name, value in (("train", train), ("mask", mask)) if name in accepted}

    def init(key, inputs):
        variables = dict(module.init(_streams(key), inputs, **keywords(False, None)))
        params = variables.pop("params", {})
        model_state = {name: tree for name, tree in variables.items() if not _is_sown(tree)}
        if "batch_stats" in model_state and "train" not in accepted:
            raise ValueError(
                f"{type(module).__name__}.__call__ must accept `train`, because it has batch statistics: "
                "nn.BatchNorm(use_running_average=not train)"
            )
        return params, model_state

    def apply(params, model_state, inputs, *, train, mask=None, key=None):
        variables = {"params": params, **model_state}
        if not train:
            return module.apply(variables, inputs, **keywords(train, mask)), model_state
        with nn.intercept_methods(_mask_batch_norm(mask)):
            logits, new_state = module.apply(
                variables,
                inputs,
                **keywords(train, mask),
                rngs=None if key is None else _streams(key),
                mutable=list(model_state),
            )
        return logits, keep_if_all_padding(mask, model_state, {**model_state, **new_state})

    return Architecture(init, apply, penalty)


def _streams(key):
    """Linen takes "params" for every stream that is not named."""
    key_params, key_dropout = jax.random.split(key)
    return {"params": key_params, "dropout": key_dropout}


def _is_sown(collection) -> bool:
    """`Module.sow` appends to tuples, which grow with every call; no other variable of flax is a tuple."""
    return any(isinstance(leaf, tuple) for leaf in jax.tree.leaves(collection, is_leaf=lambda x: isinstance(x, tuple)))


def _mask_batch_norm(mask):
    """An interceptor that gives `mask` [B] to every batch-norm that was called without one."""

    def intercept(call, args, kwargs, context):
        wanted = isinstance(context.module, _BATCH_NORMS) and context.method_name == "__call__"
        if mask is None or not wanted or kwargs.get("mask") is not None:
            return call(*args, **kwargs)
        x = args[0] if args else kwargs["x"]
        per_row = mask if isinstance(context.module, BatchNorm) else row_mask(mask, x)
        return call(*args, **{**kwargs, "mask": per_row})

    return intercept
