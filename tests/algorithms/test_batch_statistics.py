"""Rounds in which clients score with the batch statistics of the public subset."""

import chex
import jax
import pytest
import toys
from flax import linen as nn

import fedmd_jax as fmd

A = fmd.algorithms
PUBLIC, KEY = toys.public(), jax.random.key(3)


class Normed(nn.Module):
    """A hidden layer with a batch norm whose moving statistics lag far behind."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.99)(nn.Dense(6)(x))
        return nn.Dense(toys.NUM_CLASSES)(nn.relu(x))


GROUPS = {"normed": fmd.ArchitectureGroup(fmd.architecture_from_linen(Normed()), (0, 1, 2))}


def federation(groups=GROUPS, **settings):
    settings = {"algorithm": A.fedmd(), "draw_subset": A.first_examples, **settings}
    return toys.federation(groups, **settings)


def one_round(federation, *, estimated=False):
    private = toys.private(federation.groups)
    states = federation.init(jax.random.key(0), PUBLIC, private)
    if estimated:
        states = {name: by_hand(group, states[name]) for name, group in federation.groups.items()}
    return federation.round(states, PUBLIC, private, KEY)


def by_hand(group, states):
    return jax.vmap(lambda state: fmd.client.estimate_statistics(group.architecture, state, PUBLIC.inputs[:12]))(states)


def test_kept_statistics_are_those_of_clients_that_had_them_before_the_round():
    actual, info = one_round(federation(statistics=fmd.client.estimate_statistics))
    expected, expected_info = one_round(federation(), estimated=True)
    chex.assert_trees_all_close((actual, info), (expected, expected_info), rtol=2e-5, atol=2e-6)
    plain, _ = one_round(federation())
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(actual, plain, rtol=1e-2)


def test_statistics_for_scores_only_change_the_consensus_only():
    actual, info = one_round(federation(statistics=fmd.client.estimate_statistics, keep_statistics=False))
    whole, private = toys.federation(GROUPS, draw_subset=A.first_examples), toys.private(GROUPS)
    states = whole.init(jax.random.key(0), PUBLIC, private)
    scores = whole.score({"normed": by_hand(GROUPS["normed"], states["normed"])}, PUBLIC, KEY)
    consensus = fmd.weighted_consensus(scores, A.all_clients(GROUPS).weights)
    expected, expected_info = whole.learn(states, PUBLIC, private, consensus, KEY)
    chex.assert_trees_all_close((actual, info), (expected, expected_info), rtol=2e-5, atol=2e-6)


def test_networks_without_them_make_the_same_round():
    groups = {"mlp": fmd.ArchitectureGroup(toys.tanh_mlp(), (0, 1, 2))}
    actual = one_round(federation(groups, statistics=fmd.client.estimate_statistics))
    chex.assert_trees_all_equal(actual, one_round(federation(groups)))


@pytest.mark.parametrize("algorithm", [A.fd(), A.fedavg()])
def test_algorithms_without_public_scores_refuse_them(algorithm):
    with pytest.raises(ValueError, match="do not score a public subset"):
        federation(algorithm=algorithm, statistics=fmd.client.estimate_statistics)
