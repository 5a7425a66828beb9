"""Collectives of programs compiled for a TPU."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import toys

import fedmd_jax as fmd
from fedmd_jax.models import CNN, architecture_from_linen

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "tpu_compile.py"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # for timing.py
        spec = importlib.util.spec_from_file_location("tpu_compile", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu-aot]'")
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="jaxlib 0.7 crashes in compiling for a TPU")
@pytest.mark.parametrize("clients", ["--networks 2conv", "--ten"])
def test_the_consensus_is_the_only_collective(tmp_path, clients):
    """In a new process, since libtpu reads its environment once and writes to stderr."""
    file = tmp_path / "figures.json"
    small = f"{clients} --width 0.016 --subset-size 24 --num-public 32"
    command = [sys.executable, str(SCRIPT), "--topology", "v5e:2x2", *small.split(), "--json", str(file)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    assert figures["chips"] == 4
    assert figures["collectives"] == {"all-reduce f32[25,16]": 1}


def test_collectives_of_the_compiler_are_counted(script):
    """Without the mesh in the round the compiler chooses shardings itself, and gathers images."""
    architecture = architecture_from_linen(CNN((2, 2), 4, 0.0, jax.lax.conv_general_dilated))
    groups = {"cnn": fmd.ArchitectureGroup(architecture, range(4))}
    mesh, public = fmd.client_mesh(4), fmd.public_dataset(*images(100, 13))
    private = fmd.stack_private(groups, {i: images(i, 3) for i in range(4)})
    states = toys.federation(groups).new_states(jax.random.key(0), public.inputs[:1])
    arguments = (
        fmd.mapping.sharding.shard_tree(states, mesh),
        public,
        fmd.mapping.sharding.shard_tree(private, mesh),
        jax.random.key(1),
    )

    def collectives(mesh):
        program = toys.federation(groups, mesh=mesh).programs["round"].lower(*arguments).compile().as_text()
        return script.count_collectives(program)

    assert collectives(mesh) == {script.Collective("all-reduce", ("f32[13,4]",)): 1}
    assert "all-gather" in {collective.name for collective in collectives(None)}


def images(seed, num_examples):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num_examples, 4, 4, 1)).astype(np.float32), rng.integers(0, 4, num_examples)


def test_collectives_of_a_program_text(script):
    """Asynchronous collectives are pairs, combined ones have several results; operands and names do not count."""
    text = """
      %all-reduce.1 = f32[5000,16]{1,0:T(8,128)} all-reduce(%fusion.2), channel_id=1, to_apply=%add
      %ag = (f32[2]{0:T(128)}, f32[8]{0:T(128)}) all-gather-start(%p), dimensions={0}
      %done = f32[8]{0:T(128)} all-gather-done(%ag)
      ROOT %sum = f32[5000,16]{1,0} add(%all-reduce.1, %all-reduce.1)
    """
    assert script.count_collectives(text) == {
        script.Collective("all-reduce", ("f32[5000,16]",)): 1,
        script.Collective("all-gather", ("f32[2]", "f32[8]")): 1,
    }
