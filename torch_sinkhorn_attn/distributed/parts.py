"""Connected components of a support whose mask lies on several ranks: each finds those of its rows, and they are joined
where they share a column."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed.cut import few
from torch_sinkhorn_attn.distributed.share import Share
from torch_sinkhorn_attn.problem.feasibility.parts import pair_labels
from torch_sinkhorn_attn.problem.masks.entries import kept
from torch_sinkhorn_attn.problem.problem import Inputs, Problem, compute_dtype
from torch_sinkhorn_attn.problem.segments import Components, components


def whole_parts(share: Share, inputs: Inputs, whole: Problem) -> Components:
    """As `masked_components` of the whole problem; where the mask splits it, of the columns alone. `inputs`: those of
    the rank's tiles."""
    mask, columns = inputs.mask, share.columns
    if mask is None or whole.num_dustbins:
        return few(components(whole))
    forbids = torch.tensor(not bool(kept(mask, compute_dtype(inputs.query.dtype)).all()), device=mask.device)
    if not bool(share.wire.maximum(forbids.to(torch.int32))):
        return few(components(whole))
    own = torch.full((*share.problem.sizes[:2], sum(columns.counts)), -1, dtype=torch.int64, device=mask.device)
    own[..., columns.start : columns.end] = pair_labels(inputs, share.problem)[1].to(mask.device)
    col = _joined(share.wire.stacked(own)).unique(return_inverse=True)[1]
    return Components(None, col, 1 + int(col.max()) if col.numel() else 1)


def _joined(labels: Tensor) -> Tensor:
    """`[N, H, S]`: the least column of each component, from the labels `[P, N, H, S]` that each rank gave its own, -1
    where it has none."""
    size = labels.shape[-1]
    found = torch.arange(size, device=labels.device).expand(labels.shape[1:]).clone()
    while True:
        before = found
        for of_rank in labels:
            lines = int(of_rank.max()) + 1 if of_rank.numel() else 0
            place = torch.where(of_rank < 0, lines, of_rank)
            least = torch.full((*found.shape[:-1], lines + 1), size, device=found.device)
            least = least.scatter_reduce(-1, place, found, "amin")
            found = torch.where(of_rank < 0, found, least.gather(-1, place))
        if torch.equal(found, before):
            return found
