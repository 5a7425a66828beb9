"""How many clients of one architecture are simulated per second, and how many with PyTorch?

    python benchmarks/clients.py [--network cnn] [--clients 1 16 64] [--digest-batch 32] [--json FILE]

A small round, 200 public images of 28x28 and 18 private ones per client, for K clients: all at once (`vmap`), in chunks
(`fedmd(..., clients_per_chunk=)`), one at a time, and one at a time on each core (a mesh of the cores); PyTorch as a
loop, as one loop per core, and with `torch.func.vmap` over stacked modules, eager and compiled. Every contender runs in
its own process, and repeats are interleaved.
"""

import argparse
import os
import pathlib
import resource

import jax
import numpy as np
from timing import Contender, append_json, copy_ceiling, interleave, matmul_ceiling

import fedmd_jax as fmd
from fedmd_jax.models import CNN, MLP, architecture_from_linen, head_l2, resnet8

NUM_CLASSES = 16
NETWORKS = {
    "mlp": (lambda: MLP((64,), NUM_CLASSES), lambda peer, variant: peer.mlp(64)),
    "cnn": (lambda: CNN((8, 16), NUM_CLASSES), lambda peer, variant: peer.cnn((8, 16), 0.2, variant=variant)),
    "resnet8": (lambda: resnet8(NUM_CLASSES), lambda peer, variant: peer.ResNet8()),
}


def round_gflop(options: argparse.Namespace) -> float:
    """Operations of one client, from XLA's count for one image; a training step counts as three forward passes."""
    network = architecture_from_linen(NETWORKS[options.network][0]())
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), np.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), image)
    forward = jax.jit(lambda params, state, x: network.apply(params, state, x, train=False)[0])
    with jax.default_device(jax.devices("cpu")[0]):
        one_image = forward.lower(*variables, image).cost_analysis()["flops"]
    return (options.public + 3 * options.public + 3 * 2 * 18) * one_image / 1e9


class Ours:
    """A federation of one group."""

    def __init__(
        self, options: argparse.Namespace, num_clients: int, clients_per_chunk: int | None, every_core: bool = False
    ):
        limit_memory(options)
        if every_core:  # each core is a device and computes its clients with one thread
            flags = f"--xla_force_host_platform_device_count={os.cpu_count()} --xla_cpu_multi_thread_eigen=false"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        mesh = fmd.client_mesh() if every_core else None
        architecture = architecture_from_linen(NETWORKS[options.network][0](), penalty=head_l2(1e-3))
        groups = {"all": fmd.ArchitectureGroup(architecture, range(num_clients))}
        work = data(options, num_clients)
        self.public = fmd.public_dataset(work["public"])
        self.private = fmd.stack_private(groups, dict(enumerate(work["private"])))
        digest, revisit = (fmd.TrainingConfig(num_epochs=e, batch_size=b) for e, b in (work["digest"], work["revisit"]))
        federation = fmd.fedmd(
            groups,
            subset_size=options.public,
            digest_training=digest,
            revisit_training=revisit,
            clients_per_chunk=clients_per_chunk,
            mesh=mesh,
        )
        self.states = federation.init(jax.random.key(0), self.public, self.private)
        self.private = federation.put(self.private)
        self._round = federation.round

    def round(self) -> None:
        """Runs one round and waits for it."""
        self.states, _ = jax.block_until_ready(self._round(self.states, self.public, self.private, jax.random.key(1)))


def torch_contender(
    options: argparse.Namespace, num_clients: int, clients_per_chunk: int | None, num_threads: int | None, how: dict
):
    """The PyTorch peer with the same work; 0 clients per chunk is a loop over modules."""
    limit_memory(options)
    import torch
    import torch_peer

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    variant = torch_peer.Variant(**how)
    networks = [NETWORKS[options.network][1](torch_peer, variant) for _ in range(num_clients)]
    if clients_per_chunk == 0:
        return torch_peer.FedMD(networks, variant, **data(options, num_clients))
    return torch_peer.StackedFedMD(networks, variant, clients_per_chunk=clients_per_chunk, **data(options, num_clients))


class TorchProcesses:
    """One loop per core over its share of the clients, without exchanging scores."""

    def __init__(self, options: argparse.Namespace, num_clients: int, how: dict):
        num_processes = min(num_clients, os.cpu_count())
        shares = [len(part) for part in np.array_split(np.arange(num_clients), num_processes)]
        self._parts = [Contender(torch_contender, options, share, 0, 1, how) for share in shares]

    def _each(self, method):
        for part in self._parts:
            part.begin(method)
        return [part.end(method)[1] for part in self._parts]

    def round(self) -> None:
        """Runs one round in all processes and waits for them."""
        self._each("round")

    def reset_peak(self) -> None:
        """Resets the peak of every process."""
        self._each("reset_peak")

    def peak_bytes(self) -> int:
        """Sum over the processes."""
        return sum(self._each("peak_bytes"))

    def versions(self) -> dict[str, str]:
        """Versions in the first process."""
        return self._each("versions")[0]

    def close(self) -> None:
        """Ends the processes."""
        for part in self._parts:
            part.close()


def data(options: argparse.Namespace, num_clients: int) -> dict:
    """Noise in the shape of the images, and the epochs and batch sizes of training."""
    rng = np.random.default_rng(0)

    def labelled(n):
        return rng.standard_normal((n, 28, 28, 1), np.float32), rng.integers(NUM_CLASSES, size=n)

    return {
        "public": labelled(options.public)[0],
        "private": [labelled(18) for _ in range(num_clients)],
        "test": labelled(1),  # not part of a round
        "digest": (1, options.digest_batch),
        "revisit": (2, options.revisit_batch),
    }


def limit_memory(options: argparse.Namespace) -> None:
    """Makes a contender fail in its own process before the machine swaps."""
    if options.memory > 0:
        size = int(options.memory * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def forms(num_clients: int, chunk: int) -> dict[str, tuple]:
    """Constructors and arguments of the contenders for this number of clients."""
    sizes = {"one by one": 1, f"chunks of {chunk}": chunk} if num_clients > chunk else {"one by one": 1}
    sizes = {"all at once": None} | (sizes if num_clients > 1 else {})
    found = {f"fedmd_jax, {name}": (Ours, size) for name, size in sizes.items()}
    if jax.default_backend() == "cpu" and num_clients % os.cpu_count() == 0:
        found["fedmd_jax, one by one on every core"] = (Ours, 1, True)
    last = {"channels_last": True}
    found |= {
        "torch loop": (torch_contender, 0, None, {}),
        "torch loop, channels_last": (torch_contender, 0, None, last),
    }
    if num_clients > 1 and jax.default_backend() == "cpu":
        found["torch loop, channels_last, in processes"] = (TorchProcesses, last)
    stacks = {"vmap": None} if num_clients > 1 else {}
    stacks |= {f"vmap, chunks of {chunk}": chunk} if num_clients > chunk else {}
    found |= {f"torch {name}": (torch_contender, size, None, {}) for name, size in stacks.items()}
    compiled = {
        f"{name}, compiled": (*made[:-1], {**made[-1], "compiled": True})
        for name, made in found.items()
        if made[0] is torch_contender
    }
    return found | compiled


def measure(options: argparse.Namespace, num_clients: int) -> dict[str, dict]:
    """Figures of every form; a form that fails, for example for lack of memory, has the reason."""
    running, first, found = {}, {}, {}
    try:
        for name, (make, *args) in forms(num_clients, options.chunk).items():
            if options.forms and not any(form in name for form in options.forms):
                continue
            if options.no_compiled and "compiled" in name:
                continue
            try:
                running[name] = Contender(make, options, num_clients, *args)
                first[name] = running[name]("round")[0]  # a failure here must not end the others
            except RuntimeError as error:
                found[name] = {"failed": str(error).splitlines()[0]}
                if name in running:
                    running.pop(name).close()
        for name, sample in interleave(running, ["round"], repeats=options.repeats).items():
            figures = sample["round"]._replace(first=first[name])
            found[name] = {
                **figures._asdict(),
                "rate": num_clients / figures.median,
                "peak_bytes": running[name]("peak_bytes")[1],
                **running[name]("versions")[1],
            }
    finally:
        for contender in running.values():
            contender.close()
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="cnn")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--public", type=int, default=200)
    parser.add_argument("--digest-batch", type=int, default=32)
    parser.add_argument("--revisit-batch", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=8, help="clients per chunk")
    parser.add_argument("--forms", nargs="+", help="only those with one of these words in their names")
    parser.add_argument("--no-compiled", action="store_true", help="PyTorch without torch.compile")
    parser.add_argument(
        "--memory",
        type=float,
        default=12,
        help="limit per contender in GB; 0 on a GPU, since the driver maps more",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    print(f"{options.network}, digest in batches of {options.digest_batch}, revisit of {options.revisit_batch}")
    ceilings = {"matmul_gflops": matmul_ceiling(), "copy_gbytes": copy_ceiling()}
    print(f"products {ceilings['matmul_gflops']:.0f} GFLOP/s, copies {ceilings['copy_gbytes']:.0f} GB/s")
    rates = f"{'client-rounds/s':>17}{'GFLOP/s':>9}"
    print(f"{'clients':>7}  {'':<42}{'first call':>11}{'median':>10}{rates}{'peak GB':>9}")
    gflop = round_gflop(options)
    for num_clients in options.clients:
        found = measure(options, num_clients)
        for name, row in found.items():
            if "failed" in row:
                print(f"{num_clients:>7}  {name:<42} failed: {row['failed'][:60]}")
            else:
                figures = (
                    f"{row['first']:>9.1f} s{row['median']:>8.3f} s{row['rate']:>17.1f}{row['rate'] * gflop:>9.1f}"
                )
                print(f"{num_clients:>7}  {name:<42}{figures}{row['peak_bytes'] / 1e9:9.2f}", flush=True)
            settings = {key: value for key, value in vars(options).items() if key not in ("json", "clients", "forms")}
            append_json(
                options.json,
                {"benchmark": "clients", "contender": name, "clients": num_clients, **settings, **row, **ceilings},
            )
        report_ratio(num_clients, found)


def report_ratio(num_clients: int, found: dict[str, dict]) -> None:
    """Prints the ratio of the rates; above 1 fedmd_jax is faster."""
    rates = {name: row["rate"] for name, row in found.items() if "rate" in row}
    ours, peers = ([name for name in rates if name.startswith("fedmd_jax") is mine] for mine in (True, False))
    if ours and peers:
        best, other = max(ours, key=rates.get), max(peers, key=rates.get)
        print(f"{num_clients:>7}  ratio {rates[best] / rates[other]:.2f}, {best} against {other}")


if __name__ == "__main__":
    # Allocate memory on demand, and disable compiler caches, since the first call is measured, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "4000000000")  # as in round_time.py
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "8000000000")
    main()
