"""What was compiled once is not compiled again in the next run."""

import contextlib
import os
import pathlib

import jax


def keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs on disk, unless the user has chosen a folder, or none.

    They go to `$XDG_CACHE_HOME/fedmd_jax` (`~/.cache/fedmd_jax`), readable by the user alone, since programs are code.
    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. Where the
    folder cannot be made, everything is compiled as ever.
    """
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    with contextlib.suppress(OSError, RuntimeError):
        folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "fedmd_jax"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Small programs count: there are dozens of them, and each took longer to compile than to read.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
