"""Rounds in which clients score with the batch statistics of the public subset."""

from functools import partial

import chex
import faults
import jax
import jax.numpy as jnp
import optax
import pytest
import toys
from flax import linen as nn

import fedmd_jax as fmd

A = fmd.algorithms
PUBLIC, KEY = toys.public(), jax.random.key(3)


class Normed(nn.Module):
    """A hidden layer of small weights, and a batch norm whose moving statistics lag far behind when they grow."""

    hidden: int = 6

    @nn.compact
    def __call__(self, x, train):
        # Without a bias, whose gradient would be rounding errors alone.
        x = nn.Dense(self.hidden, use_bias=False, kernel_init=nn.initializers.normal(0.1))(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.99)(x)
        return nn.Dense(toys.NUM_CLASSES)(nn.relu(x))


GROUPS = {"normed": fmd.ArchitectureGroup(fmd.architecture_from_linen(Normed()), (0, 1, 2))}
ESTIMATED = {"statistics": fmd.client.estimate_statistics}


def federation(groups=GROUPS, **settings):
    settings = {"algorithm": A.fedmd(), "draw_subset": A.first_examples, **settings}
    return toys.federation(groups, **settings)


def own_data(groups):
    """Whole batches: of a batch of one example a norm would divide rounding errors by the root of its epsilon."""
    return toys.private(groups, lambda client_id: 9)


def one_round(federation, *, estimated=False, participants=None):
    private = federation.shard(own_data(federation.groups))
    states = federation.init(jax.random.key(0), PUBLIC, private)
    if estimated:
        states = {name: by_hand(group, states[name]) for name, group in federation.groups.items()}
    return federation.round(states, PUBLIC, private, KEY, participants)


def by_hand(group, states):
    return jax.vmap(lambda state: fmd.client.estimate_statistics(group.architecture, state, PUBLIC.inputs[:12]))(states)


def test_kept_statistics_are_those_of_clients_that_had_them_before_the_round():
    actual, info = one_round(federation(**ESTIMATED))
    expected, expected_info = one_round(federation(), estimated=True)
    chex.assert_trees_all_close((actual, info), (expected, expected_info), rtol=2e-5, atol=2e-6)
    plain, _ = one_round(federation())
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(actual, plain, rtol=1e-2)


def test_fedmd_takes_statistics_and_then_has_no_halves_of_a_round():
    """The lowered round is that of `make_federation`, and both settings change it."""

    def lowered(make, *arguments, **how):
        federation = make(GROUPS, *arguments, subset_size=12, **how)
        states = jax.eval_shape(federation.programs["new_states"], KEY, PUBLIC.inputs[:1])
        return federation.programs["round"].lower(states, PUBLIC, own_data(GROUPS), KEY).as_text()

    settings = [{**ESTIMATED, "keep_statistics": keep} for keep in (True, False)]
    kept, for_scores = (lowered(fmd.fedmd, **how) for how in settings)
    assert [kept, for_scores] == [lowered(fmd.make_federation, A.fedmd(), **how) for how in settings]
    assert len({kept, for_scores, lowered(fmd.fedmd)}) == 3
    with_statistics = fmd.fedmd(GROUPS, subset_size=12, **ESTIMATED)
    states = with_statistics.init(KEY, PUBLIC, own_data(GROUPS))
    with pytest.raises(ValueError, match="without `statistics` have it"):
        with_statistics.score(states, PUBLIC, KEY)


def test_statistics_for_scores_only_change_the_consensus_only():
    actual, info = one_round(federation(statistics=fmd.client.estimate_statistics, keep_statistics=False))
    whole, private = toys.federation(GROUPS, draw_subset=A.first_examples), own_data(GROUPS)
    states = whole.init(jax.random.key(0), PUBLIC, private)
    scores = whole.score({"normed": by_hand(GROUPS["normed"], states["normed"])}, PUBLIC, KEY)
    consensus = fmd.weighted_consensus(scores, A.all_clients(GROUPS).weights)
    expected, expected_info = whole.learn(states, PUBLIC, private, consensus, KEY)
    chex.assert_trees_all_close((actual, info), (expected, expected_info), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("keep", [True, False])
def test_on_many_devices_the_round_is_the_same(keep):
    """A group is stacked over four devices, with padding; two others, one without batch norms, are on a device each."""
    small = {"small": Normed(hidden=3), "mlp": fmd.models.MLP((4,), num_classes=toys.NUM_CLASSES)}
    groups = {
        name: fmd.ArchitectureGroup(fmd.architecture_from_linen(m), (i,)) for i, (name, m) in enumerate(small.items())
    }
    groups["normed"] = fmd.ArchitectureGroup(GROUPS["normed"].architecture, range(2, 8))
    # A smooth distance and larger batches, which do not amplify rounding.
    settings = {"algorithm": A.fedmd(distance=fmd.mse), "digest_training": toys.sgd(6), "revisit_training": toys.sgd(9)}
    settings["statistics"] = partial(fmd.client.estimate_statistics, batch_size=5)
    results = []
    for mesh in (None, fmd.client_mesh(4)):
        whole = federation(groups, keep_statistics=keep, mesh=mesh, **settings)
        states, info = one_round(whole)
        per_client = fmd.gather_clients(info.digest_loss), fmd.gather_clients(info.revisit_loss)
        results.append((fmd.gather_clients(states), per_client, info.consensus_size))
    chex.assert_trees_all_close(*results, rtol=5e-5, atol=5e-6)


def test_clients_that_do_not_complete_the_round_keep_their_statistics():
    whole = federation(**ESTIMATED)
    before = toys.by_client(GROUPS, whole.init(jax.random.key(0), PUBLIC, own_data(GROUPS)))
    participation = faults.participation(GROUPS, dropped={0}, stragglers={2})
    states, info = one_round(whole, participants=A.all_clients(GROUPS, participation))
    after = toys.by_client(GROUPS, states)
    for client_id in (0, 2):
        chex.assert_trees_all_equal(after[client_id], before[client_id])
    dropped = A.all_clients(GROUPS, faults.participation(GROUPS, dropped={0}))
    _, without_stragglers = one_round(whole, participants=dropped)  # whose scores count all the same
    assert info.consensus_size == without_stragglers.consensus_size


def test_the_program_that_estimates_gives_those_of_the_round_with_this_key():
    settings = {"draw_subset": A.draw_public_subset, **ESTIMATED}
    public, moving = federation(**settings), federation(draw_subset=A.draw_public_subset)
    private = own_data(GROUPS)
    states = public.init(jax.random.key(0), PUBLIC, private)
    estimated = public.programs["estimate_statistics"](states, PUBLIC, KEY)
    expected = moving.round(estimated, PUBLIC, private, KEY)
    chex.assert_trees_all_close(public.round(states, PUBLIC, private, KEY), expected, rtol=2e-5, atol=2e-6)


def test_scores_grow_with_moving_statistics_only():
    """With SGD the weights before a norm grow: moving variances are too small, and scores too large."""

    def training(batch_size, num_epochs):
        return fmd.TrainingConfig(num_epochs=num_epochs, batch_size=batch_size, optimizer=optax.sgd(0.1))

    halves = {"public_training": training(10, 40), "private_training": training(4, 5)}
    halves |= {"digest_training": training(10, 2), "revisit_training": training(4, 2)}
    settings = {"subset_size": 40, "pooled_training": training(4, 1), "draw_subset": A.draw_public_subset, **halves}
    moving, estimated = federation(**settings), federation(**settings, **ESTIMATED)
    public, private = toys.public(60), toys.private(GROUPS, lambda client_id: 12)
    states, _ = moving.transfer_learn(moving.init(jax.random.key(0), public, private), public, private, KEY)

    def sizes(federation):
        own, found = jax.tree.map(jnp.copy, states), []
        for round_ in range(20):
            own, info = federation.round(own, public, private, jax.random.fold_in(KEY, round_))
            found.append(float(info.consensus_size))
        return found

    grown, bounded = sizes(moving), sizes(estimated)
    assert grown[-1] > 2 * grown[0]
    assert max(bounded) < 1.2 * bounded[0]


def test_networks_without_them_make_the_same_round():
    groups = {"mlp": fmd.ArchitectureGroup(toys.tanh_mlp(), (0, 1, 2))}
    actual = one_round(federation(groups, statistics=fmd.client.estimate_statistics))
    chex.assert_trees_all_equal(actual, one_round(federation(groups)))


@pytest.mark.parametrize("algorithm", [A.fd(), A.fedavg()])
def test_algorithms_without_public_scores_refuse_them(algorithm):
    with pytest.raises(ValueError, match="do not score a public subset"):
        federation(algorithm=algorithm, statistics=fmd.client.estimate_statistics)
