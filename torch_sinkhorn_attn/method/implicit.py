"""The implicit gradient's adjoint system, by gauge-projected conjugate gradients over passes of the plan.

At a converged plan the score cotangent is dS = P * (D - x_i - y_j) with

    [diag(P 1)/rho_r   P               ] [x]   [row sums of P*D   ]
    [P^T               diag(P^T 1)/rho_c] [y] = [column sums of P*D]

(P's own sums on the diagonal: with a and b instead the error off convergence is 100 times larger). With f and g the
right-hand sides and r and c the row and column sums, x is eliminated, which halves the iterations:

    (diag(c)/rho_c - rho_r P^T diag(1/r) P) y = g - rho_r P^T (f / r)

Symmetrised by sqrt(c), this is the identity minus a contraction; balanced problems have one null vector, sqrt(c), per
connected component, projected out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from torch_sinkhorn_attn.problem.looking import can_look
from torch_sinkhorn_attn.problem.problem import Problem
from torch_sinkhorn_attn.problem.segments import Components, by_segment, segments

MAX_ITERS = 500  # where convergence can be looked at (eager CPU tensors); each iteration takes two passes
FIXED_ITERS = 32  # elsewhere
FIRST_ONLY = (
    "gradient='implicit' has no derivative beyond the first, nor forward mode: its backward solves a linear system. "
    "Use gradient='unrolled'."
)
TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-14}  # relative residual, both near the dtype's rounding
ROUNDING = 8  # epsilons: what may be rounding of a right-hand side that cancels, or of a null vector's curvature


class PlanOperator(Protocol):
    """A plan seen through its passes, augmented by the dustbins: `[N, H, L(+G)]` rows and `[N, H, S(+G)]` columns."""

    def row_pass(self, y: Tensor) -> Tensor:
        """P y."""

    def column_pass(self, x: Tensor) -> Tensor:
        """P^T x."""


class DensePlan:
    """A plan that is a tensor, given by its logarithm `[N, H, L, S]`."""

    def __init__(self, log_plan: Tensor):
        self.log_plan, self.plan = log_plan, log_plan.exp()

    def row_pass(self, y: Tensor) -> Tensor:
        return (self.plan @ y[..., None])[..., 0]

    def column_pass(self, x: Tensor) -> Tensor:
        return (x[..., None, :] @ self.plan)[..., 0, :]

    def times_exp(self, row: Tensor, col: Tensor) -> Tensor:
        """P * exp(row_i + col_j), formed in the log domain."""
        return (self.log_plan + row[..., :, None] + col[..., None, :]).exp()


class NormalPlan:
    """N = diag(r)^(-1/2) P diag(c)^(-1/2) by passes of P, r and c its row and column sums; lines without mass are 0.

    The singular values of N are at most 1, and 1 is taken once per connected component, by sqrt(c).
    """

    def __init__(self, plan: PlanOperator, problem: Problem, parts: Components):
        self.plan, self.balanced, self.parts = plan, problem.solver.balanced, parts
        heads, (length, size) = problem.marginals.log_row_mass.shape[:2], augmented_sizes(problem)
        like = problem.marginals.log_row_mass
        ones = torch.ones(*heads, max(length, size), dtype=like.dtype, device=like.device)
        r, c = plan.row_pass(ones[..., :size]), plan.column_pass(ones[..., :length])
        self.r_inv = torch.where(r > 0, 1 / r, 0.0)
        self.root = c.clamp(min=0).sqrt()
        self.root_inv = torch.where(self.root > 0, 1 / self.root, 0.0)
        mass = parts.col_sum(c)
        self.mass_inv = torch.where(mass > 0, 1 / mass, 0.0)

    def gram(self, s: Tensor) -> Tensor:
        """N^T N s."""
        return self.root_inv * self.plan.column_pass(self.r_inv * self.plan.row_pass(self.root_inv * s))

    def project(self, s: Tensor) -> Tensor:
        """s off the singular vectors of 1, where the problem is balanced; elsewhere s."""
        if not self.balanced:
            return s
        share = self.parts.col_sum(self.root * s) * self.mass_inv
        return s - self.root * by_segment(share, self.parts.col, s.shape[-1])


def augmented_sizes(problem: Problem) -> tuple[int, int]:
    """(L + G, S + G)."""
    num = problem.num_dustbins
    return problem.marginals.log_row_mass.shape[-1] + num, problem.marginals.log_col_mass.shape[-1] + num


def implicit_duals(
    plan: PlanOperator,
    row_sums: Tensor,
    col_sums: Tensor,
    problem: Problem,
    parts: Components,
    own: Components | None = None,
) -> tuple[Tensor, Tensor]:
    """(x, y) of the adjoint system for right-hand sides `row_sums [N, H, L(+G)]`, `col_sums [N, H, S(+G)]` of P*D.
    `own`: the problems that lines belong to; None: as `problem` has them.

    Lines without mass get 0. Where `checks.can_look` it stops at `TOLERANCE` or `MAX_ITERS`; elsewhere it runs
    `FIXED_ITERS` without asking, converged heads standing still.
    """
    rho_r, rho_c = problem.solver.rho_row, problem.solver.rho_col
    normal = NormalPlan(plan, problem, parts)
    image = rho_r * plan.column_pass(normal.r_inv * row_sums)
    rhs, both = normal.root_inv * (col_sums - image), normal.root_inv * (col_sums.abs() + image.abs())
    own = segments(problem) if own is None else own

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return by_segment(own.col_sum(x * y), own.col, x.shape[-1])

    def matrix(s: Tensor) -> Tensor:
        return s / rho_c - rho_r * normal.gram(s)

    scale = dot(both, both)
    y = normal.root_inv * conjugate_gradients(matrix, normal.project(rhs), normal.project, dot, scale, own.anywhere)
    return rho_r * normal.r_inv * (row_sums - plan.row_pass(y)), y


def conjugate_gradients(
    matrix: Callable[[Tensor], Tensor],
    rhs: Tensor,
    project: Callable[[Tensor], Tensor],
    dot: Callable[[Tensor, Tensor], Tensor],
    scale: Tensor,
    anywhere: Callable[[Tensor], bool],
) -> Tensor:
    """Solve `matrix(s) = rhs` for every problem at once, `matrix` symmetric and positive off the projection.

    `dot` is the inner product of each problem, at each of its entries; `scale` is that of the terms `rhs` is the
    difference of, by which its rounding is judged: a right-hand side that is all rounding has the solution 0, and a
    direction without curvature is a null vector, along which a step would be as long as rounding is small. `anywhere`
    tells whether some problem is still marked.
    """
    rounding = ROUNDING * torch.finfo(rhs.dtype).eps
    tolerance = torch.maximum(TOLERANCE[rhs.dtype] ** 2 * dot(rhs, rhs), rounding**2 * scale)
    solution = torch.zeros_like(rhs)
    residual, direction = rhs, rhs
    energy = dot(residual, residual)
    may_look = can_look(rhs)
    for _ in range(MAX_ITERS if may_look else FIXED_ITERS):
        busy = energy > tolerance
        if may_look and not anywhere(busy):
            break
        image = project(matrix(direction))
        curvature = dot(direction, image)
        busy = busy & (curvature > rounding * dot(direction, direction))
        step = torch.where(busy, energy / curvature, 0.0)
        solution = solution + step * direction
        residual = residual - step * image
        new_energy = dot(residual, residual)
        direction = project(residual + torch.where(busy, new_energy / energy, 0.0) * direction)
        energy = torch.where(busy, new_energy, torch.zeros_like(new_energy))
    return solution
