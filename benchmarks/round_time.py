"""How long does one FedMD round of the released configuration take, compared with PyTorch and Keras?

    python benchmarks/round_time.py --width 0.25 --against torch [--networks 0 5] [--repeats 5] [--json FILE]

Ten clients, each with its own network of the paper's Table 1, 5,000 public images of 28x28 and 18 private ones per
client: one epoch of digest in batches of 256, two epochs of revisit in batches of 5, with dropout and batch statistics.
`round` is `fedmd(...).round`, one program; the phases are also timed separately, one program per client. Evaluation, on
4,800 images, is not part of a round. Every contender runs in its own process, and repeats are interleaved.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from timing import Contender, append_json, copy_ceiling, interleave, matmul_ceiling

import fedmd_jax as fmd
from fedmd_jax.models import TABLE_1, architecture_from_linen, head_l2, paper_cnn

PHASES = ("score", "consensus", "digest", "revisit", "evaluate", "round")
INSTALL = {"torch": "torch", "keras": "keras tensorflow"}
NUM_PRIVATE, NUM_CLASSES, SIZE = 18, 16, 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Settings of a round; the defaults are those of the released code for letters, iid."""

    width: float = 1.0
    networks: tuple[int, ...] = tuple(range(len(TABLE_1)))
    num_public: int = 5000
    num_test: int = 4800
    digest: tuple[int, int] = (1, 256)  # epochs, batch size
    revisit: tuple[int, int] = (2, 5)
    tf32: bool = False
    dtype: str = "float32"  # of activations and products of fedmd_jax; the peers have float32

    def data(self) -> dict:
        """Noise in the shape of the images: public, private of each client, test."""
        rng = np.random.default_rng(0)

        def images(n):
            return rng.standard_normal((n, SIZE, SIZE, 1), np.float32)

        def labelled(n):
            return images(n), rng.integers(NUM_CLASSES, size=n)

        private = [labelled(NUM_PRIVATE) for _ in self.networks]
        return {"public": images(self.num_public), "private": private, "test": labelled(self.num_test)}

    def modules(self) -> list:
        """The Flax modules."""
        networks = (paper_cnn(TABLE_1[i], NUM_CLASSES, width=self.width) for i in self.networks)
        return [network.clone(dtype=jnp.dtype(self.dtype)) for network in networks]


class Ours:
    """The library; each method runs one phase for all clients and waits for it."""

    def __init__(self, work: Work):
        self.dtype = work.dtype
        jax.config.update("jax_default_matmul_precision", "tensorfloat32" if work.tf32 else "float32")
        groups = {
            f"network {i}": fmd.ArchitectureGroup(architecture_from_linen(module, penalty=head_l2(1e-3)), [k])
            for k, (i, module) in enumerate(zip(work.networks, work.modules(), strict=True))
        }
        digest, revisit = (fmd.TrainingConfig(num_epochs=e, batch_size=b) for e, b in (work.digest, work.revisit))
        data = work.data()
        self.public, self.test = fmd.public_dataset(data["public"]), fmd.labelled_dataset(*data["test"])
        self.private = fmd.stack_private(groups, dict(enumerate(data["private"])))
        self.federation = fmd.fedmd(
            groups, subset_size=work.num_public, digest_training=digest, revisit_training=revisit
        )
        self.states = self.federation.init(jax.random.key(0), self.public, self.private)
        self._consensus = jax.jit(partial(fmd.weighted_consensus, weights=fmd.algorithms.all_clients(groups).weights))
        self.mean_scores = jax.random.normal(jax.random.key(1), (work.num_public, NUM_CLASSES))
        self._phases = {name: phases(group, digest, revisit) for name, group in groups.items()}

    def score(self) -> None:
        """Scores the public images with every client."""
        self.scores = jax.block_until_ready(
            {name: phase["score"](self.states[name], self.public.inputs) for name, phase in self._phases.items()}
        )

    def consensus(self) -> None:
        """Averages the scores."""
        self.mean_scores = jax.block_until_ready(self._consensus(self.scores))

    def digest(self) -> None:
        """Trains every client towards the consensus."""
        for name, phase in self._phases.items():
            self.states[name], _ = phase["digest"](
                self.states[name], self.public.inputs, self.mean_scores, _keys(self.federation.groups[name])
            )
        jax.block_until_ready(self.states)

    def revisit(self) -> None:
        """Trains every client on its private data."""
        for name, phase in self._phases.items():
            self.states[name], _ = phase["revisit"](
                self.states[name], self.private[name], _keys(self.federation.groups[name])
            )
        jax.block_until_ready(self.states)

    def evaluate(self) -> None:
        """Computes accuracy and cross entropy of every client."""
        jax.block_until_ready(self.federation.evaluate(self.states, self.test))

    def round(self) -> None:
        """Runs one round, without evaluation."""
        self.states, info = self.federation.round(self.states, self.public, self.private, jax.random.key(3))
        jax.block_until_ready((self.states, info))

    def ceilings(self) -> dict[str, float]:
        """Measures the peak rates of this machine."""
        return {
            "matmul_gflops": matmul_ceiling(self.dtype),
            "copy_gbytes": copy_ceiling(),
            "device": jax.devices()[0].device_kind,
        }


def phases(group: fmd.ArchitectureGroup, digest: fmd.TrainingConfig, revisit: fmd.TrainingConfig) -> dict:
    """The phases of one group, one program each."""
    mapped = {
        "score": (fmd.score, (0, None), {}, ()),
        "digest": (fmd.digest, (0, None, None, 0), {"training": digest}, 0),
        "revisit": (fmd.revisit, (0, 0, 0), {"training": revisit}, 0),
    }
    return {
        name: jax.jit(
            fmd.mapping.map_clients(partial(fn, group.architecture, **settings), axes), donate_argnums=donated
        )
        for name, (fn, axes, settings, donated) in mapped.items()
    }


def _keys(group):
    return fmd.mapping.client_keys(jax.random.key(2), group.client_ids)


def torch_contender(work: Work, variant: str):
    """The PyTorch peer with the same work."""
    import torch_peer

    how = torch_peer.VARIANTS[variant]
    networks = [torch_peer.cnn(module.filters, module.dropout, variant=how) for module in work.modules()]
    return torch_peer.FedMD(networks, how, **work.data(), digest=work.digest, revisit=work.revisit, tf32=work.tf32)


def keras_contender(work: Work):
    """The Keras peer with the same work."""
    import keras_peer

    networks = [(module.filters, module.dropout) for module in work.modules()]
    return keras_peer.FedMD(networks, **work.data(), digest=work.digest, revisit=work.revisit)


def forward_flops(module) -> int:
    """Operations of convolutions and dense layers for one image."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 1), np.float32)
    params = jax.eval_shape(architecture_from_linen(module).init, jax.random.key(0), images)[0]
    sizes = {2: (28, 13), 3: (28, 14, 3)}[len(module.filters)]  # of the convolutions' outputs
    positions = {f"conv{number}": size**2 for number, size in enumerate(sizes, start=1)} | {"head": 1}
    return sum(2 * count * math.prod(params[layer]["kernel"].shape) for layer, count in positions.items())


def work_flops(work: Work) -> dict[str, float]:
    """GFLOP of each phase; a training step counts as three forward passes."""
    one_image = sum(map(forward_flops, work.modules())) / 1e9
    flops = {
        "score": work.num_public * one_image,
        "digest": 3 * work.digest[0] * work.num_public * one_image,
        "revisit": 3 * work.revisit[0] * NUM_PRIVATE * one_image,
        "evaluate": work.num_test * one_image,
    }
    return {**flops, "round": flops["score"] + flops["digest"] + flops["revisit"]}


def wanted_contenders(options: argparse.Namespace) -> dict[str, tuple]:
    """Constructors and arguments by name; exits with one line if a peer is not installed."""
    for peer in options.against:
        if importlib.util.find_spec(peer) is None:
            raise SystemExit(f"round_time: error: --against {peer} needs `pip install {INSTALL[peer]}`")
    found = {"fedmd_jax": (Ours,)}
    if "torch" in options.against:
        import torch_peer

        found |= {variant: (torch_contender, variant) for variant in options.variants or torch_peer.VARIANTS}
    if "keras" in options.against:
        found["keras"] = (keras_contender,)
    return found


def report(samples: dict, peaks: dict[str, int], flops: dict[str, float], ceiling: float) -> None:
    """Prints the table; the ratio is the best peer's time divided by that of fedmd_jax, `ceiling` is in GFLOP/s."""
    peers = [name for name in samples if name != "fedmd_jax"]
    print(f"{'':<38}{'first call':>11}{'median':>10}{'low':>10}{'high':>10}{'GFLOP/s':>9}{'share':>7}")
    for phase in samples["fedmd_jax"]:
        for name, found in samples.items():
            first, *seconds = found[phase]
            gflops = flops.get(phase, 0.0) / found[phase].median
            rate = f"{gflops:9.0f}{gflops / ceiling:7.0%}" if phase in flops else ""
            columns = "".join(f"{value:>8.3f} s" for value in seconds)
            print(f"{phase:<10}{name:<28}{first:>9.1f} s{columns}{rate}")
        if peers:
            best = min(peers, key=lambda peer: samples[peer][phase].median)
            ratio = samples[best][phase].median / samples["fedmd_jax"][phase].median
            print(f"{phase:<10}ratio {ratio:.2f}, the best peer is {best}")
    print("peak memory " + ", ".join(f"{name} {peak / 1e9:.2f} GB" for name, peak in peaks.items()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", action="append", default=[], choices=INSTALL, help="may be given twice")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="variants of torch, all by default")
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    parser.add_argument("--width", type=float, default=1.0, help="of the networks; 0.25 suits a CPU")
    parser.add_argument("--networks", type=int, nargs="+", default=Work.networks, help="rows of Table 1")
    parser.add_argument("--public", type=int, default=Work.num_public)
    parser.add_argument("--digest", type=int, nargs=2, default=Work.digest, metavar=("EPOCHS", "BATCH"))
    parser.add_argument("--revisit", type=int, nargs=2, default=Work.revisit, metavar=("EPOCHS", "BATCH"))
    parser.add_argument("--tf32", action="store_true", help="TF32 products on GPUs instead of float32")
    parser.add_argument("--dtype", default=Work.dtype, choices=("float32", "bfloat16"), help="of fedmd_jax")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    work = Work(
        width=options.width,
        networks=tuple(options.networks),
        num_public=options.public,
        digest=tuple(options.digest),
        revisit=tuple(options.revisit),
        tf32=options.tf32,
        dtype=options.dtype,
    )
    running = {}
    try:
        for name, (make, *args) in wanted_contenders(options).items():
            running[name] = Contender(make, work, *args)
        ceilings = running["fedmd_jax"]("ceilings")[1]
        samples = interleave(running, options.phases, repeats=options.repeats)
        peaks = {name: contender("peak_bytes")[1] for name, contender in running.items()}
        about = {name: contender("versions")[1] for name, contender in running.items()}
    except RuntimeError as error:
        raise SystemExit(f"round_time: error: {error}") from None
    finally:
        for contender in running.values():
            contender.close()
    print(
        f"{len(work.networks)} networks, width {work.width:g}, {work.num_public} public images; {ceilings['device']}:"
    )
    print(f"products {ceilings['matmul_gflops']:.0f} GFLOP/s, copies {ceilings['copy_gbytes']:.0f} GB/s")
    flops = work_flops(work)
    report(samples, peaks, flops, ceilings["matmul_gflops"])
    for name, found in samples.items():
        for phase, sample in found.items():
            figures = {**sample._asdict(), "gflop": flops.get(phase), "peak_bytes": peaks[name], **ceilings}
            record = {"benchmark": "round_time", "contender": name, "phase": phase, **dataclasses.asdict(work)}
            append_json(options.json, {**record, **figures, **about[name]})


if __name__ == "__main__":
    # Allocate memory on demand, since contenders share the device, and disable compiler caches, since the first call is
    # measured, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    # Keep freed memory in the process: returning it to the system costs PyTorch 8 to 30%.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "4000000000")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "8000000000")
    main()
