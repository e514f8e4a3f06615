"""Masks of one row (keys) or of one column (queries), read in O(n); and what the readers of all masks have in common.

Of a mask's entries those are *within* that are kept and whose tokens are active members of one problem, and those of
them *inside* that the interval of their row (the window) holds too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.arrays.of_torch import unsplit
from torch_sinkhorn_attn.problem.masks.entries import kept
from torch_sinkhorn_attn.problem.segments import by_segment, segment_max, segment_sum
from torch_sinkhorn_attn.problem.support import Support


class MaskScan(NamedTuple):
    """Shapes `[N, h, L]` and `[N, h, S]` with h the mask's heads (1 or H)."""

    row_active: Tensor  # some entry within is not low
    col_active: Tensor  # likewise; and if any of active rows are inside, one of those
    row_lo: Tensor  # hull of the entries inside, between active tokens; (0, 0) where there are none
    row_hi: Tensor
    col_covered: Tensor  # some such entry lies inside


def without_hulls(row_active: Tensor, col_active: Tensor) -> MaskScan:
    """A scan whose last three fields were not asked for, and are empty."""
    none = row_active.new_empty(0)
    return MaskScan(row_active, col_active, none.to(torch.int64), none.to(torch.int64), none)


class Lines(NamedTuple):
    """The rows and columns that a mask meets: the support, who is active, and which problem they belong to."""

    support: Support
    row_active: Tensor  # [N, 1 or h, L]
    col_active: Tensor  # [N, 1 or h, S]
    row_index: Tensor | None  # [N, 1, L], the segment; None: all in one
    col_index: Tensor | None
    groups: int

    @classmethod
    def of(cls, support: Support, packed: bool) -> Lines:
        """Those of a support."""
        row, col = (support.row_segment[:, None], support.col_segment[:, None]) if packed else (None, None)
        groups = max(1, min(support.row_lo.shape[-1], support.col_lo.shape[-1])) if packed else 1
        return cls(support, support.row_active[:, None], support.col_active[:, None], row, col, groups)

    def among(self, row_active: Tensor, col_active: Tensor) -> Lines:
        """Only so many active."""
        return self._replace(row_active=row_active, col_active=col_active)

    @property
    def length(self) -> int:
        return self.support.row_lo.shape[-1]

    @property
    def size(self) -> int:
        return self.support.col_lo.shape[-1]

    def highest(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Largest value over each problem: `[N, h, n]` to `[N, h, G]`."""
        return x.amax(-1, keepdim=True) if index is None else segment_max(x, index, self.groups)

    def any(self, x: Tensor, own: Tensor | None, other: Tensor | None, length: int) -> Tensor:
        """For each line of the other side, whether its problem has a marked line on this one."""
        return by_segment(segment_sum(x.to(torch.int64), own, self.groups), other, length) > 0


class KeyMask:
    """A mask `[N or 1, h, 1, S or 1]`: one value per key."""

    def __init__(self, mask: Tensor, lines: Lines, dtype: torch.dtype):
        self.lines = lines
        given = mask[..., 0, :].expand(*mask.shape[:2], lines.size)
        self.within = kept(given, dtype) & lines.col_active
        self.values = given if mask.dtype == torch.bool else given.to(dtype)

    def level(self) -> Tensor:
        """`[N, h, G]` the highest value inside; -inf where there is none."""
        s = self.lines.support
        inside = self.within & (s.col_lo < s.col_hi)[:, None]
        return self.lines.highest(torch.where(inside, self.values, -torch.inf), self.lines.col_index)

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The highest value within and the lowest."""
        return extremes(self.values, self.within)

    def scan(self, limit: Tensor | None, hulls: bool) -> MaskScan:
        """Entries at or below `limit [N, h, G]` are low."""
        t, s = self.lines, self.lines.support
        high = _not_low(self.within, self.values, limit, t.col_index)
        rows = t.row_active & t.any(high, t.col_index, t.row_index, t.length)
        if not hulls:
            return without_hulls(rows, high)
        lo, hi = shrunk(s.row_lo[:, None], s.row_hi[:, None], self.within, t.row_active)
        return MaskScan(rows, high, lo, hi, self.within & (s.col_lo < s.col_hi)[:, None])


class QueryMask:
    """A mask `[N or 1, h, L, 1]`: one value per query."""

    def __init__(self, mask: Tensor, lines: Lines, dtype: torch.dtype):
        self.lines = lines
        given = mask[..., 0]
        self.within = kept(given, dtype) & lines.row_active
        self.values = given if mask.dtype == torch.bool else given.to(dtype)

    def level(self) -> Tensor:
        """`[N, h, G]` the highest value inside; -inf where there is none."""
        s = self.lines.support
        inside = self.within & (s.row_lo < s.row_hi)[:, None]
        return self.lines.highest(torch.where(inside, self.values, -torch.inf), self.lines.row_index)

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The highest value within and the lowest."""
        return extremes(self.values, self.within)

    def scan(self, limit: Tensor | None, hulls: bool) -> MaskScan:
        """Entries at or below `limit [N, h, G]` are low."""
        t, s = self.lines, self.lines.support
        high = _not_low(self.within, self.values, limit, t.row_index)
        cols = t.col_active & t.any(high, t.row_index, t.col_index, t.size)
        if not hulls:
            return without_hulls(high, cols)
        lo, hi = shrunk(s.row_lo[:, None], s.row_hi[:, None], t.col_active, self.within)
        return MaskScan(high, cols, lo, hi, self._inside(self.within) & t.col_active)

    def _inside(self, marked: Tensor) -> Tensor:
        """`[N, h, S]`: whether a marked row reaches the column."""
        count, s = _counts(marked), self.lines.support
        lo, hi = (x[:, None].expand(*count.shape[:2], -1) for x in (s.col_lo, s.col_hi))
        return count.gather(-1, lo) < count.gather(-1, hi)


def shrunk(lo: Tensor, hi: Tensor, live: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The intervals `[N, 1, L]` from their first to their last live column `[N, c, S]`; (0, 0) where there is none, and
    for rows that are not marked in `rows [N, r, L]`."""
    (live,), size = unsplit(live), live.shape[-1]
    count = _counts(live)
    column = torch.arange(size, device=live.device).expand_as(live)
    order = torch.zeros_like(count).scatter(-1, torch.where(live, count[..., :-1], size), column)  # of live columns
    heads = max(live.shape[1], rows.shape[1])
    order, count = (x.expand(-1, heads, -1) for x in (order, count))
    begin, end = (count.gather(-1, x.expand(-1, heads, -1)) for x in (lo, hi))
    some = rows & (begin < end)
    first, last = order.gather(-1, begin.clamp(max=size - 1)), order.gather(-1, (end - 1).clamp(min=0)) + 1
    begin, end = unsplit(torch.where(some, first, 0), torch.where(some, last, 0))
    return begin, end


def extremes(values: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """The highest of the values that are marked, -inf over none and NaN if any is; and the lowest, 0 over none."""
    if among.numel() == 0:
        return values.new_full((), -torch.inf), values.new_zeros(())
    return highest(torch.where(among, values, -torch.inf)), torch.where(among, values, 0.0).min()


def highest(x: Tensor) -> Tensor:
    """The largest value of all, NaN if any is: XLA's own maximum may lose it."""
    return x.max().masked_fill(x.isnan().any(), torch.nan)


def _counts(marked: Tensor) -> Tensor:
    """How many are marked before each place: `[..., n]` to `[..., n + 1]`."""
    return torch.nn.functional.pad(marked.to(torch.int64).cumsum(-1), (1, 0))


def _not_low(within: Tensor, values: Tensor, limit: Tensor | None, index: Tensor | None) -> Tensor:
    # Not "above": NaN is not low, and stays to be seen.
    return within if limit is None else within & ~(values <= by_segment(limit, index, values.shape[-1]))
