"""From a `flax.nnx` module to an `Architecture`."""

import contextlib
import functools
import inspect
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from fedmd_jax.models.masking import keep_if_all_padding, row_mask
from fedmd_jax.types import Architecture, no_penalty


def architecture_from_nnx(make: Callable[[nnx.Rngs], nnx.Module], *, penalty: Callable = no_penalty) -> Architecture:
    """Makes pure functions of a recipe for an nnx module.

    The module is called as `module(inputs, train=..., mask=...)`, with those of the two arguments that its `__call__`
    has, after `module.train()` or `module.eval()`: its `nnx.Dropout` and `nnx.BatchNorm` need no argument.

    The module need not know of `mask`: wherever it calls `nnx.BatchNorm` on [B, ...], the mask is handed in, so that
    the padding of a partial batch cannot reach the statistics. A `mask` that the module itself gives is left alone.

    `params` are the values of its `nnx.Param`s, the model state those of all other variables, both as plain nested
    dictionaries. Random streams are no part of the state: each call seeds them from its `key`. What the module sows is
    dropped. Arrays that are in no variable are constants: those of one module, shared by all clients.

    Args:
      make: rngs -> a module that returns raw scores [B, C]; always the same layers, whatever the random numbers.
      penalty: params -> scalar, added to the digest and to the revisit loss.

    Returns:
      The architecture.

    Raises:
      ValueError: if `make` is itself a module, or does not make one.

    >>> architecture = architecture_from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    >>> params, model_state = architecture.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> jax.tree.map(jnp.shape, params)
    {'bias': (3,), 'kernel': (4, 3)}
    >>> logits, model_state = architecture.apply(params, model_state, jnp.ones((5, 4)), train=False)
    >>> logits.shape, model_state
    ((5, 3), {})
    """
    # Made for real, not with `jax.eval_shape`: flax takes an array that is made while tracing for a static attribute.
    module = None if isinstance(make, nnx.Module) else make(nnx.Rngs(0))
    if not isinstance(module, nnx.Module):
        raise ValueError(f"wanted a function rngs -> nnx.Module, got {make}")
    graphdef, _, streams, _, constants = _split(module)
    accepted = inspect.signature(type(module).__call__).parameters

    def init(key, inputs):
        del inputs  # nnx modules know their input sizes
        _, params, _, model_state, _ = _split(make(nnx.Rngs(key)))
        return params, model_state

    def apply(params, model_state, inputs, *, train, mask=None, key=None):
        module = nnx.merge(graphdef, params, _seed(streams, key, train), model_state, constants)
        module.train() if train else module.eval()
        keywords = {name: value for name, value in (("train", train), ("mask", mask)) if name in accepted}
        with _masked_batch_norms(module, mask if train else None):
            logits = module(inputs, **keywords)
        if not train:
            return logits, model_state
        new_state = _keep_structure(_split(module)[3], model_state)
        return logits, keep_if_all_padding(mask, model_state, new_state)

    return Architecture(init, apply, penalty)


def _split(module):
    """Module -> (static part, params, random streams, model state, constants), the last four as plain dictionaries."""
    graphdef, *states = nnx.split(module, nnx.Param, nnx.RngState, nnx.Variable, ...)
    return graphdef, *map(nnx.to_pure_dict, states)


def _seed(streams, key, train):
    """Fresh random streams of the shapes of `streams`: keys folded from `key`, counts at zero."""
    leaves, treedef = jax.tree.flatten(streams)
    if key is None:
        if train and leaves:
            raise ValueError("the network draws random numbers in training: `apply(..., train=True)` needs a `key`")
        key = jax.random.key(0)  # never drawn from
    seeds = []
    for position, leaf in enumerate(leaves):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            seeds.append(jax.random.split(jax.random.fold_in(key, position), leaf.shape))
        else:
            seeds.append(jnp.zeros_like(leaf))
    return treedef.unflatten(seeds)


def _keep_structure(new_state, old_state):
    """What `new_state` has in the places of `old_state`: a call may have sown new variables."""
    if isinstance(old_state, dict):
        return {name: _keep_structure(new_state[name], child) for name, child in old_state.items()}
    return new_state


@contextlib.contextmanager
def _masked_batch_norms(module: nnx.Module, mask: chex.Array | None):
    """Within, the batch-norms of this one module object see `mask` [B]; no other object changes."""
    layers = [] if mask is None else [m for _, m in nnx.iter_modules(module) if isinstance(m, nnx.BatchNorm)]
    classes = [type(layer) for layer in layers]
    for layer in layers:
        layer.__class__ = _masked_class(type(layer))
        object.__setattr__(layer, "_row_mask", mask)  # past nnx, which would take it for state
    try:
        yield
    finally:
        for layer, original in zip(layers, classes, strict=True):
            layer.__class__ = original
            object.__delattr__(layer, "_row_mask")


@functools.cache
def _masked_class(batch_norm: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """A subclass that fills in the mask; one for each class, because nnx registers classes for ever."""

    class MaskedBatchNorm(batch_norm):
        def __call__(self, x, *args, mask=None, **kwargs):
            mask = row_mask(self._row_mask, x) if mask is None else mask
            return super().__call__(x, *args, mask=mask, **kwargs)

    return MaskedBatchNorm
