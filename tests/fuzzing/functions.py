"""What the front door is given: arrays of any shape and dtype, counts, ids, settings; against NumPy where it answers.

Shapes are few and small: what is compiled for one case serves the others, and most complaints come before anything is.
"""

import collections
import pathlib
import tempfile
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toys
from fuzzing import odd
from fuzzing.harness import Target
from hypothesis import strategies as st

import fedmd_jax as fmd
from fedmd_jax import data
from fedmd_jax.data import DataError

_FOLDER = tempfile.TemporaryDirectory(prefix="fuzzing_functions_")
FOLDER = pathlib.Path(_FOLDER.name)


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1e-4, atol=1e-5)


# Examples.

some_inputs = odd.maybe(odd.arrays(shapes=[(3, 2), (3, 2, 2)], dtypes=odd.NUMERIC), odd.arrays() | odd.things)
some_labels = odd.maybe(odd.contents((3,), "int64"), odd.arrays() | odd.things)


def check_inputs(inputs, given):
    kind = np.int32 if given.dtype.kind in "iu" else np.float16 if given.dtype == np.float16 else np.float32
    assert inputs.dtype == kind
    assert np.isfinite(inputs).all()
    np.testing.assert_array_equal(inputs, given if kind == np.int32 else given.astype(kind))


def check_examples(inputs, labels, given_inputs, given_labels):
    given_inputs, given_labels = np.asarray(given_inputs), np.asarray(given_labels)
    check_inputs(inputs, given_inputs)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, given_labels)
    assert (np.asarray(labels) >= 0).all()


def check_datasets(case):
    kind, inputs, labels = case
    if kind == "public":
        dataset = fmd.public_dataset(inputs, labels)
        if labels is None:
            check_inputs(dataset.inputs, np.asarray(inputs))
            return
    else:
        dataset = fmd.labelled_dataset(inputs, labels)
        assert int(dataset.num_examples) == len(labels)
    check_examples(dataset.inputs, dataset.labels, inputs, labels)


some_ids = st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True) | odd.things | odd.arrays()
some_weights = st.none() | odd.maybe(st.lists(st.floats(0.1, 4), min_size=1, max_size=3), odd.things | odd.arrays())
few_ids = odd.maybe(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), some_ids, 3)


def check_group(case):
    ids, weights = case
    group = fmd.ArchitectureGroup(None, ids, weights)
    assert list(group.client_ids) == list(ids)
    assert len(set(group.client_ids)) == len(group.client_ids) == len(group.weights)
    assert all(weight == 0 or 1e-30 <= weight <= 1e30 for weight in group.weights)
    assert all(0 <= i < 2**32 for i in group.client_ids)
    if group.num_clients <= 3:
        close(fmd.algorithms.all_clients({"a": group}).weights["a"], group.weights)


def check_client_keys(case):
    keys = fmd.mapping.client_keys(KEY, case)
    for key, client_id in zip(keys, np.asarray(case).tolist(), strict=True):
        assert type(client_id) is int
        assert (jax.random.key_data(key) == jax.random.key_data(fold_in(KEY, np.uint32(client_id)))).all()


KEY = jax.random.key(0)
fold_in = jax.jit(jax.random.fold_in)


@st.composite
def private_examples(draw):
    ids = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True))
    examples = {}
    for client_id in ids:
        n = draw(st.integers(1, 3))
        inputs = draw(odd.maybe(odd.contents((n, 2), "float32"), some_inputs, 8))
        labels = draw(odd.maybe(odd.contents((n,), "int32"), some_labels, 8))
        examples[client_id] = draw(odd.maybe(st.just((inputs, labels)), odd.things, 12))
    if draw(st.integers(0, 5)) == 0:
        examples[draw(odd.scalars.filter(lambda x: x == x))] = (np.zeros((1, 2)), np.zeros(1, int))
    cut = draw(st.integers(0, len(ids)))
    return ids[:cut], ids[cut:], examples, draw(odd.maybe(st.just("host"), odd.things, 8))


def check_stack_private(case):
    first, second, examples, storage = case
    groups = {name: fmd.ArchitectureGroup(None, ids) for name, ids in (("a", first), ("b", second)) if ids}
    stacked = fmd.stack_private(groups, examples, storage=storage)
    for name, group in groups.items():
        inputs, labels, counts = stacked[name]
        for position, client_id in enumerate(group.client_ids):
            n = int(counts[position])
            given_inputs, given_labels = examples[client_id]
            assert n == len(given_labels)
            check_examples(inputs[position, :n], labels[position, :n], given_inputs, given_labels)


# Scores.


def np_log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def np_kl(logits, targets, temperature):
    student, teacher = np_log_softmax(logits / temperature), np_log_softmax(targets / temperature)
    return temperature**2 * (np.exp(teacher) * (teacher - student)).sum(axis=-1)


LOSSES = {
    "mae": (fmd.mae, lambda a, b: np.abs(a - b).mean(axis=-1)),
    "mse": (fmd.mse, lambda a, b: ((a - b) ** 2).mean(axis=-1)),
    "kl": (fmd.kl, partial(np_kl, temperature=1.0)),
    "warm kl": (partial(fmd.kl, temperature=2.0), partial(np_kl, temperature=2.0)),
}
some_scores = odd.maybe(odd.arrays(shapes=[(2, 3)], dtypes=["float32"]).map(np.float32), odd.arrays() | odd.things, 3)
floats = odd.contents((2, 3), "float32")
scores_pairs = st.tuples(floats, floats) | st.tuples(some_scores, some_scores)
compiled = {name: jax.jit(loss) for name, (loss, _) in LOSSES.items()}


def ordinary(*arrays):
    """Whether this is what is compiled and compared: small numbers of one dtype and shape."""
    return all(
        isinstance(a, np.ndarray) and a.dtype == np.float32 and a.shape == (2, 3) and (np.abs(a) < 1e6).all()
        for a in arrays
    )


def check_losses(case):
    name, (logits, targets), temperature = case
    loss, expected = LOSSES[name]
    if temperature is not None:
        loss = partial(fmd.kl, temperature=temperature)
    shape = abstract(loss, logits, targets)
    assert shape.shape == logits.shape[:-1]
    assert jnp.issubdtype(shape.dtype, jnp.floating)
    if ordinary(logits, targets) and temperature is None:
        close(compiled[name](logits, targets), expected(np.float64(logits), np.float64(targets)))


def abstract(fn, *arguments):
    """Shapes of the result, with what JAX can pass as shapes, and everything else as it is."""

    def is_array(argument):
        return (
            isinstance(argument, np.ndarray)
            and argument.dtype.kind in "biufc"
            and argument.dtype.isnative
            and argument.dtype != np.longdouble
        )

    places = [i for i, argument in enumerate(arguments) if is_array(argument)]

    def call(given):
        full = list(arguments)
        for i, argument in zip(places, given, strict=True):
            full[i] = argument
        return fn(*full)

    return jax.eval_shape(call, [arguments[i] for i in places])


cross_entropy = jax.jit(fmd.cross_entropy)


def check_cross_entropy(case):
    logits, labels = case
    shape = abstract(fmd.cross_entropy, logits, labels)
    assert shape.shape == np.shape(labels)
    if ordinary(logits) and labels.dtype == np.int32 and (labels >= 0).all() and (labels < 3).all():
        close(cross_entropy(logits, labels), -np_log_softmax(np.float64(logits))[np.arange(2), labels])


consensus = jax.jit(fmd.weighted_consensus)
SCORES = {"a": (2, 2, 3), "b": (1, 2, 3)}


@st.composite
def consensus_cases(draw):
    scores, weights = {}, {}
    for name, shape in SCORES.items():
        other = st.sampled_from([(1, 2, 3), (2, 1, 3), (1, 1, 3), (2, 2, 2), (0, 2, 3), (2, 2), (2, 2, 0)])
        odd_shape = draw(odd.maybe(st.just(shape), other, 6))
        dtype = draw(odd.maybe(st.just("float32"), st.sampled_from(odd.DTYPES), 6))
        scores[name] = draw(odd.maybe(odd.contents(odd_shape, dtype), odd.things, 15))
        usual = st.lists(
            st.sampled_from([0.0, 1.0, 0.25, 3.0, -1.0, float("nan"), float("inf"), 1e30]),
            min_size=shape[0],
            max_size=shape[0],
        ).map(np.float32)
        weights[name] = draw(odd.maybe(usual, odd.arrays() | odd.things, 8))
    if draw(st.integers(0, 10)) == 0:
        weights.pop("b")
    return ({}, {}) if draw(st.integers(0, 40)) == 0 else (scores, weights)


def np_consensus(scores, weights):
    total, weight = 0.0, 0.0
    for name, of_group in scores.items():
        for own, w in zip(of_group, weights[name], strict=True):
            if 0 < w < np.inf and np.isfinite(own).all():
                total, weight = total + np.float64(w) * own, weight + np.float64(w)
    return total / weight if weight else np.zeros(SCORES["a"][1:])


def check_consensus(case):
    scores, weights = case
    names = list(scores)
    count = len(names)

    def call(*arguments):
        return fmd.weighted_consensus(
            dict(zip(names, arguments[:count], strict=True)), dict(zip(weights, arguments[count:], strict=True))
        )

    shape = abstract(call, *scores.values(), *weights.values())
    assert shape.shape == next(iter(scores.values())).shape[1:]
    usual = all(scores[n].shape == SCORES[n] and scores[n].dtype == np.float32 for n in names)
    if usual and all((w.dtype == np.float32 and w.max() <= 1e3) or not np.isfinite(w).all() for w in weights.values()):
        close(consensus(scores, weights), np_consensus(scores, weights))


def check_weighted_sum(case):
    weights, numbers, chunk, axes = case
    fn = fmd.mapping.weighted_sum_clients(lambda own: own, axes, clients_per_chunk=chunk)
    shapes = abstract(fn, weights, numbers)
    assert shapes.total.shape == (1, *numbers.shape[1:])
    if ordinary(numbers) and weights.dtype == np.float32 and chunk in (None, 1):
        heard = np.isfinite(numbers).all(axis=1) & (weights > 0) & np.isfinite(weights)
        sums = sum_clients(chunk)(weights, numbers)
        close(sums.total[0], (np.float64(weights)[heard, None] * numbers[heard]).sum(axis=0))
        close(sums.weight[0], weights[heard].sum(dtype=np.float64))


@cache
def sum_clients(chunk):
    return jax.jit(fmd.mapping.weighted_sum_clients(lambda own: own, (0,), clients_per_chunk=chunk))


two_weights = st.lists(st.sampled_from([0.0, 1.0, 0.5, -1.0, float("nan")]), min_size=2, max_size=2).map(np.float32)


def check_map_clients(case):
    axes, chunk, own, shared = case
    mapped = fmd.mapping.map_clients(lambda own, shared: own * 2, axes, clients_per_chunk=chunk)
    shape = abstract(mapped, own, shared)
    assert shape.shape == own.shape


# The public subset.


@st.composite
def public_datasets(draw):
    inputs = draw(odd.maybe(odd.contents((4, 2), "float32"), odd.arrays() | odd.things, 6))
    usual = st.lists(st.integers(0, 1), min_size=4, max_size=4).map(np.int32)
    return fmd.PublicDataset(inputs, draw(odd.maybe(usual, st.none() | odd.arrays(), 4)))


DRAWS = {
    "random": fmd.draw_public_subset,
    "stratified": fmd.draw_stratified_subset,
    "in order": fmd.algorithms.first_examples,
}
draw_three = {name: jax.jit(partial(draw, size=3)) for name, draw in DRAWS.items()}


def check_subset(case):
    name, dataset, size = case
    shapes = abstract(lambda inputs, labels: DRAWS[name](KEY, fmd.PublicDataset(inputs, labels), size), *dataset)
    assert shapes.inputs.shape == (int(size), *dataset.inputs.shape[1:])
    usual = dataset.inputs.shape == (4, 2) and dataset.inputs.dtype == np.float32 and size == 3
    if usual and dataset.labels is not None and dataset.labels.dtype == np.int32:
        numbered = np.arange(8, dtype=np.float32).reshape(4, 2)
        subset = draw_three[name](KEY, fmd.PublicDataset(numbered, dataset.labels))
        rows = (np.asarray(subset.inputs)[:, 0] / 2).astype(int)
        assert len(set(rows.tolist())) == 3
        assert np.asarray(subset.labels).tolist() == dataset.labels[rows].tolist()
        if name == "stratified":
            for label, count in collections.Counter(dataset.labels.tolist()).items():
                assert int(3 * count / 4) <= np.sum(np.asarray(subset.labels) == label) <= -(-3 * count // 4)


# Cohorts and participation.

GROUPS = {"a": fmd.ArchitectureGroup(None, (0, 3, 5)), "b": fmd.ArchitectureGroup(None, (1, 2))}
some_sizes = st.integers(0, 7) | st.dictionaries(
    odd.maybe(st.sampled_from(["a", "b"]), odd.scalars.filter(lambda x: x == x), 6),
    odd.maybe(st.integers(1, 3), odd.things),
    max_size=3,
)


def check_cohort(size):
    sizes = fmd.simulation.cohort_sizes(GROUPS, size)
    cohort = fmd.simulation.draw_cohort(KEY, GROUPS, size)
    assert all(1 <= sizes[name] <= group.num_clients for name, group in GROUPS.items())
    assert sum(sizes.values()) == (sum(size.values()) if isinstance(size, dict) else size)
    for name, rows in cohort.rows.items():
        assert len(set(rows.tolist())) == len(rows) == sizes[name]
        assert cohort.client_ids[name].tolist() == [GROUPS[name].client_ids[row] for row in rows]


def check_rows(case):
    which, tree, rows, new = case
    if which == "take":
        taken = fmd.simulation.get_rows({"x": tree}, rows)["x"]
        rows = np.asarray(rows, int)
        assert (rows >= 0).all()
        np.testing.assert_array_equal(taken, tree[rows])
    else:
        expected = np.array(tree)
        changed = fmd.simulation.set_rows({"x": tree}, rows, {"x": new})["x"]
        rows = np.asarray(rows, int)
        assert len(set(rows.tolist())) == len(rows)
        assert (rows >= 0).all()
        for row, own in zip(rows, new, strict=True):
            expected[row] = own
        np.testing.assert_array_equal(changed, expected)


@st.composite
def rows_cases(draw):
    tree = draw(odd.maybe(odd.arrays(shapes=[(3,), (3, 2)], dtypes=odd.NUMERIC), odd.arrays(), 5))
    rows = draw(
        odd.maybe(st.lists(st.integers(0, 2), max_size=3), odd.arrays() | odd.things | st.just([3]) | st.just([-1]), 3)
    )
    usual = odd.contents((len(rows) if isinstance(rows, list) else 2, *tree.shape[1:]), tree.dtype)
    return draw(st.sampled_from(["take", "put"])), tree, rows, draw(odd.maybe(usual, odd.arrays(), 4))


some_luck = st.floats(0, 1) | odd.things | st.dictionaries(st.integers(0, 3), st.floats(0, 1) | odd.scalars, max_size=4)
three_ids = st.lists(st.integers(0, 3), min_size=3, max_size=3, unique=True).map(np.uint32)


def check_participation(case):
    ids, availability, completion = case
    participation = fmd.simulation.draw_participation(KEY, {"a": ids}, availability=availability, completion=completion)
    available, completed = np.asarray(participation.available["a"]), np.asarray(participation.completed["a"])
    assert available.shape == completed.shape == np.shape(ids)
    assert not (completed & ~available).any()
    for mask, probability in ((available, availability), (completed | ~available, completion)):
        for client_id, there in zip(np.asarray(ids).tolist(), mask, strict=True):
            share = probability[client_id] if isinstance(probability, dict) else probability
            assert there or share < 1
            assert not there or share > 0 or mask is not available


# Splitting.

RNG = partial(np.random.default_rng, 0)
some_counts = odd.maybe(st.integers(1, 3), odd.things, 8)
class_lists = odd.maybe(
    st.none() | st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True), odd.things | odd.arrays(), 8
)
twelve = odd.maybe(st.lists(st.integers(0, 3), min_size=12, max_size=24).map(np.array), odd.arrays() | odd.things, 8)
positive = odd.maybe(st.floats(0.05, 50), odd.things | st.sampled_from([1e-320, 1e-300, 1e300, 1e308, 10**400]), 3)


def check_split(case):
    kind, labels, others, num_clients, count, classes, number = case
    shared = {"num_clients": num_clients, "classes": classes, "rng": RNG()}
    if kind == "class":
        shares = data.split_by_class(labels, examples_per_class=count, **shared)
    elif kind == "k classes":
        shares = data.split_k_classes(labels, classes_per_client=2, examples_per_class=count, **shared)
    elif kind == "dirichlet":
        shares = data.split_dirichlet(labels, alpha=number, min_examples=count, **shared)
    elif kind == "quantity":
        weights = data.lognormal(number) if num_clients != 2 else data.power_law(number)
        shares = data.split_by_quantity(labels, weights=weights, min_examples=count, **shared)
    elif kind == "writer":
        shares = data.split_by_writer(others, labels, min_examples=count, **shared)
    else:
        shared["superclasses"] = shared.pop("classes")
        shares = data.split_by_superclass(others, labels, examples_per_class=count, **shared)
    labels = np.asarray(labels)
    given = np.concatenate(shares)
    assert len(shares) == num_clients
    assert len(set(given.tolist())) == len(given)
    allowed = set(labels.tolist()) if classes is None else set(np.asarray(classes).tolist())
    for share in shares:
        own = labels[share].tolist()
        if kind != "writer":
            assert set(own) <= allowed
        if kind in ("dirichlet", "quantity"):
            assert len(share) >= count
        elif kind == "class":
            assert collections.Counter(own) == dict.fromkeys(allowed, count)
        elif kind == "k classes":
            assert sorted(collections.Counter(own).values()) == [count, count]
        elif kind == "writer":
            assert len(set(np.asarray(others)[share].tolist())) == 1
    if kind in ("dirichlet", "quantity"):
        assert sorted(given.tolist()) == np.flatnonzero(np.isin(labels, list(allowed))).tolist()


# Images.

pixel_arrays = odd.maybe(
    odd.contents((2, 3, 3, 1), "uint8") | odd.contents((2, 3, 3, 1), "float32"),
    odd.arrays(shapes=[(0, 3, 3, 1), (2, 3, 3), (2, 3, 3, 2), (), (2, 0, 3, 1), (1, 1, 1, 1)]) | odd.things,
    3,
)


def check_images(case):
    kind, images, other = case
    if kind == "scale":
        close(data.scale(images), images / 255)
    elif kind == "ink":
        out = data.center_ink(images)
        assert (out.shape, out.dtype) == (images.shape, images.dtype)
        np.testing.assert_array_equal((out > 0).any(axis=(1, 2, 3)), (images > 31).any(axis=(1, 2, 3)))
    elif kind == "mean":
        close(data.mean_image(images), np.float64(images).mean(axis=0))
    elif kind == "center":
        _, moved = data.center(images, other)
        close(moved, np.float64(other) - np.float64(images).mean(axis=0))
    else:
        merged = data.merge_case(images)
        assert merged.shape == np.shape(images)
        assert ((merged >= 0) & (merged < 36)).all()


def check_saved(case):
    images, labels, name, split, columns = case
    data.save_images(FOLDER, name, split, images, labels, **columns)
    found = data.load_images(name, split, data_dir=FOLDER)
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.labels, labels)
    for column, values in columns.items():
        np.testing.assert_array_equal(data.load_column(name, split, column, data_dir=FOLDER), np.asarray(values))


saved_cases = st.tuples(
    odd.maybe(odd.contents((2, 3, 3, 1), "uint8"), pixel_arrays, 5),
    odd.maybe(odd.contents((2,), "int64"), odd.arrays() | odd.things, 5),
    odd.maybe(st.sampled_from(["own", "own/small", "a.b-c"]), odd.things | st.sampled_from(["x" * 150, "nul\0"]), 8),
    odd.maybe(st.just("train"), odd.things, 10),
    st.dictionaries(
        st.sampled_from(
            ["writer", "id", "path", "file", "allow_pickle", "a/b", "../x", "é", "", "x.npy", "arr_0", "\ud800"]
        ),
        odd.maybe(st.sampled_from([np.array(["a", "b"]), np.array([1, 2])]), odd.arrays() | odd.things, 4),
        max_size=2,
    ),
)


# Settings and small things.


class Call(NamedTuple):
    """A function and what its result must be."""

    fn: object
    good: object = lambda result, *arguments: True


def training(*, num_epochs, batch_size, optimizer, early_stopping):
    return fmd.TrainingConfig(
        num_epochs=num_epochs, batch_size=batch_size, optimizer=optimizer, early_stopping=early_stopping
    )


def a_federation(**settings):
    return fmd.fedmd({"a": fmd.ArchitectureGroup(toys.linear(), (0, 1))}, **settings)


count = odd.maybe(st.integers(1, 3), odd.things, 2)
number = odd.maybe(st.floats(0.1, 2), odd.things, 2)
STATE = fmd.ClientState({"w": np.zeros((2, 3), np.float32)}, {}, {}, {})
SETTINGS = {
    "Training": (
        training,
        {
            "num_epochs": count,
            "batch_size": count,
            "optimizer": odd.maybe(st.just(optax.sgd(0.1)), odd.things),
            "early_stopping": odd.maybe(st.none(), odd.things),
        },
    ),
    "clip_scores": (lambda bound: fmd.transforms.clip_scores(jnp.ones((2, 3)), bound=bound), {"bound": number}),
    "EarlyStopping": (fmd.EarlyStopping, {"patience": count, "min_delta": number}),
    "client_mesh": (fmd.client_mesh, {"num_devices": st.none() | count}),
    "adam": (fmd.adam, {"learning_rate": number, "b1": number, "b2": number, "eps": number}),
    "communication_bytes": (
        fmd.communication_bytes,
        {
            "states": odd.maybe(st.just({"a": STATE}), st.sampled_from([{}, {"a": STATE._replace(params={})}]), 5),
            "subset_size": count,
            "num_classes": count,
            "num_rounds": count,
            "dtype": odd.maybe(st.sampled_from(["float32", jnp.bfloat16, np.float16]), odd.things),
        },
    ),
    "fedmd": (
        a_federation,
        {
            "subset_size": count,
            "clients_per_chunk": st.none()
            | st.just("auto")
            | count
            | st.dictionaries(st.sampled_from(["a", "b"]), count, max_size=2),
            "costs": st.none() | odd.things | st.dictionaries(st.sampled_from(["a", "b"]), number, max_size=2),
        },
    ),
}
settings_cases = st.sampled_from(sorted(SETTINGS)).flatmap(
    lambda name: st.tuples(st.just(name), st.fixed_dictionaries(SETTINGS[name][1]))
)


def check_settings(case):
    name, arguments = case
    result = SETTINGS[name][0](**arguments)
    if name == "communication_bytes":
        one_way = arguments["subset_size"] * arguments["num_classes"] * jnp.dtype(arguments["dtype"]).itemsize
        assert result == (one_way, one_way, 4 * one_way * arguments["num_rounds"], 12.0)
    elif name == "client_mesh":
        assert result.size == (arguments["num_devices"] or jax.device_count())
    elif name in ("Training", "EarlyStopping"):
        assert all(getattr(result, key) is value for key, value in arguments.items())


# A whole federation, before anything is compiled.


@cache
def federation():
    return toys.federation({"a": fmd.ArchitectureGroup(toys.linear(), (0, 1))}, subset_size=2)


def stacked(draw, shape):
    """A dataset by hand, perhaps with parts that do not fit."""
    k, n = shape
    lead = (k, n) if k else (n,)
    inputs = draw(odd.maybe(odd.contents((*lead, 5), "float32"), odd.arrays() | odd.things, 6))
    labels = draw(odd.maybe(odd.contents(lead, "int32"), odd.arrays() | odd.things, 6))
    usual = odd.contents((k,) if k else (), "int32")
    return fmd.PrivateDataset(inputs, labels, draw(odd.maybe(usual, odd.arrays() | odd.things, 6)))


@st.composite
def federation_data(draw):
    public = fmd.PublicDataset(
        draw(odd.maybe(odd.contents((3, 5), "float32"), odd.arrays() | odd.things, 6)),
        draw(odd.maybe(odd.contents((3,), "int32"), odd.arrays() | odd.things, 4)),
    )
    private = {"a": stacked(draw, (2, 3))} if draw(st.integers(0, 9)) else draw(odd.things)
    return public, private, draw(odd.maybe(st.just(stacked(draw, (0, 2))), odd.things, 9))


def check_federation(case):
    public, private, test = case
    federation().check(public, private, test)
    parts = [private["a"], test]
    for dataset in (public, *parts):
        if dataset.labels is not None:
            assert np.issubdtype(np.asarray(dataset.labels).dtype, np.integer)
            assert np.min(dataset.labels) >= 0
            assert np.max(dataset.labels) < toys.NUM_CLASSES
        assert np.isfinite(np.asarray(dataset.inputs, np.float64)).all()
        assert np.shape(dataset.inputs)[-1] == 5


def check_evaluate(case):
    kind, dataset, batch_size = case
    architecture = fmd.Architecture(
        None, lambda *given, train: (jnp.zeros((given[2].shape[0], 4)), {})
    )  # takes anything
    state = fmd.ClientState({}, {}, {}, {})
    if kind == "score":
        shape = abstract(lambda inputs: fmd.score(architecture, state, inputs, batch_size=batch_size), dataset.inputs)
        assert shape.shape == (dataset.inputs.shape[0], 4)
        return
    shape = abstract(
        lambda *parts: fmd.evaluate(architecture, state, fmd.PrivateDataset(*parts), batch_size=batch_size), *dataset
    )
    assert shape.accuracy.shape == shape.loss.shape == ()


@st.composite
def evaluate_cases(draw):
    return draw(st.sampled_from(["score", "evaluate"])), stacked(draw, (0, 3)), draw(st.none() | count)


# Spread over devices.


@st.composite
def trees(draw):
    names = st.sampled_from(["a", "b"])
    leaf = odd.maybe(
        odd.arrays(shapes=[(1, 2), (2, 2), (3, 2), (2,)], dtypes=["float32", "int32"]), odd.arrays() | odd.things, 8
    )
    tree = draw(st.dictionaries(names, leaf | st.dictionaries(st.sampled_from("xy"), leaf, max_size=2), max_size=2))
    costs = draw(odd.maybe(st.none(), odd.things | st.dictionaries(names, number, max_size=2), 4))
    return tree, draw(st.sampled_from([1, 2])), costs


def check_spread(case):
    tree, num_devices, costs = case
    sharded = fmd.mapping.shard_clients(tree, fmd.client_mesh(num_devices), costs=costs)
    gathered = fmd.gather_clients(sharded)
    assert sorted(gathered) == sorted(tree)
    for name in tree:
        for found, given in zip(jax.tree.leaves(gathered[name]), jax.tree.leaves(tree[name]), strict=True):
            np.testing.assert_array_equal(found, given.astype(found.dtype))  # JAX has no float64 here


def target(name, case, check, *, few=12, share=1.0, errors=(ValueError,)):
    return Target(name=name, case=case, check=check, errors=errors, few=few, share=share)


SPLITS = ["class", "k classes", "dirichlet", "quantity", "writer", "superclass"]
TARGETS = [
    target(
        "datasets",
        st.tuples(st.sampled_from(["public", "labelled"]), some_inputs, some_labels),
        check_datasets,
        few=24,
        share=2,
    ),
    target("groups", st.tuples(few_ids, some_weights), check_group, few=16),
    target("client keys", three_ids | odd.arrays(shapes=[(), (3,), (3, 1)]) | odd.things, check_client_keys),
    target("stacking of private data", private_examples(), check_stack_private, few=20, share=2),
    target(
        "losses",
        st.tuples(st.sampled_from(sorted(LOSSES)), scores_pairs, odd.maybe(st.none(), number)),
        check_losses,
        few=20,
        share=2,
    ),
    target(
        "cross entropy",
        st.tuples(
            odd.maybe(floats, some_scores, 3), odd.maybe(odd.contents((2,), "int32"), odd.arrays() | odd.things, 3)
        ),
        check_cross_entropy,
        few=12,
    ),
    target("consensus", consensus_cases(), check_consensus, few=20, share=2),
    target(
        "weighted sums",
        st.tuples(
            odd.maybe(two_weights, odd.arrays() | odd.things),
            odd.maybe(floats, odd.arrays() | odd.things),
            odd.maybe(st.sampled_from([None, 1]), odd.things),
            odd.maybe(st.just((0,)), odd.things | st.sampled_from([(None,), (0, 0), (1,), ()]), 8),
        ),
        check_weighted_sum,
    ),
    target(
        "mapping",
        st.tuples(
            odd.maybe(st.just((0, None)), odd.things | st.sampled_from([(0, 0), (None, None), (1, None), (0,)]), 5),
            odd.maybe(st.sampled_from([None, 1, 2]), odd.things),
            odd.maybe(floats, odd.arrays() | odd.things),
            odd.maybe(floats, odd.arrays() | odd.things),
        ),
        check_map_clients,
    ),
    target(
        "public subsets",
        st.tuples(
            st.sampled_from(sorted(DRAWS)), public_datasets(), odd.maybe(st.just(3), st.integers(0, 6) | odd.things, 3)
        ),
        check_subset,
        few=16,
    ),
    target("cohorts", odd.maybe(some_sizes, odd.things, 5), check_cohort, few=16),
    target("rows of clients", rows_cases(), check_rows, few=16),
    target(
        "participation",
        st.tuples(odd.maybe(three_ids, odd.arrays() | odd.things, 6), some_luck, some_luck),
        check_participation,
        few=16,
    ),
    target(
        "partitions",
        st.tuples(st.sampled_from(SPLITS), twelve, twelve, some_counts, some_counts, class_lists, positive),
        check_split,
        few=40,
        share=4,
    ),
    target(
        "images",
        st.tuples(st.sampled_from(["scale", "ink", "mean", "center", "merge"]), pixel_arrays, pixel_arrays),
        check_images,
        few=24,
        share=2,
    ),
    target("saved images", saved_cases, check_saved, few=16, errors=(DataError,)),
    target("settings", settings_cases, check_settings, few=32, share=3),
    target("data of a federation", federation_data(), check_federation, few=16, share=2),
    target("evaluation", evaluate_cases(), check_evaluate, few=12),
    target("clients on devices", trees(), check_spread, few=8),
]
