"""Certificates at run time: how balanced the plan is, how fast the iteration contracts, how far the surrogate's
gradient is from the implicit one. Everything but `exact_diameter` takes O(n W) time and O(n) memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from torch_sinkhorn_attn.compat.tracing import one_node
from torch_sinkhorn_attn.engines import ENGINES, REFERENCE, choose, engine_of
from torch_sinkhorn_attn.engines.tiled.engine import TiledPasses, attention_output, marginal_errors
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.functional import refuse_unknown
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.method.implicit import NormalPlan
from torch_sinkhorn_attn.method.staircase import Factor, Field, implicit_field, tail_field
from torch_sinkhorn_attn.options import CONVERGED_WITHIN
from torch_sinkhorn_attn.problem.arguments import Keywords, prepare
from torch_sinkhorn_attn.problem.mass_scale import MassScale
from torch_sinkhorn_attn.problem.problem import OutputGrads, Potentials, Problem, full_precision
from torch_sinkhorn_attn.problem.segments import Components, by_segment, components, segment_max, segment_sum, segments
from torch_sinkhorn_attn.problem.status import Status, judge
from torch_sinkhorn_attn.problem.tensor_kinds import check_kind

POWER_ITERS = 100


@dataclass(frozen=True)
class Certificate:
    """What `certify` found, per batch element, head and (when packed) segment: tensors `(..., H)` or `(..., H, G)`.

    Attributes:
        row_residual_l1, row_residual_max: L1 and L-infinity norm of P 1 - a at the returned duals.
        col_residual_l1, col_residual_max: of P^T 1 - b. On a relaxed side the marginal is penalised, not enforced.
        positive: whether every pair of active tokens (the dustbin's included) is in the support.
        diameter: upper bound of the projective diameter Delta of exp(S) (Delta itself with `exact_diameter`); inf where
            not positive.
        contraction: Birkhoff-Hopf factor kappa = tanh(Delta/4) of one half-step in Hilbert's metric, at any iterate;
            1 = not certified.
        rate: a-posteriori rate per plain iteration near the fixed point: second singular value squared of
            diag(P1)^(-1/2) P diag(P^T 1)^(-1/2) (relaxed: rho_r rho_c times the first), by power iteration, which
            approaches it from below.
        dropped: L1 norm of the cotangent the surrogate drops, for the probe's or your cotangent.
        bias_bound: certified bound of ||dS_unrolled - dS_tail||_1, unrolled through the iterations that were taken, at
            most T; inf = not certified (a zero in the block, kappa = 1, a relaxed side, or an over-relaxed or
            accelerated base, whose half-steps kappa does not bound).
        implicit_bias_bound: the same against the implicit gradient, whatever the base; holds at converged duals.
        measured_bias: ||dS_tail - dS_implicit||_1, both evaluated at the returned plan, with your options' gradient in
            place of the tail.
        implicit_norm: ||dS_implicit||_1, what to divide `measured_bias` by.
        status: int8, a `Status`: converged, not converged, or no plan. Without a plan there are no potentials to
            converge to, and the numbers above are those of an iterate on its way to nowhere.
        reasons: in words, why problems without a plan have none.
    """

    row_residual_l1: Tensor
    row_residual_max: Tensor
    col_residual_l1: Tensor
    col_residual_max: Tensor
    positive: Tensor
    diameter: Tensor
    contraction: Tensor
    rate: Tensor
    dropped: Tensor
    bias_bound: Tensor
    implicit_bias_bound: Tensor
    measured_bias: Tensor
    implicit_norm: Tensor
    status: Tensor
    reasons = ()  # no field: all of these are tensors

    @property
    def relative_bias(self) -> Tensor:
        """measured_bias / implicit_norm, 0 where both vanish."""
        return torch.where(self.implicit_norm > 0, self.measured_bias / self.implicit_norm, 0.0)

    def __str__(self) -> str:
        return _table(self)

    __repr__ = __str__


@one_node
def certify(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    value: Tensor | None = None,
    grad_output: Tensor | None = None,
    exact_diameter: bool = False,
    **options: Unpack[Keywords],
) -> Certificate:
    """Certificates of the plan that `sinkhorn_attention` computes with the same options (dropout aside).

    The bias of a gradient depends on the cotangent it is given. Pass your `value` and `grad_output` for the exact case;
    by default a Gaussian probe drawn from a fixed seed stands in for what is missing.

    Args:
        query, key, attn_mask, options: as `sinkhorn_attention`.
        value: `(..., Hk, S, Ev)`.
        grad_output: `(..., H, L, Ev)`, dL/dO; needs `value`.
        exact_diameter: compute Delta itself in O(n^2 m) instead of its one-pass bound 2 (max log P - min log P).

    Returns:
        A frozen `Certificate`; print it for a table. Of XLA tensors it is on the CPU: only the plan is computed there.

    Raises:
        TypeError, ValueError: as `sinkhorn_attention`, or for `grad_output` without `value` or of the wrong shape.

    >>> import torch
    >>> q, k = (torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    >>> certificate = certify(q, k, base_iters=50)
    >>> bool(certificate.positive.all()), bool((certificate.contraction < 1).all())
    (True, True)
    >>> bool((certificate.measured_bias <= certificate.implicit_bias_bound).all())
    True
    >>> certify(q, k, window=(2, 2)).contraction  # a band has zeros: not certified
    tensor([1.], dtype=torch.float64)
    """
    refuse_unknown("certify", options)
    if grad_output is not None and value is None:
        raise ValueError("certify got grad_output without value; pass both, or neither for the probe.")
    for name, x in (("query", query), ("value", value), ("grad_output", grad_output)):
        if isinstance(x, Tensor):
            check_kind(name, x)
    options = {**options, "dropout_p": 0.0}
    with torch.no_grad(), full_precision(query.device):
        if value is None:
            value = _probe(key.shape, key, seed=0)
        prepared = prepare(query.detach(), key.detach(), value.detach(), attn_mask, **options)
        inputs, problem = prepared.inputs, prepared.problem
        shape = (*query.shape[:-1], value.shape[-1])
        if grad_output is None:
            grad_output = _probe(shape, query, seed=1)
        elif grad_output.shape != shape:
            raise ValueError(
                f"grad_output has shape {tuple(grad_output.shape)}; the output's, {tuple(shape)}, is needed."
            )
        engine = choose(prepared.engine, inputs, problem)
        if engine == REFERENCE:
            _, potentials = reference.plan_and_potentials(reference.dense_problem(inputs, problem), problem)
        else:
            potentials = ENGINES[engine].solve(inputs, problem)
        given = inputs, problem, potentials, grad_output  # what is found in them decides what is computed next
        inputs, problem, potentials, grad_output = engine_of(query.device).fetched(given)
        tiles = Tiles(inputs, problem).at(potentials.row[-1], potentials.col[-1])
        found = _certificate(
            tiles, potentials, grad_output.reshape(inputs.query.shape[0], *grad_output.shape[-3:]), exact_diameter,
            prepared.scale,
        )  # fmt: skip
        packed = problem.support.row_segment is not None
        residuals = tuple(found[k].cpu().double() for k in (1, 3))
        status, reasons = judge(residuals, CONVERGED_WITHIN, prepared.existence, by_segment=packed)
        found = (*found, status.to(found[0].device))
        certificate = Certificate(*(prepared.unflatten(x if packed else x[..., 0]) for x in found))
        object.__setattr__(certificate, "reasons", tuple(reasons))
        return certificate


class _Segments:
    """Sums and maxima of augmented row or column vectors by problem, `[N, H, n(+G)]` to `[N, H, G]`."""

    def __init__(self, problem: Problem):
        self.row, self.col, self.count = segments(problem)

    def sum(self, x: Tensor, index: Tensor | None) -> Tensor:
        return segment_sum(x, index, self.count)

    def max(self, x: Tensor, index: Tensor | None) -> Tensor:
        return segment_max(x, index, self.count)


def _certificate(
    tiles: Tiles, potentials: Potentials, grad_output: Tensor, exact_diameter: bool, scale: MassScale | None
) -> tuple[Tensor, ...]:
    problem, by = tiles.problem, _Segments(tiles.problem)
    row_error, col_error = (x.abs() for x in marginal_errors(tiles, scale))
    positive, spread = _log_plan_spread(tiles, by)
    diameter = _exact_diameter(tiles, by) if exact_diameter else 2 * spread
    diameter = torch.where(positive, diameter, torch.inf)
    contraction = torch.where(positive, (diameter / 4).tanh(), 1.0)
    parts = _exact_components(tiles)
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


def _log_plan_spread(tiles: Tiles, by: _Segments) -> tuple[Tensor, Tensor]:
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


def _exact_diameter(tiles: Tiles, by: _Segments) -> Tensor:
    """Delta = max over i, k, j, l of S_ij + S_kl - S_il - S_kj, dense and in O(n^2 m)."""
    scores = reference.dense_problem(tiles.inputs, tiles.problem).scores
    diameter = scores.new_zeros(tiles.num, tiles.heads, by.count)
    for i in range(scores.shape[-2]):
        inside = (scores > -torch.inf) & (scores[..., i : i + 1, :] > -torch.inf)
        gap = scores[..., i : i + 1, :] - scores
        span = gap.masked_fill(~inside, -torch.inf).amax(-1) + (-gap).masked_fill(~inside, -torch.inf).amax(-1)
        diameter = torch.maximum(diameter, by.max(span, by.row))
    return diameter


def convergence_rate(tiles: Tiles, parts: Components, by: _Segments, max_iters: int = POWER_ITERS) -> Tensor:
    """Largest eigenvalue of rho_r rho_c N^T N, N = diag(r)^(-1/2) P diag(c)^(-1/2), off the null vectors if
    balanced."""
    problem = tiles.problem
    normal = NormalPlan(tiles, problem, parts)
    x = _probe(tiles.v.shape, tiles.v, seed=2) * (normal.root > 0)
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


def _field_distance(tiles: Tiles, fields: _Fields, by: _Segments) -> tuple[Tensor, Tensor]:
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


def _exact_components(tiles: Tiles) -> Components:
    """Connected components of the support with its mask, by spreading the smallest row label (with pointer jumping)."""
    problem = tiles.problem
    if tiles.inputs.mask is None or tiles.bins:
        return components(problem)
    far = tiles.length
    row = torch.arange(far, device=tiles.u.device).expand(tiles.num, tiles.heads, far).clone()
    col = row.new_full((tiles.num, tiles.heads, tiles.size), far)
    while True:
        before = row.clone()
        for i, rows in enumerate(tiles.row_blocks):
            for j in tiles.columns(i):
                cols, inside = tiles.col_blocks[j], tiles.log_plan(i, j) > -torch.inf
                from_rows = torch.where(inside, row[..., rows, None], far).amin(-2)
                col[..., cols] = torch.minimum(col[..., cols], from_rows)
                from_cols = torch.where(inside, col[..., None, cols], far).amin(-1)
                row[..., rows] = torch.minimum(row[..., rows], from_cols)
        row = row.gather(-1, row)
        if torch.equal(row, before):
            return Components(row, col.clamp(max=max(0, far - 1)), max(1, far))


def _probe(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(like)


def _table(c: Certificate, most_rows: int = 24) -> str:
    head = ["index", "status", "row residual", "col residual"]
    head += ["contraction", "rate", "bias bound", "measured bias", "relative"]
    lines = []
    places = torch.ones(c.rate.shape, dtype=torch.bool, device="cpu").nonzero().tolist()
    for index in places:
        at = tuple(index)
        kappa, bound, status = c.contraction[at].item(), c.bias_bound[at].item(), Status(int(c.status[at]))
        exists = status != Status.NO_PLAN
        lines.append([
            ",".join(map(str, index)), status.words, f"{c.row_residual_max[at]:.2e}", f"{c.col_residual_max[at]:.2e}",
            f"{kappa:.6f}" if kappa < 1 else "not certified", f"{c.rate[at]:.6f}" if exists else "-",
            f"{bound:.2e}" if bound < torch.inf else "not certified",
            f"{c.measured_bias[at]:.2e}" if exists else "-", f"{100 * c.relative_bias[at]:.3g} %" if exists else "-",
        ])  # fmt: skip
    hidden = len(lines) - most_rows
    lines = [head, *lines[:most_rows]]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    text = "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
    text += f"\n... and {hidden} more" if hidden > 0 else ""
    counts = [(status, int((c.status == status).sum())) for status in (Status.NO_PLAN, Status.NOT_CONVERGED)]
    verdict = ", ".join(f"{status.words}: {count} of {c.status.numel()}" for status, count in counts if count)
    return text + (f"\n{verdict}" if verdict else "") + (f". {c.reasons[0]}" if c.reasons else "")
