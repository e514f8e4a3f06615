"""Programs that test_command.py compiles in a process without torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any


def loops(topology: str) -> dict[str, Any]:
    """A kernel over a grid of 4 with loops of 20, 64, n and 7 trips, itself in a loop of 3."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    from torch_sinkhorn_attn.aot.bundles import compile_and_read, weighted

    def kernel(n: Any, x: Any, y: Any, z: Any) -> None:
        def outer(i: Any, c: Any) -> Any:
            c = jax.lax.fori_loop(0, 64, lambda j, c: c * 1.5 + x[pl.ds(j * 8, 8), :], c)
            return jax.lax.fori_loop(0, n[i], lambda j, c: jnp.exp(c + x[pl.ds(j * 8, 8), :]), c)

        def twice(j: Any, c: Any) -> Any:
            z[pl.ds(j * 8, 8), :] = x[pl.ds(j * 8, 8), :] * 2
            return c

        y[...] = jax.lax.fori_loop(0, 20, outer, jnp.zeros((8, 128), jnp.float32))
        jax.lax.fori_loop(0, 7, twice, 0)

    def call(n: Any, x: Any) -> Any:
        block, row = pl.BlockSpec((512, 128), lambda i, n: (0, i)), pl.BlockSpec((8, 128), lambda i, n: (0, i))
        grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(4,), in_specs=[block], out_specs=[row, block])
        shapes = [jax.ShapeDtypeStruct((size, 512), jnp.float32) for size in (8, 512)]
        with jax.named_scope("nested"):
            return pl.pallas_call(kernel, out_shape=shapes, grid_spec=grid, name="nested")(n, x)

    def program(n: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda i, x: call(n, x)[1], x)

    args = [jax.ShapeDtypeStruct((20,), jnp.int32), jax.ShapeDtypeStruct((512, 512), jnp.float32)]
    report = compile_and_read(program, args, topology)
    loops = report.kernels[0].loops
    unknown = next(index for index, loop in enumerate(loops) if loop.trips is None)
    return {**asdict(report), "weighted": [weighted(loops, {unknown: trips}) for trips in (0, 1, 10)]}


def long_name(topology: str, name: str) -> dict[str, Any]:
    """A kernel whose name is longer than that of a file may be."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    from torch_sinkhorn_attn.aot.bundles import compile_and_read

    def kernel(x: Any, y: Any) -> None:
        y[...] = x[...] * 2

    def program(x: Any) -> Any:
        with jax.named_scope(name):
            return pl.pallas_call(kernel, out_shape=x, name=name)(x)

    return asdict(compile_and_read(program, [jax.ShapeDtypeStruct((8, 128), jnp.float32)], topology))


def resident(topology: str) -> dict[str, Any]:
    """A resident forward of 53 row blocks, too many to unroll, and four stopped iterations: three in a loop around
    the sweep."""
    from functools import partial

    from torch_sinkhorn_attn.aot.attention import Configuration, problem
    from torch_sinkhorn_attn.aot.bundles import compile_and_read
    from torch_sinkhorn_attn.engines.tpu.method import run
    from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering

    given = {"length": 53 * 128, "window": (20, 20), "base_iters": 4, "tail_iters": 1, "features": 16}
    inputs, constants, statics = problem(Configuration.of(given))
    lowering = Lowering("resident", generation="v6e")
    forward = partial(run.forward, statics=statics, lowering=lowering, residuals=False)
    return asdict(compile_and_read(forward, [inputs, constants], topology))


def too_large(topology: str) -> dict[str, Any]:
    """A kernel whose windows exceed the VMEM of any TPU."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    from torch_sinkhorn_attn.aot.bundles import compile_and_read

    def kernel(x: Any, y: Any) -> None:
        y[...] = x[...] * 2

    def program(x: Any) -> Any:
        block = pl.BlockSpec((8192, 4096), lambda i: (i, 0))
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=out, grid=(2,), in_specs=[block], out_specs=block)(x)

    return asdict(compile_and_read(program, [jax.ShapeDtypeStruct((16384, 4096), jnp.float32)], topology))


def aborts() -> dict[str, Any]:
    """What libtpu does on some errors."""
    import os
    import sys

    print("F0000 Check failed: something", file=sys.stderr, flush=True)
    os.abort()
