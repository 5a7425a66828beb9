"""Four virtual devices, quick compilation, and JAX at its strictest: no silent broadcasting."""

import importlib.metadata
import os
import tempfile

# Before jax is imported: a toy need not run fast, but there are hundreds of them to compile. XLA's emitters of whole
# fusions take twice as long; later versions have no others.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += (
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
)

# Many tests compile the same small program, and so do the processes that they start.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

_cache = tempfile.TemporaryDirectory(prefix="fedmd_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
jax.config.update("jax_compilation_cache_dir", _cache.name)

# Whatever is compiled takes its time, and the more so the more others compute.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture
def key():
    return jax.random.key(0)
