"""A mask with a value per query and key, read in blocks of rows: whole, or where that saves time only its intervals."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines import engine_of
from torch_sinkhorn_attn.problem.looking import can_look
from torch_sinkhorn_attn.problem.masks.entries import kept
from torch_sinkhorn_attn.problem.masks.lines import Lines, MaskScan, extremes, highest, without_hulls
from torch_sinkhorn_attn.problem.segments import by_segment

_BLOCK_ELEMENTS = 1 << 21
_GATHERED_ELEMENTS = 1 << 18  # with indices, of 8 bytes each: near the cache
_GATHER_COST = 4  # reading an entry at an index, against reading all in order


class _Block(NamedTuple):
    rows: slice
    column: Tensor  # [N, 1, l, W] of the entries read, or [S]
    values: Tensor  # [N or 1, h, l, W or S]
    inside: Tensor  # bool [N, h, l, W or S]
    within: Tensor  # likewise, of the entries read


class DenseMask:
    """A mask `[N or 1, h, L, S]`."""

    def __init__(self, mask: Tensor, lines: Lines, dtype: torch.dtype):
        self.mask, self.lines, self.dtype = mask, lines, dtype
        self.num, self.heads = lines.support.row_lo.shape[0], mask.shape[1]

    @cached_property
    def _width(self) -> int | None:
        """Of the widest interval, if it pays to read those alone."""
        s = self.lines.support
        if s.row_lo.numel() == 0 or not can_look(self.mask, s.row_lo):
            return None
        width = max(1, int((s.row_hi - s.row_lo).max()))
        return width if width * _GATHER_COST <= self.lines.size else None

    def _blocks(self) -> Iterator[_Block]:
        width, elements = self.lines.size, _BLOCK_ELEMENTS
        if self._width is not None:
            width, elements = self._width, _GATHERED_ELEMENTS
        step = max(1, elements // max(1, self.num * self.heads * width))
        if engine_of(self.mask.device).compiles:  # it fuses the reading into the reductions, and would unroll the loop
            step = self.lines.length
        for start in range(0, self.lines.length, step):
            rows = slice(start, min(start + step, self.lines.length))
            yield self._whole(rows) if self._width is None else self._intervals(rows, width)

    def _whole(self, rows: slice) -> _Block:
        t, s = self.lines, self.lines.support
        values, column = self.mask[..., rows, :], torch.arange(t.size, device=self.mask.device)
        within = kept(values, self.dtype) & t.row_active[..., rows, None] & t.col_active[..., None, :]
        if t.row_index is not None and t.col_index is not None:
            within = within & (t.row_index[..., rows, None] == t.col_index[..., None, :])
        lo, hi = s.row_lo[:, None, rows, None], s.row_hi[:, None, rows, None]
        return _Block(rows, column, values, within & (column >= lo) & (column < hi), within)

    def _intervals(self, rows: slice, width: int) -> _Block:
        t, s = self.lines, self.lines.support
        column = s.row_lo[:, rows, None] + torch.arange(width, device=self.mask.device)
        valid = (column < s.row_hi[:, rows, None])[:, None]
        column = column.clamp(max=t.size - 1)[:, None]
        shape = (self.num, self.heads, *column.shape[2:])
        values = self.mask[..., rows, :].expand(*shape[:3], t.size).gather(-1, column.expand(shape))
        values = values.masked_fill(~valid, 0)
        flat = column.flatten(2).expand(-1, t.col_active.shape[1], -1)
        live = t.col_active.gather(-1, flat).unflatten(-1, shape[2:])
        inside = valid & live & t.row_active[..., rows, None] & kept(values, self.dtype)
        return _Block(rows, column, values, inside, inside)

    def level(self) -> Tensor:
        """`[N, h, G]` the highest value inside; -inf where there is none."""
        rows = [torch.where(b.inside, b.values.to(self.dtype), -torch.inf).amax(-1) for b in self._blocks()]
        return self.lines.highest(torch.cat(rows, -1), self.lines.row_index)

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The highest value inside and the lowest."""
        pairs = [extremes(b.values.to(self.dtype), b.inside) for b in self._blocks()]
        if not pairs:
            return self.mask.new_full((), -torch.inf, dtype=self.dtype), self.mask.new_zeros((), dtype=self.dtype)
        tops, bottoms = (torch.stack(x) for x in zip(*pairs, strict=True))
        return highest(tops), bottoms.min()

    def scan(self, limit: Tensor | None, hulls: bool) -> MaskScan:
        """Entries at or below `limit [N, h, G]` are low."""
        t = self.lines
        limits = None if limit is None else by_segment(limit, t.row_index, t.length)
        rows, ends = [], []
        high = torch.zeros(self.num, self.heads, t.size, dtype=torch.bool, device=self.mask.device)
        anywhere = high  # columns with an entry that is not low, inside and within
        for b in self._blocks():
            low_entry = None if limits is None else b.values.to(self.dtype) <= limits[..., b.rows, None]  # NaN is not
            inside, within = (x if low_entry is None else x & ~low_entry for x in (b.inside, b.within))
            rows.append(within.any(-1))
            high = high | self._columns(b, inside)
            if self._width is None:
                anywhere = anywhere | within.any(-2)
            if hulls:
                ends.append(_hull(b))
        high = self.across(high)
        row_active, low = torch.cat(rows, -1) if rows else high.new_zeros(*high.shape[:2], 0), torch.zeros_like(high)
        if self._width is not None:  # what the intervals do not hold is read only for lines that are not decided
            row_active = row_active | self._elsewhere(limit, t.row_active & ~row_active, False)
        if limits is not None:
            for b in self._blocks():
                low = low | self._columns(b, b.inside & row_active[..., b.rows, None])
            low = self.across(low)
        if self._width is not None:
            anywhere = self._elsewhere(limit, t.col_active & ~high & ~low, True)
        col_active = high | (self.across(anywhere) & ~low)
        if not hulls:
            return without_hulls(row_active, col_active)
        lo, hi = (torch.cat(x, -1) for x in zip(*ends, strict=True))
        return MaskScan(row_active, col_active, lo, hi, high)

    def across(self, marked: Tensor) -> Tensor:
        """Columns `[N, h, S]` marked here, or by rows that lie on other devices."""
        return marked

    def _columns(self, b: _Block, marked: Tensor) -> Tensor:
        """`[N, h, S]`: columns with a marked entry in the block."""
        if self._width is None:
            return marked.any(-2)
        found = torch.zeros(self.num, self.heads, self.lines.size + 1, dtype=torch.bool, device=marked.device)
        place = torch.where(marked, b.column, self.lines.size).flatten(2)
        return found.scatter_(-1, place, True)[..., :-1]

    def _elsewhere(self, limit: Tensor | None, asked: Tensor, columns: bool) -> Tensor:
        """`[N, h, n]`: those of the lines asked for that have an entry within which is not low, anywhere."""
        t, found = self.lines, torch.zeros_like(asked)
        active, own, other = t.col_active, t.row_index, t.col_index
        if columns:
            active, own, other = t.row_active, t.col_index, t.row_index
        for n, h in asked.any(-1).nonzero().tolist():
            plane = self.mask[min(n, self.mask.shape[0] - 1), h]
            plane, live = plane.T if columns else plane, active[n, min(h, active.shape[1] - 1)]
            for lines in asked[n, h].nonzero()[:, 0].split(max(1, _BLOCK_ELEMENTS // len(live))):
                first, last = int(lines[0]), int(lines[-1]) + 1
                near = last - first <= _GATHER_COST * len(lines)  # padding lies together: read it in place
                lines = torch.arange(first, last, device=lines.device) if near else lines
                values = plane[first:last] if near else plane.index_select(0, lines)
                marked, group = kept(values, self.dtype) & live, torch.zeros_like(lines)
                if own is not None and other is not None:
                    group = own[n, 0, lines]
                    marked &= group[:, None] == other[n, 0]
                if limit is not None:
                    marked &= ~(values.to(self.dtype) <= limit[n, h, group][:, None])
                found[n, h, lines] = marked.view(torch.uint8).amax(-1) > 0  # 16 times faster than any()
        return found & asked


def _hull(b: _Block) -> tuple[Tensor, Tensor]:
    """First column inside, and the one after the last, of each row; (0, 0) where there is none."""
    width = b.inside.shape[-1]
    some, marks = b.inside.any(-1), b.inside.to(torch.uint8)
    first, last = marks.argmax(-1), width - 1 - marks.flip(-1).argmax(-1)
    if b.column.ndim > 1:
        first, last = first + b.column[..., 0], last + b.column[..., 0]
    return torch.where(some, first, 0), torch.where(some, last + 1, 0)
