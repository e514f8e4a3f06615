"""The adjoint by hand, dense: one reference plan tile P times a modifier field, for every R and every option.

With D = dL/dP, every half-step of the tail contributes one plan factor, and each factor is P times row and column
exponentials of dual differences (the staircase):

    row factor     A^r = exp(S + v^r + u^r/rho_r - log a)      = P * exp(u^r/rho_r - log a - u^R)_i * exp(v^r - v^R)_j
    column factor  B^r = exp(S + u^(r-1) + v^r/rho_c - log b)  = P * exp(u^(r-1) - u^R)_i * exp(v^r/rho_c - log b -
    v^R)_j

    dS = P*D - sum_r rho_r z^r_i A^r - sum_r rho_c w^r_j B^r                   r = R..1
    z^R = rowsum(P*D),  w^R = colsum(P*D) - rho_r A^R^T z^R,  z^(r-1) = -rho_c B^r w^r,  w^r = -rho_r A^r^T z^r

so that dS = P * (D - X Y^T) with X [.., 2R], Y [.., 2R]: nothing but one tile and a low-rank field. z^0, the cotangent
of the stopped u^0, is dropped by the surrogate and returned for the bias certificate. For R = 0 the one differentiated
row half-step leaves w^0, the cotangent of v^0, dropped instead.

`Staircase` holds the exponentials and is shared with the tiled engine; `backward` is the dense adjoint.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torch_sinkhorn_attn.implicit import DensePlan, PlanOperator, implicit_duals
from torch_sinkhorn_attn.problem import Inputs, Potentials, Problem
from torch_sinkhorn_attn.reference import Dense
from torch_sinkhorn_attn.support import Components, components, with_dustbin


class Field(NamedTuple):
    """The modifier field: dS = P * (D - row_terms col_terms^T)."""

    row_terms: Tensor  # X [N, H, L(+G), K]
    col_terms: Tensor  # Y [N, H, S(+G), K]


class Cotangents(NamedTuple):
    """The dense adjoint's result."""

    scores: Tensor  # dS [N, H, L(+G), S(+G)]
    dropped: Tensor  # z^0 [N, H, L(+G)], or w^0 [N, H, S(+G)] for R = 0; zeros when the gradient is implicit


class Staircase:
    """Row and column exponentials of the tail's dual differences, augmented by the dustbins; 0 on inactive lines."""

    def __init__(self, potentials: Potentials, problem: Problem):
        dtype = potentials.row.dtype
        self.log_a = with_dustbin(problem.log_row_mass, problem.log_row_capacity).to(dtype)
        self.log_b = with_dustbin(problem.log_col_mass, problem.log_col_capacity).to(dtype)
        self.u, self.v = potentials.row, potentials.col
        self.rho_r, self.rho_c = problem.rho_row, problem.rho_col
        self.tail_iters = problem.schedule[1]
        self.row_active, self.col_active = self.log_a > -torch.inf, self.log_b > -torch.inf

    def row_factor(self, r: int) -> tuple[Tensor, Tensor]:
        """(row, column) exponentials of A^r."""
        rows = self.u[r] / self.rho_r - self.log_a - self.u[-1]
        return self._exp(rows, self.row_active), self._exp(self.v[r] - self.v[-1], self.col_active)

    def column_factor(self, r: int) -> tuple[Tensor, Tensor]:
        """(row, column) exponentials of B^r."""
        cols = self.v[r] / self.rho_c - self.log_b - self.v[-1]
        return self._exp(self.u[r - 1] - self.u[-1], self.row_active), self._exp(cols, self.col_active)

    @staticmethod
    def _exp(x: Tensor, active: Tensor) -> Tensor:
        return torch.where(active, x, -torch.inf).exp()


def stack_field(terms: list[tuple[Tensor, Tensor]]) -> Field:
    """Terms (x_i, y_j) of the field as two matrices."""
    return Field(torch.stack([x for x, _ in terms], -1), torch.stack([y for _, y in terms], -1))


class Passes(Protocol):
    """The passes over P the recursion takes, with riders: the first column pass may gather dV and the column sums, the
    last one (given the known `field`, and the row terms of the factor still to come as `deferred`) dK, the last row
    pass (given the whole `field`) dQ."""

    row_sums: Tensor  # rowsum(P*D) [N, H, L(+G)]

    def column(self, x: Tensor, field: Field | None = None, deferred: Tensor | None = None) -> Tensor:
        """P^T x."""

    def column_sums(self) -> Tensor:
        """colsum(P*D) [N, H, S(+G)]; asked for after the first column pass."""

    def row(self, y: Tensor, field: Field | None = None) -> Tensor:
        """P y."""


def tail_field(passes: Passes, potentials: Potentials, problem: Problem) -> tuple[Field, Tensor]:
    """The modifier field of the tail and the dropped cotangent, by max(2 R, 2) passes."""
    stairs = Staircase(potentials, problem)
    rho_r, rho_c, tail_iters = problem.rho_row, problem.rho_col, problem.schedule[1]
    terms: list[tuple[Tensor, Tensor]] = []
    z = passes.row_sums
    if tail_iters == 0:
        rows, cols = stairs.row_factor(0)
        field = stack_field([(rho_r * z * rows, cols)])
        dropped = cols * passes.column(rho_r * z * rows, field)
        dropped = passes.column_sums() - dropped
        passes.row(torch.zeros_like(cols), field)
        return field, dropped
    for r in range(tail_iters, 0, -1):
        rows, cols = stairs.row_factor(r)
        next_rows, next_cols = stairs.column_factor(r)
        terms.append((rho_r * z * rows, cols))
        last = r == 1
        w = -cols * passes.column(terms[-1][0], stack_field(terms) if last else None, next_rows if last else None)
        if r == tail_iters:
            w = w + passes.column_sums()
        terms.append((next_rows, rho_c * w * next_cols))
        z = -next_rows * passes.row(terms[-1][1], stack_field(terms) if last else None)
    return stack_field(terms), z


class DensePasses:
    """Passes over dense P and P*D."""

    def __init__(self, plan: Tensor, weighted: Tensor):
        self.plan = DensePlan(plan)
        self.row_sums, self._column_sums = weighted.sum(-1), weighted.sum(-2)

    def column(self, x: Tensor, field: Field | None = None, deferred: Tensor | None = None) -> Tensor:
        return self.plan.column_pass(x)

    def column_sums(self) -> Tensor:
        return self._column_sums

    def row(self, y: Tensor, field: Field | None = None) -> Tensor:
        return self.plan.row_pass(y)


def implicit_field(
    plan: PlanOperator, row_sums: Tensor, col_sums: Tensor, problem: Problem, parts: Components
) -> Field:
    """The field of the implicit gradient: D - x_i - y_j."""
    x, y = implicit_duals(plan, row_sums, col_sums, problem, parts)
    return stack_field([(x, torch.ones_like(y)), (torch.ones_like(x), y)])


def backward(dense: Dense, grad_plan: Tensor, potentials: Potentials, problem: Problem) -> Cotangents:
    """dS of the augmented scores for a cotangent D = `grad_plan` of the augmented plan."""
    u, v = potentials.row[-1], potentials.col[-1]
    plan = torch.exp(dense.scores + u[..., :, None] + v[..., None, :])
    weighted = plan * grad_plan
    passes = DensePasses(plan, weighted)
    if problem.gradient == "implicit":
        field = implicit_field(passes.plan, passes.row_sums, passes.column_sums(), problem, components(problem))
        dropped = torch.zeros_like(passes.row_sums)
    else:
        field, dropped = tail_field(passes, potentials, problem)
    return Cotangents(weighted - plan * (field.row_terms @ field.col_terms.transpose(-1, -2)), dropped)


def score_gradients(grad_scores: Tensor, inputs: Inputs, problem: Problem, mask_grad: bool) -> Inputs:
    """Cotangents of everything the scores are made of, from the augmented dS `[N, H, L(+G), S(+G)]`."""
    length, size = problem.log_row_mass.shape[-1], problem.log_col_mass.shape[-1]
    real, dtype = grad_scores[..., :length, :size], grad_scores.dtype
    by_group = (inputs.key.shape[1], inputs.query.shape[1] // inputs.key.shape[1])
    query, grouped = inputs.query.to(dtype).unflatten(1, by_group), real.unflatten(1, by_group)
    factor = problem.scale / problem.epsilon
    grad_query = (grouped @ inputs.key.to(dtype)[:, :, None]).flatten(1, 2) * factor
    grad_key = (grouped.transpose(-1, -2) @ query).sum(2) * factor
    grad_mask = real.sum_to_size(inputs.mask.shape) if mask_grad and inputs.mask is not None else None
    if not problem.has_dustbin:
        return Inputs(grad_query, grad_key, mask=grad_mask)
    to_bin, from_bin, corner = (
        grad_scores[..., :length, size:].sum(-1),
        grad_scores[..., length:, :size].sum(-2),
        grad_scores[..., length:, size:].sum((-1, -2)),
    )
    bins = (x / problem.epsilon for x in (to_bin, from_bin, corner))
    return Inputs(grad_query, grad_key, None, grad_mask, *bins)
