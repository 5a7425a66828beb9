"""`python -m fedmd_jax` is `fedmd-jax`."""

from fedmd_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
