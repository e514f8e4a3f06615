"""A problem as the arguments of the resident kernels: pointers, numbers, and what they are compiled for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.triton import interpreted
from torch_sinkhorn_attn.engines.triton.layout import LOG2E, Layout, Lines, Mask, Number, Static, power_of_two
from torch_sinkhorn_attn.options import plain_iterations
from torch_sinkhorn_attn.problem.problem import Inputs, Problem

BLOCK = 32  # columns at once where a plan is not in registers
LARGEST_CHUNK = 64  # features of a product at once, beside a plan in registers

# Warps of a program by the entries of its plan: plain forward, forward of other bases, backward. A thread has 255
# registers. 128 of them for the plan leave room for the vectors of a plain iteration, and fewer threads exchange less.
WARPS = {128 * 128: (4, 8, 8), 64 * 128: (4, 4, 4), 64 * 64: (2, 4, 4), 32 * 64: (1, 2, 2)}


def warps(rows: int, cols: int, kind: int) -> int:
    """Warps of a program with `rows` x `cols` entries; kind 0, 1 or 2 as in `WARPS`.

    >>> warps(128, 128, 0), warps(64, 32, 0), warps(16, 16, 2)
    (4, 1, 1)
    """
    found = 1
    for entries, counts in sorted(WARPS.items()):
        if rows * cols >= entries:
            found = counts[kind]
    return found


class Arguments(NamedTuple):
    """What kernels read and write. Where a problem has none of it, any tensor stands in."""

    rows: Lines
    cols: Lines
    value: Lines
    mask: Mask
    scale: Number  # scale / epsilon * log2 e
    heads: int
    row_mass: Tensor  # logarithms [N, H, L], [N, H, S], and of the dustbin's capacities [N, H, 1]
    col_mass: Tensor
    row_capacity: Tensor
    col_capacity: Tensor
    row_score: Tensor  # [N, H, L], [N, H, S], [N, H], [N, H, Ev]
    col_score: Tensor
    corner_score: Tensor
    bin_value: Tensor
    dustbin_scale: Number  # log2 e / epsilon
    rho_row: Number
    rho_col: Number
    omega: Number
    tolerance: Number  # * log2 e
    contraction: Number
    keep_scale: Number  # 1 / (1 - dropout_p)
    initial_row: Tensor
    initial_col: Tensor
    scratch: Tensor  # [N*H, 2, COLS]
    row_potential: Tensor  # [R+1, N, H, L(+1)]
    col_potential: Tensor
    output: Tensor  # [N, H, L, Ev]
    row_residual: Tensor  # [N, H]
    col_residual: Tensor
    to_bin: Tensor  # [N, H, L]
    from_bin: Tensor  # [N, H, S]


class Case(NamedTuple):
    """What they are compiled for."""

    rows: int  # of the tile: a power of two that holds the dustbin's line too
    cols: int
    acc: Any  # tl.float32 or tl.float64
    fast: bool  # whether there is NVIDIA's assembly
    dustbin: bool
    bin_value: bool
    relaxed: bool
    relaxed_rows: bool
    plain: bool  # base: balanced, no option
    over_relaxed: bool
    tolerance: bool
    accelerated: bool
    measured: bool  # the contraction of an accelerated base is
    plain_iterations: int
    initial: bool
    centre: bool
    components: bool  # the support may have more than one
    differentiated: bool  # R > 0
    terms: int  # of the adjoint's field, max(2 R, 1); 0 for the forward, which is compiled for any R
    dropout: bool
    output: bool
    residuals: bool


class Prepared(NamedTuple):
    """Arguments, and constants: tiles of all columns, of blocks of them, of values, and the case."""

    arguments: Arguments
    whole: Static
    blocks: Static
    values: Static
    case: Case
    dtype: torch.dtype

    @property
    def constants(self) -> dict[str, Any]:
        return {"S": self.whole, "B": self.blocks, "V": self.values, "C": self.case}


def prepare(inputs: Inputs, problem: Problem, residuals: bool = False, adjoint: bool = False) -> Prepared:
    """Arguments without results. The adjoint's case does not tell how the base was made."""
    solver, marginals, support = problem.solver, problem.marginals, problem.support
    outline = problem.outline
    layout = Layout.of(inputs, replace(problem, outline=replace(outline, banded=False)))  # intervals of rows are enough
    rows, static = layout.rows, layout.static
    if outline.banded:
        static = static._replace(banded=True)
        rows = rows._replace(lo=support.row_lo.contiguous(), hi=support.row_hi.contiguous())
    _, heads, length, size = problem.sizes
    bins = problem.num_dustbins
    sides = power_of_two(length + bins), power_of_two(size + bins)
    chunk = min(LARGEST_CHUNK, static.chunk)
    whole = static._replace(outer=sides[0], inner=sides[1], chunk=chunk)
    block = sides[1] if interpreted() else min(BLOCK, sides[1])
    value_width = 0 if inputs.value is None else inputs.value.shape[-1]
    values = whole._replace(features=value_width, chunk=min(LARGEST_CHUNK, power_of_two(value_width)))
    other = inputs.query

    def given(x: Tensor | None) -> Tensor:
        return other if x is None else x.contiguous()

    arguments = Arguments(
        rows=rows,
        cols=layout.cols,
        value=layout.cols if layout.values is None else layout.values,
        mask=layout.row_mask,
        scale=layout.scale,
        heads=heads,
        row_mass=marginals.log_row_mass.contiguous(),
        col_mass=marginals.log_col_mass.contiguous(),
        row_capacity=given(marginals.log_row_capacity),
        col_capacity=given(marginals.log_col_capacity),
        row_score=given(inputs.row_score),
        col_score=given(inputs.col_score),
        corner_score=given(inputs.corner_score),
        bin_value=given(inputs.dustbin_value),
        dustbin_scale=Number.of(LOG2E / solver.epsilon),
        rho_row=Number.of(solver.rho_row),
        rho_col=Number.of(solver.rho_col),
        omega=Number.of(solver.over_relaxation),
        tolerance=Number.of(solver.tolerance * LOG2E),
        contraction=Number.of(solver.contraction),
        keep_scale=Number.of(1 / (1 - solver.dropout_p)),
        initial_row=given(problem.initial_row),
        initial_col=given(problem.initial_col),
        **dict.fromkeys(Arguments._fields[-8:], other),
    )
    base = solver.stopped > 0 and not adjoint
    accelerated = base and solver.acceleration is not None
    over_relaxed, tolerance = base and solver.over_relaxation != 1, base and solver.tolerance > 0
    case = Case(
        rows=sides[0],
        cols=sides[1],
        acc=static.acc,
        fast=not interpreted() and torch.version.hip is None,
        dustbin=problem.has_dustbin,
        bin_value=inputs.dustbin_value is not None,
        relaxed=not solver.balanced,
        relaxed_rows=solver.rho_row != 1,
        plain=not base or (solver.balanced and not (over_relaxed or tolerance or accelerated)),
        over_relaxed=over_relaxed,
        tolerance=tolerance,
        accelerated=accelerated,
        measured=accelerated and solver.contraction == 0,
        plain_iterations=plain_iterations(solver.contraction) if accelerated else 0,
        initial=problem.initial_row is not None and not adjoint,
        centre=base and solver.balanced,
        components=base and solver.balanced and outline.banded and not problem.has_dustbin,
        differentiated=solver.kept > 0,
        terms=max(2 * solver.kept, 1) if adjoint else 0,
        dropout=problem.dropout_seed is not None,
        output=inputs.value is not None,
        residuals=residuals,
    )
    return Prepared(arguments, whole, whole._replace(inner=block), values, case, layout.dtype)


def threshold(dropout_p: float) -> int:
    """The smallest number of 32 bits that keeps an entry, as in `method.dropout`."""
    return int(dropout_p * 2**32)
