"""Memory, compile time and collectives of a sharded round on a TPU pod.

    pip install 'fedmd_jax[tpu-aot]'
    python benchmarks/tpu_compile.py [--topology v5e:2x2]... [--clients-per-chip 1] [--width 1.0] [--json FILE]

The round is compiled ahead of time on any machine, without a TPU, and not run, so there are no run times. Every chip
has its share of two groups, with two and three convolutions; with `--ten` there are the ten networks of the paper's
Table 1, one client each, and every chip branches to its networks. Bytes and FLOPs are those of one chip; XLA counts
the body of a loop once. The exit status is 1 if there is any collective but one all-reduce of the consensus and its
weight, [M + 1, C].
"""

import argparse
import collections
import functools
import importlib.util
import os
import pathlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Set before jax is imported: libtpu would query the network for a TPU of this machine, and lock it.
os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from timing import append_json

import fedmd_jax as fmd
from fedmd_jax.models import CNN, TABLE_1, PaperNetwork, choose_form, conv_general_dilated, head_l2, scale_width

TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16")  # a v5e pod has 256 chips
NETWORKS = {"2conv": TABLE_1[0], "3conv": TABLE_1[5]}
NUM_CLASSES = 16
NUM_PRIVATE = 18  # three examples of six letters, as in the paper
IMAGE = (28, 28, 1)

COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<name>all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|"
    r"ragged-all-to-all|reduce-scatter|send|recv)(-start)?\("
)


class Collective(NamedTuple):
    """A collective instruction and the shapes of its results."""

    name: str
    shapes: tuple[str, ...]  # such as f32[5000,16]

    def __str__(self):
        return f"{self.name} {' '.join(self.shapes)}"


def count_collectives(program: str) -> collections.Counter[Collective]:
    """Counts collectives in the text of a compiled program; an asynchronous pair counts once."""
    found = (COLLECTIVE.search(line) for line in program.splitlines())
    return collections.Counter(
        Collective(match["name"], tuple(re.findall(r"\w+\[[\d,]*\]", match["shapes"]))) for match in found if match
    )


def tpu_mesh(topology: str) -> Mesh:
    """The mesh of `fedmd_jax.client_mesh` for chips of a topology description."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.asarray(chips), ("clients",))


def tpu_groups(
    networks: Mapping[str, PaperNetwork], num_clients: int, *, width: float
) -> dict[str, fmd.ArchitectureGroup]:
    """A group of `num_clients` for each network, with the convolution forms of a TPU."""
    # The default form would be that of the platform of the trace.
    choose = functools.partial(choose_form, platform="tpu")
    convolution = functools.partial(conv_general_dilated, choose=choose)
    groups = {}
    for number, (name, network) in enumerate(networks.items()):
        module = CNN(scale_width(network.filters, width), NUM_CLASSES, network.dropout, convolution)
        architecture = fmd.architecture_from_linen(module, penalty=head_l2())
        groups[name] = fmd.ArchitectureGroup(architecture, range(number * num_clients, (number + 1) * num_clients))
    return groups


def abstract_arguments(federation: fmd.Federation, *, num_public: int) -> tuple[Any, ...]:
    """The arguments of `federation.round` as shapes with shardings: states, public, private, key."""
    images = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    states = jax.eval_shape(federation.programs["new_states"], key, images((1, *IMAGE)))
    public = fmd.PublicDataset(images((num_public, *IMAGE)), integers((num_public,)))
    private = {
        name: fmd.PrivateDataset(
            images((group.num_clients, NUM_PRIVATE, *IMAGE)),
            integers((group.num_clients, NUM_PRIVATE)),
            integers((group.num_clients,)),
        )
        for name, group in federation.groups.items()
    }

    return tuple(map(federation.put, (states, public, private, key)))


def compile_round(
    topology: str,
    *,
    networks: Sequence[str],
    ten: bool,
    clients_per_chip: int,
    width: float,
    subset_size: int,
    num_public: int,
) -> dict[str, Any]:
    """Compiles a round and returns its figures; `clients_per_chip` counts each network, and is not used with `ten`."""
    mesh = tpu_mesh(topology)
    if ten:
        groups = tpu_groups({f"network {row}": network for row, network in enumerate(TABLE_1)}, 1, width=width)
    else:
        groups = tpu_groups({name: NETWORKS[name] for name in networks}, clients_per_chip * mesh.size, width=width)
    costs = fmd.mapping.client_costs(groups, jnp.zeros((1, *IMAGE)))
    federation = fmd.fedmd(groups, subset_size=subset_size, mesh=mesh, costs=costs)
    lowered = federation.programs["round"].lower(*abstract_arguments(federation, num_public=num_public))
    start, start_cpu = time.perf_counter(), time.process_time()
    compiled = lowered.compile()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    memory = compiled.memory_analysis()
    collectives = count_collectives(compiled.as_text())
    expected = {Collective("all-reduce", (f"f32[{subset_size + 1},{NUM_CLASSES}]",)): 1}
    return {
        "chips": mesh.size,
        "chip": mesh.devices.flat[0].device_kind,
        "clients": sum(group.num_clients for group in groups.values()),
        "compile_seconds": seconds,
        "compile_cpu_seconds": cpu_seconds,  # independent of other load
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,  # donated arguments whose buffers the outputs reuse
        "temp_bytes": memory.temp_size_in_bytes,
        "gflops": compiled.cost_analysis()["flops"] / 1e9,
        "collectives": {str(collective): count for collective, count in collectives.items()},
        "only_the_consensus_crosses": collectives == expected,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", action="append", metavar="NAME", help=f"default: {' '.join(TOPOLOGIES)}")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default: both")
    parser.add_argument("--ten", action="store_true", help="ten different networks instead, one client each")
    parser.add_argument("--clients-per-chip", type=int, default=1, help="clients of each network per chip")
    parser.add_argument("--width", type=float, default=1.0, help="multiplies the filters of the paper's networks")
    parser.add_argument("--subset-size", type=int, default=5000, help="M, public examples of a round")
    parser.add_argument("--num-public", type=int, default=60_000, help="P, public examples; default: as in MNIST")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        parser.exit(2, "compiling for a TPU needs libtpu: pip install 'fedmd_jax[tpu-aot]'\n")
    if jax.__version_info__ < (0, 10):  # jaxlib 0.7 crashes here
        parser.exit(2, f"compiling for a TPU is tested with jax 0.10 and newer, got jax {jax.__version__}\n")
    jax.config.update("jax_platforms", "cpu")  # otherwise JAX looks for a local TPU
    settings = {name: value for name, value in vars(options).items() if name not in ("topology", "json")}
    columns = f"{'':<10} {'clients':>7} {'compile':>9} {'argument':>10} {'output':>10} {'temp':>10} {'GFLOP':>8}"
    print(f"{columns}  crosses chips")
    holds = True
    for topology in options.topology or TOPOLOGIES:
        result = compile_round(topology, **settings)
        megabytes = (result[f"{kind}_bytes"] / 1e6 for kind in ("argument", "output", "temp"))
        print(
            f"{topology:<10} {result['clients']:>7} {result['compile_seconds']:>7.1f} s "
            f"{' '.join(f'{size:>7.1f} MB' for size in megabytes)} {result['gflops']:>8.2f}  "
            f"{', '.join(f'{count} x {collective}' for collective, count in result['collectives'].items())}"
        )
        holds &= result["only_the_consensus_crosses"]
        append_json(options.json, {"benchmark": "tpu_compile", "topology": topology, **settings, **result})
    print("only the consensus crosses chips" if holds else "MORE THAN THE CONSENSUS CROSSES CHIPS")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
