"""The exact certificates, tile by tile: everything but `exact_diameter` takes O(n W) time and O(n) memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from torch_sinkhorn_attn.problem.segments import Components, by_segment
from torch_sinkhorn_attn.thermometer.probes import probe

POWER_ITERS = 100


class Solved(NamedTuple):
    """A problem at its potentials, and what the exact numbers are computed with. Where its lines lie on several devices
    (`distributed.certificates`), each has its own part of it."""

    tiles: Tiles
    potentials: Potentials
    passes: TiledPasses  # for the cotangent of the output
    parts: Components  # of the support with its mask
    start: Tensor  # of the power iteration, [N, H, S(+G)]
    scores: Callable[[], Tensor]  # dense and augmented, of all lines
    all_own: Components  # the problem of each of all lines


def solved(tiles: Tiles, potentials: Potentials, grad_output: Tensor) -> Solved:
    """On one device."""
    passes = TiledPasses(tiles, attention_output(tiles), OutputGrads(grad_output))
    parts = masked_components(tiles.inputs, tiles.problem)
    start = power_start(tiles.v.shape, tiles.v)

    def scores() -> Tensor:
        return reference.dense_problem(tiles.inputs, tiles.problem).scores

    return Solved(tiles, potentials, passes, parts, start, scores, tiles.own)


def power_start(shape: Sequence[int], like: Tensor) -> Tensor:
    return probe(shape, like, seed=2)


class ByProblem:
    """Sums and maxima by problem, `[N, H, n]` to `[N, H, G]`, of vectors with or without the dustbins' entries."""

    def __init__(self, tiles: Tiles):
        self.own, self.bins = tiles.own, tiles.bins
        self.rows, self.cols = tiles.length + tiles.bins, tiles.size + tiles.bins

    def row_sum(self, x: Tensor) -> Tensor:
        return self.own.row_sum(self._wide(x, self.rows, 0))

    def col_sum(self, x: Tensor) -> Tensor:
        return self.own.col_sum(self._wide(x, self.cols, 0))

    def row_max(self, x: Tensor) -> Tensor:
        return self.own.row_max(self._wide(x, self.rows, -torch.inf))

    def col_max(self, x: Tensor) -> Tensor:
        return self.own.col_max(self._wide(x, self.cols, -torch.inf))

    def _wide(self, x: Tensor, count: int, fill: float) -> Tensor:
        return x if x.shape[-1] == count else torch.nn.functional.pad(x, (0, self.bins), value=fill)


def exact_numbers(at: Solved, exact_diameter: bool, scale: MassScale | None) -> tuple[Any, ...]:
    """The fields of a `Certificate` up to its status, `[N, H, G]` each."""
    tiles = at.tiles
    problem, by = tiles.problem, ByProblem(tiles)
    row_error, col_error = (x.abs() for x in marginal_errors(tiles, scale))
    positive, spread = _log_plan_spread(tiles, by)
    diameter = _exact_diameter(at.scores(), at.all_own) if exact_diameter else 2 * spread
    diameter = torch.where(positive, diameter, torch.inf)
    contraction = torch.where(positive, (diameter / 4).tanh(), 1.0)
    fields = _fields(at)
    rows_dropped = problem.solver.gradient == "implicit" or problem.solver.kept > 0
    dropped = (by.row_sum if rows_dropped else by.col_sum)(fields.dropped.abs())
    bound, implicit_bound = _bias_bounds(dropped, contraction, problem)
    measured, norm = _field_distance(at, fields, by)
    return (
        by.row_sum(row_error), by.row_max(row_error).clamp(min=0),
        by.col_sum(col_error), by.col_max(col_error).clamp(min=0),
        positive, diameter, contraction, convergence_rate(at, by),
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


def _log_plan_spread(tiles: Tiles, by: ByProblem) -> tuple[Tensor, Tensor]:
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
    pairs = by.row_sum(real_rows.long()) * by.col_sum(real_cols.long())
    positive = by.row_sum(count) == pairs
    largest, smallest = by.row_max(most), -by.row_max(-least)
    if tiles.bins:
        to_bin, from_bin, corner = tiles.log_dustbin_plan
        largest = torch.stack([largest, by.row_max(to_bin), by.col_max(from_bin), corner]).amax(0)
        to_bin, from_bin, corner = (x.masked_fill(x == -torch.inf, torch.inf) for x in (to_bin, from_bin, corner))
        smallest = torch.stack([smallest, -by.row_max(-to_bin), -by.col_max(-from_bin), corner]).amin(0)
    spread = largest - smallest
    return positive, torch.where(spread.isnan(), 0.0, spread).clamp(min=0)


def _exact_diameter(scores: Tensor, own: Components) -> Tensor:
    """Delta = max over i, k, j, l of S_ij + S_kl - S_il - S_kj, dense and in O(n^2 m)."""
    diameter = scores.new_zeros(*scores.shape[:2], own.number)
    for i in range(scores.shape[-2]):
        inside = (scores > -torch.inf) & (scores[..., i : i + 1, :] > -torch.inf)
        gap = scores[..., i : i + 1, :] - scores
        span = gap.masked_fill(~inside, -torch.inf).amax(-1) + (-gap).masked_fill(~inside, -torch.inf).amax(-1)
        diameter = torch.maximum(diameter, own.row_max(span))
    return diameter


def convergence_rate(at: Solved, by: ByProblem, max_iters: int = POWER_ITERS) -> Tensor:
    """Largest eigenvalue of rho_r rho_c N^T N, N = diag(r)^(-1/2) P diag(c)^(-1/2), off the null vectors if
    balanced."""
    problem, own = at.tiles.problem, at.tiles.own
    normal = NormalPlan(at.tiles, problem, at.parts)
    x = at.start * (normal.root > 0)
    rate = x.new_zeros(*x.shape[:-1], own.number)
    for _ in range(max_iters):
        x = normal.project(x)
        size = by.col_sum(x * x).sqrt()
        x = x * by_segment(torch.where(size > 0, 1 / size, 0.0), own.col, x.shape[-1])
        image = normal.gram(x)
        previous, rate = rate, by.col_sum(x * image)
        x = image
        if ((rate - previous).abs() <= 1e-6 * rate).all():
            break
    return (problem.solver.rho_row * problem.solver.rho_col * rate).clamp(min=0)


class _Fields(NamedTuple):
    surrogate: Field
    implicit: Field
    dropped: Tensor


def _fields(at: Solved) -> _Fields:
    """Modifier fields of the gradient asked for and of the implicit one, for the same cotangent."""
    tiles, passes, problem = at.tiles, at.passes, at.tiles.problem
    zero = Factor(torch.zeros_like(tiles.u), torch.zeros_like(tiles.v), scaled=True)
    passes.column(zero.row, zero)
    implicit = implicit_field(tiles, passes.row_sums, passes.column_sums(), problem, at.parts, tiles.own)
    if problem.solver.gradient == "implicit":
        return _Fields(implicit, implicit, zero.row)
    surrogate, dropped = tail_field(passes, at.potentials, problem)
    return _Fields(surrogate, implicit, dropped)


def _field_distance(at: Solved, fields: _Fields, by: ByProblem) -> tuple[Tensor, Tensor]:
    """(||dS_surrogate - dS_implicit||_1, ||dS_implicit||_1) by problem, tile by tile."""
    tiles, d, (one, other) = at.tiles, at.passes.d, (fields.surrogate, fields.implicit)
    distance, norm = torch.zeros_like(tiles.u), torch.zeros_like(tiles.u)
    for i, rows in enumerate(tiles.row_blocks):
        for j in tiles.columns(i):
            first = tiles.score_cotangent(d.grad, one, i, j)
            second = tiles.score_cotangent(d.grad, other, i, j)
            norm[..., rows] += second.abs().sum(-1)
            distance[..., rows] += first.sub_(second).abs().sum(-1)
    distance, norm = by.row_sum(distance), by.row_sum(norm)
    if tiles.dustbin is None or d.to_bin is None or d.from_bin is None:
        return distance, norm
    bins_one, bins_other = (
        tiles.dustbin.score_cotangent(tiles.log_dustbin_plan, d.to_bin, d.from_bin, field) for field in (one, other)
    )
    for x, y, total in zip(bins_one[:2], bins_other[:2], (by.row_sum, by.col_sum), strict=True):
        distance, norm = distance + total((x - y).abs()), norm + total(y.abs())
    return distance + (bins_one[2] - bins_other[2]).abs(), norm + bins_other[2].abs()
