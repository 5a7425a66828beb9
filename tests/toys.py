"""Small networks and federations, written without a network library."""

import collections
import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedmd_jax as fmd

NUM_CLASSES = 4
NUM_FEATURES = 5


@contextlib.contextmanager
def float64():
    """In the whole process, as all supported versions can."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def _network(init, features, **more) -> fmd.Architecture:
    """An architecture from a function that gives logits and features."""

    def apply(*arguments, **how):
        (logits, _), model_state = features(*arguments, **how)
        return logits, model_state

    return fmd.Architecture(init, apply, features=features, **more)


def linear() -> fmd.Architecture:
    """Logits = x W + b; features are x W."""

    def init(key, inputs):
        shape = (inputs.shape[-1], NUM_CLASSES)
        return {"w": 0.3 * jax.random.normal(key, shape), "b": jnp.zeros(NUM_CLASSES)}, {}

    def features(params, model_state, inputs, *, train, mask=None, key=None):
        del train, mask, key
        units = inputs @ params["w"]
        return (units + params["b"][None], units), model_state

    return _network(init, features)


def tanh_mlp(hidden: int = 6) -> fmd.Architecture:
    """Logits = tanh(x U) V, with an L2 penalty on V; features are tanh(x U)."""

    def init(key, inputs):
        key_u, key_v = jax.random.split(key)
        return {
            "u": 0.5 * jax.random.normal(key_u, (inputs.shape[-1], hidden)),
            "v": 0.5 * jax.random.normal(key_v, (hidden, NUM_CLASSES)),
        }, {}

    def features(params, model_state, inputs, *, train, mask=None, key=None):
        del train, mask, key
        units = jnp.tanh(inputs @ params["u"])
        return (units @ params["v"], units), model_state

    return _network(init, features, penalty=lambda params: 1e-2 * jnp.sum(params["v"] ** 2))


def normed(noise: float = 0.0) -> fmd.Architecture:
    """Linear scores of inputs centred by masked batch means, with moving means, and additive noise in training."""

    def init(key, inputs):
        params, _ = linear().init(key, inputs)
        return params, {"mean": jnp.zeros(inputs.shape[-1]), "num_batches": jnp.zeros((), jnp.int32)}

    def features(params, model_state, inputs, *, train, mask=None, key=None):
        mean = model_state["mean"]
        if train:
            mask = jnp.ones(inputs.shape[0], bool) if mask is None else mask
            mean = jnp.sum(inputs * mask[:, None], axis=0) / jnp.maximum(jnp.sum(mask), 1)
            model_state = {
                "mean": 0.9 * model_state["mean"] + 0.1 * mean,
                "num_batches": model_state["num_batches"] + 1,
            }
            inputs = inputs + noise * jax.random.normal(key, inputs.shape)
        outputs, _ = linear().features(params, {}, inputs - mean[None], train=train)
        return outputs, model_state

    return _network(init, features)


def convolutional(filters: int = 2) -> fmd.Architecture:
    """Logits = mean over positions of relu(x * U), the features, times V: a convolution along the inputs."""

    def init(key, inputs):
        key_u, key_v = jax.random.split(key)
        return {
            "u": 0.5 * jax.random.normal(key_u, (filters, 1, 3)),
            "v": 0.5 * jax.random.normal(key_v, (filters, NUM_CLASSES)),
        }, {}

    def features(params, model_state, inputs, *, train, mask=None, key=None):
        del train, mask, key
        units = jax.nn.relu(jax.lax.conv(inputs[:, None], params["u"], (1,), "SAME")).mean(axis=2)
        return (units @ params["v"], units), model_state

    return _network(init, features)


def collectives(program: str) -> dict[str, int]:
    """Counts the collectives in the text of a compiled program."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter|send|recv"
    return dict(collections.Counter(re.findall(rf" ({names})(?:-start)?\(", program)))


def examples(seed: int, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [n, 5] and labels [n] that a linear network can learn."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, num_examples)
    means = np.eye(NUM_CLASSES, NUM_FEATURES)
    return (2.0 * means[labels] + rng.normal(size=(num_examples, NUM_FEATURES))).astype(np.float32), labels


def public(num_examples: int = 23) -> fmd.PublicDataset:
    return fmd.public_dataset(*examples(100, num_examples))


def private(groups, num_examples=lambda client_id: 7 + client_id) -> dict[str, fmd.PrivateDataset]:
    """Private datasets of different sizes."""
    ids = [client_id for group in groups.values() for client_id in group.client_ids]
    return fmd.stack_private(groups, {i: examples(i, num_examples(i)) for i in ids})


def groups(**weights) -> dict[str, fmd.ArchitectureGroup]:
    """Five clients in two architectures."""
    return {
        "linear": fmd.ArchitectureGroup(linear(), (0, 1, 2), weights.get("linear")),
        "mlp": fmd.ArchitectureGroup(tanh_mlp(), (3, 4), weights.get("mlp")),
    }


def clients(groups, *trees):
    """Yields the group, the id and the part in each tree, per group [K, ...], of every client."""
    for name, group in groups.items():
        for k, client_id in enumerate(group.client_ids):
            yield name, client_id, *(jax.tree.map(lambda leaf, k=k: leaf[k], tree[name]) for tree in trees)


def by_client(groups, tree) -> dict:
    """Per group [K, ...] -> {client id: one client's}."""
    return {client_id: own for _, client_id, own in clients(groups, tree)}


def sgd(batch_size: int, num_epochs: int = 1, shuffle: bool = True) -> fmd.TrainingConfig:
    """SGD with momentum: it has a state, but unlike Adam does not amplify rounding noise."""
    return fmd.TrainingConfig(
        num_epochs=num_epochs, batch_size=batch_size, optimizer=optax.sgd(0.05, momentum=0.9), shuffle=shuffle
    )


def federation(groups, *, shuffle: bool = True, algorithm=None, **settings) -> fmd.Federation:
    """A federation with partial last batches in every phase; of FedMD or of another algorithm."""
    trainings = {
        "public_training": sgd(8, 2, shuffle),
        "private_training": sgd(4, 2, shuffle),
        "pooled_training": sgd(16, 2, shuffle),
        "digest_training": sgd(5, 2, shuffle),
        "revisit_training": sgd(3, 2, shuffle),
    }
    settings = {"subset_size": 12, **trainings, **settings}
    return fmd.fedmd(groups, **settings) if algorithm is None else fmd.make_federation(groups, algorithm, **settings)
