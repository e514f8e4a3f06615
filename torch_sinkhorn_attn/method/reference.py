"""The definition: dense, any dtype, differentiated by autograd (engine "reference"). Read this file to know what is
computed; every other engine is tested against it in float64.

The dustbin is an ordinary extra row and column here (one per segment), so the whole method is four lines of algebra on
the augmented scores `[N, H, L+G, S+G]`:

    v = rho_c (log b - LSE_i(S + u))        u = rho_r (log a - LSE_j(S + v))        P = exp(S + u + v)

Formulas: D. Forde, arXiv:2605.08123, in the order columns first, rows last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.compat.once import differentiable_once
from torch_sinkhorn_attn.method import acceleration
from torch_sinkhorn_attn.method.dropout import keep_mask
from torch_sinkhorn_attn.method.implicit import FIRST_ONLY, DensePlan, implicit_duals
from torch_sinkhorn_attn.method.partners import leading
from torch_sinkhorn_attn.problem.looking import can_look
from torch_sinkhorn_attn.problem.masks.entries import kept
from torch_sinkhorn_attn.problem.problem import (
    Inputs,
    Partners,
    Potentials,
    Problem,
    Result,
    compute_dtype,
    full_precision,
)
from torch_sinkhorn_attn.problem.segments import (
    Components,
    by_segment,
    centre_gauge,
    components,
    largest,
    mass_of,
    segments,
)


class Dense(NamedTuple):
    """The augmented problem as dense tensors: `scores [N, H, L+G, S+G]`, -inf off the support, and its log masses."""

    scores: Tensor
    log_a: Tensor  # [N, H, L+G]
    log_b: Tensor  # [N, H, S+G]


def forward(inputs: Inputs, problem: Problem) -> Result:
    """Attention by the definition. Differentiable in every tensor of `inputs`, twice unless the gradient is
    implicit."""
    assert inputs.value is not None
    dense = dense_problem(inputs, problem)
    plan, potentials = plan_and_potentials(dense, problem)
    length, size = problem.sizes[2:]
    real = plan[..., :length, :size]
    to_bin, from_bin = plan[..., :length, size:].sum(-1), plan[..., length:, :size].sum(-2)
    if problem.dropout_seed is not None:
        real = real * keep_mask(problem, real) / (1 - problem.solver.dropout_p)
    value = per_head(inputs.value, real.shape[1]).to(real.dtype)
    mass = real @ value
    if inputs.dustbin_value is not None:
        mass = mass + to_bin[..., None] * inputs.dustbin_value.to(real.dtype)[:, :, None]
    output = mass / mass_of(problem.marginals.log_row_mass.to(real.dtype))[..., None]
    row_residual, col_residual = marginal_residuals(plan.detach(), dense)
    empty = plan.new_zeros(0)
    if not problem.has_dustbin:
        to_bin, from_bin = empty, empty
    return Result(output, potentials, row_residual, col_residual, to_bin, from_bin)


def plan(inputs: Inputs, problem: Problem, log: bool = False) -> tuple[Tensor, Potentials]:
    """The plan `[N, H, L, S]`, or `[N, H, L+1, S+1]` with a dustbin (the last entries summed over segments); or its
    logarithm, S + u + v, which no exp has touched. And the stacked duals."""
    full, potentials = plan_and_potentials(dense_problem(inputs, problem), problem, log)
    return fold_dustbins(full, problem, log), potentials


def matches(inputs: Inputs, problem: Problem, k: int) -> Partners:
    """The k largest entries of each row and column of the plan."""
    dense = dense_problem(inputs, problem)
    full, _ = plan_and_potentials(dense, problem)
    length, size = problem.sizes[2:]
    real = full.masked_fill(dense.scores == -torch.inf, 0.0)[..., :length, :size]  # NaN is nobody's off the support
    rows, cols = leading(real, k), leading(real, k, dim=-2)
    bins = full[..., :length, size:].sum(-1), full[..., length:, :size].sum(-2)
    to_bin, from_bin = bins if problem.has_dustbin else (real.new_zeros(0), real.new_zeros(0))
    return Partners(rows.place, rows.mass, cols.place, cols.mass, to_bin, from_bin)


def fold_dustbins(full: Tensor, problem: Problem, log: bool = False) -> Tensor:
    """Sum the G dustbin rows and columns of an augmented plan `[..., L+G, S+G]`, or of its logarithm, to one each."""
    if problem.num_dustbins <= 1:
        return full
    total = log_sum if log else torch.sum
    length, size = problem.sizes[2:]
    rows = torch.cat([full[..., :length, :], total(full[..., length:, :], -2).unsqueeze(-2)], -2)
    return torch.cat([rows[..., :size], total(rows[..., size:], -1).unsqueeze(-1)], -1)


def unfold_dustbins(grad: Tensor, problem: Problem, log_plan: Tensor | None = None) -> Tensor:
    """The transpose of `fold_dustbins`: every dustbin row and column gets the cotangent of their sum; given the
    augmented log plan, that of the sum's logarithm, by its share."""
    extra = problem.num_dustbins - 1
    if extra < 1:
        return grad
    wide = torch.cat([grad, grad[..., -1:, :].expand(*grad.shape[:-2], extra, -1)], -2)
    wide = torch.cat([wide, wide[..., -1:].expand(*wide.shape[:-1], extra)], -1)
    if log_plan is None:
        return wide
    total = fold_dustbins(log_plan, problem, log=True)
    shares = (log_plan - unfold_dustbins(total, problem)).exp()
    return wide * shares.masked_fill(log_plan == -torch.inf, 0.0)


def log_sum(x: Tensor, dim: int) -> Tensor:
    """log sum exp, -inf with gradient 0 where all are -inf."""
    none = (x == -torch.inf).all(dim)
    return torch.logsumexp(x.masked_fill(none.unsqueeze(dim), 0.0), dim).masked_fill(none, -torch.inf)


def dense_problem(inputs: Inputs, problem: Problem) -> Dense:
    """Scores with mask, support and dustbin written out. The support is where both tokens are active, the interval
    holds the column, and the mask keeps it."""
    dtype = compute_dtype(inputs.query.dtype)
    query, key = inputs.query.to(dtype), per_head(inputs.key, inputs.query.shape[1]).to(dtype)
    scores = query @ key.transpose(-1, -2) * (problem.solver.scale / problem.solver.epsilon)
    support = torch.ones_like(scores, dtype=torch.bool)
    if problem.outline.banded:
        column = torch.arange(scores.shape[-1], device=scores.device)
        lo, hi = (x[:, None, :, None] for x in (problem.support.row_lo, problem.support.row_hi))
        support = support & (column >= lo) & (column < hi)
    if inputs.mask is not None:
        support = support & kept(inputs.mask, dtype)
        if inputs.mask.dtype != torch.bool:
            scores = scores + inputs.mask.to(dtype).masked_fill(~kept(inputs.mask, dtype), 0.0)
    log_a, log_b = (x.to(dtype) for x in problem.marginals.augmented)
    if problem.has_dustbin:
        scores, support = _with_dustbin_scores(scores, support, inputs, problem)
    support = support & (log_a > -torch.inf)[..., :, None] & (log_b > -torch.inf)[..., None, :]
    return Dense(scores.masked_fill(~support, -torch.inf), log_a, log_b)


def plan_and_potentials(dense: Dense, problem: Problem, log: bool = False) -> tuple[Tensor, Potentials]:
    """Solve and return the augmented plan, or its logarithm, differentiable as `problem.solver.gradient` says, with the
    tail's duals."""
    parts = components(problem)
    solver = problem.solver
    stopped, differentiated = solver.stopped, solver.kept
    rho_r, rho_c, omega = solver.rho_row, solver.rho_col, solver.over_relaxation
    implicit = solver.gradient == "implicit"
    with torch.no_grad():
        held = dense.scores.detach()  # no_grad alone would let forward-mode tangents through
        u, v = stopped_base(
            _initial(problem.initial_row, dense.log_a),
            _initial(problem.initial_col, dense.log_b),
            lambda u, v: half_step(held, u, dense.log_b, rho_c, dim=-2, old=v, omega=omega),
            lambda v, u: half_step(held, v, dense.log_a, rho_r, dim=-1, old=u, omega=omega),
            problem,
        )
        if solver.balanced and stopped:
            u, v = centre_gauge(u, v, dense.log_a, dense.log_b, parts)
    rows, cols = [u], [v]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not implicit):
        for _ in range(differentiated):
            v = half_step(dense.scores, u, dense.log_b, rho_c, dim=-2)
            u = half_step(dense.scores, v, dense.log_a, rho_r, dim=-1)
            rows.append(u)
            cols.append(v)
        if differentiated == 0:
            u = half_step(dense.scores, v, dense.log_a, rho_r, dim=-1)
            rows = [u]
    potentials = Potentials(torch.stack(rows).detach(), torch.stack(cols).detach())
    if implicit:
        function = _ImplicitPlan if torch.compiler.is_compiling() else _EagerImplicitPlan
        return function.apply(dense.scores, u, v, problem, parts, log), potentials
    log_plan = log_plan_of(dense, u, v)
    return log_plan if log else log_plan.exp(), potentials


def log_plan_of(dense: Dense, u: Tensor, v: Tensor) -> Tensor:
    """The logarithm of the augmented plan, S + u + v."""
    return dense.scores + u[..., :, None] + v[..., None, :]


HalfStep = Callable[[Tensor, Tensor], Tensor]


def stopped_base(
    u: Tensor, v: Tensor, column: HalfStep, row: HalfStep, problem: Problem, own: Components | None = None
) -> tuple[Tensor, Tensor]:
    """T iterations v = column(u, v), u = row(v, u): half-steps, over-relaxed by omega from the potential they replace.
    With acceleration v moves on from there, by the momentum of `method.acceleration`.

    With a tolerance each problem (batch element, head, segment) ends at the first (u^t, v^t), t >= 1, from which the
    next column half-step, before over-relaxation and momentum, would move no v_j by more: max_j |v_plain_j - v_j| <=
    tolerance. It stands still from then on; the loop itself ends when all do, where looking costs nothing (eager CPU
    tensors). `own`: the problems that lines belong to; None: as `problem` has them.
    """
    own, done, solver = segments(problem) if own is None else own, None, problem.solver
    momentum = None
    if solver.acceleration is not None:
        log_b, momentum = problem.marginals.augmented[1].to(v.dtype), acceleration.start(v, own, solver.contraction)
    for t in range(solver.stopped):
        next_v = plain = column(u, v)
        if momentum is not None:
            next_v, momentum = acceleration.step(t, v, plain, momentum, log_b, own, solver.contraction)
        if t and solver.tolerance:
            change = (plain - v).abs() / solver.over_relaxation
            small = own.col_max(change) <= solver.tolerance
            done = small if done is None else done | small
            if can_look(done) and done.all():
                break
            next_v = torch.where(by_segment(done, own.col, v.shape[-1]), v, next_v)
        next_u = row(next_v, u)
        if done is not None:
            next_u = torch.where(by_segment(done, own.row, u.shape[-1]), u, next_u)
        u, v = next_u, next_v
    return u, v


def half_step(
    scores: Tensor,
    other: Tensor,
    log_mass: Tensor,
    rho: float,
    dim: int,
    old: Tensor | None = None,
    omega: float = 1.0,
) -> Tensor:
    """rho (log mass - LSE_dim(scores + other)); 0 on a line without support, whose plan is 0 whatever its potential.

    `dim=-2` is the column half-step (sums over rows, `other` = u), `dim=-1` the row half-step (`other` = v). With an
    omega other than 1 it is over-relaxed from the old potential, (1 - omega) * old + omega * plain (A. Thibault, L.
    Chizat, C. Dossal, N. Papadakis, Overrelaxed Sinkhorn-Knopp algorithm for regularized optimal transport, Algorithms
    14(5), 2021, arXiv:1711.01851).
    """
    dead = (scores == -torch.inf).all(dim)
    shifted = scores + other.unsqueeze(-1 if dim == -2 else -2)
    shifted = shifted.masked_fill(dead.unsqueeze(dim), 0.0)
    potential = rho * (log_mass.masked_fill(dead, 0.0) - torch.logsumexp(shifted, dim))
    if old is not None and omega != 1:
        potential = (1 - omega) * old + omega * potential
    return potential.masked_fill(dead, 0.0)


def marginal_residuals(plan: Tensor, dense: Dense) -> tuple[Tensor, Tensor]:
    """Largest |P 1 - a| and |P^T 1 - b| per head, dustbins included: `[N, H]` each."""
    row = (plan.sum(-1) - dense.log_a.exp()).abs()
    col = (plan.sum(-2) - dense.log_b.exp()).abs()
    return largest(row), largest(col)


class _ImplicitPlan(torch.autograd.Function):
    """exp(S + u + v), or S + u + v, whose gradient is that of the converged plan: dS = P * (D - x - y), x and y by
    CG."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, u: Tensor, v: Tensor, problem: Problem, parts: Components, log: bool) -> Tensor:
        log_plan = scores + u[..., :, None] + v[..., None, :]
        return log_plan if log else log_plan.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.problem, ctx.parts, ctx.log = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, u, v = ctx.saved_tensors
        with torch.no_grad(), full_precision(grad.device):
            plan = DensePlan(scores + u[..., :, None] + v[..., None, :])
            weighted = grad.masked_fill(scores == -torch.inf, 0.0) if ctx.log else plan.plan * grad
            x, y = implicit_duals(plan, weighted.sum(-1), weighted.sum(-2), ctx.problem, ctx.parts)
            grad_scores = weighted - plan.plan * (x[..., :, None] + y[..., None, :])
        return *differentiable_once([grad_scores], [scores, grad], FIRST_ONLY), None, None, None, None, None


class _EagerImplicitPlan(_ImplicitPlan):
    """torch.compile takes no Function with a jvp."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise RuntimeError(FIRST_ONLY)


def _with_dustbin_scores(scores: Tensor, support: Tensor, inputs: Inputs, problem: Problem) -> tuple[Tensor, Tensor]:
    """Append the G dustbin columns and rows; token i reaches only the dustbin of its own segment."""
    assert inputs.row_score is not None and inputs.col_score is not None and inputs.corner_score is not None
    num = problem.num_dustbins
    bins = torch.arange(num, device=scores.device)
    own = [
        (
            torch.ones(x.shape[-1], num, dtype=torch.bool, device=scores.device)
            if s is None
            else (s[:, None, :, None] == bins)
        )
        for s, x in ((problem.support.row_segment, inputs.row_score), (problem.support.col_segment, inputs.col_score))
    ]
    head = scores.shape[:2]
    row = (inputs.row_score.to(scores.dtype) / problem.solver.epsilon)[..., :, None].expand(*head, -1, num)
    col = (inputs.col_score.to(scores.dtype) / problem.solver.epsilon)[..., None, :].expand(*head, num, -1)
    corner = (inputs.corner_score.to(scores.dtype) / problem.solver.epsilon)[..., None, None].expand(*head, num, num)
    scores = torch.cat([torch.cat([scores, row], -1), torch.cat([col, corner], -1)], -2)
    own_row, own_col = own[0].expand(*head, -1, num), own[1].transpose(-1, -2).expand(*head, num, -1)
    diagonal = torch.eye(num, dtype=torch.bool, device=scores.device).expand(*head, num, num)
    support = torch.cat([torch.cat([support, own_row], -1), torch.cat([own_col, diagonal], -1)], -2)
    return scores, support


def per_head(x: Tensor, heads: int) -> Tensor:
    """GQA: `[N, Hk, S, E]` to `[N, H, S, E]`, query head h reading key head h // (H / Hk)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _initial(given: Tensor | None, log_mass: Tensor) -> Tensor:
    start = torch.zeros_like(log_mass) if given is None else given.to(log_mass.dtype)
    return start.masked_fill(log_mass == -torch.inf, 0.0)
