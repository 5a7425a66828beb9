"""FedMD in NumPy: slow, obvious, in float64, with gradients by hand and without code of the library.

One client at a time; networks are `toys.linear` and `toys.tanh_mlp`, the optimizer is SGD with momentum, batches are
taken in order.
"""

import numpy as np

LEARNING_RATE, MOMENTUM = 0.05, 0.9


def scores(params, x):
    if "w" in params:
        return x @ params["w"] + params["b"]
    return np.tanh(x @ params["u"]) @ params["v"]


def gradients(params, x, score_gradient):
    """Gradients of the mean loss plus the penalty; `score_gradient` [B, C] is per example."""
    g = score_gradient / len(x)
    if "w" in params:
        return {"w": x.T @ g, "b": g.sum(axis=0)}
    hidden = np.tanh(x @ params["u"])
    return {"v": hidden.T @ g + 2e-2 * params["v"], "u": x.T @ ((g @ params["v"].T) * (1 - hidden**2))}


def penalty(params):
    return 1e-2 * np.sum(params["v"] ** 2) if "v" in params else 0.0


def mae(z, target):
    return np.abs(z - target).mean(axis=1), np.sign(z - target) / z.shape[1]


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cross_entropy(z, label):
    p = softmax(z)
    picked = p[np.arange(len(z)), label]
    p[np.arange(len(z)), label] -= 1
    return -np.log(picked), p


def train(params, velocity, x, y, loss, *, num_epochs, batch_size):
    epoch_losses = []
    for _ in range(num_epochs):
        total = 0.0
        for start in range(0, len(x), batch_size):
            batch, target = x[start : start + batch_size], y[start : start + batch_size]
            value, score_gradient = loss(scores(params, batch), target)
            total += len(batch) * (value.mean() + penalty(params))
            for name, gradient in gradients(params, batch, score_gradient).items():
                velocity[name] = gradient + MOMENTUM * velocity[name]
                params[name] = params[name] - LEARNING_RATE * velocity[name]
        epoch_losses.append(total / len(x))
    return epoch_losses


def zeros_like(params):
    return {name: np.zeros_like(value) for name, value in params.items()}


class Client:
    """Parameters, two optimizer states, and whether the client takes part and completes the round."""

    available = completed = True

    def __init__(self, params, x, y, weight):
        self.params = {name: np.asarray(value, np.float64) for name, value in params.items()}
        self.digest_velocity, self.revisit_velocity = zeros_like(self.params), zeros_like(self.params)
        self.x, self.y, self.weight = np.asarray(x, np.float64), y, weight


def fedmd_round(clients, subset, *, digest, revisit, score_clip=np.inf):
    """Returns the digest and revisit losses of every client, [K][E]; None for clients that do not complete."""
    reports = [(client.weight, scores(client.params, subset)) for client in clients if client.available]
    finite = [(weight, np.clip(z, -score_clip, score_clip)) for weight, z in reports if np.isfinite(z).all()]
    total = sum(weight for weight, _ in finite)
    consensus = sum(weight * z for weight, z in finite) / total if total else None
    losses = []
    for client in clients:
        digest_loss = revisit_loss = None
        if client.completed and consensus is not None:
            digest_loss = train(client.params, client.digest_velocity, subset, consensus, mae, **digest)
        if client.completed:
            revisit_loss = train(client.params, client.revisit_velocity, client.x, client.y, cross_entropy, **revisit)
        losses.append((digest_loss, revisit_loss))
    return losses
