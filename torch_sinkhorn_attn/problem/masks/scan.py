"""What an attn_mask leaves: the tokens that stay active, and the hull of what is kept of each row's interval.

A constant added to a whole line of the scores is absorbed by that line's potential: a key padded with a finite "minus
infinity" (-1e4) would keep its mass. So entries of a float mask that lie `-floor` or more below the highest of their
problem are *low*, and a line that has no others is inactive, as if they were -inf.

It takes O(n) for masks of one row or one column (padding). For dense masks beside intervals of width W it takes O(n W)
where data may be looked at, plus the lines of which the interval keeps nothing; elsewhere O(L S).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn._ops import add_op_namespace_prefix
from torch_sinkhorn_attn.compat.tracing import for_onnx, recording
from torch_sinkhorn_attn.problem.fits import check_mask, check_present, described, refuse
from torch_sinkhorn_attn.problem.looking import can_look
from torch_sinkhorn_attn.problem.masks.dense import DenseMask
from torch_sinkhorn_attn.problem.masks.lines import KeyMask, Lines, MaskScan, QueryMask, without_hulls
from torch_sinkhorn_attn.problem.support import Support


class Extremes(NamedTuple):
    """Of the entries of a float mask that intervals hold: scalars."""

    highest: Tensor  # NaN if any of them is
    lowest: Tensor  # of what is kept between tokens left active; 0 where nothing is


def scan_mask(
    mask: Tensor, support: Support, packed: bool, dtype: torch.dtype, floor: float | None = None, hulls: bool = True
) -> MaskScan:
    """Read `mask` (4-D, broadcasting to [N, H, L, S]), which is added in `dtype`. Temporaries are O(block), results
    O(n); without `hulls` those are empty."""
    mask = mask.detach()
    lines = Lines.of(support, packed)
    if recording() and not for_onnx() and 1 not in mask.shape[-2:]:
        row, col = _scan_op(mask, *support, packed, dtype, floor)
        return without_hulls(row, col)
    return _scan(mask, lines, dtype, floor, hulls)


def _scan(mask: Tensor, lines: Lines, dtype: torch.dtype, floor: float | None, hulls: bool) -> MaskScan:
    if 0 in (lines.length, lines.size):
        row, col = (x.expand(-1, mask.shape[1], -1) & False for x in (lines.row_active, lines.col_active))
        return MaskScan(row, col, row.to(torch.int64), row.to(torch.int64), col)
    limit = _limit(mask, lines, dtype, floor)
    reader = _reader(mask, lines, dtype)
    if limit is None:
        return reader.scan(None, hulls)
    found = reader.scan(limit, hulls=False)
    if not hulls:
        return found
    left = _reader(mask, lines.among(found.row_active, found.col_active), dtype).scan(None, hulls)
    return left._replace(row_active=found.row_active, col_active=found.col_active)


def keeps_all(mask: Tensor, dtype: torch.dtype, floor: float | None) -> bool:
    """Whether no entry of the mask, in the support or not, forbids a pair, is low, or is to be refused: one reading
    that saves the others."""
    if mask.numel() == 0:
        return False
    if mask.dtype == torch.bool:
        return bool(mask.all())
    low, high = (x.item() for x in torch.aminmax(mask.detach()))
    least = max(torch.finfo(mask.dtype).min, torch.finfo(dtype).min) / 2
    if floor is not None:
        least = max(least, high + floor)
    return high < math.inf and low > max(least, -largest_addend(dtype))  # not so for NaN


def largest_addend(dtype: torch.dtype) -> float:
    """Beyond it adding to a score loses its second decimal."""
    return 0.01 / torch.finfo(dtype).eps


def extremes(mask: Tensor, support: Support, packed: bool, dtype: torch.dtype, left: MaskScan) -> Extremes:
    """Of a float mask whose scan is `left`."""
    lines = Lines.of(support, packed).among(left.row_active, left.col_active)
    return Extremes(*_reader(mask.detach(), lines, dtype).extremes())


def _limit(mask: Tensor, lines: Lines, dtype: torch.dtype, floor: float | None) -> Tensor | None:
    """`[N, h, G]`: entries at or below it are low; None if none are."""
    if floor is None or mask.dtype == torch.bool:
        return None
    reader = _reader(mask, lines, dtype)
    if can_look(mask, lines.support.row_lo):
        highest, lowest = reader.extremes()
        if lowest > highest + floor:
            return None
    level = reader.level()
    return torch.where(level.isfinite(), level + floor, -torch.inf)


def _reader(mask: Tensor, lines: Lines, dtype: torch.dtype) -> KeyMask | QueryMask | DenseMask:
    if mask.shape[-2] == 1:
        return KeyMask(mask, lines, dtype)
    return (QueryMask if mask.shape[-1] == 1 else DenseMask)(mask, lines, dtype)


@torch.library.custom_op(add_op_namespace_prefix("scan_mask"), mutates_args=())
def _scan_op(
    mask: Tensor,
    row_lo: Tensor,
    row_hi: Tensor,
    col_lo: Tensor,
    col_hi: Tensor,
    row_segment: Tensor,
    col_segment: Tensor,
    row_active: Tensor,
    col_active: Tensor,
    packed: bool,
    dtype: torch.dtype,
    floor: float | None,
) -> tuple[Tensor, Tensor]:
    """`_scan` of a dense mask for compiled programs: its loop over blocks would tie them to one length."""
    support = Support(row_lo, row_hi, col_lo, col_hi, row_segment, col_segment, row_active, col_active)
    _check_scan(mask, support, packed, dtype, floor)
    found = _scan(mask, Lines.of(support, packed), dtype, floor, hulls=False)
    return found.row_active.clone(), found.col_active.clone()


@_scan_op.register_fake
def _scan_fake(
    mask: Tensor,
    row_lo: Tensor,
    row_hi: Tensor,
    col_lo: Tensor,
    col_hi: Tensor,
    row_segment: Tensor,
    col_segment: Tensor,
    row_active: Tensor,
    col_active: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    row, col = (
        mask.new_empty(x.shape[0], mask.shape[1], x.shape[1], dtype=torch.bool) for x in (row_active, col_active)
    )
    return row, col


def _check_scan(mask: Tensor, support: Support, packed: bool, dtype: torch.dtype, floor: float | None) -> None:
    """A call of `scan_mask`, whose tensors are a mask and the fields of a support."""
    check_present(mask=mask, **support._asdict())
    for name, x in (("row_lo", support.row_lo), ("col_lo", support.col_lo)):
        if x.ndim != 2:
            raise ValueError(f"{name} is {described(x)}; two dimensions are needed: batch and tokens.")
    (num, length), size, device = support.row_lo.shape, support.col_lo.shape[1], mask.device
    for name, x in support._asdict().items():
        kind, shape = torch.bool if name.endswith("active") else torch.int64, (num, size if "col" in name else length)
        if x.shape != shape or x.dtype != kind or x.device != device:
            refuse(name, x, kind, shape, device)
    check_mask(mask, (num, mask.shape[1] if mask.ndim == 4 else 1, length, size), device)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype={dtype}; the compute dtype is needed, float32 or float64.")
    if floor is not None and not -math.inf < floor < 0:
        raise ValueError(f"floor={floor} is out of range; a negative number or None is needed.")
    if device.type != "cpu":
        return
    most = max(1, min(length, size)) if packed else 1
    for side, end in (("row", size), ("col", length)):
        lo, hi, segment = (getattr(support, f"{side}_{name}") for name in ("lo", "hi", "segment"))
        if lo.numel() and not bool(((lo >= 0) & (lo <= hi) & (hi <= end)).all()):
            raise ValueError(f"{side}_lo and {side}_hi must hold 0 <= {side}_lo <= {side}_hi <= {end}.")
        if packed and segment.numel() and not 0 <= int(segment.min()) <= int(segment.max()) < most:
            raise ValueError(f"{side}_segment must hold indices from 0 to {most - 1}.")
