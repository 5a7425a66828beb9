"""Properties of a round for any networks."""

import re
from functools import partial
from typing import Any, NamedTuple

import chex
import faults
import jax
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


def start(groups, private):
    return toys.federation(groups).init(jax.random.key(0), PUBLIC, private)


def round_of(groups, **settings):
    settings = {"subset_size": 12, "digest_training": toys.sgd(5, 2), "revisit_training": toys.sgd(3, 2), **settings}
    return partial(fmd.fedmd_round, groups=groups, **settings)


def run(groups, key, **settings):
    private = toys.private(groups)
    states, info = jax.jit(round_of(groups, **settings))(start(groups, private), PUBLIC, private, key)
    trees = {"state": states, "digest_loss": info.digest_loss, "revisit_loss": info.revisit_loss}
    return {name: toys.by_client(groups, tree) for name, tree in trees.items()}


@pytest.fixture(scope="module")
def plain():
    """A round with the settings of `round_of`."""
    return run(GROUPS, jax.random.key(0))


# Dropped clients and stragglers of two rounds; the last case leaves no client with a weight.
PARTICIPATION = {
    "all": ([], []),
    "some": ([{0, 3}, {2}], [{4}, {0, 1}]),
    "no consensus": ([{0}, {0, 2, 3, 4}], [{1}, set()]),
}


@pytest.mark.parametrize("absent_and_stragglers", PARTICIPATION.values(), ids=PARTICIPATION)
def test_two_rounds_against_numpy_loops(key, absent_and_stragglers):
    """Weights, different numbers of examples, clipped scores, partial last batches, and memories of the first round."""
    groups = toys.groups(linear=(1.0, 0.0, 2.5), mlp=(0.5, 1.0))
    private = toys.private(groups)
    states = start(groups, private)
    weights, clients = fmd.algorithms.all_clients(groups).weights, {}
    for _, client_id, state, weight in toys.clients(groups, states, weights):
        clients[client_id] = oracle.Client(state.params, *toys.examples(client_id, 7 + client_id), float(weight))
    in_order = {"digest_training": toys.sgd(5, 2, shuffle=False), "revisit_training": toys.sgd(3, 2, shuffle=False)}
    transforms = (partial(fmd.transforms.clip_scores, bound=0.8),)
    bounded = round_of(groups, draw_subset=fmd.algorithms.first_examples, transforms=transforms, **in_order)
    step = jax.jit(lambda states, participants: bounded(states, PUBLIC, private, key, participants=participants))
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
    found = toys.clients(groups, states, info.digest_loss, info.revisit_loss)
    for (_, client_id, state, *losses), expected_losses in zip(found, expected, strict=True):
        for name, value in clients[client_id].params.items():
            np.testing.assert_allclose(state.params[name], value, rtol=1e-4, atol=1e-5)
        for loss, expected_loss in zip(losses, expected_losses, strict=True):
            if expected_loss is not None:
                np.testing.assert_allclose(loss, expected_loss, rtol=1e-4)


def test_grouping_and_order_do_not_matter(key):
    weights = dict(enumerate((1.0, 2.0, 0.5, 3.0, 1.0)))
    architectures = {"linear": toys.linear(), "mlp": toys.tanh_mlp()}

    def group(name, *client_ids):
        return fmd.ArchitectureGroup(architectures[name], client_ids, [weights[i] for i in client_ids])

    expected = run({"linear": group("linear", 0, 1, 2), "mlp": group("mlp", 3, 4)}, key)
    for other in (
        {"linear": group("linear", 2, 0, 1), "mlp": group("mlp", 4, 3)},
        {"mlp": group("mlp", 3, 4), "linear": group("linear", 0, 1, 2)},
        {str(i): group("linear" if i < 3 else "mlp", i) for i in range(5)},
    ):
        chex.assert_trees_all_close(run(other, key), expected, **TOLERANCE)


def test_a_client_without_weight_learns_but_is_excluded(key):
    """It digests and revisits; all other clients end as if it did not exist."""
    silent = toys.groups(linear=(1.0, 1.0, 0.0))
    without = {"linear": fmd.ArchitectureGroup(silent["linear"].architecture, (0, 1)), "mlp": silent["mlp"]}
    actual, others = run(silent, key), run(without, key)
    for kind, clients in actual.items():
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


def test_weights_may_be_traced(key):
    """One compiled round for any participation."""
    participants = fmd.algorithms.all_clients(GROUPS)
    round_ = partial(round_of(GROUPS), start(GROUPS, PRIVATE), PUBLIC, PRIVATE, key)
    step = jax.jit(lambda weights: round_(participants=participants._replace(weights=weights))[0])
    given = {"linear": jnp.array([1.0, 0.0, 2.0]), "mlp": jnp.array([0.0, 3.0])}
    fixed = run(toys.groups(linear=(1.0, 0.0, 2.0), mlp=(0.0, 3.0)), key)["state"]
    chex.assert_trees_all_close(toys.by_client(GROUPS, step(given)), fixed, **TOLERANCE)


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
    """A round on four devices."""

    groups: dict
    program: Any
    arguments: tuple  # for one device
    sharded: tuple


@pytest.fixture(scope="module", params=[(two_groups, None), (two_groups, 2), (ten_networks, None)])
def sharded(request):
    """Of the ten networks one has NaN parameters, and one client is dropped."""
    make_groups, clients_per_chunk = request.param
    groups, mesh = make_groups(), fmd.client_mesh(4)
    private = toys.private(groups)
    states = dict(start(groups, private))
    if "network 5" in groups:
        broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), states["network 5"].params)
        states["network 5"] = states["network 5"]._replace(params=broken)
    participation = faults.participation(groups, dropped={9}, stragglers=set())
    key = jax.random.key(3)
    arguments = (fmd.mapping.shard_clients(states, mesh), PUBLIC, fmd.mapping.shard_clients(private, mesh), key)
    step = jax.jit(round_of(groups, mesh=mesh, clients_per_chunk=clients_per_chunk))
    participants = fmd.algorithms.all_clients(groups, participation)
    program = step.lower(*arguments, participants=participants).compile()
    return Sharded(groups, program, ((states, PUBLIC, private, key), participants), (arguments, participants))


@pytest.mark.parametrize("clients_per_chunk", [1, 2, {"mlp": 3}])
def test_chunks_change_nothing(key, plain, clients_per_chunk):
    """Also if the last chunk is not full."""
    chex.assert_trees_all_close(run(GROUPS, key, clients_per_chunk=clients_per_chunk), plain, **TOLERANCE)


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
    arguments, participants = sharded.sharded
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


def test_the_consensus_is_the_only_array_that_crosses_devices(sharded):
    assert toys.collectives(sharded.program.as_text()) == {"all-reduce": 1}


def test_a_device_has_its_networks_and_branches_to_them():
    """Ten networks on four devices are three rows with a switch in each of three phases; the last row is not full."""
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
        for inner in jax.tree.leaves(equation.params):
            if hasattr(inner, "eqns"):
                yield from switches(inner)


def test_the_halves_of_a_round_are_the_round_also_of_a_client_alone(key):
    """All clients score, the server averages, and clients learn, together or in federations of one client."""
    factor = {"learning_rate_factor": 0.5}
    settings = {"transforms": (partial(fmd.transforms.clip_scores, bound=0.8),)}
    whole = toys.federation(GROUPS, **settings)
    sent = whole.score(start(GROUPS, PRIVATE), PUBLIC, key)
    consensus = fmd.weighted_consensus(sent, fmd.algorithms.all_clients(GROUPS).weights)
    assert jnp.abs(consensus).max() <= 0.8
    expected, expected_info = whole.round(start(GROUPS, PRIVATE), PUBLIC, PRIVATE, key, **factor)
    learned, info = whole.learn(start(GROUPS, PRIVATE), PUBLIC, PRIVATE, consensus, key, **factor)
    chex.assert_trees_all_close((learned, info), (expected, expected_info), **TOLERANCE)
    for name, row in (("linear", 2), ("mlp", 0)):
        group = GROUPS[name]
        alone = toys.federation({name: fmd.ArchitectureGroup(group.architecture, [group.client_ids[row]])}, **settings)
        private, scores, state, loss = (
            {name: jax.tree.map(lambda leaf, k=row: leaf[k : k + 1], tree[name])}
            for tree in (PRIVATE, sent, expected, expected_info.digest_loss)
        )
        states = alone.init(jax.random.key(0), PUBLIC, private)
        chex.assert_trees_all_close(alone.score(states, PUBLIC, key), scores, rtol=1e-5, atol=1e-6)
        states, info = alone.learn(states, PUBLIC, private, consensus, key, **factor)
        chex.assert_trees_all_close((states, info.digest_loss), (state, loss), **TOLERANCE)


def test_transforms_are_applied_in_order_with_a_key_of_each_client(key):
    def noise(scores, key):
        return scores + jax.random.normal(key, scores.shape)

    def double(scores, key):
        return 2 * scores

    def sent(*transforms):
        federation = toys.federation(GROUPS, transforms=transforms)
        return toys.by_client(GROUPS, federation.score(start(GROUPS, PRIVATE), PUBLIC, key))

    plain, noisy, noisy_first, noisy_last = sent(), sent(noise), sent(noise, double), sent(double, noise)
    drawn = {client_id: noisy[client_id] - plain[client_id] for client_id in plain}
    assert len({float(each[0, 0]) for each in drawn.values()}) == len(plain)
    for client_id, scores in plain.items():
        np.testing.assert_allclose(noisy_first[client_id], 2 * (scores + drawn[client_id]), rtol=1e-5, atol=1e-5)
        assert jnp.abs(noisy_last[client_id] - 2 * scores).max() < 6
        assert jnp.abs(noisy_last[client_id] - 2 * scores - drawn[client_id]).max() > 0.1  # a key for each transform


def test_an_aggregator_of_the_callers_own(key):
    """The median of all scores, on one device and on four, without a client with NaN."""

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
    sent = toys.by_client(groups, plain.score(broken, PUBLIC, key))
    consensus = np.median([sent[client_id] for client_id in (0, 1, 3)], axis=0)
    expected, _ = plain.learn(jax.tree.map(jnp.copy, broken), PUBLIC, PRIVATE, jnp.asarray(consensus), key)
    for mesh in (None, fmd.client_mesh(4)):
        federation = toys.federation(groups, distance=fmd.mse, aggregator=from_all_scores(median), mesh=mesh)
        after, info = federation.round(
            federation.shard(jax.tree.map(jnp.copy, broken)), PUBLIC, federation.shard(PRIVATE), key
        )
        assert [bool(finite) for finite in info.scores_finite["mlp"]] == [True, False]
        for client_id, one in toys.by_client(groups, fmd.gather_clients(after)).items():
            if client_id != 4:
                chex.assert_trees_all_close(one, toys.by_client(groups, expected)[client_id], **TOLERANCE)


def test_a_mean_made_by_from_all_scores_equals_the_default(key, plain):
    def mean(scores, weights):
        return jnp.einsum("k,kmc->mc", weights / weights.sum(), scores)

    chex.assert_trees_all_close(run(GROUPS, key, aggregator=from_all_scores(mean)), plain, **TOLERANCE)
