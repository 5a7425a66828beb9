"""What `field.py` runs in the environment of another library: only the API of that library."""

import json
import pathlib
import sys
import time


def htfllib(folder, dataset):
    """Prints the mean accuracy, by scores, of the clients whose networks HtFLlib has kept in a folder."""
    import torch
    from flcore.clients.clientbase import load_item
    from utils.data_utils import read_client_data

    accuracy = []
    kept = next(path.parent for path in pathlib.Path(folder).rglob("Client_0_model.pt"))
    for number in range(len(list(kept.glob("Client_*_model.pt")))):
        network = load_item(f"Client_{number}", "model", str(kept)).eval()
        images, labels = map(torch.stack, zip(*read_client_data(dataset, number, is_train=False), strict=True))
        with torch.no_grad():
            accuracy.append((network(images).argmax(1) == labels).float().mean().item())
    found = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"accuracy": sum(accuracy) / len(accuracy), "versions": found}))


def fedjax(path, num_rounds, num_epochs, batch_size):
    """FedAvg, as in FedJAX's examples/emnist_fed_avg.py with plain SGD and averaging."""
    import fedjax
    import jax
    import numpy as np
    from fedjax.algorithms import fed_avg

    data = np.load(path)
    clients = [{name: data[f"train_{name}"][number] for name in "xy"} for number in range(len(data["train_x"]))]
    train = {b"%d" % number: examples for number, examples in enumerate(clients)}
    train = fedjax.InMemoryFederatedData(train)
    test = fedjax.ClientDataset({name: np.concatenate(data[f"test_{name}"]) for name in "xy"})
    model = fedjax.models.emnist.create_conv_model(only_digits=True)

    def loss(params, batch, key):
        return jax.numpy.mean(model.train_loss(batch, model.apply_for_train(params, batch, key)))

    batches = fedjax.ShuffleRepeatBatchHParams(batch_size=int(batch_size), num_epochs=int(num_epochs))
    optimizers = fedjax.optimizers.sgd(0.01), fedjax.optimizers.sgd(1.0)
    algorithm = fed_avg.federated_averaging(jax.jit(jax.grad(loss)), *optimizers, batches)
    state = algorithm.init(model.init(jax.random.PRNGKey(0)))
    sampler = fedjax.client_samplers.UniformGetClientSampler(fd=train, num_clients=train.num_clients(), seed=0)
    found = {"round": [], "evaluate": [], "accuracy": []}
    for _ in range(int(num_rounds)):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(algorithm.apply(state, sampler.sample()))
        trained = time.perf_counter()
        metrics = fedjax.evaluate_model(model, state.params, test.padded_batch(batch_size=256))
        found["accuracy"].append(float(metrics["accuracy"]))
        found["evaluate"].append(time.perf_counter() - trained)
        found["round"].append(trained - start)
    versions = {"jax": jax.__version__, "numpy": np.__version__}
    print(json.dumps({**found, "versions": versions}))


if __name__ == "__main__":
    {"htfllib": htfllib, "fedjax": fedjax}[sys.argv[1]](*sys.argv[2:])
