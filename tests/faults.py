"""Clients that go wrong in one phase, as networks: a switch in the state decides for which client it does."""

import jax
import jax.numpy as jnp
import toys

import fedmd_jax as fmd

# What a client's switch says; the same network serves the sound and the broken ones of a group.
SOUND, SCORES, DIGEST, REVISIT, LOSS = range(5)
NAMES = {SCORES: "scores not finite", DIGEST: "digest not finite", REVISIT: "revisit not finite"}


def breakable(network=toys.linear, bad=jnp.nan) -> fmd.Architecture:
    """A network that gives `bad` where `params["switch"]` says so; batches of 5 are digested, batches of 3 revisited."""
    sound = network()

    def init(key, inputs):
        params, model_state = sound.init(key, inputs)
        return {**params, "switch": jnp.float32(SOUND)}, {"of network": model_state, "count": jnp.zeros(())}

    def apply(params, model_state, inputs, *, train, mask=None, key=None):
        switch = jax.lax.stop_gradient(params["switch"])
        logits, inner = sound.apply(params, model_state["of network"], inputs, train=train, mask=mask, key=key)
        count = model_state["count"]
        if train:
            wrong = switch == {5: DIGEST, 3: REVISIT}.get(inputs.shape[0], -1)
            count = jnp.where(wrong, bad, count + 1)
            logits = logits + jnp.where(switch == LOSS, bad, 0.0)
        else:
            logits = jnp.where(switch == SCORES, logits.at[0, 0].set(bad), logits)
        return logits, {"of network": inner, "count": count}

    return fmd.Architecture(init, apply, sound.penalty)


def switched(groups, states, faults):
    """The same states, with the switches of some clients set: {client id: fault}."""

    def of_group(group, clients):
        switches = jnp.array([float(faults.get(client_id, SOUND)) for client_id in group.client_ids])
        return clients._replace(params={**clients.params, "switch": switches})

    return {name: of_group(groups[name], clients) for name, clients in states.items()}


def attendance(groups, *, absent=(), stragglers=()) -> fmd.Attendance:
    """Everybody but these clients."""

    def without(clients):
        return {name: jnp.array([i not in clients for i in group.client_ids]) for name, group in groups.items()}

    return fmd.Attendance(without(set(absent)), without({*absent, *stragglers}))
