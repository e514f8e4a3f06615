"""The adjoint by hand, dense: one reference plan tile P times a modifier field, for every R and every option.

With D = dL/dP, every half-step of the tail contributes one plan factor, and each factor is P times row and column
exponentials of dual differences (the staircase), A^r for a row and B^r for a column half-step:

    A^r = exp(S + v^r + u^r/rho_r - log a)      = P * exp(u^r/rho_r - log a - u^R)_i * exp(v^r - v^R)_j
    B^r = exp(S + u^(r-1) + v^r/rho_c - log b)  = P * exp(u^(r-1) - u^R)_i * exp(v^r/rho_c - log b - v^R)_j

    dS = P*D - sum_r rho_r z^r_i A^r - sum_r rho_c w^r_j B^r                   r = R..1
    z^R = rowsum(P*D),  w^R = colsum(P*D) - rho_r A^R^T z^R,  z^(r-1) = -rho_c B^r w^r,  w^r = -rho_r A^r^T z^r

so that dS = P * (D - X Y^T) with X [.., 2R], Y [.., 2R]: nothing but one tile and a low-rank field. z^0, the cotangent
of the stopped u^0, is dropped by the surrogate and returned for the bias certificate. For R = 0 the one differentiated
row half-step leaves w^0, the cotangent of v^0, dropped instead.

`Staircase` holds the factors and is shared with the tiled engine; `backward` is the dense adjoint.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torch_sinkhorn_attn.method.implicit import DensePlan, PlanOperator, implicit_duals
from torch_sinkhorn_attn.method.reference import Dense, log_plan_of
from torch_sinkhorn_attn.problem.looking import can_look
from torch_sinkhorn_attn.problem.problem import Inputs, Potentials, Problem
from torch_sinkhorn_attn.problem.segments import Components, components


class Factor(NamedTuple):
    """A plan factor as P * exp(row_i + col_j): its dual differences. Entries of the factor never exceed 1, but beside a
    large difference P underflows; `scaled` says that exp(row) and exp(col) may be applied outside of P."""

    row: Tensor  # [N, H, L(+G)]
    col: Tensor  # [N, H, S(+G)]
    scaled: bool

    def terms(self, row_weight: Tensor, col_weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weights with the exponentials inside where they may be."""
        if not self.scaled:
            return row_weight, col_weight
        return row_weight * self.row.exp(), col_weight * self.col.exp()


class Field(NamedTuple):
    """The modifier field: dS = P * (D - X Y^T); with exponents P * D - sum_k x_ki y_kj exp(log P + row_ki + col_kj)."""

    row_terms: Tensor  # X [N, H, L(+G), K]
    col_terms: Tensor  # Y [N, H, S(+G), K]
    row_exponents: Tensor | None = None  # [N, H, L(+G), K], None where the terms hold them
    col_exponents: Tensor | None = None


class Cotangents(NamedTuple):
    """The dense adjoint's result."""

    scores: Tensor  # dS [N, H, L(+G), S(+G)]
    dropped: Tensor  # z^0 [N, H, L(+G)], or w^0 [N, H, S(+G)] for R = 0; zeros when the gradient is implicit


LARGEST_EXPONENT = {torch.float32: 30.0, torch.float64: 300.0}  # of a difference that may be applied outside of P


class Staircase:
    """The factors of the tail, from its duals (augmented by the dustbins).

    `scaled`: whether every factor may be written as P times row and column exponentials. That needs a look at the data,
    so it is asked where `can_look`; elsewhere the factors are always formed entry by entry.
    """

    def __init__(self, potentials: Potentials, problem: Problem, may_scale: bool = True):
        dtype = potentials.row.dtype
        self.log_a, self.log_b = (x.to(dtype) for x in problem.marginals.augmented)
        self.u, self.v = potentials.row, potentials.col
        self.rho_r, self.rho_c = problem.solver.rho_row, problem.solver.rho_col
        self.tail_iters = problem.solver.kept
        factors = [self._row(r) for r in range(1, self.tail_iters + 1)] or [self._row(0)]
        factors += [self._column(r) for r in range(1, self.tail_iters + 1)]
        self.scaled = may_scale and can_look(self.u)
        if self.scaled:
            limit = LARGEST_EXPONENT[dtype]
            self.scaled = all(x.numel() == 0 or bool(x.max() <= limit) for pair in factors for x in pair)

    def row_factor(self, r: int) -> Factor:
        """A^r."""
        return Factor(*self._row(r), self.scaled)

    def column_factor(self, r: int) -> Factor:
        """B^r."""
        return Factor(*self._column(r), self.scaled)

    def _row(self, r: int) -> tuple[Tensor, Tensor]:
        rows = (self.u[r] / self.rho_r - self.log_a - self.u[-1]).masked_fill(self.log_a == -torch.inf, 0.0)
        return rows, self.v[r] - self.v[-1]

    def _column(self, r: int) -> tuple[Tensor, Tensor]:
        cols = (self.v[r] / self.rho_c - self.log_b - self.v[-1]).masked_fill(self.log_b == -torch.inf, 0.0)
        return self.u[r - 1] - self.u[-1], cols


def make_field(terms: list[tuple[Tensor, Tensor, Factor]]) -> Field:
    """Weighted factors (row weight, column weight, factor) as one field."""
    pairs = [factor.terms(x, y) for x, y, factor in terms]
    x, y = (torch.stack(side, -1) for side in zip(*pairs, strict=True))
    if terms[0][2].scaled:
        return Field(x, y)
    return Field(x, y, torch.stack([f.row for _, _, f in terms], -1), torch.stack([f.col for _, _, f in terms], -1))


class Passes(Protocol):
    """The passes the recursion takes, with riders: the first column pass may gather dV and the column sums, the last
    one (given the known `field`, and the factor still to come as `deferred`) dK, the last row pass (given the whole
    `field`) dQ."""

    row_sums: Tensor  # rowsum(P*D) [N, H, L(+G)]
    may_scale: bool

    def column(self, x: Tensor, factor: Factor, field: Field | None = None, deferred: Factor | None = None) -> Tensor:
        """factor^T x."""

    def column_sums(self) -> Tensor:
        """colsum(P*D) [N, H, S(+G)]; asked for after the first column pass."""

    def row(self, y: Tensor, factor: Factor, field: Field | None = None) -> Tensor:
        """factor y."""


def tail_field(passes: Passes, potentials: Potentials, problem: Problem) -> tuple[Field, Tensor]:
    """The modifier field of the tail and the dropped cotangent, by max(2 R, 2) passes."""
    stairs = Staircase(potentials, problem, passes.may_scale)
    rho_r, rho_c, tail_iters = problem.solver.rho_row, problem.solver.rho_col, problem.solver.kept
    row_ones, col_ones = torch.ones_like(stairs.log_a), torch.ones_like(stairs.log_b)
    z = passes.row_sums
    if tail_iters == 0:
        factor = stairs.row_factor(0)
        field = make_field([(rho_r * z, col_ones, factor)])
        image = passes.column(rho_r * z, factor, field)
        passes.row(torch.zeros_like(col_ones), factor, field)
        return field, passes.column_sums() - image
    terms: list[tuple[Tensor, Tensor, Factor]] = []
    for r in range(tail_iters, 0, -1):
        a, b, last = stairs.row_factor(r), stairs.column_factor(r), r == 1
        terms.append((rho_r * z, col_ones, a))
        w = -passes.column(rho_r * z, a, make_field(terms) if last else None, b if last else None)
        if r == tail_iters:
            w = w + passes.column_sums()
        terms.append((row_ones, rho_c * w, b))
        z = -passes.row(rho_c * w, b, make_field(terms) if last else None)
    return make_field(terms), z


class DensePasses:
    """Passes over dense P and P*D."""

    may_scale = True

    def __init__(self, plan: DensePlan, weighted: Tensor):
        self.plan = plan
        self.row_sums, self._column_sums = weighted.sum(-1), weighted.sum(-2)

    def column(self, x: Tensor, factor: Factor, field: Field | None = None, deferred: Factor | None = None) -> Tensor:
        if factor.scaled:
            return self.plan.column_pass(x * factor.row.exp()) * factor.col.exp()
        return (x[..., None, :] @ self.plan.times_exp(factor.row, factor.col))[..., 0, :]

    def column_sums(self) -> Tensor:
        return self._column_sums

    def row(self, y: Tensor, factor: Factor, field: Field | None = None) -> Tensor:
        if factor.scaled:
            return self.plan.row_pass(y * factor.col.exp()) * factor.row.exp()
        return (self.plan.times_exp(factor.row, factor.col) @ y[..., None])[..., 0]


def implicit_field(
    plan: PlanOperator,
    row_sums: Tensor,
    col_sums: Tensor,
    problem: Problem,
    parts: Components,
    own: Components | None = None,
) -> Field:
    """The field of the implicit gradient: D - x_i - y_j."""
    x, y = implicit_duals(plan, row_sums, col_sums, problem, parts, own)
    row_terms, col_terms = torch.stack([x, torch.ones_like(x)], -1), torch.stack([torch.ones_like(y), y], -1)
    return Field(row_terms, col_terms)


def subtract_field(weighted: Tensor, log_plan: Tensor, field: Field) -> Tensor:
    """P * D - field, for `weighted` = P * D, log P `[N, H, l, s]` (a tile or the whole) and the field there."""
    x, y = field.row_terms, field.col_terms
    if field.row_exponents is None or field.col_exponents is None:
        return weighted - log_plan.exp() * (x @ y.transpose(-1, -2))
    for k in range(x.shape[-1]):
        row, col = field.row_exponents[..., k], field.col_exponents[..., k]
        factor = (log_plan + row[..., None] + col[..., None, :]).exp()
        weighted = weighted - factor * x[..., k, None] * y[..., None, :, k]
    return weighted


def backward(dense: Dense, grad_plan: Tensor, potentials: Potentials, problem: Problem) -> Cotangents:
    """dS of the augmented scores for a cotangent D = `grad_plan` of the augmented plan."""
    return adjoint(log_plan_of(dense, potentials.row[-1], potentials.col[-1]), grad_plan, potentials, problem)


def adjoint(
    log_plan: Tensor, grad_plan: Tensor, potentials: Potentials, problem: Problem, log: bool = False
) -> Cotangents:
    """`backward`, of an augmented plan given by its logarithm; or, with `log`, for a cotangent of the logarithm: that
    is P*D itself, so nothing is divided by P."""
    plan = DensePlan(log_plan)
    weighted = grad_plan.masked_fill(plan.log_plan == -torch.inf, 0.0) if log else plan.plan * grad_plan
    passes = DensePasses(plan, weighted)
    if problem.solver.gradient == "implicit":
        field = implicit_field(plan, passes.row_sums, passes.column_sums(), problem, components(problem))
        dropped = torch.zeros_like(passes.row_sums)
    else:
        field, dropped = tail_field(passes, potentials, problem)
    if field.row_exponents is None:
        return Cotangents(weighted - plan.plan * (field.row_terms @ field.col_terms.mT), dropped)
    return Cotangents(subtract_field(weighted, plan.log_plan, field), dropped)


def score_gradients(grad_scores: Tensor, inputs: Inputs, problem: Problem, mask_grad: bool) -> Inputs:
    """Cotangents of everything the scores are made of, from the augmented dS `[N, H, L(+G), S(+G)]`."""
    length, size = problem.sizes[2:]
    real, dtype = grad_scores[..., :length, :size], grad_scores.dtype
    by_group = (inputs.key.shape[1], inputs.query.shape[1] // inputs.key.shape[1])
    query, grouped = inputs.query.to(dtype).unflatten(1, by_group), real.unflatten(1, by_group)
    factor = problem.solver.scale / problem.solver.epsilon
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
    bins = (x / problem.solver.epsilon for x in (to_bin, from_bin, corner))
    return Inputs(grad_query, grad_key, None, grad_mask, *bins)
