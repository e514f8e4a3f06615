"""The adjoint of the resident shape: what its kernel is given, and what is made of its results."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from torch_sinkhorn_attn.engines.tpu.method import sinkhorn, staircase
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Inputs
from torch_sinkhorn_attn.engines.tpu.resident.backward import AdjointStatics, field_parts, kernel
from torch_sinkhorn_attn.engines.tpu.resident.launch import Scratch, Shapes, launch, resident_or_streamed
from torch_sinkhorn_attn.engines.tpu.resident.neighbours import neighbours_of
from torch_sinkhorn_attn.engines.tpu.resident.strip import (
    BLOCK,
    SUBLANES,
    Strip,
    first_blocks,
    operands,
    pad_lanes,
    split,
    strip_of,
    tokens_last,
)

LARGEST_EXPONENT = 30.0  # of a dual difference that may be applied outside of P, as in `method.staircase`

ShapeDtype = Array | jax.ShapeDtypeStruct
Bins = tuple[Array | None, Array | None]


def backward(
    problem: sinkhorn.Augmented,
    lowering: Lowering,
    output: Array,
    potentials: tuple[Array, Array],
    grad_output: Array,
    grad_bins: Bins,
) -> tuple[Inputs, Array]:
    """`staircase.backward` by the resident kernel, and by `problem`'s own passes where the data want that."""
    strip = strip_of(problem.length, problem.size, problem.statics)
    first, fits = first_blocks(problem.constants, strip)
    exponents = staircase_exponents(problem, potentials)
    small = jnp.all(jnp.stack([jnp.max(x, initial=-jnp.inf) for x in exponents]) <= LARGEST_EXPONENT)
    given = output, potentials, grad_output, grad_bins

    def streamed() -> tuple[Inputs, Array]:
        return staircase.backward(problem, *given, False)

    def resident() -> tuple[Inputs, Array]:
        return adjoint(problem, lowering, strip, first, exponents, *given)

    return resident_or_streamed(~problem.anywhere(~(fits & small)), resident, streamed)


def staircase_exponents(problem: sinkhorn.Augmented, potentials: tuple[Array, Array]) -> tuple[Array, ...]:
    """Dual differences of the factors, `[R, N, H, L(+G)]` and `[R, N, H, S(+G)]`: rows of A, rows of B, columns of A,
    columns of B; A^r = P exp(row + column)."""
    u, v = potentials
    row_a = jnp.where(problem.log_a == -jnp.inf, 0, staircase.row_exponent(problem, u) - u[-1])[1:]
    col_b = jnp.where(problem.log_b == -jnp.inf, 0, staircase.col_exponent(problem, v) - v[-1])[1:]
    return row_a, u[:-1] - u[-1], v[1:] - v[-1], col_b


def adjoint(
    problem: sinkhorn.Augmented,
    lowering: Lowering,
    strip: Strip,
    first: Array,
    exponents: tuple[Array, ...],
    output: Array,
    potentials: tuple[Array, Array],
    grad_output: Array,
    grad_bins: Bins,
) -> tuple[Inputs, Array]:
    """The cotangents by the kernel, whatever the data."""
    statics, length, size = problem.statics, problem.length, problem.size
    u, v = (x[-1] for x in potentials)
    d = staircase.plan_cotangent(problem, u, v, output, grad_output, grad_bins)
    given = kernel_operands(problem, strip, d, u, v, exponents)
    width, low = given["value"].shape[2], given["value"].dtype
    parts = field_parts(statics.kept, low)
    beside = neighbours_of(statics)
    options = AdjointStatics(strip, statics, problem.dtype, width, parts, problem.dustbin is not None, beside)
    results, scratch = kernel_results(problem, strip, given), kernel_scratch(problem, strip, given)
    body = functools.partial(kernel, options)
    out = launch("sinkhorn_resident_backward", body, problem, lowering, first, given, results, scratch, beside)
    z, w = (jnp.moveaxis(out[name], 2, 0) for name in ("z", "w"))
    z, w = z[..., :length], w[..., :size]
    if problem.dustbin is not None:
        bins = (jnp.moveaxis(out[name], 2, 0)[..., :1] for name in ("bin_z", "bin_w"))
        z, w = (jnp.concatenate(pair, -1) for pair in zip((z, w), bins, strict=True))
    features = problem.inputs.query.shape[-1]
    key, value = (jnp.swapaxes(out[name][..., :size], -1, -2) for name in ("grad_key", "grad_value"))
    found = staircase.Cotangents(out["grad_query"][:, :, :length, :features], key[..., :features], value[..., :width])
    field = staircase.staircase_field(problem, potentials, z[1:], w)
    return staircase.gather(problem, u, v, d, field, found), z[0]


def kernel_operands(
    problem: sinkhorn.Augmented, strip: Strip, d: staircase.Cotangent, u: Array, v: Array, exponents: tuple[Array, ...]
) -> dict[str, Array]:
    """By the names of `backward.Refs`."""
    inputs, constants, length, size = problem.inputs, problem.constants, problem.length, problem.size
    lp, sp = strip.padded_length, strip.padded_size
    assert inputs.value is not None
    row_a, row_b, col_a, col_b = (jnp.moveaxis(jnp.exp(x), 0, 2) for x in exponents)
    found = operands(inputs, constants, problem.statics, strip, u[..., :length], v[..., :size])
    found["value"] = pad_lanes(tokens_last(inputs.value), sp)
    low = found["value"].dtype
    first_x = (row_a[..., -1, :] * d.row_sums)[..., None, :length]
    grad = jnp.concatenate([jnp.swapaxes(d.grad.astype(low), -1, -2), split(first_x, low)], 2)
    found["grad"] = pad_lanes(grad, lp)
    if problem.statics.banded:
        found["col_lo"], found["col_hi"] = (pad_lanes(x, sp)[:, None] for x in (constants.col_lo, constants.col_hi))
    vectors = {"row_sums": d.row_sums}, {"col_sums": d.col_sums}
    if problem.dustbin is not None:
        plan = problem.dustbin.matrix(*problem.live(u, v))
        vectors[0]["plan_col"], vectors[1]["plan_row"] = plan.column, plan.row
        ends = [plan.corner, d.row_sums[..., length:], d.col_sums[..., size:]]
        ends += [row_a[..., length], row_b[..., length], col_a[..., size], col_b[..., size]]
        scalars = jnp.concatenate(ends, -1)
        found["bins"] = jnp.broadcast_to(scalars[..., None], (*scalars.shape, BLOCK))
    found |= {name: pad_lanes(x[..., None, :length], lp) for name, x in vectors[0].items()}
    found |= {name: pad_lanes(x[..., None, :size], sp) for name, x in vectors[1].items()}
    found |= {name: pad_lanes(x[..., :length], lp) for name, x in (("row_a", row_a), ("row_b", row_b))}
    return found | {name: pad_lanes(x[..., :size], sp) for name, x in (("col_a", col_a), ("col_b", col_b))}


def kernel_results(problem: sinkhorn.Augmented, strip: Strip, given: Mapping[str, ShapeDtype]) -> Shapes:
    """Shapes of one head's results."""
    kept, lp, sp = problem.statics.kept, strip.padded_length, strip.padded_size
    width = given["query"].shape[2]
    found: Shapes = {"grad_query": (lp, width), "grad_key": (width, sp), "grad_value": (given["grad"].shape[2], sp)}
    found |= {"z": (kept + 1, lp), "w": (kept, sp)}
    return found if problem.dustbin is None else found | {"bin_z": (kept + 1, BLOCK), "bin_w": (kept, BLOCK)}


def kernel_scratch(problem: sinkhorn.Augmented, strip: Strip, given: Mapping[str, ShapeDtype]) -> Scratch:
    """Shape and dtype of one head's workspace."""
    lp, sp, dtype, low = strip.padded_length, strip.padded_size, problem.dtype, given["value"].dtype
    field = field_parts(problem.statics.kept, low) + given["value"].shape[2]
    return {
        "strip": ((lp, strip.columns), dtype),
        "sums": ((SUBLANES, sp), dtype),
        "y": ((SUBLANES, sp), dtype),
        "inner": ((strip.unroll, BLOCK, strip.columns), dtype),
        "grad_scores": ((strip.unroll, BLOCK, strip.columns), low),
        "field_rows": ((field, lp), low),
        "field_cols": ((field, sp), low),
    }


def footprint(problem: sinkhorn.Augmented, strip: Strip) -> tuple[Mapping[str, ShapeDtype], Shapes, Scratch]:
    """Operands, results and scratch of the adjoint's launch, by shape."""

    def look() -> dict[str, Array]:
        u, v = (jnp.zeros((problem.statics.kept + 1, *x.shape), problem.dtype) for x in (problem.log_a, problem.log_b))
        assert problem.inputs.value is not None
        grad = jnp.zeros((*problem.constants.log_row_mass.shape, problem.inputs.value.shape[-1]), problem.dtype)
        d = staircase.plan_cotangent(problem, u[-1], v[-1], grad, grad, (None, None))
        return kernel_operands(problem, strip, d, u[-1], v[-1], staircase_exponents(problem, (u, v)))

    given = jax.eval_shape(look)
    return given, kernel_results(problem, strip, given), kernel_scratch(problem, strip, given)
