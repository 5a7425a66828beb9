"""A run whose programs train nothing."""

import dataclasses

import jax
import jax.numpy as jnp

from fedmd_jax.client.evaluation import Evaluation
from fedmd_jax.types import ClientState, Participation, RoundInfo, TrainingInfo

UNIT = 2.0**-20  # accuracies are shares


def counting(setup):
    """The same with functions that train nothing: a client's only number says which of them it went through.

    It does so for six digits; after that it still depends on all. Its accuracy is this number times `UNIT`, to the bit.
    """
    groups = {
        name: dataclasses.replace(group, architecture=group.architecture._replace(apply=_apply))
        for name, group in setup.federation.groups.items()
    }

    def of_clients(seeds, value):
        """Per group [K], or [S, K] of several seeds."""
        return {name: jnp.full((*seeds, group.num_clients), value) for name, group in groups.items()}

    def new_states(keys, _):
        return {name: ClientState(ones, {}, {}, {}) for name, ones in of_clients(keys.shape, 1.0).items()}

    def appended(digit):
        def append(states, *_):
            shapes = {name: state.params.shape for name, state in states.items()}
            info = {
                name: TrainingInfo(jnp.zeros((*shape, 1)), jnp.ones(shape, jnp.int32), jnp.ones(shape, bool))
                for name, shape in shapes.items()
            }
            return {
                name: state._replace(params=(10 * state.params + digit) % 999_983) for name, state in states.items()
            }, info

        return append

    def round_(states, public, private, keys):
        losses = {name: ones[..., None] for name, ones in of_clients(keys.shape, 0.0).items()}
        client_ids = {
            name: jnp.broadcast_to(jnp.array(group.client_ids), (*keys.shape, group.num_clients))
            for name, group in groups.items()
        }
        yes = of_clients(keys.shape, True)
        info = RoundInfo(losses, losses, client_ids, jnp.full(keys.shape, True), Participation(yes, yes), yes, yes, yes)
        return appended(4)(states)[0], info

    def evaluate(states, _):
        return {
            name: Evaluation(UNIT * state.params, state.params, jnp.ones((*state.params.shape, 2, 2), jnp.int32))
            for name, state in states.items()
        }

    programs = {
        "new_states": jax.jit(new_states),
        "pretrain": jax.jit(appended(2), donate_argnums=0),
        "train_private": jax.jit(appended(3), donate_argnums=0),
        "round": jax.jit(round_, donate_argnums=0),
        "revisit": jax.jit(appended(6), donate_argnums=0),
        "train_pooled": jax.jit(appended(5)),
        "confusion": jax.jit(evaluate),
    }
    federation = dataclasses.replace(setup.federation, groups=groups, programs=programs)
    return setup._replace(federation=federation)


def _apply(params, model_state, inputs, *, train):
    """All examples have the class that is the number of the client modulo 16."""
    return jax.nn.one_hot(jnp.full(len(inputs), params.astype(jnp.int32) % 16), 16), model_state
