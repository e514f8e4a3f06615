"""What a plan costs: the regularised transport cost, primal and dual, from the duals and the plan's marginals.

With KL(p | q) = sum p log(p / q) - p + q, the problem is

    min over P    <C, P> + epsilon KL(P | a b^T) + tau_r KL(P 1 | a) + tau_c KL(P^T 1 | b)

where a balanced side has tau = inf: its marginal is fixed. The plan is P_ij = a_i b_j exp((f_i + g_j - C_ij) /
epsilon). With r and c its own marginals

    primal = <r, f> + <c, g> - epsilon (sum P - sum a sum b) + tau_r KL(r | a) + tau_c KL(c | b)
    dual   = <a, f> + <b, g> - epsilon (sum P - sum a sum b)          balanced; relaxed, in place of <a, f>:
             tau_r sum a (1 - exp(-f / tau_r)), likewise for g

Both take O(n) numbers, so the matrix is never formed. The envelope theorem gives the derivative at the optimum:
d dual / dC = P, with f and g held.

Attention's potentials belong to P = exp(S + u + v), S = -C / epsilon, whose entropy is relative to 1. Balanced that is
the same problem, for the marginals fix the difference: f = epsilon (u - log a). Relaxed it is another one, unless the
masses are 1; so log a_i + log b_j are added to the scores (`relative`), and f = epsilon u.

Sources: Peyre and Cuturi, Computational Optimal Transport, 2019, chapters 4 and 10; Sejourne et al., arXiv:1910.12958.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.method.dustbin_vectors import DustbinVectors
from torch_sinkhorn_attn.method.reference import per_head
from torch_sinkhorn_attn.problem.mass_scale import MassScale
from torch_sinkhorn_attn.problem.problem import Inputs, Potentials, Problem
from torch_sinkhorn_attn.problem.segments import Components, segment_sum, segments


class Sums(NamedTuple):
    """What the passes over the plan find, of its real pairs and of the dustbin's, in the problem's unit of mass."""

    times_key: Tensor  # P K [N, H, L, E]
    times_query: Tensor  # P^T Q [N, H, S, E]
    row: Tensor  # P 1 over real columns [N, H, L]
    col: Tensor  # P^T 1 over real rows [N, H, S]
    to_bin: Tensor  # [N, H, L], empty without a dustbin
    from_bin: Tensor  # [N, H, S]
    corner: Tensor  # [N, H, G]
    plan: Tensor | None  # P itself [N, H, L, S], where a float mask of L x S weighs it


class Duals(NamedTuple):
    """In the caller's unit of mass, augmented: `[N, H, L+G]` and `[N, H, S+G]`, 0 where inactive; float64 where the
    device has it for sure."""

    f: Tensor
    g: Tensor
    a: Tensor
    b: Tensor
    row: Tensor  # r
    col: Tensor  # c


def relative(inputs: Inputs, problem: Problem, scale: MassScale | None) -> tuple[Inputs, Problem]:
    """A relaxed problem with log a_i + log b_j added to its scores, in the caller's unit of mass; balanced, itself. The
    tokens get two more features. Keys have the queries' heads."""
    solver, heads = problem.solver, problem.sizes[1]
    if solver.balanced:
        return inputs, problem
    log_masses = problem.marginals.augmented
    shift = 0.0 if scale is None else math.log(2) * scale.power[..., None]
    row, col = (torch.where(x > -torch.inf, x + shift, 0.0) * solver.epsilon for x in log_masses)
    query, key = inputs.query * solver.scale, per_head(inputs.key, heads)
    ones_row, ones_col = torch.ones_like(query[..., :1]), torch.ones_like(key[..., :1])
    length, size = problem.sizes[2:]
    query = torch.cat([query, row[..., :length, None], ones_row], -1)
    key = torch.cat([key, ones_col, col[..., :size, None]], -1)
    found = inputs._replace(query=query, key=key)
    if problem.has_dustbin:
        if problem.num_dustbins > 1:
            raise ValueError(
                "relaxation beside a dustbin and packed segments: the dustbins' masses, by which their entropy is "
                "weighed, differ by segment, and their scores do not. Pass the segments as batch elements."
            )
        assert inputs.row_score is not None and inputs.col_score is not None and inputs.corner_score is not None
        row_bin, col_bin = row[..., length:], col[..., size:]
        found = found._replace(
            row_score=inputs.row_score + row[..., :length] + col_bin,
            col_score=inputs.col_score + col[..., :size] + row_bin,
            corner_score=inputs.corner_score + (row_bin + col_bin)[..., 0],
        )
    return found, replace(problem, solver=replace(solver, scale=1.0))


def corner_of(inputs: Inputs, problem: Problem, potentials: Potentials) -> Tensor:
    """P where the dustbin's row and column meet, `[N, H, G]`; empty without one."""
    u, v = potentials.row[-1], potentials.col[-1]
    capacity = problem.marginals.log_row_capacity
    if capacity is None:
        return u.new_zeros(0)
    corner = DustbinVectors(inputs, problem, problem.solver.epsilon, u.dtype).log_plan(u, v).corner
    return corner.masked_fill(capacity == -torch.inf, -torch.inf).exp()


def duals(problem: Problem, potentials: Potentials, sums: Sums, scale: MassScale | None) -> Duals:
    u, v = potentials.row[-1], potentials.col[-1]
    row, col = sums.row, sums.col
    if problem.has_dustbin:
        own = segments_of_tokens(problem)
        row = torch.cat([row + sums.to_bin, segment_sum(sums.from_bin, own.col, own.number) + sums.corner], -1)
        col = torch.cat([col + sums.from_bin, segment_sum(sums.to_bin, own.row, own.number) + sums.corner], -1)
    log_a, log_b = problem.marginals.augmented
    a, b, epsilon = log_a.exp(), log_b.exp(), problem.solver.epsilon
    if scale is not None:
        u, v = scale.restored(u, v, log_a, log_b)
        shift = math.log(2) * scale.power[..., None]
        log_a, log_b, a, b = log_a + shift, log_b + shift, scale.of_mass(a), scale.of_mass(b)
        row, col = scale.of_plan(row), scale.of_plan(col)
    shifted = (u, v) if not problem.solver.balanced else (u - log_a, v - log_b)  # relaxed: of `relative` scores
    f, g = (torch.where(mass > -torch.inf, epsilon * x, 0.0) for x, mass in zip(shifted, (log_a, log_b), strict=True))
    wide = torch.float64 if u.device.type in ("cpu", "cuda") else u.dtype
    return Duals(*(x.to(wide) for x in (f, g, a, b, row, col)))


def segments_of_tokens(problem: Problem) -> Components:
    """The dustbin of each token: indices `[N, 1, L]` and `[N, 1, S]`, or None for one dustbin."""
    row, col = (None if x is None else x[:, None] for x in (problem.support.row_segment, problem.support.col_segment))
    return Components(row, col, max(1, problem.num_dustbins))


def slopes(found: Duals, problem: Problem) -> tuple[Tensor, Tensor]:
    """x `[N, H, L+G]` and y `[N, H, S+G]`: the primal's derivative with respect to P_ij is x_i + y_j; f + g where
    balanced, and 0 at the optimum of a relaxed side."""
    pair = []
    for potential, mass, marginal, tau in (
        (found.f, found.a, found.row, _tau(problem, 0)),
        (found.g, found.b, found.col, _tau(problem, 1)),
    ):
        live = (mass > 0) & (marginal > 0)
        ratio = torch.where(live, marginal, 1.0) / torch.where(live, mass, 1.0)
        pair.append(potential if tau == torch.inf else potential + tau * ratio.log())
    return pair[0], pair[1]


def values(found: Duals, problem: Problem) -> tuple[Tensor, Tensor]:
    """(dual, primal) `[N, H]`, in float64."""
    f, g, a, b, row, col = found
    own, epsilon = segments(problem), problem.solver.epsilon
    product = segment_sum(a, own.row, own.number) * segment_sum(b, own.col, own.number)
    excess = epsilon * (row.sum(-1) - product.sum(-1))
    dual, primal = -excess, (row * f).sum(-1) + (col * g).sum(-1) - excess
    for mass, potential, marginal, tau in ((a, f, row, _tau(problem, 0)), (b, g, col, _tau(problem, 1))):
        if tau == torch.inf:
            dual = dual + (mass * potential).sum(-1)
        else:
            dual = dual - tau * (mass * torch.expm1(-potential / tau)).sum(-1)
            relative = torch.special.xlogy(marginal, marginal / mass.masked_fill(mass == 0, 1.0))
            primal = primal + tau * (relative - marginal + mass).sum(-1)
    return dual, primal


def _tau(problem: Problem, side: int) -> float:
    """The KL strength of the rows (0) or columns (1); inf where balanced."""
    rho = (problem.solver.rho_row, problem.solver.rho_col)[side]
    return torch.inf if rho == 1 else problem.solver.epsilon * rho / (1 - rho)
