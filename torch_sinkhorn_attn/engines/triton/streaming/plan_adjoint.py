"""The adjoint of the plan, or of its logarithm, by the passes of the attention's: D, or P*D, is the cotangent itself,
read tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.tiled.adjoint import adjoint_field, score_gradients
from torch_sinkhorn_attn.engines.triton.streaming.adjoint import StreamingPasses, no_dropout
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_pass import Cotangents
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_tiles import Dense, Riders
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_vectors import Terms
from torch_sinkhorn_attn.engines.triton.streaming.lines import StreamedPlan
from torch_sinkhorn_attn.method.dustbin_vectors import Vectors
from torch_sinkhorn_attn.problem.problem import Gradients, Potentials


def plan_gradients(plan: StreamedPlan, potentials: Potentials, grad: Tensor, wants_mask: bool, log: bool) -> Gradients:
    """`Engine.plan_backward` for the cotangent `[N, H, L, S]`, `[N, H, L+1, S+1]` with a dustbin."""
    passes = PlanPasses(plan, grad, wants_mask, log)
    field, dropped = adjoint_field(passes, potentials)
    return Gradients(score_gradients(passes, field), dropped)


class PlanPasses(StreamingPasses):
    """The passes for the cotangent of the plan."""

    gathers_value = False

    def __init__(self, plan: StreamedPlan, grad: Tensor, wants_mask: bool, log: bool):
        layout = plan.layout
        n, h, row, col = grad.stride()
        given = Dense(grad, n, h, col, row)
        cotangents = Cotangents(layout.rows, layout.cols, layout.static, given, no_dropout(plan))
        super().__init__(plan, cotangents, Riders(dense="log" if log else "plan"), wants_mask)
        if plan.dustbin is not None:
            self.bins = _weighted_bins(plan, grad.to(plan.dtype), log)
        self.row_sums = self.complete_row_sums(self._sums(column=False)[0])

    def real_column_sums(self) -> Tensor:
        if self.sums is None:
            self.sums = self._sums(column=True)
        return super().real_column_sums()

    def _sums(self, column: bool) -> Tensor:
        """Sums of P*D over the inner lines."""
        vector = self.plan.u if column else self.plan.v
        return self._pass(self.riders._replace(image=False, sums=True), Terms(vector, None), column)[1]


def _weighted_bins(plan: StreamedPlan, grad: Tensor, log: bool) -> Vectors:
    """P*D on the dustbins, whose rows and columns the cotangent holds summed to one each."""
    given = grad[..., : plan.length, plan.size], grad[..., plan.length, : plan.size], grad[..., -1:, -1]
    if not log:
        column, row, corner = (p * g for p, g in zip(plan.dustbin_plan, given, strict=True))
        return Vectors(column, row, corner)
    logs = plan.log_dustbin_plan
    shares = torch.ones_like(logs.column), torch.ones_like(logs.row), logs.corner.softmax(-1)
    parts = (s * g for s, g in zip(shares, given, strict=True))
    column, row, corner = (x.masked_fill(p == -torch.inf, 0.0) for x, p in zip(parts, logs, strict=True))
    return Vectors(column, row, corner)
