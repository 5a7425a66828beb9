"""JAX with four virtual devices, fast compilation, a shared compilation cache and strict broadcasting."""

import gc
import importlib.metadata
import os
import tempfile

# Set before jax is imported; the workers of pytest-xdist and the processes that tests start inherit it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Tests compile hundreds of toys, whose speed does not matter. The last two flags halve the time of compilation with
    # jaxlib 0.10; later versions do not have them.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    # Many tests compile the same small programs.
    _cache = tempfile.TemporaryDirectory(prefix="fedmd_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Jaxprs are many small objects: with the default of 700 collections took 6% of the time of test_inputs.py.
gc.set_threshold(50_000)

# The time of an example includes compilation and depends on other load.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture
def key():
    return jax.random.key(0)
