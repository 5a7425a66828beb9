import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import fedmd_jax as fmd


def count(labels, predicted):
    """The slow and obvious version of `Evaluation.confusion`."""
    counts = np.zeros((toys.NUM_CLASSES, toys.NUM_CLASSES), int)
    for label, prediction in zip(labels, predicted, strict=True):
        counts[label, prediction] += 1
    return counts


def predict(architecture, state, inputs):
    return np.asarray(fmd.score(architecture, state, jnp.asarray(inputs))).argmax(-1)


def test_padding_is_ignored(key):
    architecture = toys.linear()
    state = fmd.init_client(architecture, key, jnp.zeros((1, 5)), digest=toys.sgd(4), revisit=toys.sgd(4))
    inputs, labels = toys.examples(0, 11)
    expected = fmd.evaluate(architecture, state, fmd.labelled_dataset(inputs, labels), confusion=True)
    predicted = predict(architecture, state, inputs)
    np.testing.assert_allclose(expected.accuracy, (predicted == labels).mean(), rtol=1e-6)
    np.testing.assert_array_equal(expected.confusion, count(labels, predicted))
    junk = fmd.PrivateDataset(
        jnp.pad(inputs, ((0, 9), (0, 0)), constant_values=7.0),
        jnp.pad(jnp.asarray(labels), (0, 9), constant_values=2),
        jnp.int32(11),
    )
    for batch_size in (4, 256):
        padded = fmd.evaluate(architecture, state, junk, batch_size=batch_size, confusion=True)
        np.testing.assert_allclose(padded[:2], expected[:2], rtol=1e-6)
        np.testing.assert_array_equal(padded.confusion, expected.confusion)
    empty = fmd.evaluate(architecture, state, junk._replace(num_examples=jnp.int32(0)), confusion=True)
    assert empty[:2] == (0.0, 0.0)
    assert not empty.confusion.any()


def test_labels_outside_of_the_head_are_not_counted(key):
    architecture = toys.linear()
    state = fmd.init_client(architecture, key, jnp.zeros((1, 5)), digest=toys.sgd(4), revisit=toys.sgd(4))
    inputs, labels = toys.examples(0, 11)
    odd = np.where(np.arange(11) % 3 == 0, [-1, toys.NUM_CLASSES, -7, 90] * 2 + [-1, 4, -5], labels)
    known = (odd >= 0) & (odd < toys.NUM_CLASSES)
    found = fmd.evaluate(architecture, state, fmd.PrivateDataset(inputs, jnp.asarray(odd), 11), confusion=True)
    np.testing.assert_array_equal(found.confusion, count(odd[known], predict(architecture, state, inputs)[known]))


@pytest.mark.parametrize(("num_devices", "clients_per_chunk"), [(1, None), (1, 1), (1, 2), (4, None)])
def test_the_clients_of_a_federation_are_counted_one_by_one(key, num_devices, clients_per_chunk):
    groups = toys.groups()
    mesh = fmd.client_mesh(num_devices) if num_devices > 1 else None
    federation = toys.federation(groups, mesh=mesh, clients_per_chunk=clients_per_chunk)
    private = toys.private(groups)
    states = federation.init(key, toys.public(), private)
    alone = fmd.gather_clients(states)
    shared = fmd.labelled_dataset(*toys.examples(7, 19))
    # One dataset for all clients, or each client's own with padding.
    for test, of_client in (
        (shared, lambda *_: shared),
        (private, lambda name, k: jax.tree.map(lambda x: x[k], private[name])),
    ):
        found = fmd.gather_clients(federation.evaluate(states, federation.put(test), confusion=True))
        for name, group in groups.items():
            for k in range(group.num_clients):
                state = jax.tree.map(lambda leaf, k=k: leaf[k], alone[name])
                inputs, labels, num_examples = of_client(name, k)
                predicted = predict(group.architecture, state, inputs)[:num_examples]
                expected = count(np.asarray(labels)[:num_examples], predicted)
                np.testing.assert_array_equal(found[name].confusion[k], expected)
                assert found[name].confusion[k].sum() == num_examples
            correct = np.trace(found[name].confusion, axis1=-2, axis2=-1)
            np.testing.assert_allclose(found[name].accuracy, correct / found[name].confusion.sum((-2, -1)), rtol=1e-6)
    assert federation.evaluate(states, shared)["mlp"].confusion is None


def test_accuracy_by_class():
    counts = np.array([[[3, 1, 0], [0, 0, 0], [2, 0, 2]], [[0, 4, 0], [1, 0, 0], [0, 0, 5]]])
    expected = [[0.75, np.nan, 0.5], [0.0, 0.0, 1.0]]
    for confusion in (counts, jnp.asarray(counts)):
        np.testing.assert_array_equal(fmd.client.class_accuracy(confusion), expected)
    np.testing.assert_array_equal(fmd.client.Evaluation(0.5, 1.0, counts[0]).class_accuracy, expected[0])
    with pytest.raises(ValueError, match="evaluate with confusion=True"):
        _ = fmd.client.Evaluation(0.5, 1.0).class_accuracy
    with pytest.raises(ValueError, match=r"must have shape \[..., C, C\], got \(2, 3\)"):
        fmd.client.class_accuracy(np.zeros((2, 3)))
