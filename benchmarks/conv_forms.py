"""Which form of a convolution is fastest for vmapped clients inside a scan?

    python benchmarks/conv_forms.py [--clients 4] [--shapes 9] [--json FILE]

`fedmd_jax.models.choose_form` is based on these figures. Each line is one step of a scan of four, for all clients: the
forward pass, the kernel gradient and the image gradient separately. Native convolutions are so slow in a scan on CPUs
that only the small shapes include them. `patches_in_parts` is `patches` on other platforms.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from timing import append_json, matmul_ceiling, measure

from fedmd_jax.models import blocked, choose_form, native, native_or_patches, patches, patches_in_parts, shifted

NUM_STEPS = 4


class Shape(NamedTuple):
    """A convolution of [batch, size, size, inputs] by a [kernel, kernel, inputs, outputs] kernel, without padding."""

    batch: int
    size: int
    inputs: int
    outputs: int
    kernel: int
    stride: int

    @property
    def output_size(self) -> int:
        """Height and width of the result."""
        return (self.size - self.kernel) // self.stride + 1

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of one client."""
        return 2 * self.batch * self.output_size**2 * self.kernel**2 * self.inputs * self.outputs


SHAPES = (
    Shape(32, 30, 1, 8, 3, 1),
    Shape(64, 30, 1, 32, 3, 1),
    Shape(64, 34, 3, 16, 3, 1),
    Shape(64, 30, 8, 16, 3, 1),
    Shape(64, 28, 8, 16, 3, 2),
    Shape(64, 28, 8, 16, 2, 2),
    Shape(32, 30, 16, 16, 3, 1),
    Shape(64, 18, 32, 32, 3, 1),
    Shape(16, 28, 64, 128, 3, 2),
)


def steps(form: Callable, shape: Shape, *, of: str) -> Callable:
    """Vmaps over clients a scan of dependent steps, none of which the compiler can remove.

    Args:
      form: The convolution.
      shape: Its shape.
      of: "forward", "kernel" or "images": the forward pass, or one gradient with the part of the pass that it needs.
    """

    def convolve(x, kernel):
        return form(x, kernel, (shape.stride,) * 2, ((0, 0), (0, 0)))

    def step(carry, _):
        x, kernel, upstream = carry
        if of == "forward":
            return (x + 1e-9 * jnp.mean(convolve(x, kernel)), kernel, upstream), None
        _, pull_back = jax.vjp(convolve, x, kernel)
        by_x, by_kernel = pull_back(upstream)
        if of == "kernel":
            return (x + 1e-9 * jnp.mean(by_kernel), kernel, upstream), None
        return (x + 1e-9 * by_x, kernel, upstream), None

    return jax.vmap(lambda *carry: jax.lax.scan(step, carry, None, length=NUM_STEPS)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first ones")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    ceiling = matmul_ceiling()
    print(f"{options.clients} clients; matmul ceiling {ceiling:.0f} GFLOP/s")
    columns = f"{'batch x image -> filters':<34} {'form':<18} {'forward':>10} {'kernel':>10} {'images':>10}"
    print(f"{columns} {'GFLOP/s':>8} {'compile':>8}")
    for shape in SHAPES[: options.shapes]:
        key_x, key_kernel = jax.random.split(jax.random.key(0))
        x = jax.random.normal(key_x, (options.clients, shape.batch, shape.size, shape.size, shape.inputs))
        kernel = jax.random.normal(
            key_kernel, (options.clients, shape.kernel, shape.kernel, shape.inputs, shape.outputs)
        )
        chosen = choose_form(x.shape[1:], kernel.shape[1:])
        upstream = jax.random.normal(
            key_x, (options.clients, shape.batch, shape.output_size, shape.output_size, shape.outputs)
        )
        for form in (shifted, patches, patches_in_parts, blocked, native, native_or_patches):
            on_cpu = jax.default_backend() == "cpu"
            if (form is native and shape.forward_flops > 2e8 and on_cpu) or (form is patches_in_parts and not on_cpu):
                continue
            name = f"{shape.batch} x {shape.size}x{shape.size}x{shape.inputs} -> {shape.outputs}, "
            name += f"{shape.kernel}x{shape.kernel} / {shape.stride}"
            timings = {
                of: measure(steps(form, shape, of=of), x, kernel, upstream, repeats=3)
                for of in ("forward", "kernel", "images")
            }
            milliseconds = {of: timing.run / NUM_STEPS * 1e3 for of, timing in timings.items()}
            compile_time = sum(timing.compile for timing in timings.values())
            rate = options.clients * shape.forward_flops / milliseconds["forward"] / 1e6
            row = "".join(f"{ms:>8.1f} ms" for ms in milliseconds.values())
            chosen_here = "  <- chosen" if form is chosen else ""
            print(f"{name:<34} {form.__name__:<18}{row} {rate:>8.1f} {compile_time:>6.1f} s{chosen_here}", flush=True)
            record = {"benchmark": "conv_forms", "clients": options.clients, **shape._asdict(), "form": form.__name__}
            figures = {f"{of}_ms": ms for of, ms in milliseconds.items()} | {"ceiling_gflops": ceiling}
            append_json(options.json, {**record, **figures})


if __name__ == "__main__":
    main()
