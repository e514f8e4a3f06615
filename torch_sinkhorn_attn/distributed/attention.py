"""`sinkhorn_attention` over a process group: one Function for the whole of it, whose state between forward and
backward is that of the rank's rows and owned columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.compat.once import differentiable_once
from torch_sinkhorn_attn.distributed import context
from torch_sinkhorn_attn.distributed.preparation import Sharded
from torch_sinkhorn_attn.distributed.share import Share
from torch_sinkhorn_attn.functional import given_back, in_callers_unit
from torch_sinkhorn_attn.problem.mass_scale import MassScale
from torch_sinkhorn_attn.problem.problem import Inputs, OutputGrads, Potentials, Result, full_precision
from torch_sinkhorn_attn.problem.status import SinkhornAux

FIRST_ONLY = (
    "Sequence-parallel attention has no derivative beyond the first: its backward talks to the other ranks. Compute "
    "what needs second derivatives on one device."
)


def attention(sharded: Sharded, return_aux: bool) -> Tensor | tuple[Tensor, SinkhornAux]:
    """`sinkhorn_attention`; residuals and status are those of the whole problem."""
    return of_result(sharded, solved(sharded, return_aux), return_aux)


def solved(sharded: Sharded, residuals: bool, known: Result | None = None) -> Result:
    """`known`: what was found before, to be differentiated again."""
    output, row, col, *rest = _Attention.apply(sharded.share, residuals, known, *sharded.prepared.inputs)
    return Result(output, Potentials(row.detach(), col.detach()), *(x.detach() for x in rest[:2]), *rest[2:])


def of_result(sharded: Sharded, result: Result, return_aux: bool) -> Tensor | tuple[Tensor, SinkhornAux]:
    """What a call returns, in its unit of mass."""
    prepared, share = sharded.prepared, sharded.share

    def errors(scale: MassScale) -> list[Tensor]:
        return share.errors(prepared.inputs, result.potentials, scale)

    with context.sequence_parallel(None):
        found = in_callers_unit(share.owned_only(prepared), result, return_aux, errors)
        return given_back(prepared, found, return_aux)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, share: Share, residuals: bool, known: Result | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        with full_precision(inputs.query.device):
            found = share.solve(inputs, residuals) if known is None else known
        ctx.share = share
        ctx.save_for_backward(*inputs, found.output, *found.potentials)
        return found.output, *found.potentials, *found[2:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, output, row, col = ctx.saved_tensors
        inputs, share = Inputs(*tensors), ctx.share
        wanted = ctx.needs_input_grad[3:]
        mask = inputs.mask is not None and wanted[Inputs._fields.index("mask")]
        to_bin, from_bin = grads[5:] if share.problem.has_dustbin else (None, None)
        with torch.no_grad(), full_precision(output.device):
            found = share.gradients(inputs, output, Potentials(row, col), OutputGrads(grads[0], to_bin, from_bin, mask))
        given = [
            g.to(x.dtype) if x is not None and g is not None and want else None
            for g, x, want in zip(found, inputs, wanted, strict=True)
        ]
        return None, None, None, *differentiable_once(given, [*inputs, *grads], FIRST_ONLY)
