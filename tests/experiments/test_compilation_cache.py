import types

import jax
import jax.numpy as jnp
import pytest

from fedmd_jax.experiments.compile import Programs
from fedmd_jax.experiments.setup import cache_compiled_programs


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    """As in a process of its own; the suite's folder comes back after."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_own_folder(tmp_path):
    cache_compiled_programs()
    folder = tmp_path / "caches" / "fedmd_jax"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o077 == 0
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


@pytest.mark.parametrize(
    ("setting", "value", "folder"),
    [("jax_compilation_cache_dir", "elsewhere", "elsewhere"), ("jax_enable_compilation_cache", False, None)],
)
def test_the_users_choice_stands(setting, value, folder):
    jax.config.update(setting, value)
    cache_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == folder


def test_a_folder_that_cannot_be_made_is_no_reason_to_stop(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None


def test_programs_are_not_compiled_without_jit():
    """As with JAX_DISABLE_JIT=1."""
    programs = Programs()
    programs.restart(types.SimpleNamespace(programs={"evaluate": lambda x: x + 1}))  # has no `lower`
    with jax.disable_jit():
        programs.begin("evaluate", jnp.ones(2))
        assert programs("evaluate", jnp.ones(2)).tolist() == [2, 2]
