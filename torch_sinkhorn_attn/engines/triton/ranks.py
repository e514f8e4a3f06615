"""The rows of a rank of a sharded sequence, by the streaming kernels; its vectors are completed by the others."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed.share import Share
from torch_sinkhorn_attn.distributed.tiles import OfRank
from torch_sinkhorn_attn.engines.tiled.adjoint import OutputCotangent, attention_gradients
from torch_sinkhorn_attn.engines.tiled.augmented import AugmentedPlan
from torch_sinkhorn_attn.engines.triton.streaming.adjoint import OutputPasses
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_tiles import Riders
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_vectors import Terms
from torch_sinkhorn_attn.engines.triton.streaming.lines import StreamedPlan
from torch_sinkhorn_attn.method.staircase import Factor, Field
from torch_sinkhorn_attn.problem.problem import Inputs, OutputGrads, Potentials


class SharedStream(OfRank, StreamedPlan):
    """`tiles.SharedTiles` by kernels."""

    def __init__(self, inputs: Inputs, share: Share):
        self.share = share
        super().__init__(inputs, share.problem)

    def column_half_step(self, u: Tensor, old: Tensor | None = None) -> Tensor:
        """A kernel that finished it would know the rows here alone."""
        return AugmentedPlan.column_half_step(self, u, old)


class SharedOutputPasses(OutputPasses):
    """The passes of the adjoint. The kernel completes dK by the weight of the last factor, which here is known only
    once all ranks have added their rows: so dK waits for the whole field, and takes a pass of its own."""

    waiting = False

    def column(self, x: Tensor, factor: Factor, field: Field | None = None, deferred: Factor | None = None) -> Tensor:
        if deferred is None:
            return super().column(x, factor, field)
        self.waiting = True
        return super().column(x, factor)

    def row(self, y: Tensor, factor: Factor, field: Field | None = None) -> Tensor:
        if field is not None and self.waiting:
            super().column(torch.zeros_like(self.plan.u), factor, field)
        return super().row(y, factor, field)

    def _pass(self, riders: Riders, given: Terms, column: bool) -> tuple[Tensor, Tensor]:
        empty = 0 in (self.plan.length, self.plan.size)
        image, sums = self._nothing(riders, column) if empty else super()._pass(riders, given, column)
        return self.plan.complete_sums(image) if column else image, sums

    def _nothing(self, riders: Riders, column: bool) -> tuple[Tensor, Tensor]:
        """What a pass gathers where a rank has no rows, or holds no columns."""
        plan, inputs = self.plan, self.plan.inputs
        image = plan.u.new_zeros(plan.num, plan.heads, plan.size if column else plan.length)
        if riders.values and inputs.value is not None:
            self.grad_value = plan.u.new_zeros(inputs.value.shape)
        if riders.field and column:
            self.grad_key = plan.u.new_zeros(inputs.key.shape)
        elif riders.field:
            self.grad_query = plan.u.new_zeros(inputs.query.shape)
            if inputs.mask is not None and self.wants_mask:
                self.grad_mask = plan.u.new_zeros(inputs.mask.shape)
        return image, image[None]


def gradients(plan: SharedStream, output: Tensor, potentials: Potentials, grads: OutputGrads) -> Inputs:
    """The adjoint of attention."""
    cotangent = OutputCotangent(plan, output, grads)
    passes = SharedOutputPasses(plan, cotangent, grads.mask)
    return attention_gradients(passes, cotangent, potentials).inputs
