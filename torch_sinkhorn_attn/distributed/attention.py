"""`sinkhorn_attention` over a process group: one Function for the whole of it, whose state between forward and
backward is that of the rank's rows and owned columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.compat.once import differentiable_once
from torch_sinkhorn_attn.distributed import context
from torch_sinkhorn_attn.distributed.dtensors import local, sharding_of, wrapped
from torch_sinkhorn_attn.distributed.preparation import prepare_shard
from torch_sinkhorn_attn.distributed.tiles import Share
from torch_sinkhorn_attn.distributed.wire import Wire
from torch_sinkhorn_attn.functional import given_back, in_callers_unit
from torch_sinkhorn_attn.problem.arguments import Keywords
from torch_sinkhorn_attn.problem.mass_scale import MassScale
from torch_sinkhorn_attn.problem.problem import Inputs, OutputGrads, Potentials, Result, full_precision
from torch_sinkhorn_attn.problem.status import SinkhornAux

FIRST_ONLY = (
    "Sequence-parallel attention has no derivative beyond the first: its backward talks to the other "
    "ranks. Compute what "
    "needs second derivatives on one device."
)


@torch.compiler.disable
def sharded_attention(
    group: Any,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    attn_mask: Tensor | None,
    keywords: Keywords,
    return_aux: bool,
) -> Tensor | tuple[Tensor, SinkhornAux]:
    """`sinkhorn_attention` of this rank's shards; residuals and status are those of the whole problem."""
    sharding = sharding_of(query, group)
    if sharding is not None:
        query, value = local("query", query, sharding), local("value", value, sharding)
        key = local("key", key, sharding)
    prepared, share = prepare_shard(Wire(group), query, key, value, attn_mask, keywords)
    inputs = prepared.inputs
    output, row, col, *rest = _Attention.apply(share, return_aux, *inputs)
    potentials = Potentials(row.detach(), col.detach())
    residuals, bins = (x.detach() for x in rest[:2]), rest[2:]

    def errors(scale: MassScale) -> list[Tensor]:
        return share.errors(inputs, potentials, scale)

    with context.sequence_parallel(None):
        result = in_callers_unit(
            share.owned_only(prepared), Result(output, potentials, *residuals, *bins), return_aux, errors
        )
        found = given_back(prepared, result, return_aux)
    if sharding is None:
        return found
    if isinstance(found, Tensor):
        return wrapped(found, sharding)
    return wrapped(found[0], sharding), found[1]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Share, residuals: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        with full_precision(inputs.query.device):
            found = share.solve(inputs, residuals)
        ctx.share = share
        ctx.save_for_backward(*inputs, found.output, *found.potentials)
        return found.output, *found.potentials, *found[2:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, output, row, col = ctx.saved_tensors
        inputs, share = Inputs(*tensors), ctx.share
        wanted = ctx.needs_input_grad[2:]
        mask = inputs.mask is not None and wanted[Inputs._fields.index("mask")]
        to_bin, from_bin = grads[5:] if share.problem.has_dustbin else (None, None)
        with torch.no_grad(), full_precision(output.device):
            found = share.gradients(inputs, output, Potentials(row, col), OutputGrads(grads[0], to_bin, from_bin, mask))
        given = [
            g.to(x.dtype) if x is not None and g is not None and want else None
            for g, x, want in zip(found, inputs, wanted, strict=True)
        ]
        return None, None, *differentiable_once(given, [*inputs, *grads], FIRST_ONLY)
