"""The forward of one problem by one program: solve, duals, output and residuals in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_sinkhorn_attn.engines.triton import tiles
from torch_sinkhorn_attn.engines.triton.launch import launch
from torch_sinkhorn_attn.engines.triton.resident import options, solve
from torch_sinkhorn_attn.engines.triton.resident.arguments import Arguments, prepare, threshold, warps
from torch_sinkhorn_attn.engines.triton.tiles import LN2, LOG2E, number
from torch_sinkhorn_attn.problem.problem import Inputs, Potentials, Problem, Result


@triton.jit(do_not_specialize=["stopped", "kept", "threshold"])
def forward_kernel(
    A, stopped, kept, seed, threshold, S: tl.constexpr, B: tl.constexpr, V: tl.constexpr, C: tl.constexpr
):
    """The base, the tail, and what is made of the plan, which is in registers from the first iteration on."""
    A = Arguments(*A)  # triton 3.5 forgets the ones among the numbers of nested tuples, in loops, unless it made them
    flat = tl.program_id(0).to(tl.int64)
    n, h = flat // A.heads, flat % A.heads
    log_a = solve.row_mass(A, flat, C)
    u, p, a, b, formed = base(A, n, h, flat, log_a, stopped, S, B, C)
    if C.centre:
        v = solve.absorbed_v(A, flat, C)
        if stopped > 0:
            u, v = options.centred(A, n, flat, log_a, u, v, C)
            solve.absorb_v(A, flat, v, C)
    p = tail(A, n, h, flat, log_a, u, p, a, b, formed, kept, S, B, C)
    if C.output:
        write_output(A, n, h, flat, log_a, p, seed, threshold, S, V, C)


@triton.jit
def base(A, n, h, flat, log_a, stopped, S: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """The stopped iterations: u^0 (v^0 is absorbed), its plan, the masses of its lines, and whether there is a plan."""
    i, j = tl.arange(0, C.rows), tl.arange(0, C.cols)
    length, size = A.rows.size + C.dustbin, A.cols.size + C.dustbin
    if C.initial:
        u = tl.load(A.initial_row + flat * length + i, mask=i < length, other=0.0).to(C.acc) * LOG2E
        v = tl.load(A.initial_col + flat * size + j, mask=j < size, other=0.0).to(C.acc) * LOG2E
        u = tl.where(log_a == float("-inf"), 0.0, u)
        v = tl.where(solve.col_mass(A, flat, C) == float("-inf"), 0.0, v)
    else:
        u, v = (i * 0).to(C.acc), (j * 0).to(C.acc)
    solve.absorb_v(A, flat, v, C)
    if C.plain:
        return solve.plain_base(A, n, h, flat, log_a, u, stopped, S, B, C)
    return options.any_base(A, n, h, flat, log_a, u, v, stopped, S, B, C)


@triton.jit
def write_row(A, flat, r, u, C: tl.constexpr):
    """u^r to its place, in natural units."""
    i, length = tl.arange(0, C.rows), A.rows.size + C.dustbin
    tl.store(A.row_potential + (r * tl.num_programs(0).to(tl.int64) + flat) * length + i, u * LN2, mask=i < length)


@triton.jit
def write_col(A, flat, r, v, C: tl.constexpr):
    j, size = tl.arange(0, C.cols), A.cols.size + C.dustbin
    tl.store(A.col_potential + (r * tl.num_programs(0).to(tl.int64) + flat) * size + j, v * LN2, mask=j < size)


@triton.jit
def tail(A, n, h, flat, log_a, u, p, a, b, formed, kept, S: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """The kept iterations, or for R = 0 a row half-step, from the absorbed u^0, v^0 whose plan is p: the plan of their
    end. Scaled, where all sums stay in their range; else again by logarithms."""
    write_col(A, flat, 0, solve.absorbed_v(A, flat, C), C)
    x, y = tl.where(a == 0, 1.0, 1.0).to(C.acc), tl.where(b == 0, 1.0, 1.0).to(C.acc)
    safe = formed
    if C.differentiated:
        write_row(A, flat, 0, u, C)
        for r in range(1, kept + 1):
            v = solve.absorbed_v(A, flat, C)
            sums = solve.column_sums(p, x)
            new = tl.where(b == 0, 0.0, number(A.rho_col, C) * ((solve.col_mass(A, flat, C) + v) - tl.log2(sums)))
            y = tl.exp2(new - v)
            safe = safe & solve.sums_in_range(sums, y, b)
            write_col(A, flat, r, new, C)
            sums = solve.row_sums(p, y)
            new_u = tl.where(a == 0, 0.0, number(A.rho_row, C) * ((log_a + u) - tl.log2(sums)))
            x = tl.exp2(new_u - u)
            safe = safe & solve.sums_in_range(sums, x, a)
            write_row(A, flat, r, new_u, C)
    else:
        sums = solve.row_sums(p, y)
        new_u = tl.where(a == 0, 0.0, number(A.rho_row, C) * ((log_a + u) - tl.log2(sums)))
        x = tl.exp2(new_u - u)
        safe = safe & solve.sums_in_range(sums, x, a)
        write_row(A, flat, 0, new_u, C)
    if not safe:
        tl.debug_barrier()
        for r in range(1, kept + 1):
            lse = solve.column_lse(A, n, h, flat, log_a, u, B, C)
            v = solve.potential(lse, solve.col_mass(A, flat, C), number(A.rho_col, C), C.relaxed)
            solve.absorb_v(A, flat, v, C)
            write_col(A, flat, r, v, C)
            u = solve.potential(solve.row_lse(A, n, h, flat, log_a, B, C), log_a, number(A.rho_row, C), C.relaxed)
            write_row(A, flat, r, u, C)
        if not C.differentiated:
            u = solve.potential(solve.row_lse(A, n, h, flat, log_a, B, C), log_a, number(A.rho_row, C), C.relaxed)
            write_row(A, flat, 0, u, C)
        p, a, b = solve.absorbed(A, n, h, flat, log_a, u, S, C)
        x, y = tl.where(a == 0, 1.0, 1.0).to(C.acc), tl.where(b == 0, 1.0, 1.0).to(C.acc)
    return p * x[:, None] * y[None, :]


@triton.jit
def write_output(A, n, h, flat, log_a, p, seed, threshold, S: tl.constexpr, V: tl.constexpr, C: tl.constexpr):
    """O_i = (1/a_i) sum_j P_ij V_j, rows of a balanced side divided by their own sums, which cancels the rounding of
    large scores; the masses of the dustbin, and the largest errors of the marginals."""
    i, j = tl.arange(0, C.rows), tl.arange(0, C.cols)
    length, size = A.rows.size, A.cols.size
    sums = tl.sum(p, 1)
    if C.residuals:
        error = tl.abs(sums - tl.exp2(log_a))
        tl.store(A.row_residual + flat, largest(error))
        error = tl.abs(tl.sum(p, 0) - tl.exp2(solve.col_mass(A, flat, C)))
        tl.store(A.col_residual + flat, largest(error))
    divisor = tl.where(log_a == float("-inf"), 1.0, tl.exp2(log_a))
    if not C.relaxed_rows:
        divisor = tl.where(sums > 0, sums, divisor)
    if C.dustbin:
        to_bin = tl.sum(tl.where((j == size)[None, :], p, 0.0), 1)
        tl.store(A.to_bin + flat * length + i, to_bin, mask=i < length)
        from_bin = tl.sum(tl.where((i == length)[:, None], p, 0.0), 0)
        tl.store(A.from_bin + flat * size + j, from_bin, mask=j < size)
        p = tl.where((j < size)[None, :], p, 0.0)
    p = p * (1.0 / divisor)[:, None]
    if C.dropout:
        keep = tiles.keep_tile(seed, flat, i[:, None], j[None, :], threshold)
        p = tl.where(keep, p * number(A.keep_scale, C), 0.0)
    pointers = tiles.feature_pointers(A.value, n, h, tiles.clamped(j, A.value), V.chunk)
    place = A.output + (flat * length + i)[:, None] * V.features
    for e in range(0, V.features, V.chunk):
        value = tiles.load_features(pointers, e, V.features, V.chunk, V.widen)
        feature = e + tl.arange(0, V.chunk)
        out = tl.dot(p.to(V.product), value.to(V.product), input_precision=V.plan_precision, out_dtype=C.acc)
        if C.bin_value:
            learned = tl.load(A.bin_value + flat * V.features + feature, mask=feature < V.features, other=0.0)
            out += (to_bin / divisor)[:, None] * learned.to(C.acc)[None, :]
        tl.store(place + feature[None, :], out, mask=(i < length)[:, None] & (feature < V.features)[None, :])


@triton.jit
def largest(error):
    """The largest entry; NaN, if one is."""
    return tl.where(tl.max(tl.where(error != error, 1, 0), 0) == 1, float("nan"), tl.max(error, 0))


def forward(inputs: Inputs, problem: Problem, residuals: bool = True) -> Result:
    """Launch it. Without a value there are duals alone, and the output is empty."""
    prepared = prepare(inputs, problem, residuals)
    solver, case = problem.solver, prepared.case
    num, heads, length, size = problem.sizes
    bins, duals = problem.num_dustbins, solver.kept + 1

    def new(*shape: int) -> Tensor:
        return inputs.query.new_empty(shape, dtype=prepared.dtype)

    results: dict[str, Any] = {
        "scratch": new(num * heads, 2, case.cols),
        "row_potential": new(duals, num, heads, length + bins),
        "col_potential": new(duals, num, heads, size + bins),
    }
    if case.output:
        results["output"] = new(num, heads, length, prepared.values.features)
        results["row_residual"], results["col_residual"] = new(num, heads), new(num, heads)
        results["to_bin"], results["from_bin"] = (
            (new(num, heads, length), new(num, heads, size)) if case.dustbin else (new(0), new(0))
        )
        if not residuals:
            results["row_residual"].fill_(torch.nan)
            results["col_residual"].fill_(torch.nan)
    arguments = prepared.arguments._replace(**results)
    seed = inputs.query if problem.dropout_seed is None else problem.dropout_seed
    launch(
        forward_kernel,
        (num * heads,),
        arguments,
        solver.stopped,
        solver.kept,
        seed,
        threshold(solver.dropout_p),
        **prepared.constants,
        num_warps=warps(case.rows, case.cols, 0 if case.plain else 1),
        num_stages=1,
    )
    potentials = Potentials(arguments.row_potential, arguments.col_potential)
    if not case.output:
        return Result(new(0), potentials, *(new(0) for _ in range(4)))
    return Result(
        arguments.output,
        potentials,
        arguments.row_residual,
        arguments.col_residual,
        arguments.to_bin,
        arguments.from_bin,
    )
