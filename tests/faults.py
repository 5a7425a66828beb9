"""Networks that become non-finite in one phase: a switch among the parameters selects the clients and the phase."""

import jax
import jax.numpy as jnp
import toys

import fedmd_jax as fmd

# Values of the switch: no fault, or the phase of the fault. Training phases are identified by the batch sizes of
# `toys`.
SOUND, SCORES, LOSS, REVISIT, PRIVATE, DIGEST, PUBLIC, POOL = 0, 1, 2, 3, 4, 5, 8, 16


def breakable(network=toys.linear) -> fmd.Architecture:
    """A network with faults: one number becomes NaN, or infinite if the switch is negative."""
    sound = network()

    def init(key, inputs):
        params, model_state = sound.init(key, inputs)
        return {**params, "switch": jnp.float32(SOUND)}, {"inner": model_state, "count": jnp.zeros(())}

    def broken(params, what):
        switch = jax.lax.stop_gradient(params["switch"])
        # Rounded, since the memory of an optimizer may move it a little.
        return jnp.round(jnp.abs(switch)) == what, jnp.where(switch < 0, jnp.inf, jnp.nan)

    def apply(params, model_state, inputs, *, train, mask=None, key=None):
        logits, inner = sound.apply(params, model_state["inner"], inputs, train=train, mask=mask, key=key)
        wrong, bad = broken(params, inputs.shape[0] if train else SCORES)
        if train:
            count = jnp.where(wrong, bad, model_state["count"] + 1)
            return logits, {"inner": inner, "count": count}
        return logits.at[0, 0].set(jnp.where(wrong, bad, logits[0, 0])), model_state

    def penalty(params):
        wrong, bad = broken(params, LOSS)  # only the loss goes wrong, no gradient
        return sound.penalty(params) + jnp.where(wrong, bad, 0.0)

    return fmd.Architecture(init, apply, penalty)


def switched(groups, states, faults):
    """The same states, with the switches of some clients set: {client id: what}."""

    def of_group(group, clients):
        switches = jnp.array([float(faults.get(client_id, SOUND)) for client_id in group.client_ids])
        return clients._replace(params={**clients.params, "switch": switches})

    return {name: of_group(groups[name], clients) for name, clients in states.items()}


def participation(groups, *, dropped=(), stragglers=()) -> fmd.Participation:
    """Participation of all clients but these."""

    def without(clients):
        return {name: jnp.array([i not in clients for i in group.client_ids]) for name, group in groups.items()}

    return fmd.Participation(without(set(dropped)), without({*dropped, *stragglers}))
