"""Connected components of a support with its mask: one gauge freedom, and one null vector, each."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.problem import bits
from torch_sinkhorn_attn.problem.feasibility import flow
from torch_sinkhorn_attn.problem.feasibility.masks import MaskedSupport, active_pairs, read_pairs
from torch_sinkhorn_attn.problem.masks.entries import kept
from torch_sinkhorn_attn.problem.problem import Inputs, Problem, compute_dtype
from torch_sinkhorn_attn.problem.segments import Components, components


def masked_components(inputs: Inputs, problem: Problem) -> Components:
    """Labels `[N, H, L]` and `[N, H, S]`, the mask read once, into a bit for each pair. Those of `components` where the
    mask cannot split what the intervals hold together: there is none, it forbids nothing, or only whole tokens, or a
    dustbin joins them all."""
    mask = inputs.mask
    dtype = compute_dtype(inputs.query.dtype)
    if mask is None or problem.num_dustbins or 1 in mask.shape[-2:] or bool(kept(mask, dtype).all()):
        return components(problem)
    row, col = pair_labels(inputs, problem)
    device = problem.marginals.log_row_mass.device
    return Components(row.clamp(min=0).to(device), col.clamp(min=0).to(device), max(1, problem.sizes[2]))


def pair_labels(inputs: Inputs, problem: Problem) -> tuple[Tensor, Tensor]:
    """The first row of the component of each row `[N, H, L]` and column `[N, H, S]`, -1 where it has no pair; on the
    CPU."""
    mask, dtype = inputs.mask, compute_dtype(inputs.query.dtype)
    assert mask is not None
    num, heads, length, size = problem.sizes
    row_live, col_live = (
        (x > -torch.inf).cpu() for x in (problem.marginals.log_row_mass, problem.marginals.log_col_mass)
    )
    lo, hi = (x.cpu() for x in (problem.support.row_lo, problem.support.row_hi))
    wide = mask.cpu().expand(*mask.shape[:2], length, size)
    support = MaskedSupport(wide, lo, hi, problem.outline.banded, dtype)
    row = torch.full((num, heads, length), -1, dtype=torch.int64, device="cpu")
    col = torch.full((num, heads, size), -1, dtype=torch.int64, device="cpu")
    if 0 in (length, size):
        return row, col
    for n in range(num):
        for h in range(heads):
            if h == 0 or mask.shape[1] > 1:
                pairs = read_pairs(support, n, h)
            elif torch.equal(row_live[n, h], row_live[n, h - 1]) and torch.equal(col_live[n, h], col_live[n, h - 1]):
                row[n, h], col[n, h] = row[n, h - 1], col[n, h - 1]
                continue
            rows = active_pairs(pairs, row_live[n, h], col_live[n, h])
            for own_rows, own_cols in flow.components(flow.Graph(rows, bits.transposed(rows, size))):
                row[n, h, own_rows] = col[n, h, own_cols] = own_rows[0]
    return row, col
