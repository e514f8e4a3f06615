"""The adjoint of the wavefront shape: what its kernel is given, and what is made of its results."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from torch_sinkhorn_attn.engines.tpu.method import sinkhorn, staircase
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Inputs
from torch_sinkhorn_attn.engines.tpu.resident.adjoint import (
    LARGEST_EXPONENT,
    Bins,
    footprint,
    kernel_operands,
    staircase_exponents,
)
from torch_sinkhorn_attn.engines.tpu.resident.backward import field_parts
from torch_sinkhorn_attn.engines.tpu.resident.launch import resident_or_streamed
from torch_sinkhorn_attn.engines.tpu.resident.strip import BLOCK, SUBLANES, Strip, matmul_dtype
from torch_sinkhorn_attn.engines.tpu.wavefront.backward import AdjointStatics, kernel
from torch_sinkhorn_attn.engines.tpu.wavefront.launch import COLS, ROWS, Operand, Result, Scratch, launch
from torch_sinkhorn_attn.engines.tpu.wavefront.passes import (
    bytes_of,
    intervals,
    lines_for,
    mask_floor,
    mask_operands,
    pad_cols,
    shapes_of,
    without_padding,
)
from torch_sinkhorn_attn.engines.tpu.wavefront.path import Entries, entries_of, path_of
from torch_sinkhorn_attn.engines.tpu.wavefront.products import BandPasses, options_of as products_of

MOST_KEPT = 8  # tail iterations: each has results of its own


def backward(
    problem: sinkhorn.Augmented,
    lowering: Lowering,
    output: Array,
    potentials: tuple[Array, Array],
    grad_output: Array,
    grad_bins: Bins,
    mask_grad: bool,
) -> tuple[Inputs, Array]:
    """`staircase.backward` by the wavefront kernel, or by products along its path, and by `problem`'s own passes where
    the data want that."""
    given = output, potentials, grad_output, grad_bins
    if by_products(problem, mask_grad):
        return _by_products(problem, lowering, (*given, mask_grad))
    exponents = staircase_exponents(problem, potentials)
    small = jnp.all(jnp.stack([jnp.max(x, initial=-jnp.inf) for x in exponents]) <= LARGEST_EXPONENT)
    o = options_of(problem)
    entries = entries_of(problem.constants, o.path, problem.statics, o.way.before, o.way.steps)
    return resident_or_streamed(
        entries.fits & small,
        lambda: adjoint(problem, lowering, o, entries, exponents, *given),
        lambda: staircase.backward(problem, *given, False),
    )


def by_products(problem: sinkhorn.Augmented, mask_grad: bool) -> bool:
    """Whether the adjoint couples all rows, or writes a tile for each pair: then its kernel is not one."""
    statics = problem.statics
    return problem.dustbin is not None or statics.implicit or mask_grad or not 0 < statics.kept <= MOST_KEPT


def _by_products(problem: sinkhorn.Augmented, lowering: Lowering, given: Any) -> tuple[Inputs, Array]:
    """`staircase.backward(problem, *given)`."""
    inputs, constants, statics = problem.inputs, problem.constants, problem.statics
    band = sinkhorn.Augmented(inputs, constants, statics, BandPasses(problem, lowering), problem.connected)
    way = products_of(problem, True, True).way
    fits = entries_of(constants, way.path, statics, way.before, way.steps).fits
    return resident_or_streamed(
        fits, lambda: staircase.backward(band, *given), lambda: staircase.backward(problem, *given)
    )


def options_of(problem: sinkhorn.Augmented) -> AdjointStatics:
    """What the kernel compiles in."""
    query, value, statics = problem.inputs.query, problem.inputs.value, problem.statics
    assert value is not None
    biases = 2 * (3 if matmul_dtype(query) == jnp.bfloat16 else 1)  # u^R and v^R, as `strip.split` holds them
    return AdjointStatics(
        path_of(problem.length, problem.size, statics),
        statics,
        problem.dtype,
        whole_tiles(query.shape[-1] + biases),
        value.shape[-1],
        field_parts(statics.kept, matmul_dtype(value)),
        mask_floor(problem),
    )


def vmem(problem: sinkhorn.Augmented) -> int:
    """Bytes of a core's memory that the kernel takes at most."""
    o, path = options_of(problem), path_of(problem.length, problem.size, problem.statics)
    arrays = footprint(problem, Strip(path.rows, path.cols, path.width))[0]

    def look() -> list[Operand]:
        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in arrays.items()}
        return operands_of(problem, o, zeros)

    return bytes_of(shapes_of(look), results_of(o, arrays), scratch_of(o, arrays), problem.dtype)


def adjoint(
    problem: sinkhorn.Augmented,
    lowering: Lowering,
    o: AdjointStatics,
    entries: Entries,
    exponents: tuple[Array, ...],
    output: Array,
    potentials: tuple[Array, Array],
    grad_output: Array,
    grad_bins: Bins,
) -> tuple[Inputs, Array]:
    """The cotangents by the kernel, whatever the data."""
    length, size, path = problem.length, problem.size, o.path
    u, v = (x[-1] for x in potentials)
    d = staircase.plan_cotangent(problem, u, v, output, grad_output, grad_bins)
    arrays = kernel_operands(problem, Strip(path.rows, path.cols, path.width), d, u, v, exponents)
    results = results_of(o, arrays)
    found = launch(
        "sinkhorn_wavefront_backward", functools.partial(kernel, o), problem, lowering, entries, path, o.way.before,
        operands_of(problem, o, arrays), results, scratch_of(o, arrays),
    )  # fmt: skip
    out = {
        result.name: without_padding(x, path, size) if result.side == COLS else x
        for result, x in zip(results, found, strict=True)
    }
    rows_in, cols_in = supported(problem)
    rows = jnp.where(rows_in[..., None, :], out["rows"][..., :length], 0)
    cols, value = (jnp.where(cols_in[..., None, :], out[name], 0) for name in ("cols", "grad_value"))
    z = jnp.concatenate([jnp.moveaxis(rows[:, :, o.features :], 2, 0), d.row_sums[None]])
    w = jnp.moveaxis(cols[:, :, o.features :], 2, 0)
    features = problem.inputs.query.shape[-1]
    query, key, value = (
        jnp.swapaxes(x[:, :, :count], -1, -2)
        for x, count in ((rows, features), (cols, features), (value, o.value_width))
    )
    field = staircase.staircase_field(problem, potentials, z[1:], w)
    cotangents = staircase.Cotangents(query, key, value)
    return staircase.gather(problem, u, v, d, field, cotangents), z[0]


def supported(problem: sinkhorn.Augmented) -> tuple[Array, Array]:
    """Lines with a support, `[N, 1, L]` and `[N, 1, S]`: those that no way leads through are not written."""
    constants = problem.constants
    return (constants.row_lo < constants.row_hi)[:, None], (constants.col_lo < constants.col_hi)[:, None]


def operands_of(problem: sinkhorn.Augmented, o: AdjointStatics, arrays: Mapping[str, Any]) -> list[Operand]:
    """What the kernel reads, from the arrays of the resident one."""
    path = o.path
    row_lines = jnp.concatenate([arrays[name] for name in ("row_a", "row_b", "row_sums")], 2).astype(o.dtype)
    col_lines = jnp.concatenate([arrays[name] for name in ("col_a", "col_b", "col_sums")], 2).astype(o.dtype)
    bounds = jnp.stack(intervals(problem, path), 2)
    row_features = [in_tiles(arrays["query"]), in_tiles(arrays["grad"])]
    col_features = [in_tiles(arrays["head_key"]), in_tiles(arrays["value"])]
    low = jnp.result_type(*row_features, *col_features)
    return [
        Operand("row_features", jnp.concatenate([x.astype(low) for x in row_features], 2), ROWS),
        Operand("col_features", pad_cols(of_heads(col_features, low), path), COLS),
        *mask_operands(problem, path),
        Operand("row_lines", row_lines, ROWS),
        Operand("col_lines", jnp.concatenate([bounds, pad_cols(col_lines, path)], 2), COLS),
    ]


TILE = 16  # lines of bfloat16 in a register


def whole_tiles(count: int) -> int:
    """Lines, rounded up."""
    return -(-count // TILE) * TILE


def in_tiles(x: Array) -> Array:
    """`[N, H, F, n]` with features of 0, so that what is stacked on it begins in a register of its own."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, whole_tiles(x.shape[2]) - x.shape[2]), (0, 0)))


def of_heads(parts: list[Array], dtype: Any) -> Array:
    """Arrays of keys, with the heads they are for, stacked: `[N, H, ...]` and `[N, Hk, ...]`."""
    heads = max(x.shape[1] for x in parts)
    return jnp.concatenate([jnp.repeat(x, heads // x.shape[1], 1).astype(dtype) for x in parts], 2)


def results_of(o: AdjointStatics, arrays: Mapping[str, Any]) -> list[Result]:
    """What it writes."""
    lp, sp, kept, lag = o.path.padded_length, o.path.padded_cols * BLOCK, o.statics.kept, o.path.lag
    return [
        Result("rows", (o.features + kept, lp), ROWS, kept * lag),
        Result("cols", (o.features + kept, sp), COLS, (kept + 1) * lag),
        Result("grad_value", (whole_tiles(arrays["grad"].shape[2]), sp), COLS, lag),
    ]


def scratch_of(o: AdjointStatics, arrays: Mapping[str, Any]) -> Scratch:
    """Its workspace."""
    way, path, kept, dtype, line = o.way, o.path, o.statics.kept, o.dtype, (SUBLANES, BLOCK)
    low = jnp.result_type(*(arrays[name].dtype for name in ("query", "grad", "head_key", "value")))
    grads, values = (whole_tiles(arrays[name].shape[2]) for name in ("grad", "value"))
    return {
        "plan": ((way.ring + 1, BLOCK, path.columns), dtype),
        "zs": ((way.ring + 1, lines_for(kept), BLOCK), dtype),
        "ws": ((way.held, lines_for(kept), BLOCK), dtype),
        "sums": ((kept + 1, way.touched, *line), dtype),
        "y": ((kept + 1, way.touched, *line), dtype),
        "row_kept": ((way.ring + 1, o.features + grads, BLOCK), low),
        "col_kept": ((way.held, o.features + values, BLOCK), low),
        "row_factors": ((way.ring + 1, lines_for(2 * kept + 1), BLOCK), dtype),
        "lines": ((way.held, lines_for(2 * kept + 3), BLOCK), dtype),
        "field_cols": ((way.window, o.field_parts + o.value_width, BLOCK), low),
        "value_sums": ((way.touched, grads, BLOCK), dtype),
        "key_sums": ((way.touched, o.features, BLOCK), dtype),
    }
