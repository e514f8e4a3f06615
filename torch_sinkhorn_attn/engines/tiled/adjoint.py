"""The adjoint of attention as every engine in Python runs it, whoever makes the tiles: cotangents set up, the passes of
`method.staircase` or of the implicit gradient called, cotangents gathered, the dustbin beside.

An engine brings an `AugmentedPlan` (its passes) and a subclass of `AdjointPasses` (passes in which cotangents ride).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.tiled.augmented import AugmentedPlan
from torch_sinkhorn_attn.method.dustbin_vectors import Vectors
from torch_sinkhorn_attn.method.staircase import Factor, Field, implicit_field, tail_field
from torch_sinkhorn_attn.problem.problem import Gradients, Inputs, OutputGrads, Potentials
from torch_sinkhorn_attn.problem.segments import mass_of


class OutputCotangent:
    """D = dL/dP from the cotangents of output and dustbin masses: D_ij = <dO_i, V_j> / a_i (dropped out) on real pairs,
    and a vector each for the dustbin's column `[N, H, L]` and row `[N, H, S]`."""

    to_bin: Tensor | None = None
    from_bin: Tensor | None = None
    bins: Vectors | None = None  # P*D there

    def __init__(self, plan: AugmentedPlan, output: Tensor, grads: OutputGrads):
        self.log_mass = plan.problem.marginals.log_row_mass
        inactive = self.log_mass == -torch.inf
        self.output = grads.output.to(plan.dtype).masked_fill(inactive[..., None], 0.0)  # dO [N, H, L, Ev]
        self.row_sums = (self.output * output).sum(-1)  # rowsum(P*D) [N, H, L(+G)], without a pass
        if plan.dustbin is None:
            return
        to_bin, from_bin, corner = plan.dustbin_plan
        grad_to, self.from_bin = (
            torch.zeros_like(p) if g is None else g.to(plan.dtype)
            for g, p in ((grads.to_bin, to_bin), (grads.from_bin, from_bin))
        )
        self.to_bin = grad_to
        if plan.inputs.dustbin_value is not None:
            self.to_bin = grad_to + (self.grad * plan.inputs.dustbin_value.to(plan.dtype)[:, :, None]).sum(-1)
        self.bins = Vectors(to_bin * self.to_bin, from_bin * self.from_bin, torch.zeros_like(corner))
        self.row_sums = torch.cat([self.row_sums + to_bin * grad_to, plan.dustbin.sum_cols(self.bins.row)], -1)

    @cached_property
    def grad(self) -> Tensor:
        """dO / a `[N, H, L, Ev]`."""
        return self.output / mass_of(self.log_mass)[..., None]


class AdjointPasses(ABC):
    """The passes of `staircase.tail_field` over a plan, gathering cotangents; see `staircase.Passes`."""

    may_scale = True
    gathers_value = True  # whether V has a cotangent, which rides in the first column pass
    row_sums: Tensor
    bins: Vectors | None = None  # P*D on the dustbin

    def __init__(self, plan: AugmentedPlan):
        self.plan = plan

    @abstractmethod
    def column(self, x: Tensor, factor: Factor, field: Field | None = None, deferred: Factor | None = None) -> Tensor:
        """factor^T x."""

    @abstractmethod
    def row(self, y: Tensor, factor: Factor, field: Field | None = None) -> Tensor:
        """factor y."""

    @abstractmethod
    def real_column_sums(self) -> Tensor:
        """colsum(P*D) over the real rows here `[N, H, S]`; asked for after the first column pass."""

    @abstractmethod
    def gathered(self, field: Field) -> Inputs:
        """Cotangents of query, key, value and mask (the last two None where not wanted), after all passes."""

    def complete_row_sums(self, real: Tensor) -> Tensor:
        """rowsum(P*D) `[N, H, L(+G)]` from its part over real columns."""
        dustbin, bins = self.plan.dustbin, self.bins
        if dustbin is None or bins is None:
            return real
        return torch.cat([real + bins.column, dustbin.sum_cols(bins.row) + bins.corner], -1)

    def column_sums(self) -> Tensor:
        """colsum(P*D) `[N, H, S(+G)]`."""
        sums, dustbin = self.plan.complete_sums(self.real_column_sums()), self.plan.dustbin
        if dustbin is None or self.bins is None:
            return sums
        return torch.cat([sums + self.bins.row, dustbin.sum_rows(self.bins.column) + self.bins.corner], -1)


def adjoint_field(passes: AdjointPasses, potentials: Potentials) -> tuple[Field, Tensor]:
    """The modifier field and the dropped cotangent, by all passes of the adjoint."""
    plan, problem = passes.plan, passes.plan.problem
    if problem.solver.gradient != "implicit":
        return tail_field(passes, potentials, problem)
    zero = Factor(torch.zeros_like(plan.u), torch.zeros_like(plan.v), scaled=True)
    if passes.gathers_value:
        passes.column(zero.row, zero)
    field = implicit_field(plan, passes.row_sums, passes.column_sums(), problem, plan.parts, plan.own)
    passes.column(zero.row, zero, field)
    passes.row(zero.col, zero, field)
    return field, zero.row


def score_gradients(passes: AdjointPasses, field: Field) -> Inputs:
    """Cotangents of everything the plan is made of, from what the passes gathered; V's beside, if wanted."""
    found, plan = passes.gathered(field), passes.plan
    if plan.dustbin is None or passes.bins is None:
        return found
    epsilon = plan.problem.solver.epsilon
    column, row, corner = plan.dustbin.less_field(plan.log_dustbin_plan, passes.bins, field)
    return found._replace(row_score=column / epsilon, col_score=row / epsilon, corner_score=corner.sum(-1) / epsilon)


def attention_gradients(passes: AdjointPasses, cotangent: OutputCotangent, potentials: Potentials) -> Gradients:
    """The adjoint of the output: all passes, and what they gathered."""
    field, dropped = adjoint_field(passes, potentials)
    found, plan = score_gradients(passes, field), passes.plan
    if plan.inputs.dustbin_value is not None:
        found = found._replace(dustbin_value=(plan.dustbin_plan.column[..., None] * cotangent.grad).sum(-2))
    return Gradients(found, dropped)
