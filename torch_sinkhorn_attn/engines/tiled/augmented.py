"""A plan by its passes, the dustbins' vectors included; how its real pairs are summed over is the subclass's.

Vectors are augmented by the dustbins where there are any: `[N, H, L(+G)]` on the row side, `[N, H, S(+G)]` on the
column side; the dustbin's part of a pass is a few vector operations. Inactive tokens have potential 0 outside and -inf
inside a pass, so their part of the plan is exactly 0.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.tiled.dustbin_plan import DustbinPlan
from torch_sinkhorn_attn.method.dustbin_vectors import Vectors
from torch_sinkhorn_attn.method.staircase import Factor
from torch_sinkhorn_attn.problem.problem import Inputs, Problem, compute_dtype
from torch_sinkhorn_attn.problem.segments import Components, components, segments

P = TypeVar("P", bound="AugmentedPlan")


class AugmentedPlan(ABC):
    """Half-steps over the scores of a problem; after `at(u, v)` the plan exp(S + u + v) and its passes.

    `engine.iterate`, `attention_output` and `marginal_errors` work on it, and so does `method.implicit`.
    """

    u: Tensor
    v: Tensor
    _u: Tensor
    _v: Tensor

    def __init__(self, inputs: Inputs, problem: Problem):
        self.inputs, self.problem = inputs, problem
        self.dtype = compute_dtype(inputs.query.dtype)
        self.num, self.heads, self.length = problem.marginals.log_row_mass.shape
        self.size, self.bins = problem.marginals.log_col_mass.shape[-1], problem.num_dustbins
        self.groups = inputs.key.shape[1]
        self.log_a, self.log_b = (x.to(self.dtype) for x in problem.marginals.augmented)
        self.row_dead, self.col_dead = self.log_a == -torch.inf, self.log_b == -torch.inf
        self.dustbin = self._dustbin() if self.bins else None

    def at(self: P, u: Tensor, v: Tensor) -> P:
        """The same scores with potentials, augmented: the plan exp(S + u + v)."""
        other = copy.copy(self)
        other.u, other.v = u, v
        other._u, other._v = self._live(u, self.row_dead), self._live(v, self.col_dead)
        for name in ("log_dustbin_plan", "dustbin_plan", *self._of_potentials):
            other.__dict__.pop(name, None)
        return other

    _of_potentials: tuple[str, ...] = ()  # further cached properties that depend on u and v

    @staticmethod
    def _live(potential: Tensor, dead: Tensor) -> Tensor:
        return potential.masked_fill(dead, -torch.inf)

    # What other devices may have a share in: `distributed.tiles` overrides these

    def _dustbin(self) -> DustbinPlan:
        return DustbinPlan(self.inputs, self.problem, self.problem.solver.epsilon, self.dtype)

    @cached_property
    def own(self) -> Components:
        """The problem that each line belongs to."""
        return segments(self.problem)

    @cached_property
    def parts(self) -> Components:
        """The connected component of each line."""
        return components(self.problem)

    def complete_lse(self, partial: Tensor) -> Tensor:
        """The log sum exp over all rows, `[N, H, S]`, from that over the rows here."""
        return partial

    def complete_sums(self, partial: Tensor) -> Tensor:
        """The sums over all rows, `[N, H, S]`, from those over the rows here."""
        return partial

    # The subclass's: real pairs alone

    @abstractmethod
    def real_column_lse(self, u: Tensor) -> Tensor:
        """LSE_i(S + u) over real rows, `[N, H, S]`; `u` is -inf on dead rows."""

    @abstractmethod
    def real_row_lse(self, v: Tensor) -> Tensor:
        """LSE_j(S + v) over real columns, `[N, H, L]`."""

    @abstractmethod
    def real_row_pass(self, y: Tensor, factor: Factor | None = None) -> Tensor:
        """P y, or a factor's (its `scaled` is not asked), over real columns: `[N, H, L]`."""

    @abstractmethod
    def real_column_pass(self, x: Tensor, factor: Factor | None = None) -> Tensor:
        """P^T x likewise, `[N, H, S]`."""

    @abstractmethod
    def value_pass(self) -> tuple[Tensor, Tensor]:
        """P V with dropout `[N, H, L, Ev]`, and the sums of P over real columns `[N, H, L]`."""

    # Grouped queries

    def per_head(self, x: Tensor) -> Tensor:
        """Key-head tensors `[N, Hk, ...]` as a broadcast view over query heads, `[N, Hk, H/Hk, ...]`."""
        return x.to(self.dtype)[:, :, None]

    def by_group(self, x: Tensor) -> Tensor:
        """`[N, H, ...]` as `[N, Hk, H/Hk, ...]`."""
        return x.unflatten(1, (self.groups, self.heads // self.groups))

    # Half-steps

    def initial_potentials(self) -> tuple[Tensor, Tensor]:
        """u and v to start from: the warm start or 0."""
        given = self.problem.initial_row, self.problem.initial_col
        u, v = (
            torch.zeros_like(mass) if x is None else x.to(self.dtype)
            for x, mass in zip(given, (self.log_a, self.log_b), strict=True)
        )
        return u.masked_fill(self.row_dead, 0.0), v.masked_fill(self.col_dead, 0.0)

    def column_half_step(self, u: Tensor, old: Tensor | None = None) -> Tensor:
        """v = rho_c (log b - LSE_i(S + u)), augmented; over-relaxed where the old v is given."""
        live = self._live(u, self.row_dead)
        lse = self.complete_lse(self.real_column_lse(live))
        if self.dustbin is not None:
            lse = self.dustbin.column_lse(lse, live)
        return potential(lse, self.log_b, self.problem.solver.rho_col, old, self.problem.solver.over_relaxation)

    def row_half_step(self, v: Tensor, old: Tensor | None = None) -> Tensor:
        """u = rho_r (log a - LSE_j(S + v)), augmented; over-relaxed where the old u is given."""
        live = self._live(v, self.col_dead)
        lse = self.real_row_lse(live)
        if self.dustbin is not None:
            lse = self.dustbin.row_lse(lse, live)
        return potential(lse, self.log_a, self.problem.solver.rho_row, old, self.problem.solver.over_relaxation)

    # Passes of the plan

    def row_pass(self, y: Tensor, factor: Factor | None = None) -> Tensor:
        """P y, augmented; or a factor's."""
        if factor is not None and factor.scaled:
            return factor.row.exp() * self.row_pass(factor.col.exp() * y)
        return self.complete_rows(self.real_row_pass(y, factor), y, factor)

    def column_pass(self, x: Tensor, factor: Factor | None = None) -> Tensor:
        """P^T x, augmented; or a factor's."""
        if factor is not None and factor.scaled:
            return factor.col.exp() * self.column_pass(factor.row.exp() * x)
        return self.complete_cols(self.real_column_pass(x, factor), x, factor)

    # The dustbin's part of the plan

    @cached_property
    def log_dustbin_plan(self) -> Vectors:
        """log P on the dustbin's column `[N, H, L]`, row `[N, H, S]` and corner `[N, H, G]`; empty without one."""
        if self.dustbin is None:
            return Vectors(*(self._u.new_zeros(0) for _ in range(3)))
        return self.dustbin.log_plan(self._u, self._v)

    @cached_property
    def dustbin_plan(self) -> Vectors:
        """P there; empty without a dustbin."""
        return Vectors(*(x.exp() for x in self.log_dustbin_plan))

    def _dustbin_factor(self, factor: Factor | None) -> Vectors:
        if factor is None or self.dustbin is None:
            return self.dustbin_plan
        return self.dustbin.times_exp(self.log_dustbin_plan, factor)

    def complete_rows(self, real: Tensor, y: Tensor, factor: Factor | None = None) -> Tensor:
        """The augmented P y (or factor's) from its real part."""
        return real if self.dustbin is None else self.dustbin.complete_rows(real, self._dustbin_factor(factor), y)

    def complete_cols(self, real: Tensor, x: Tensor, factor: Factor | None = None) -> Tensor:
        """The augmented P^T x (or factor's) from its real part over the rows here."""
        real = self.complete_sums(real)
        return real if self.dustbin is None else self.dustbin.complete_cols(real, self._dustbin_factor(factor), x)


def potential(lse: Tensor, log_mass: Tensor, rho: float, old: Tensor | None = None, omega: float = 1.0) -> Tensor:
    """rho (log mass - LSE), over-relaxed from the old potential where given, 0 on inactive lines and on lines without
    support."""
    found = rho * (log_mass - lse)
    if old is not None and omega != 1:
        found = (1 - omega) * old + omega * found
    return found.masked_fill((lse == -torch.inf) | (log_mass == -torch.inf), 0.0)
