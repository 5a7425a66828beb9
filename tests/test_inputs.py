"""Inputs of every dtype reach the networks unchanged, or are refused in one line."""

import collections
from functools import reduce

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import oracle
import pytest
import toys
from flax import linen as nn

import fedmd_jax as fmd

NUM_TOKENS, NUM_IDS, FIRST = 12, 9, 2**24 + 1  # float32 rounds every second id from here on
LABELS = np.arange(4)


def make_public(inputs, labels=LABELS):
    return fmd.public_dataset(inputs, labels).inputs


def make_test(inputs, labels=LABELS):
    return fmd.labelled_dataset(inputs, labels).inputs


def make_private(inputs, labels=LABELS):
    return fmd.stack_private({"a": fmd.ArchitectureGroup(None, (0,))}, {0: (inputs, labels)})["a"].inputs[0]


makers = pytest.mark.parametrize("make", [make_public, make_test, make_private])


@makers
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        *((dtype, np.int32) for dtype in ("u1", "i1", "i2", ">i4", "i8", "u8", ml_dtypes.int4, ml_dtypes.uint4)),
        *((dtype, np.float32) for dtype in ("f4", ">f4", "f8", "longdouble")),
        *((dtype, np.float16) for dtype in ("f2", ">f2")),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
    ],
)
def test_inputs_keep_their_kind(make, given, kept):
    inputs = np.array([[0, 1, 7]] * 4).astype(given)
    made = make(inputs)
    assert made.dtype == kept
    np.testing.assert_array_equal(np.asarray(made, np.float64), inputs.astype(np.float64))


@makers
@pytest.mark.parametrize("value", [2**24 + 1, 2**31 - 1, -(2**31)])
def test_integers_are_exact(make, value):
    assert make(np.full((4, 2), value)).tolist() == [[value] * 2] * 4
    beyond = 2**31 if value > 0 else -(2**31) - 1
    with pytest.raises(ValueError, match=rf"inputs must fit into int32, got {beyond}$"):
        make(np.full((4, 2), beyond))


Pair = collections.namedtuple("Pair", "ids mask")
ROWS = np.zeros((4, 3))


@makers
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (ROWS.astype(bool), r"must be numbers, got dtype bool: inputs.astype\(np.float32\) or inputs.astype\(np.int32"),
        (ROWS.astype(np.complex64), "must be numbers, got dtype complex64$"),
        (ROWS.astype("m8[s]"), "must be numbers, got dtype timedelta64"),
        (ROWS.astype(ml_dtypes.float8_e5m2), "combines with float32 parameters, got float8_e5m2: inputs.astype"),
        (ROWS.astype(ml_dtypes.float8_e4m3fn), "combines with float32 parameters, got float8_e4m3fn: inputs.astype"),
        (np.full((4, 3), np.inf, ml_dtypes.bfloat16), "must be finite, got NaN or infinity in 4 rows"),
        (np.full((4, 3), np.nan, np.float16), "must be finite, got NaN or infinity in 4 rows"),
        ({"ids": ROWS}, "must be one array of numbers, no other pytree"),
        (Pair(ROWS, ROWS), "must be one array of numbers, no other pytree"),
        ((ROWS, ROWS), "got 2 inputs, 4 labels; inputs must be one array, not several$"),
        ([ROWS, ROWS[:, :2]], "must be one array, got"),
        (np.zeros((4, 3, 32, 32), np.uint8), r"\[N, H, W, C\], got .*\[N, C, H, W\]: np.moveaxis\(inputs, 1, -1\)"),
        (np.zeros((4, 1, 28, 28)), r"\[N, H, W, C\], got .*\[N, C, H, W\]: np.moveaxis\(inputs, 1, -1\)"),
        (np.zeros((4, 3, 72, 128)), r"\[N, H, W, C\], got .*\[N, C, H, W\]: np.moveaxis\(inputs, 1, -1\)"),
    ],
)
def test_other_inputs_are_refused_in_one_line(make, inputs, message):
    with pytest.raises(ValueError, match=rf"^.+{message}.*$"):
        make(inputs)


@makers
@pytest.mark.parametrize(
    "shape", [(28, 28, 1), (32, 32, 3), (3, 3, 64), (1, 1, 512), (1, 128, 9), (3, 3, 3), (3, 2, 5), (4, 32, 32)]
)
def test_shapes_with_channels_last_pass(make, shape):
    assert make(np.zeros((4, *shape))).shape == (4, *shape)


@makers
def test_rows_may_come_as_a_list_or_a_tuple(make):
    for kind in (list, tuple):
        np.testing.assert_array_equal(make(kind(np.eye(4, 3))), np.eye(4, 3))


def test_clients_of_several_dtypes_are_refused():
    groups = {"a": fmd.ArchitectureGroup(toys.linear(), (0,)), "b": fmd.ArchitectureGroup(toys.linear(), (7,))}
    message = r"^all inputs of a federation must have one dtype, got float32 \(client 0\) and int32 \(client 7\)$"
    with pytest.raises(ValueError, match=message):
        fmd.stack_private(groups, {0: (ROWS, LABELS), 7: (ROWS.astype(int), LABELS)})
    fmd.stack_private(groups, {0: (ROWS.astype(np.uint8), LABELS), 7: (ROWS.astype(int), LABELS)})


def test_datasets_of_several_dtypes_are_refused():
    groups = {"a": fmd.ArchitectureGroup(toys.linear(), (0,))}
    federation = toys.federation(groups, subset_size=4)
    dtypes = {"public": np.float32, "private": np.float64, "test": np.float32}

    def check(**changed):
        kinds = dtypes | changed
        private = fmd.stack_private(groups, {0: (ROWS.astype(kinds["private"]), LABELS)})
        public = fmd.public_dataset(ROWS.astype(kinds["public"]), LABELS)
        federation.check(public, private, fmd.labelled_dataset(ROWS.astype(kinds["test"]), LABELS))

    check()
    for changed, message in [
        ({"public": np.uint8}, r"int32 \(public dataset\) and float32 \(group 'a'\)$"),
        ({"private": np.float16}, r"float32 \(public dataset\) and float16 \(group 'a'\)$"),
        ({"test": ml_dtypes.bfloat16}, r"float32 \(public dataset\) and bfloat16 \(labelled dataset 1, shared\)$"),
    ]:
        with pytest.raises(ValueError, match=f"^all inputs of a federation must have one dtype, got {message}"):
            check(**changed)


# Tokens.


def bag_of_ids() -> fmd.Architecture:
    """Logits = the sum of the rows of w with these ids, plus b; rounded ids select other rows."""

    def init(key, inputs):
        del inputs
        return {"w": 0.3 * jax.random.normal(key, (NUM_IDS, toys.NUM_CLASSES)), "b": jnp.zeros(toys.NUM_CLASSES)}, {}

    def apply(params, model_state, inputs, *, train, mask=None, key=None):
        del train, mask, key
        return params["w"][inputs - FIRST].sum(axis=1) + params["b"][None], model_state

    return fmd.Architecture(init, apply)


class Bag(nn.Module):
    """Embedding, mean, dense."""

    @nn.compact
    def __call__(self, ids):
        return nn.Dense(toys.NUM_CLASSES)(nn.Embed(NUM_IDS, 4)(ids).mean(axis=1))


class Attention(nn.Module):
    """Embedding, self-attention, mean, dense."""

    @nn.compact
    def __call__(self, ids):
        tokens = nn.Embed(NUM_IDS, 4)(ids)
        tokens = tokens + nn.MultiHeadDotProductAttention(num_heads=2)(tokens)
        return nn.Dense(toys.NUM_CLASSES)(tokens.mean(axis=1))


def texts(seed, num_examples):
    """Token ids from 0, [n, 12], in which the label is the most frequent of the first four."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, toys.NUM_CLASSES, num_examples)
    ids = rng.integers(0, NUM_IDS, (num_examples, NUM_TOKENS))
    return np.where(rng.random(ids.shape) < 0.5, labels[:, None], ids), labels


def counts(ids):
    """How often each id is in each text, [n, 9], float64."""
    return (ids[:, :, None] == np.arange(NUM_IDS)).sum(axis=1).astype(np.float64)


SIZES = {0: 9, 1: 6, 5: 7}


def federate(architectures, given, mesh=None):
    """Trains two clients of the first network and one of the second on texts, whose inputs are `given(ids)`."""
    names = list(architectures)
    ids = {names[0]: (0, 1), names[1]: (5,)}
    groups = {name: fmd.ArchitectureGroup(architectures[name], ids[name]) for name in names}

    def training(batch_size):
        return fmd.TrainingConfig(batch_size=batch_size, optimizer=optax.sgd(0.05, momentum=0.9), shuffle=False)

    phases = ("public", "private", "pooled", "digest", "revisit")
    trainings = {f"{phase}_training": training(size) for phase, size in zip(phases, (8, 4, 4, 5, 4), strict=True)}
    federation = fmd.fedmd(groups, subset_size=10, draw_subset=fmd.algorithms.first_examples, mesh=mesh, **trainings)
    public_ids, public_labels = texts(100, 20)
    public = fmd.public_dataset(given(public_ids), public_labels)
    examples = {i: texts(i, size) for i, size in SIZES.items()}
    private = fmd.stack_private(groups, {i: (given(ids), labels) for i, (ids, labels) in examples.items()})
    test_ids, test_labels = texts(200, 17)
    test = fmd.labelled_dataset(given(test_ids), test_labels)
    key = jax.random.key(0)
    states = federation.init(key, public, private)
    initial = jax.tree.map(np.array, dict(states))
    states, _ = federation.transfer_learn(states, public, private, key)
    states, history = fmd.run_federation(federation, states, public, private, key, num_rounds=2, test=test)
    return groups, initial, fmd.gather_clients(states), history


@pytest.mark.parametrize("num_devices", [None, 4])
def test_a_federation_of_tokens_agrees_with_numpy(num_devices):
    """Ids beyond 2**24, against the oracle on counts of ids in float64."""
    mesh = num_devices and fmd.client_mesh(num_devices)
    architectures = {"a": bag_of_ids(), "b": bag_of_ids()}
    groups, initial, states, history = federate(architectures, lambda ids: (ids + FIRST).astype(np.int64), mesh)
    public_ids, public_labels = texts(100, 20)
    test_ids, test_labels = texts(200, 17)
    places = {client_id: (name, k) for name, group in groups.items() for k, client_id in enumerate(group.client_ids)}
    clients = {}
    for client_id, (name, k) in places.items():
        ids, labels = texts(client_id, SIZES[client_id])
        params = jax.tree.map(lambda leaf, k=k: leaf[k], initial[name].params)
        client = clients[client_id] = oracle.Client(params, counts(ids), labels, 1.0)
        train = [client.params, oracle.zeros_like(client.params), counts(public_ids), public_labels]
        oracle.train(*train, oracle.cross_entropy, num_epochs=1, batch_size=8)
        train = [client.params, client.revisit_velocity, client.x, labels]
        oracle.train(*train, oracle.cross_entropy, num_epochs=1, batch_size=4)
    for metrics in history:
        if metrics.round > 0:
            settings = {"digest": {"num_epochs": 1, "batch_size": 5}, "revisit": {"num_epochs": 1, "batch_size": 4}}
            oracle.fedmd_round(list(clients.values()), counts(public_ids[:10]), **settings)
        for found in metrics.clients:
            logits = oracle.scores(clients[found.client_id].params, counts(test_ids))
            assert found.accuracy == pytest.approx((logits.argmax(axis=1) == test_labels).mean())
    for client_id, (name, k) in places.items():
        found = jax.tree.map(lambda leaf, k=k: leaf[k], states[name].params)
        chex.assert_trees_all_close(found, clients[client_id].params, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def text_classifiers():
    architectures = {"attention": fmd.architecture_from_linen(Attention()), "bag": fmd.architecture_from_linen(Bag())}
    return federate(architectures, lambda ids: ids)


def test_text_classifiers_score_as_in_numpy(text_classifiers):
    groups, _, states, _ = text_classifiers
    ids, _ = texts(200, 17)
    params = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), states["bag"].params)
    embedding, dense = params["Embed_0"]["embedding"], params["Dense_0"]
    expected = embedding[ids].mean(axis=1) @ dense["kernel"] + dense["bias"]
    state = jax.tree.map(lambda leaf: leaf[0], states["bag"])
    found = fmd.score(groups["bag"].architecture, state, fmd.public_dataset(ids).inputs, batch_size=4)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_text_classifiers_learn(text_classifiers):
    _, initial, states, history = text_classifiers
    assert [client.status for metrics in history for client in metrics.clients] == ["ok"] * 9
    for name, state in states.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
            if path[-1].key != "bias":
                before = reduce(lambda tree, step: tree[step.key], path, initial[name].params)
                assert (np.abs(leaf - before).reshape(len(leaf), -1).max(axis=1) > 1e-4).all()


def test_a_population_of_tokens(key):
    """A cohort of all clients equals the federation, also if clients are stored on the host."""
    groups = {"a": fmd.ArchitectureGroup(bag_of_ids(), (0, 1, 5))}
    federation = toys.federation(groups, subset_size=10)
    public = fmd.public_dataset(texts(100, 20)[0] + FIRST)
    examples = {i: texts(i, size) for i, size in SIZES.items()}
    private = fmd.stack_private(groups, {i: (ids + FIRST, labels) for i, (ids, labels) in examples.items()})
    test_ids, test_labels = texts(200, 17)
    test = fmd.labelled_dataset(test_ids + FIRST, test_labels)
    states, _ = fmd.run_federation(
        federation, federation.init(key, public, private), public, private, key, num_rounds=1, test=test
    )
    population = fmd.simulation.init_population(federation, key, public, private, cohort_size=2)
    assert population.private["a"].inputs.dtype == np.int32
    population, _ = fmd.simulation.run_population(
        federation, population, public, key, cohort_size=3, num_rounds=1, test=test
    )
    chex.assert_trees_all_close(population.states, dict(states), rtol=1e-5, atol=1e-6)


# Half precision.


def federate_counts(dtype):
    """Final states and accuracies on counts of ids, which are exact in all dtypes."""
    architectures = {"a": toys.linear(), "b": toys.tanh_mlp()}
    *_, states, history = federate(architectures, lambda ids: counts(ids).astype(dtype))
    return states, [metrics.mean_accuracy for metrics in history]


@pytest.fixture(scope="module")
def federated_in_float32():
    return federate_counts(np.float32)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.uint8])
def test_a_federation_of_other_dtypes_equals_that_in_float32(dtype, federated_in_float32):
    (states, accuracies), (expected, expected_accuracies) = federate_counts(dtype), federated_in_float32
    chex.assert_trees_all_close(states, expected, rtol=1e-4, atol=1e-5)
    assert accuracies == pytest.approx(expected_accuracies, abs=1 / 17)


def test_padding_cannot_become_nan():
    """A network that normalises each example would compute 0/0 of a row of zeros."""
    stacked = fmd.stack_private(
        {"a": fmd.ArchitectureGroup(toys.linear(), (0, 1))}, {0: toys.examples(0, 5), 1: toys.examples(1, 2)}
    )["a"]
    normalised = stacked.inputs / stacked.inputs.std(axis=-1, keepdims=True)
    assert np.isfinite(normalised).all()
    np.testing.assert_array_equal(stacked.inputs[1, 2:], np.broadcast_to(stacked.inputs[1, 1], (3, toys.NUM_FEATURES)))
    assert (stacked.labels[1, 2:] == stacked.labels[1, 1]).all()
