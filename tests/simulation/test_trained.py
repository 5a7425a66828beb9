"""Trained clients and their ensemble, against the federation that they come from and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import fedmd_jax as fmd
from fedmd_jax.simulation import mean_logits, mean_probabilities

INPUTS, LABELS = toys.examples(7, 150)  # more than a batch of `score`


@pytest.fixture(scope="module")
def groups():
    return toys.groups()


@pytest.fixture(scope="module")
def states(groups):
    return toys.federation(groups).new_states(jax.random.key(3), INPUTS)


@pytest.fixture(scope="module")
def clients(groups, states):
    return fmd.trained_clients(groups, states, INPUTS)


def test_clients_have_the_scores_and_the_accuracy_that_the_federation_gives_them(groups, states, clients):
    assert list(clients) == [0, 1, 2, 3, 4]
    evaluations = toys.federation(groups).evaluate(states, fmd.labelled_dataset(INPUTS, LABELS))
    for name, group in groups.items():
        for k, client_id in enumerate(group.client_ids):
            client, state = clients[client_id], jax.tree.map(lambda leaf, k=k: leaf[k], states[name])
            assert (client.client_id, client.name, client.num_classes) == (client_id, name, toys.NUM_CLASSES)
            np.testing.assert_array_equal(client.logits(INPUTS), fmd.score(group.architecture, state, INPUTS))
            accuracy = np.mean(client.predict(INPUTS) == LABELS)
            assert np.float32(accuracy) == evaluations[name].accuracy[k]


def test_a_client_of_a_linear_network_by_numpy(clients):
    params = jax.tree.map(np.float64, clients[1].params)
    logits = INPUTS.astype(np.float64) @ params["w"] + params["b"]
    np.testing.assert_allclose(clients[1].logits(INPUTS), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(clients[1].predict(INPUTS), logits.argmax(axis=1))
    np.testing.assert_allclose(clients[1].probabilities(INPUTS), softmax(logits), rtol=1e-5)


def test_sharded_clients_are_the_same(groups, states, clients):
    sharded = fmd.trained_clients(groups, toys.federation(groups, mesh=fmd.client_mesh(4)).shard(states), INPUTS)
    for client_id, client in clients.items():
        jax.tree.map(np.testing.assert_array_equal, sharded[client_id].state, client.state)


def test_the_state_of_a_client_is_complete(clients):
    client, training = clients[3], toys.sgd(8)
    state, info = fmd.revisit(
        client.architecture,
        client.state,
        fmd.labelled_dataset(INPUTS, LABELS),
        jax.random.key(0),
        training=training,
    )
    assert info.finite
    assert not np.array_equal(state.params["u"], client.params["u"])


def test_the_ensemble_by_numpy(clients):
    chosen = [clients[i] for i in (0, 2, 3)]
    logits = np.stack([np.float64(client.logits(INPUTS)) for client in chosen])
    ensemble = fmd.Ensemble(chosen)
    for combine, wanted in (
        (mean_logits, logits.mean(axis=0)),
        (mean_probabilities, softmax(logits).mean(axis=0)),
        (lambda logits: jnp.max(logits, axis=0), logits.max(axis=0)),
    ):
        np.testing.assert_allclose(ensemble.scores(INPUTS, combine=combine), wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(ensemble.predict(INPUTS, combine=combine), wanted.argmax(axis=1))
    np.testing.assert_array_equal(ensemble.scores(INPUTS), ensemble.scores(INPUTS, combine=mean_logits))


def test_the_order_of_clients_does_not_matter_and_copies_change_nothing(clients):
    one, two = (fmd.Ensemble([clients[i] for i in ids]).scores(INPUTS) for ids in ((0, 1, 4), (4, 0, 1)))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(fmd.Ensemble([clients[2]] * 2).scores(INPUTS), clients[2].logits(INPUTS))


def test_clients_of_one_network_share_a_compiled_program(groups, states):
    network, traces = toys.linear(), []

    def apply(*args, **kwargs):
        traces.append(1)
        return network.apply(*args, **kwargs)

    counted = network._replace(apply=apply)
    group = {"linear": fmd.ArchitectureGroup(counted, groups["linear"].client_ids)}
    for client in fmd.trained_clients(group, {"linear": states["linear"]}, INPUTS).values():
        client.predict(INPUTS)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (INPUTS[0], r"inputs: inputs must have shape \[N, ...\], got \(5,\)"),
        (INPUTS[:, :4], r"client 0 takes inputs float32\[N, 5\], got float32\[N, 4\]"),
        ((100 * INPUTS).astype(int), r"client 0 takes inputs float32\[N, 5\], got int32\[N, 5\]"),
        (np.full_like(INPUTS, np.nan), "inputs: inputs must be finite, got NaN or infinity in 150 rows, first row 0"),
    ],
)
def test_other_inputs_are_refused(clients, inputs, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        clients[0].predict(inputs)


def test_inputs_of_64_bits_are_converted_as_those_of_data_sets_are(clients):
    np.testing.assert_array_equal(clients[0].logits(INPUTS.astype(np.float64)), clients[0].logits(INPUTS))


def test_other_states_are_refused(groups, states):
    with pytest.raises(ValueError, match=r"states of the groups are needed, with .*, got {'mlp': 2}"):
        fmd.trained_clients(groups, {"mlp": states["mlp"]}, INPUTS)
    federation = toys.federation(groups)
    donated = jax.tree.map(jnp.copy, states)
    federation.revisit(donated, toys.private(groups), jax.random.key(0))
    with pytest.raises(ValueError, match="these states were donated to an earlier call"):
        fmd.trained_clients(groups, donated, INPUTS)
    with pytest.raises(ValueError, match="an ensemble needs at least one client, got none"):
        fmd.Ensemble([])


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
