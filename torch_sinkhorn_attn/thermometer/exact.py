"""The exact certificates, tile by tile: everything but `exact_diameter` takes O(n W) time and O(n) memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.tiled.engine import TiledPasses, attention_output, marginal_errors
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.method.implicit import NormalPlan
from torch_sinkhorn_attn.method.staircase import Factor, Field, implicit_field, tail_field
from torch_sinkhorn_attn.problem.feasibility.parts import masked_components
from torch_sinkhorn_attn.problem.mass_scale import MassScale
from torch_sinkhorn_attn.problem.problem import OutputGrads, Potentials, Problem
from torch_sinkhorn_attn.problem.segments import Components, by_segment, segment_max, segment_sum, segments
from torch_sinkhorn_attn.thermometer.probes import probe

POWER_ITERS = 100


class BySegment:
    """Sums and maxima of augmented row or column vectors by problem, `[N, H, n(+G)]` to `[N, H, G]`."""

    def __init__(self, problem: Problem):
        self.row, self.col, self.count = segments(problem)

    def sum(self, x: Tensor, index: Tensor | None) -> Tensor:
        return segment_sum(x, index, self.count)

    def max(self, x: Tensor, index: Tensor | None) -> Tensor:
        return segment_max(x, index, self.count)


def exact_numbers(
    tiles: Tiles, potentials: Potentials, grad_output: Tensor, exact_diameter: bool, scale: MassScale | None
) -> tuple[Any, ...]:
    """The fields of a `Certificate` up to its status, `[N, H, G]` each."""
    problem, by = tiles.problem, BySegment(tiles.problem)
    row_error, col_error = (x.abs() for x in marginal_errors(tiles, scale))
    positive, spread = _log_plan_spread(tiles, by)
    diameter = _exact_diameter(tiles, by) if exact_diameter else 2 * spread
    diameter = torch.where(positive, diameter, torch.inf)
    contraction = torch.where(positive, (diameter / 4).tanh(), 1.0)
    parts = masked_components(tiles.inputs, problem)
    fields = _fields(tiles, potentials, grad_output, parts)
    rows_dropped = problem.solver.gradient == "implicit" or problem.solver.kept > 0
    dropped = by.sum(fields.dropped.abs(), by.row if rows_dropped else by.col)
    bound, implicit_bound = _bias_bounds(dropped, contraction, problem)
    measured, norm = _field_distance(tiles, fields, by)
    return (
        by.sum(row_error, by.row), by.max(row_error, by.row).clamp(min=0),
        by.sum(col_error, by.col), by.max(col_error, by.col).clamp(min=0),
        positive, diameter, contraction, convergence_rate(tiles, parts, by),
        dropped, bound, implicit_bound, measured, norm,
    )  # fmt: skip


def _bias_bounds(dropped: Tensor, kappa: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """||z0||_1 (1 - kappa^h) / (1 - kappa) for the h dropped half-steps (2T, or 2T - 1 for R = 0), and for h -> inf.
    A base that stopped early dropped fewer, which the bound for T covers; kappa is not that of half-steps that are not
    plain."""
    base, tail = problem.solver.stopped, problem.solver.kept
    half_steps = 2 * base - (tail == 0 and base > 0)
    certified = kappa < 1 if problem.solver.balanced else torch.zeros_like(kappa, dtype=torch.bool)
    if problem.solver.gradient == "implicit":  # drops nothing of its own, and says nothing of the unrolled one
        return torch.full_like(dropped, torch.inf), torch.where(certified, 0.0, torch.inf)
    geometric = torch.where(certified, 1 / (1 - kappa), torch.inf)
    against_unrolled = dropped * (1 - kappa**half_steps) * geometric
    if half_steps == 0:  # nothing is dropped on the way to u = 0
        against_unrolled = torch.zeros_like(dropped)
    plain = certified & problem.solver.plain_base
    return (
        torch.where(plain | (half_steps == 0), against_unrolled, torch.inf),
        torch.where(certified, dropped * geometric, torch.inf),
    )


def _log_plan_spread(tiles: Tiles, by: BySegment) -> tuple[Tensor, Tensor]:
    """Whether each problem's active block is positive, and max log P - min log P over its support."""
    shape = (tiles.num, tiles.heads, tiles.length)
    most, least = tiles.u.new_full(shape, -torch.inf), tiles.u.new_full(shape, torch.inf)
    count = torch.zeros(shape, dtype=torch.int64, device=tiles.u.device)  # float32 would lose a zero in 2^24 pairs
    for i, rows in enumerate(tiles.row_blocks):
        for j in tiles.columns(i):
            log_plan = tiles.log_plan(i, j)
            inside = log_plan > -torch.inf
            most[..., rows] = torch.maximum(most[..., rows], log_plan.amax(-1))
            least[..., rows] = torch.minimum(least[..., rows], log_plan.masked_fill(~inside, torch.inf).amin(-1))
            count[..., rows] += inside.sum(-1)
    live_rows, live_cols = (~dead for dead in (tiles.row_dead, tiles.col_dead))
    real_rows, real_cols = live_rows[..., : tiles.length], live_cols[..., : tiles.size]
    row, col = (None if s is None else s[..., :n] for s, n in ((by.row, tiles.length), (by.col, tiles.size)))
    pairs = by.sum(real_rows.long(), row) * by.sum(real_cols.long(), col)
    positive = by.sum(count, row) == pairs
    largest, smallest = by.max(most, row), -by.max(-least, row)
    if tiles.bins:
        to_bin, from_bin, corner = tiles.log_dustbin_plan
        largest = torch.stack([largest, by.max(to_bin, row), by.max(from_bin, col), corner]).amax(0)
        to_bin, from_bin, corner = (x.masked_fill(x == -torch.inf, torch.inf) for x in (to_bin, from_bin, corner))
        smallest = torch.stack([smallest, -by.max(-to_bin, row), -by.max(-from_bin, col), corner]).amin(0)
    spread = largest - smallest
    return positive, torch.where(spread.isnan(), 0.0, spread).clamp(min=0)


def _exact_diameter(tiles: Tiles, by: BySegment) -> Tensor:
    """Delta = max over i, k, j, l of S_ij + S_kl - S_il - S_kj, dense and in O(n^2 m)."""
    scores = reference.dense_problem(tiles.inputs, tiles.problem).scores
    diameter = scores.new_zeros(tiles.num, tiles.heads, by.count)
    for i in range(scores.shape[-2]):
        inside = (scores > -torch.inf) & (scores[..., i : i + 1, :] > -torch.inf)
        gap = scores[..., i : i + 1, :] - scores
        span = gap.masked_fill(~inside, -torch.inf).amax(-1) + (-gap).masked_fill(~inside, -torch.inf).amax(-1)
        diameter = torch.maximum(diameter, by.max(span, by.row))
    return diameter


def convergence_rate(tiles: Tiles, parts: Components, by: BySegment, max_iters: int = POWER_ITERS) -> Tensor:
    """Largest eigenvalue of rho_r rho_c N^T N, N = diag(r)^(-1/2) P diag(c)^(-1/2), off the null vectors if
    balanced."""
    problem = tiles.problem
    normal = NormalPlan(tiles, problem, parts)
    x = probe(tiles.v.shape, tiles.v, seed=2) * (normal.root > 0)
    rate = x.new_zeros(*x.shape[:-1], by.count)
    for _ in range(max_iters):
        x = normal.project(x)
        size = by.sum(x * x, by.col).sqrt()
        x = x * by_segment(torch.where(size > 0, 1 / size, 0.0), by.col, x.shape[-1])
        image = normal.gram(x)
        previous, rate = rate, by.sum(x * image, by.col)
        x = image
        if ((rate - previous).abs() <= 1e-6 * rate).all():
            break
    return (problem.solver.rho_row * problem.solver.rho_col * rate).clamp(min=0)


class _Fields(NamedTuple):
    surrogate: Field
    implicit: Field
    dropped: Tensor
    passes: TiledPasses


def _fields(tiles: Tiles, potentials: Potentials, grad_output: Tensor, parts: Components) -> _Fields:
    """Modifier fields of the gradient asked for and of the implicit one, for the same cotangent."""
    passes = TiledPasses(tiles, attention_output(tiles), OutputGrads(grad_output))
    zero = Factor(torch.zeros_like(tiles.u), torch.zeros_like(tiles.v), scaled=True)
    passes.column(zero.row, zero)
    implicit = implicit_field(tiles, passes.row_sums, passes.column_sums(), tiles.problem, parts)
    if tiles.problem.solver.gradient == "implicit":
        return _Fields(implicit, implicit, zero.row, passes)
    surrogate, dropped = tail_field(passes, potentials, tiles.problem)
    return _Fields(surrogate, implicit, dropped, passes)


def _field_distance(tiles: Tiles, fields: _Fields, by: BySegment) -> tuple[Tensor, Tensor]:
    """(||dS_surrogate - dS_implicit||_1, ||dS_implicit||_1) by problem, tile by tile."""
    d, (one, other) = fields.passes.d, (fields.surrogate, fields.implicit)
    distance, norm = torch.zeros_like(tiles.u), torch.zeros_like(tiles.u)
    for i, rows in enumerate(tiles.row_blocks):
        for j in tiles.columns(i):
            first = tiles.score_cotangent(d.grad, one, i, j)
            second = tiles.score_cotangent(d.grad, other, i, j)
            norm[..., rows] += second.abs().sum(-1)
            distance[..., rows] += first.sub_(second).abs().sum(-1)
    distance, norm = by.sum(distance, by.row), by.sum(norm, by.row)
    if tiles.dustbin is None or d.to_bin is None or d.from_bin is None:
        return distance, norm
    bins_one, bins_other = (
        tiles.dustbin.score_cotangent(tiles.log_dustbin_plan, d.to_bin, d.from_bin, field) for field in (one, other)
    )
    index = (
        None if by.row is None else by.row[..., : tiles.length],
        None if by.col is None else by.col[..., : tiles.size],
    )
    for x, y, where in zip(bins_one[:2], bins_other[:2], index, strict=True):
        distance, norm = distance + by.sum((x - y).abs(), where), norm + by.sum(y.abs(), where)
    return distance + (bins_one[2] - bins_other[2]).abs(), norm + bins_other[2].abs()
