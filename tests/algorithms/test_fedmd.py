"""Properties of a round for any networks."""

import re
from functools import partial
from typing import Any, NamedTuple

import chex
import faults
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import toys

import fedmd_jax as fmd
from fedmd_jax.aggregators.base import from_all_scores

GROUPS = toys.groups()
PUBLIC = toys.public()
PRIVATE = toys.private(GROUPS)
# SGD, so that rounding stays rounding: grouping, order and sharding agree to this.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def start(groups, private, key=None):
    key = jax.random.key(0) if key is None else key
    return toys.federation(groups).init(key, PUBLIC, private)


def round_of(groups, **settings):
    settings = {"subset_size": 12, "digest_training": toys.sgd(5, 2), "revisit_training": toys.sgd(3, 2), **settings}
    return partial(fmd.fedmd_round, groups=groups, **settings)


def by_client(groups, tree):
    """Per group [K, ...] -> {client id: one client's}."""
    return {
        client_id: jax.tree.map(lambda leaf, k=k: leaf[k], tree[name])
        for name, group in groups.items()
        for k, client_id in enumerate(group.client_ids)
    }


def run(groups, key, **settings):
    private = toys.private(groups)
    states, info = jax.jit(round_of(groups, **settings))(start(groups, private), PUBLIC, private, key)
    return {
        "state": by_client(groups, states),
        "digest_loss": by_client(groups, info.digest_loss),
        "revisit_loss": by_client(groups, info.revisit_loss),
    }


# Dropped clients and stragglers of two rounds; the last leaves no client with a weight.
ATTENDANCE = {
    "everybody": ([], []),
    "some": ([{0, 3}, {2}], [{4}, {0, 1}]),
    "nobody heard": ([{0}, {0, 2, 3, 4}], [{1}, set()]),
}


@pytest.mark.parametrize("absent_and_stragglers", ATTENDANCE.values(), ids=ATTENDANCE)
def test_two_rounds_against_numpy_loops(key, absent_and_stragglers):
    """Weighted, ragged, bounded, with partial last batches; two rounds, so that both optimizer memories live on."""
    groups = toys.groups(linear=(1.0, 0.0, 2.5), mlp=(0.5, 1.0))
    private = toys.private(groups)
    states = start(groups, private)
    clients = {}
    for name, group in groups.items():
        for k, (client_id, weight) in enumerate(zip(group.client_ids, group.weights, strict=True)):
            params = jax.tree.map(lambda leaf, k=k: np.asarray(leaf[k]), states[name].params)
            clients[client_id] = oracle.Client(params, *toys.examples(client_id, 7 + client_id), weight)
    in_order = {"digest_training": toys.sgd(5, 2, shuffle=False), "revisit_training": toys.sgd(3, 2, shuffle=False)}
    transforms = (partial(fmd.transforms.clip_scores, bound=0.8),)
    bounded = round_of(groups, draw_subset=fmd.algorithms.first_examples, transforms=transforms, **in_order)
    step = jax.jit(lambda states, attending: bounded(states, PUBLIC, private, key, participants=attending))
    subset = np.asarray(PUBLIC.inputs[:12], np.float64)
    for round_ in range(2):
        dropped, stragglers = (sets[round_] if sets else set() for sets in absent_and_stragglers)
        participation = faults.participation(groups, dropped=dropped, stragglers=stragglers)
        states, info = step(states, fmd.algorithms.all_clients(groups, participation))
        for client_id, client in clients.items():
            client.available = client_id not in dropped
            client.completed = client.available and client_id not in stragglers
        expected = oracle.fedmd_round(
            list(clients.values()),
            subset,
            digest={"num_epochs": 2, "batch_size": 5},
            revisit={"num_epochs": 2, "batch_size": 3},
            score_clip=0.8,
        )
    actual, losses = by_client(groups, states), by_client(groups, info._asdict()["digest_loss"])
    revisit_losses = by_client(groups, info.revisit_loss)
    for (client_id, client), (digest_loss, revisit_loss) in zip(clients.items(), expected, strict=True):
        for name, value in client.params.items():
            np.testing.assert_allclose(actual[client_id].params[name], value, rtol=1e-4, atol=1e-5)
        if digest_loss is not None:
            np.testing.assert_allclose(losses[client_id], digest_loss, rtol=1e-4)
        if revisit_loss is not None:
            np.testing.assert_allclose(revisit_losses[client_id], revisit_loss, rtol=1e-4)


@pytest.mark.parametrize("regroup", ["order of clients", "order of groups", "one by one"])
def test_grouping_and_order_do_not_matter(key, regroup):
    weights = dict(enumerate((1.0, 2.0, 0.5, 3.0, 1.0)))
    original = toys.groups(linear=[weights[i] for i in (0, 1, 2)], mlp=[weights[i] for i in (3, 4)])
    linear, mlp = original["linear"].architecture, original["mlp"].architecture
    if regroup == "order of clients":
        other = {
            "linear": fmd.ArchitectureGroup(linear, (2, 0, 1), [weights[i] for i in (2, 0, 1)]),
            "mlp": fmd.ArchitectureGroup(mlp, (4, 3), [weights[i] for i in (4, 3)]),
        }
    elif regroup == "order of groups":
        other = dict(reversed(original.items()))
    else:
        other = {str(i): fmd.ArchitectureGroup(linear if i < 3 else mlp, (i,), (weights[i],)) for i in range(5)}
    chex.assert_trees_all_close(run(other, key), run(original, key), **TOLERANCE)


def test_a_client_without_weight_learns_but_is_excluded(key):
    """It digests and revisits; all other clients end as if it did not exist."""
    silent = toys.groups(linear=(1.0, 1.0, 0.0))
    without = {"linear": fmd.ArchitectureGroup(silent["linear"].architecture, (0, 1)), "mlp": silent["mlp"]}
    everybody, others = run(silent, key), run(without, key)
    for kind, clients in everybody.items():
        silent_client = clients.pop(2)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(silent_client))
        chex.assert_trees_all_close(clients, others[kind], **TOLERANCE)


def test_a_distance_may_be_of_half_precision(key):
    def rounded(logits, targets):
        return fmd.mae(logits, targets).astype(jnp.bfloat16)

    private = toys.private(GROUPS)
    arguments = start(GROUPS, private), PUBLIC, private, key
    info = jax.eval_shape(round_of(GROUPS, distance=rounded), *arguments)[1]
    assert {loss.dtype for loss in info.digest_loss.values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("num_devices", [None, 2])
def test_networks_of_several_precisions_meet(key, num_devices):
    def half():
        whole = toys.linear()

        def apply(params, model_state, inputs, *, train, mask=None, key=None):
            logits, model_state = whole.apply(params, model_state, inputs, train=train)
            return logits.astype(jnp.bfloat16), model_state

        return whole._replace(apply=apply)

    groups = {"whole": fmd.ArchitectureGroup(toys.linear(), (0,)), "half": fmd.ArchitectureGroup(half(), (1,))}
    mesh = None if num_devices is None else fmd.client_mesh(num_devices)
    federation, private = toys.federation(groups, mesh=mesh), toys.private(groups)
    states = jax.eval_shape(federation.programs["new_states"], key, PUBLIC.inputs[:1])
    _, info = jax.eval_shape(federation.round, federation.put(states), PUBLIC, federation.put(private), key)
    assert {info.digest_loss[name].dtype for name in groups} == {jnp.dtype(jnp.float32)}


def test_padding_clients_change_nothing(key):
    """A stand-in without weight and without examples, as it fills up a group to a multiple of the devices."""
    linear = GROUPS["linear"].architecture
    filled = {"linear": fmd.ArchitectureGroup(linear, (0, 1, 2, 1000), (1.0, 1.0, 1.0, 0.0)), "mlp": GROUPS["mlp"]}
    private = dict(PRIVATE)
    private["linear"] = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:1])]), PRIVATE["linear"])
    states, info = jax.jit(round_of(filled))(start(filled, private), PUBLIC, private, key)
    actual = by_client(filled, states)
    del actual[1000]
    chex.assert_trees_all_close(actual, run(GROUPS, key)["state"], **TOLERANCE)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((states, info)))


def test_a_round_without_any_weight_leaves_all_undigested_and_says_so(key):
    nobody = toys.groups(linear=(0.0, 0.0, 0.0), mlp=(0.0, 0.0))
    states = start(nobody, PRIVATE)
    after, info = jax.jit(round_of(nobody))(states, PUBLIC, PRIVATE, key)
    assert not info.digested
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((after, info)))
    # Private training continues: exactly a revisit of all clients.
    key_revisit = jax.random.split(key, 3)[2]
    for name, group in nobody.items():
        one = partial(fmd.revisit, group.architecture, training=toys.sgd(3, 2))
        keys = fmd.mapping.client_keys(key_revisit, group.client_ids)
        expected, own = fmd.mapping.map_clients(one, (0, 0, 0))(states[name], PRIVATE[name], keys)
        chex.assert_trees_all_close((after[name], info.revisit_loss[name]), (expected, own.loss), **TOLERANCE)
        assert not info.digest_loss[name].any()


def test_weights_may_be_traced(key):
    """One compiled round for any participation."""
    private, states = PRIVATE, start(GROUPS, PRIVATE)
    everybody = fmd.algorithms.all_clients(GROUPS)
    round_ = partial(round_of(GROUPS), states, PUBLIC, private, key)
    step = jax.jit(lambda weights: round_(participants=everybody._replace(weights=weights))[0])
    given = {"linear": jnp.array([1.0, 0.0, 2.0]), "mlp": jnp.array([0.0, 3.0])}
    fixed = run(toys.groups(linear=(1.0, 0.0, 2.0), mlp=(0.0, 3.0)), key)["state"]
    chex.assert_trees_all_close(by_client(GROUPS, step(given)), fixed, **TOLERANCE)


def test_scanning_over_rounds_is_looping_over_them(key):
    step, keys = round_of(GROUPS), jax.random.split(key, 3)

    @jax.jit
    def scanned(states):
        return jax.lax.scan(lambda states, key: step(states, PUBLIC, PRIVATE, key), states, keys)

    looped, infos = start(GROUPS, PRIVATE), []
    for k in keys:
        looped, info = jax.jit(step)(looped, PUBLIC, PRIVATE, k)
        infos.append(info)
    states, info = scanned(start(GROUPS, PRIVATE))
    chex.assert_trees_all_close((states, info), (looped, jax.tree.map(lambda *x: jnp.stack(x), *infos)), **TOLERANCE)


def test_seeds_can_be_mapped_over(key):
    step, keys = round_of(GROUPS), jax.random.split(key, 2)
    states = start(GROUPS, PRIVATE)
    both, info = jax.jit(jax.vmap(step, (None, None, None, 0)))(states, PUBLIC, PRIVATE, keys)
    for seed in range(2):
        one, _ = jax.jit(step)(states, PUBLIC, PRIVATE, keys[seed])
        chex.assert_trees_all_close(jax.tree.map(lambda x, seed=seed: x[seed], both), one, **TOLERANCE)
    assert info.digested.all()


def two_groups():
    """Four and eight clients, with batch statistics and noise in one of the networks."""
    return {
        "normed": fmd.ArchitectureGroup(toys.normed(noise=0.1), range(4)),
        "mlp": fmd.ArchitectureGroup(toys.tanh_mlp(), range(4, 12)),
    }


def ten_networks():
    """One group per client, of different widths, depths and kinds of state; one client is excluded."""
    networks = [*map(toys.tanh_mlp, range(3, 8)), *map(toys.convolutional, (2, 3, 4)), toys.linear(), toys.normed(0.1)]
    return {
        f"network {client_id}": fmd.ArchitectureGroup(network, (client_id,), (float(client_id != 2),))
        for client_id, network in enumerate(networks)
    }


class Sharded(NamedTuple):
    """A round of four devices: its program, what that is given, and the same for one device."""

    groups: dict
    program: Any
    arguments: tuple
    spread: tuple


@pytest.fixture(scope="module", params=[(two_groups, None), (two_groups, 2), (ten_networks, None)])
def sharded(request):
    """Of the ten networks one has gone wrong, and one client is not there."""
    make_groups, clients_per_chunk = request.param
    groups, mesh = make_groups(), fmd.client_mesh(4)
    private = toys.private(groups)
    states = dict(start(groups, private))
    if "network 5" in groups:
        broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), states["network 5"].params)
        states["network 5"] = states["network 5"]._replace(params=broken)
    participation = faults.participation(groups, dropped={9}, stragglers=set())
    key = jax.random.key(3)
    spread = (fmd.mapping.shard_clients(states, mesh), PUBLIC, fmd.mapping.shard_clients(private, mesh), key)
    step = jax.jit(round_of(groups, mesh=mesh, clients_per_chunk=clients_per_chunk))
    participants = fmd.algorithms.all_clients(groups, participation)
    program = step.lower(*spread, participants=participants).compile()
    return Sharded(groups, program, ((states, PUBLIC, private, key), participants), (spread, participants))


@pytest.mark.parametrize("clients_per_chunk", [1, 2, {"mlp": 3}])
def test_chunks_change_nothing(key, clients_per_chunk):
    """Also where the last chunk is not full."""
    chex.assert_trees_all_close(run(GROUPS, key, clients_per_chunk=clients_per_chunk), run(GROUPS, key), **TOLERANCE)


@pytest.mark.parametrize(("clients_per_chunk", "held"), [(None, True), (4, False), (1, False)])
def test_scores_of_all_clients_are_never_held_in_chunks(clients_per_chunk, held):
    """Seven clients, a subset of 12, four classes; neither traced nor compiled."""
    groups = {"only": fmd.ArchitectureGroup(toys.tanh_mlp(), range(7))}
    arguments = (start(groups, toys.private(groups)), PUBLIC, toys.private(groups), jax.random.key(0))
    lowered = jax.jit(round_of(groups, clients_per_chunk=clients_per_chunk)).lower(*arguments)
    text = lowered.compile().as_text()
    assert ("tensor<7x12x4xf32>" in lowered.as_text()) == held
    assert held or not re.search(r"f32\[(7,12,4|12,7,4|12,4,7|84,4|7,48)\]", text)


def test_weights_that_do_not_go_with_the_clients_are_refused(key):
    one_less = {"linear": jnp.ones(2), "mlp": jnp.ones(2)}
    for weights in (one_less, {"linear": jnp.ones(3)}):
        some = fmd.algorithms.all_clients(GROUPS)._replace(weights=weights)
        with pytest.raises(ValueError, match="one weight per client is needed"):
            round_of(GROUPS, participants=some)(start(GROUPS, PRIVATE), PUBLIC, PRIVATE, key)


def test_sharded_is_unsharded(sharded):
    arguments, participants = sharded.arguments
    expected, expected_info = jax.jit(round_of(sharded.groups))(*arguments, participants=participants)
    arguments, participants = sharded.spread
    actual, info = sharded.program(*arguments, participants=participants)
    chex.assert_trees_all_close(fmd.gather_clients(actual), expected, **TOLERANCE)
    for name, field in expected_info._asdict().items():
        there = getattr(info, name)
        there = fmd.gather_clients(there) if isinstance(there, fmd.mapping.ShardedClients) else there
        chex.assert_trees_all_close(jax.device_get(there), jax.device_get(field), **TOLERANCE)
    if "network 5" in sharded.groups:
        assert [name for name, finite in info.scores_finite.items() if not finite.all()] == ["network 5"]
        for name in ("network 5", "network 9"):
            chex.assert_trees_all_equal(actual[name], arguments[0][name])


def test_the_consensus_is_the_only_thing_that_crosses_devices(sharded):
    assert toys.collectives(sharded.program.as_text()) == {"all-reduce": 1}


def test_a_device_has_its_networks_and_branches_to_them():
    """Ten networks on four devices are three rows, a switch each in each of three phases; the last has empty seats."""
    groups, mesh = ten_networks(), fmd.client_mesh(4)
    private = toys.private(groups)
    states, data = (fmd.mapping.shard_clients(tree, mesh) for tree in (start(groups, private), private))
    program = jax.make_jaxpr(round_of(groups, mesh=mesh))(states, PUBLIC, data, jax.random.key(0))
    assert sorted(switches(program.jaxpr)) == sorted(3 * [4, 4, 3])


def switches(jaxpr):
    """The number of branches of each choice among more than two."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond" and len(equation.params["branches"]) > 2:
            yield len(equation.params["branches"])
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from switches(inner)


def test_the_halves_of_a_round_are_the_round_and_a_client_alone_does_its_half(key):
    """Each client in a federation of its own scores and learns; the server averages what they send."""
    settings = {"transforms": (partial(fmd.transforms.clip_scores, bound=0.8),)}
    whole = toys.federation(GROUPS, **settings)
    expected, expected_info = whole.round(start(GROUPS, PRIVATE), PUBLIC, PRIVATE, key)
    sent, alone = {}, {}
    for name, group in GROUPS.items():
        for k, client_id in enumerate(group.client_ids):
            own = {name: fmd.ArchitectureGroup(group.architecture, [client_id], [group.weights[k]])}
            private = {name: jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], PRIVATE[name])}
            federation = toys.federation(own, **settings)
            alone[client_id] = federation, federation.init(jax.random.key(0), PUBLIC, private), private
            sent[client_id] = federation.score(alone[client_id][1], PUBLIC, key)[name]
    weights = {client_id: jnp.ones(1) for client_id in sent}
    consensus = fmd.weighted_consensus(sent, weights)
    assert jnp.abs(consensus).max() <= 0.8
    infos = {}
    for client_id, (federation, states, private) in alone.items():
        states, infos[client_id] = federation.learn(states, PUBLIC, private, consensus, key)
        (name,) = federation.groups
        one = jax.tree.map(lambda leaf: leaf[0], states[name])
        chex.assert_trees_all_close(one, by_client(GROUPS, expected)[client_id], **TOLERANCE)
        loss = by_client(GROUPS, expected_info.digest_loss)[client_id]
        np.testing.assert_allclose(infos[client_id].digest_loss[name][0], loss, rtol=1e-5)
    together = whole.score(start(GROUPS, PRIVATE), PUBLIC, key)
    for client_id, scores in by_client(GROUPS, together).items():
        np.testing.assert_allclose(scores, sent[client_id][0], rtol=1e-5, atol=1e-6)


def test_transforms_are_applied_in_order_with_a_key_of_each_client(key):
    def noise(scores, key):
        return scores + jax.random.normal(key, scores.shape)

    def double(scores, key):
        return 2 * scores

    def sent(*transforms):
        federation = toys.federation(GROUPS, transforms=transforms)
        return by_client(GROUPS, federation.score(start(GROUPS, PRIVATE), PUBLIC, key))

    plain, noisy, noisy_first, noisy_last = sent(), sent(noise), sent(noise, double), sent(double, noise)
    drawn = {client_id: noisy[client_id] - plain[client_id] for client_id in plain}
    assert len({float(each[0, 0]) for each in drawn.values()}) == len(plain)
    for client_id, scores in plain.items():
        np.testing.assert_allclose(noisy_first[client_id], 2 * (scores + drawn[client_id]), rtol=1e-5, atol=1e-5)
        assert jnp.abs(noisy_last[client_id] - 2 * scores).max() < 6
        assert jnp.abs(noisy_last[client_id] - 2 * scores - drawn[client_id]).max() > 0.1  # a key for each transform


def test_an_aggregator_of_the_callers_own(key):
    """The median of all scores, on one device and on four: of a client with NaN as if it were not there."""

    def median(scores, weights):
        return jnp.nanmedian(jnp.where(weights[:, None, None] > 0, scores, jnp.nan), axis=0)

    groups = toys.groups(linear=(1.0, 1.0, 0.0))
    states = start(groups, PRIVATE)
    broken = dict(states)
    broken["mlp"] = states["mlp"]._replace(
        params=jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), states["mlp"].params)
    )
    # Not the absolute error: a median is the score of one client, where its gradient is the sign of rounding.
    plain = toys.federation(groups, distance=fmd.mse)
    sent = by_client(groups, plain.score(broken, PUBLIC, key))
    consensus = np.median([sent[client_id] for client_id in (0, 1, 3)], axis=0)
    expected, _ = plain.learn(jax.tree.map(jnp.copy, broken), PUBLIC, PRIVATE, jnp.asarray(consensus), key)
    for mesh in (None, fmd.client_mesh(4)):
        federation = toys.federation(groups, distance=fmd.mse, aggregator=from_all_scores(median), mesh=mesh)
        after, info = federation.round(
            federation.shard(jax.tree.map(jnp.copy, broken)), PUBLIC, federation.shard(PRIVATE), key
        )
        assert [bool(finite) for finite in info.scores_finite["mlp"]] == [True, False]
        for client_id, one in by_client(groups, fmd.gather_clients(after)).items():
            if client_id != 4:
                chex.assert_trees_all_close(one, by_client(groups, expected)[client_id], **TOLERANCE)


def test_an_aggregator_out_of_all_scores_that_is_the_mean_is_the_default(key):
    def mean(scores, weights):
        return jnp.einsum("k,kmc->mc", weights / weights.sum(), scores)

    actual, expected = run(GROUPS, key, aggregator=from_all_scores(mean)), run(GROUPS, key)
    chex.assert_trees_all_close(actual, expected, **TOLERANCE)
