"""The PyTorch peer does the same work: networks and the losses of a round agree."""

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedmd_jax as fmd
from fedmd_jax.models import CNN, MLP, architecture_from_linen, head_l2, resnet8

pytest.importorskip("torch", reason="PyTorch is needed by benchmarks only")
import torch
import torch_peer

CNNS = [(4, 6), (4, 6, 8)]
FULL = (1, 256)  # one full batch: the order does not matter
TOLERANCE = 1e-4


def cnn_pair(filters, **variant):
    variant = torch_peer.Variant(**variant)
    return CNN(filters, 16, dropout=0.0), torch_peer.cnn(filters, 0.0, variant=variant)


PAIRS = {
    "2conv": lambda: cnn_pair(CNNS[0]),
    "3conv": lambda: cnn_pair(CNNS[1]),
    "2conv as usual": lambda: cnn_pair(CNNS[0], tuned=False),
    "3conv as usual": lambda: cnn_pair(CNNS[1], tuned=False),
    "2conv channels_last": lambda: cnn_pair(CNNS[0], channels_last=True),
    "3conv channels_last": lambda: cnn_pair(CNNS[1], channels_last=True),
    "mlp": lambda: (MLP((8,), 16), torch_peer.mlp(8)),
    "resnet8": lambda: (resnet8(16), torch_peer.ResNet8()),
}


def our_path(name):
    """Path in our tree of the peer's parameter or buffer `layer.leaf`."""
    layer, _, leaf = name.rpartition(".")
    if layer.startswith(("stem", "first", "second")):  # of the residual network
        place, number = layer.rpartition(".")[::2]
        kind = {"1": "conv", "2": "norm"}[number]
        block = {"first": "_1", "second": "_2"}.get(place[:-2])
        layer = f"stem_{kind}" if block is None else f"stage{int(place[-1]) + 1}_block1{block}_{kind}"
    leaf = {"running_mean": "mean", "running_var": "var"}.get(leaf, leaf)
    if leaf == "weight":
        leaf = "scale" if "bn" in layer or "norm" in layer else "kernel"
    return layer, leaf


def as_ours(network, channels_last):
    """The peer's tensors as our trees of parameters and batch statistics."""
    params, statistics = {}, {}
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        (layer, leaf), array = our_path(name), tensor.numpy()
        if leaf == "kernel" and array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif leaf == "kernel":
            array = array.T
            channels = getattr(network, f"bn{sum('conv' in n for n, _ in network.named_children())}", None)
            if layer == "head" and channels is not None and not channels_last:
                array = reorder(array, channels.num_features)
        tree = statistics if leaf in ("mean", "var") else params
        tree.setdefault(layer, {})[leaf] = jnp.asarray(array.copy())
    return params, {"batch_stats": statistics} if statistics else {}


def reorder(kernel, channels):
    """Rows of the head from [channels, pixels] to [pixels, channels]."""
    return kernel.reshape(channels, -1, kernel.shape[1]).swapaxes(0, 1).reshape(kernel.shape)


def far(network):
    """Moves parameters and statistics away from initial values such as 0 and 1."""
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.dtype.is_floating_point:
                tensor += 0.1 * torch.rand_like(tensor)
    return network


def images(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 28, 28, 1), np.float32)


def labelled(n, seed=0):
    return images(n, seed), np.random.default_rng(seed).integers(16, size=n)


def assert_close(ours, theirs, tolerance=TOLERANCE):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), ours, theirs)


@pytest.mark.parametrize("name", PAIRS)
def test_networks_agree(name):
    torch.manual_seed(0)
    module, network = PAIRS[name]()
    last = "channels_last" in name
    network = far(network).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    apply = jax.jit(architecture_from_linen(module).apply, static_argnames="train")
    x = images(7)
    for train in (False, True):
        variables = as_ours(network, last)
        theirs = network.train(train)(torch.as_tensor(x).permute(0, 3, 1, 2)).detach().numpy()
        ours, statistics = apply(*variables, x, train=train, key=jax.random.key(0))
        assert_close(ours, theirs)
        assert_close(statistics, as_ours(network, last)[1])  # changed in training


def federations(make, peer_class, **settings):
    """Two clients in both libraries, with the same weights."""
    torch.manual_seed(0)
    module, network = make()
    networks = [far(network), far(copy.deepcopy(network))]
    work = {"public": images(40), "private": [labelled(18, k) for k in range(2)], "test": labelled(9, 2)}
    peer = peer_class(copy.deepcopy(networks), torch_peer.Variant(), **work, digest=FULL, revisit=(2, 256), **settings)
    groups = {"all": fmd.ArchitectureGroup(architecture_from_linen(module, penalty=head_l2(1e-3)), [0, 1])}
    federation = fmd.fedmd(
        groups,
        subset_size=40,
        digest_training=fmd.TrainingConfig(num_epochs=1, batch_size=256),
        revisit_training=fmd.TrainingConfig(num_epochs=2, batch_size=256),
    )
    public = fmd.public_dataset(work["public"])
    private = fmd.stack_private(groups, dict(enumerate(work["private"])))
    states = federation.init(jax.random.key(0), public, private)
    variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(as_ours(network, False) for network in networks))
    states["all"] = states["all"]._replace(params=variables[0], model_state=variables[1])
    return federation, states, public, private, peer


PEERS = {
    "loop": (torch_peer.FedMD, {}),
    "vmap": (torch_peer.StackedFedMD, {}),
    "vmap in chunks": (torch_peer.StackedFedMD, {"clients_per_chunk": 1}),
}


@pytest.mark.parametrize("network", ["2conv", "mlp"])
@pytest.mark.parametrize("name", PEERS)
def test_rounds_agree(network, name):
    peer_class, settings = PEERS[name]
    federation, states, public, private, peer = federations(PAIRS[network], peer_class, **settings)
    states, info = federation.round(states, public, private, jax.random.key(0))
    peer.round()
    # Losses, of which the later ones follow steps. Weights are not compared: Adam's first step has the length of the
    # learning rate, also for gradients that are rounding noise, and PyTorch adds epsilon elsewhere.
    assert_close(info.digest_loss["all"], losses(peer, "digest"), 1e-4)
    assert_close(info.revisit_loss["all"], losses(peer, "revisit"), 2e-3)


@pytest.mark.parametrize("channels_last", [False, True])
def test_dropout_has_the_same_levels(channels_last):
    x = torch.rand(8, 5, 28, 28) + 1
    layer = torch_peer.ByteDropout(0.2, channels_last)
    y = layer.train()(x)
    kept = y != 0
    assert torch.allclose(y[kept], x[kept] * 256 / 205)
    assert abs(kept.float().mean() - 205 / 256) < 0.02  # of 31,360
    assert kept.any(0).all()  # no position is always dropped
    assert layer.eval()(x) is x


def losses(peer, phase):
    return np.asarray(peer.losses[phase])
