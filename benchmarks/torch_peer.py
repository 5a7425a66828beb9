"""FedMD in idiomatic PyTorch: the peer of `round_time.py` and `clients.py`.

It has the networks, losses, batches and steps of the library. The library itself does not need it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

# On a CPU PyTorch scores network 0 of Table 1 with 64 images at once up to twice as fast as with 256.
SCORE_BATCH = 1024 if torch.cuda.is_available() else 64
# Ten networks share their modules' code, and each has whole and partial batches in training and in inference.
torch._dynamo.config.recompile_limit = 1000
torch._dynamo.config.accumulated_recompile_limit = 10000
torch._inductor.config.fallback_random = not torch.cuda.is_available()  # Inductor's generator is slow on CPUs
torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of running uncompiled with a log message


class SamePool(nn.Module):
    """2x2 average pooling with stride 1 and "same" padding at the end; means are over real pixels, as in TensorFlow."""

    def __init__(self, compiled: bool = False):
        super().__init__()
        self.compiled = compiled

    def forward(self, x):
        """[B, C, H, W] -> [B, C, H, W]."""
        if self.compiled:
            return F.avg_pool2d(x, 2, 1, 1, count_include_pad=False)[:, :, 1:, 1:]
        # This reduces a step to three quarters of the time. `F.pad(mode="replicate")` is as fast, but does not compile.
        x = torch.cat([x, x[:, :, -1:]], 2)
        return F.avg_pool2d(torch.cat([x, x[:, :, :, -1:]], 3), 2, 1)


class ByteDropout(nn.Module):
    """Dropout by eight random bits per element; on a CPU `nn.Dropout` takes a third of a training step."""

    def __init__(self, rate: float, channels_last: bool = False):
        super().__init__()
        self.levels, self.channels_last = round((1 - rate) * 256), channels_last

    def forward(self, x):
        """[B, C, H, W] -> [B, C, H, W]."""
        if not self.training or self.levels == 256:
            return x
        # Allocated from `x`, so that `vmap` draws other bits for every client; `randint` takes twice as long.
        words = x.new_empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()] < self.levels
        stored = x.permute(0, 2, 3, 1).shape if self.channels_last else x.shape
        kept = kept.view(stored).permute(0, 3, 1, 2) if self.channels_last else kept.view(stored)
        return x * (kept * (256 / self.levels))


class FlattenAsStored(nn.Module):
    """[B, C, H, W] -> [B, H * W * C]; no copy if the memory format is channels_last."""

    def forward(self, x):
        """Flattens with pixels first."""
        return x.permute(0, 2, 3, 1).flatten(1)


@dataclasses.dataclass(frozen=True)
class Variant:
    """PyTorch settings."""

    channels_last: bool = False
    compiled: bool = False
    tuned: bool = True  # uses `ByteDropout` and cheaper pooling, found by profiling
    mode: str | None = None  # of `torch.compile`


VARIANTS = {
    "torch as usual": Variant(tuned=False),
    "torch": Variant(),
    "torch channels_last": Variant(channels_last=True),
    "torch compile": Variant(compiled=True),
    "torch compile channels_last": Variant(channels_last=True, compiled=True),
}


def cnn(
    filters: Sequence[int], dropout: float, *, variant: Variant = VARIANTS["torch"], num_classes: int = 16
) -> nn.Sequential:
    """The library's `CNN` of two or three convolutions, for images of 28x28, with the same layer names.

    Args:
      filters: Filters of each convolution.
      dropout: Dropout rate.
      variant: With channels_last the head's inputs have another order.
      num_classes: Number of classes, C.
    """
    network = nn.Sequential()

    def convolution(number, inputs, size, stride, padding):
        filters_here = filters[number - 1]
        network.add_module(f"conv{number}", nn.Conv2d(inputs, filters_here, size, stride, padding))
        network.add_module(f"bn{number}", nn.BatchNorm2d(filters_here, eps=1e-3, momentum=0.01))
        network.add_module(f"relu{number}", nn.ReLU(inplace=True))
        network.add_module(f"dropout{number}", dropout_layer(dropout))

    # On a GPU 32 bits cost the same, and the compiler fuses them with their surroundings.
    few_bits = variant.tuned and not torch.cuda.is_available()
    dropout_layer = partial(ByteDropout, channels_last=variant.channels_last) if few_bits else nn.Dropout
    convolution(1, 1, 3, 1, 1)
    if len(filters) == 2 and variant.tuned:
        network.add_module("pool1", nn.AvgPool2d(2, 1))  # a 3x3 kernel with stride 2 does not read the last of 28 rows
    else:
        network.add_module("pool1", SamePool(variant.compiled or not variant.tuned))
    if len(filters) == 2:
        convolution(2, filters[0], 3, 2, 0)
    else:
        convolution(2, filters[0], 2, 2, 0)
        network.add_module("pool2", nn.AvgPool2d(2, 2))
        convolution(3, filters[1], 3, 2, 0)
    network.add_module("flatten", FlattenAsStored() if variant.channels_last else nn.Flatten())
    with torch.no_grad():
        features = network.eval()(torch.zeros(1, 1, 28, 28)).shape[1]
    network.add_module("head", nn.Linear(features, num_classes, bias=False))
    return glorot(network)


def mlp(hidden: int, *, num_classes: int = 16) -> nn.Sequential:
    """The library's `MLP` with one hidden layer, without dropout."""
    network = nn.Sequential()
    network.add_module("flatten", nn.Flatten())
    network.add_module("dense1", nn.Linear(28 * 28, hidden))
    network.add_module("relu1", nn.ReLU())
    network.add_module("head", nn.Linear(hidden, num_classes))
    return glorot(network)


class ResNet8(nn.Module):
    """The library's `resnet8` of width 1, with shortcuts without parameters."""

    def __init__(self, *, num_classes: int = 16):
        super().__init__()
        self.stem = _conv_norm(1, 16, 1)
        sizes = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        self.first = nn.ModuleList(_conv_norm(inputs, filters, stride) for inputs, filters, stride in sizes)
        self.second = nn.ModuleList(_conv_norm(filters, filters, 1) for _, filters, _ in sizes)
        self.head = nn.Linear(64, num_classes)
        glorot(self)

    def forward(self, x):
        """Computes scores [B, C]."""
        x = F.relu(self.stem(x))
        for first, second in zip(self.first, self.second, strict=True):
            y = second(F.relu(first(x)))
            stride = x.shape[2] // y.shape[2]
            x = F.relu(y + F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))
        return self.head(x.mean((2, 3)))


def _conv_norm(inputs, filters, stride):
    # "SAME" with stride 2 pads an even image only at the end.
    pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else nn.ZeroPad2d(1)
    conv = nn.Conv2d(inputs, filters, 3, stride, bias=False)
    return nn.Sequential(pad, conv, nn.BatchNorm2d(filters, eps=1e-3, momentum=0.01))


def glorot(network: nn.Module) -> nn.Module:
    """Draws the weights from the library's distribution: other scales could give denormal numbers, which are slow."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def digest_loss(network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, penalty: float) -> torch.Tensor:
    """Mean absolute error over classes and batch, plus the head's L2 penalty (without the factor 1/2)."""
    return F.l1_loss(network(inputs), targets) + penalty * network.head.weight.square().sum()


def revisit_loss(network: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, penalty: float) -> torch.Tensor:
    """Cross entropy plus the same L2 penalty."""
    return F.cross_entropy(network(inputs), labels) + penalty * network.head.weight.square().sum()


def forward(network: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Computes scores."""
    return network(inputs)


def adam(parameters) -> torch.optim.Optimizer:
    """Keras' settings; PyTorch adds epsilon elsewhere, which does not change the amount of work."""
    return torch.optim.Adam(parameters, lr=1e-3, eps=1e-7, fused=True)


class FedMD:
    """Clients with their own networks; each method runs one phase for all clients and waits for it."""

    def __init__(
        self,
        networks: Sequence[nn.Module],
        variant: Variant,
        *,
        public: np.ndarray,
        private: Sequence[tuple[np.ndarray, np.ndarray]],
        test: tuple[np.ndarray, np.ndarray],
        digest: tuple[int, int],
        revisit: tuple[int, int],
        penalty: float = 1e-3,
        tf32: bool = False,
    ):
        """Moves networks and data to the device.

        Args:
          networks: One per client.
          variant: PyTorch settings.
          public: Images [M, H, W, 1], all of which are drawn in every round.
          private: Images [N, H, W, 1] and labels [N] of each client.
          test: Images and labels that all clients share.
          digest: Epochs and batch size.
          revisit: Epochs and batch size.
          penalty: Factor of the head's L2 penalty in both losses.
          tf32: Whether a GPU may use TF32 in products.
        """
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.variant, self.penalty, self.phases = variant, penalty, {"digest": digest, "revisit": revisit}
        self.public = self._images(public)
        self.private = [(self._images(x), self._labels(y)) for x, y in private]
        self.test = self._images(test[0]), self._labels(test[1])
        self._take_clients([network.to(self.device, memory_format=self._format()) for network in networks])
        self.draw()
        self.scores = torch.randn(len(networks), len(public), 16, device=self.device)
        self.consensus()
        self.losses: dict[str, torch.Tensor] = {}  # by phase, [K, E]

    def _take_clients(self, networks):
        self.clients = [(network, adam(network.parameters()), adam(network.parameters())) for network in networks]
        # Network and loss are one graph, compiled once per architecture and batch size.
        self._forward, self._digest_loss, self._revisit_loss = map(self._compile, (forward, digest_loss, revisit_loss))

    def _compile(self, function):
        if not self.variant.compiled:
            return function
        return torch.compile(function, dynamic=False, mode=self.variant.mode)

    def _format(self):
        return torch.channels_last if self.variant.channels_last else torch.contiguous_format

    def _images(self, images):
        tensor = torch.as_tensor(images, dtype=torch.float32).permute(0, 3, 1, 2)
        return tensor.contiguous(memory_format=self._format()).to(self.device)

    def _labels(self, labels):
        return torch.as_tensor(labels, dtype=torch.int64, device=self.device)

    def draw(self) -> None:
        """Draws the public subset of the round."""
        self.subset = self.public[torch.randperm(len(self.public), device=self.device)]

    def score(self) -> None:
        """Scores the public subset with every client."""
        self.scores = torch.stack([self._predict(network, self.subset) for network, _, _ in self.clients])
        self._wait()

    def consensus(self) -> None:
        """Averages the scores."""
        self.mean_scores = self.scores.mean(0)
        self._wait()

    def digest(self) -> None:
        """Trains every client towards the consensus."""
        self.losses["digest"] = torch.stack(
            [
                self._fit(network, self._digest_loss, optimizer, self.subset, self.mean_scores, *self.phases["digest"])
                for network, optimizer, _ in self.clients
            ]
        )
        self._wait()

    def revisit(self) -> None:
        """Trains every client on its private data."""
        self.losses["revisit"] = torch.stack(
            [
                self._fit(network, self._revisit_loss, optimizer, *private, *self.phases["revisit"])
                for (network, _, optimizer), private in zip(self.clients, self.private, strict=True)
            ]
        )
        self._wait()

    def evaluate(self) -> list[list[float]]:
        """Computes accuracy and cross entropy of every client."""
        images, labels = self.test
        results = []
        for network, _, _ in self.clients:
            logits = self._predict(network, images)
            accuracy = (logits.argmax(1) == labels).float().mean()
            results.append(torch.stack([accuracy, F.cross_entropy(logits, labels)]))
        return torch.stack(results).tolist()

    def round(self) -> None:
        """Runs all phases but the evaluation."""
        self.draw()
        self.score()
        self.consensus()
        self.digest()
        self.revisit()

    def _predict(self, network, images):
        network.eval()
        with torch.inference_mode():
            return torch.cat([self._forward(network, batch) for batch in images.split(SCORE_BATCH)])

    def _fit(self, network, loss_fn, optimizer, inputs, targets, num_epochs, batch_size):
        """Trains one client; mean losses of the epochs [E]."""
        network.train()
        total = torch.zeros(num_epochs, device=self.device)
        for epoch in range(num_epochs):
            for rows in torch.randperm(len(inputs), device=self.device).split(batch_size):
                optimizer.zero_grad(set_to_none=True)
                loss = loss_fn(network, inputs[rows], targets[rows], self.penalty)
                loss.backward()
                optimizer.step()
                total[epoch] += loss.detach() * len(rows)
        return total / len(inputs)

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Stack:
    """Clients of one architecture as stacked tensors [K, ...], mapped by `torch.func.vmap`."""

    def __init__(self, networks: Sequence[nn.Module], private: Sequence, penalty: float, compile_: Callable):
        self.network, self.num_clients = (
            networks[0],
            len(networks),
        )  # of the network only the code is used
        self.params, self.buffers = torch.func.stack_module_state(list(networks))
        # Adam is elementwise, so one optimizer over stacked tensors equals one per client.
        self.digest_optimizer, self.revisit_optimizer = (adam(self.params.values()) for _ in range(2))
        self.private = tuple(map(torch.stack, zip(*private, strict=True)))

        def call(params, buffers, inputs):
            return torch.func.functional_call(self.network, (params, buffers), (inputs,))

        def losses(loss, inputs, targets):
            def one(params, buffers, inputs, targets):
                return loss(call(params, buffers, inputs), targets) + penalty * params["head.weight"].square().sum()

            # Moving batch statistics are updated in place in the stacked buffers.
            return torch.func.vmap(one, randomness="different")(self.params, self.buffers, inputs, targets)

        self.forward = compile_(lambda inputs: torch.func.vmap(call, (0, 0, None))(self.params, self.buffers, inputs))
        self.digest_losses = compile_(lambda inputs, targets: losses(F.l1_loss, inputs, targets))
        self.revisit_losses = compile_(lambda inputs, labels: losses(F.cross_entropy, inputs, labels))


class StackedFedMD(FedMD):
    """`FedMD` for clients of one architecture, `clients_per_chunk` at once."""

    def __init__(self, networks, variant, *, clients_per_chunk: int | None = None, **work):
        """Takes the arguments of `FedMD` and the number of stacked clients; all by default."""
        self._size = clients_per_chunk or len(networks)
        super().__init__(networks, variant, **work)

    def _take_clients(self, networks):
        self.stacks = [
            Stack(networks[i : i + self._size], self.private[i : i + self._size], self.penalty, self._compile)
            for i in range(0, len(networks), self._size)
        ]

    def score(self) -> None:
        """Scores with all clients of a stack at once."""
        found = []
        for stack in self.stacks:
            stack.network.eval()
            with torch.inference_mode():
                found.append(torch.cat([stack.forward(batch) for batch in self.subset.split(SCORE_BATCH)], dim=1))
        self.scores = torch.cat(found)
        self._wait()

    def digest(self) -> None:
        """Trains the clients of each stack towards the consensus."""
        found = []
        for stack in self.stacks:
            data = (tensor.expand(stack.num_clients, *tensor.shape) for tensor in (self.subset, self.mean_scores))
            fit = partial(self._fit_stack, stack, stack.digest_losses, stack.digest_optimizer)
            found.append(fit(*data, *self.phases["digest"]))
        self.losses["digest"] = torch.cat(found)
        self._wait()

    def revisit(self) -> None:
        """Trains the clients of each stack on their private data."""
        found = []
        for stack in self.stacks:
            fit = partial(self._fit_stack, stack, stack.revisit_losses, stack.revisit_optimizer)
            found.append(fit(*stack.private, *self.phases["revisit"]))
        self.losses["revisit"] = torch.cat(found)
        self._wait()

    def _fit_stack(self, stack, losses_fn, optimizer, inputs, targets, num_epochs, batch_size):
        """Trains with another order of examples for each client; mean losses [K, E]."""
        stack.network.train()
        clients = torch.arange(stack.num_clients, device=self.device)[:, None]
        total = torch.zeros(stack.num_clients, num_epochs, device=self.device)
        for epoch in range(num_epochs):
            order = torch.rand(inputs.shape[:2], device=self.device).argsort(1)
            for rows in order.split(batch_size, dim=1):
                optimizer.zero_grad(set_to_none=True)
                losses = losses_fn(inputs[clients, rows], targets[clients, rows])
                losses.sum().backward()
                optimizer.step()
                total[:, epoch] += losses.detach() * rows.shape[1]
        return total / inputs.shape[1]
