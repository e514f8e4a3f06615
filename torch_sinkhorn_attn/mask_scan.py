"""One reading of an attn_mask, row block by row block: which tokens it leaves active, and the hull of what it keeps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.reference import kept
from torch_sinkhorn_attn.support import Support
from torch_sinkhorn_attn.tracing import for_onnx, recording

_BLOCK_ELEMENTS = 1 << 21


class MaskScan(NamedTuple):
    """Shapes `[N, h, L]` and `[N, h, S]` with h the mask's heads (1 or H)."""

    row_active: Tensor  # some active key of its problem is kept
    col_active: Tensor
    row_lo: Tensor  # hull of the kept entries inside the window; (0, 0) where there are none
    row_hi: Tensor
    col_covered: Tensor  # some kept entry lies inside the window


def scan_mask(mask: Tensor, support: Support, packed: bool, dtype: torch.dtype) -> MaskScan:
    """Read `mask` (4-D, broadcasting to [N, H, L, S]) once; temporaries are O(block), results O(n). `dtype` is the one
    it is added in."""
    mask = mask.detach()
    if not recording() or for_onnx():
        return _scan(mask, support, packed, dtype)
    names = ("row_active", "col_active", "row_segment", "col_segment", "row_lo", "row_hi")
    return MaskScan(*_scan_op(mask, *(getattr(support, name) for name in names), packed, dtype))


@torch.library.custom_op("torch_sinkhorn_attn::scan_mask", mutates_args=())
def _scan_op(
    mask: Tensor,
    row_active: Tensor,
    col_active: Tensor,
    row_segment: Tensor,
    col_segment: Tensor,
    row_lo: Tensor,
    row_hi: Tensor,
    packed: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_scan` for compiled programs: its loop over blocks would tie them to one length."""
    support = Support(
        row_active=row_active, col_active=col_active, row_segment=row_segment, col_segment=col_segment,
        row_lo=row_lo, row_hi=row_hi, col_lo=row_lo, col_hi=row_hi,
    )  # fmt: skip
    row, col, lo, hi, covered = _scan(mask, support, packed, dtype)
    return row, col, lo, hi.clone(), covered.clone()


@_scan_op.register_fake
def _scan_fake(
    mask: Tensor, row_active: Tensor, col_active: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, col = (
        mask.new_empty(x.shape[0], mask.shape[1], x.shape[1], dtype=torch.bool) for x in (row_active, col_active)
    )
    lo, hi = (torch.empty_like(row, dtype=torch.int64) for _ in range(2))
    return row, col, lo, hi, torch.empty_like(col)


def _scan(mask: Tensor, support: Support, packed: bool, dtype: torch.dtype) -> MaskScan:
    length, size = support.row_active.shape[-1], support.col_active.shape[-1]
    num, heads = support.row_active.shape[0], mask.shape[1]
    step = max(1, _BLOCK_ELEMENTS // max(1, num * heads * size))
    if mask.device.type == "xla":  # fuses the reading into the reductions, and would unroll the loop
        step = max(1, length)
    column = torch.arange(size, device=mask.device)
    rows: list[tuple[Tensor, ...]] = []
    col_active = torch.zeros(num, heads, size, dtype=torch.bool, device=mask.device)
    col_covered = col_active
    for start in range(0, length if size else 0, step):
        block = slice(start, min(start + step, length))
        tile = kept(mask if mask.shape[-2] == 1 else mask[..., block, :], dtype)
        tile = tile & support.row_active[:, None, block, None] & support.col_active[:, None, None, :]
        if packed:
            tile = tile & (support.row_segment[:, None, block, None] == support.col_segment[:, None, None, :])
        lo, hi = support.row_lo[:, None, block, None], support.row_hi[:, None, block, None]
        inside = tile & (column >= lo) & (column < hi)
        some = inside.any(-1)
        first = torch.where(some, inside.to(torch.uint8).argmax(-1), 0)
        last = torch.where(some, size - inside.flip(-1).to(torch.uint8).argmax(-1), 0)
        rows.append((tile.any(-1), first, last))
        col_active, col_covered = col_active | tile.any(-2), col_covered | inside.any(-2)
    if not rows or not size:
        empty = torch.zeros(num, heads, length, dtype=torch.int64, device=mask.device)
        return MaskScan(empty.bool(), col_active, empty, empty, col_covered)
    row_active, row_lo, row_hi = (torch.cat(parts, -1) for parts in zip(*rows, strict=True))
    return MaskScan(row_active, col_active, row_lo, row_hi, col_covered)
