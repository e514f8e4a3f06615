"""Whether a problem with an attn_mask has a plan that is positive on its support, in any order of its tokens.

The support is read once, into one bit a pair. Where the mask forbids only whole tokens, it is that of the intervals and
O(n) decides; else `transport_flow` does. Problems that agree (heads, batch elements, layers that share a mask) are
solved once: what has a plan is remembered by its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.problem import bits
from torch_sinkhorn_attn.problem.feasibility import flow as transport_flow
from torch_sinkhorn_attn.problem.feasibility.intervals import IntervalProblem, check_intervals, interval_flow, refusal
from torch_sinkhorn_attn.problem.masks.entries import kept

_BLOCK_ELEMENTS = 1 << 22
_WINDOW_ROWS = 256  # rows read at once beside a window: few, so that little is read outside it
_MOST_REMEMBERED = 4096

_has_plan: dict[bytes, None] = {}  # digests of problems


class MaskedSupport(NamedTuple):
    """Where pairs may be: what the mask keeps inside the intervals."""

    mask: Tensor  # [N or 1, H or 1, L or 1, S or 1], on the CPU
    row_lo: Tensor  # [N, L] intervals before the mask
    row_hi: Tensor
    banded: bool  # they do not hold every pair of active tokens
    dtype: torch.dtype  # in which the mask is added

    @property
    def lines_only(self) -> bool:
        """Whether the mask's shape says that it forbids only whole queries, or only whole keys."""
        return self.mask.shape[-2] == 1 or self.mask.shape[-1] == 1

    def without_mask(self, m: IntervalProblem) -> IntervalProblem:
        lo, hi = (x[:, None].expand(m.row_mass.shape) for x in (self.row_lo, self.row_hi))
        return m._replace(row_lo=lo, row_hi=hi)


def check_masked(m: IntervalProblem, support: MaskedSupport) -> None:
    """Refuse a balanced problem without a plan."""
    plain = support.without_mask(m)
    if support.lines_only:
        if support.banded:
            check_intervals(plain)
        return
    by_intervals = torch.zeros(*m.row_mass.shape[:2], 1, dtype=torch.bool, device=m.row_mass.device)
    for n, h, key, pairs in _problems(m, support):
        if key in _has_plan:
            continue
        rows = active_pairs(pairs, m.row_mass[n, h] > 0, m.col_mass[n, h] > 0)
        if _holds_intervals(plain, n, h, rows):
            by_intervals[n, h] = support.banded
            continue
        _check_flow(m, n, h, rows)
        if len(_has_plan) >= _MOST_REMEMBERED:
            _has_plan.clear()
        _has_plan[key] = None
    if by_intervals.any():
        check_intervals(plain._replace(row_mass=torch.where(by_intervals, m.row_mass, 0.0)))


def masked_flow(m: IntervalProblem, support: MaskedSupport) -> Tensor:
    """`[N, H, G]` the largest mass that the support can carry, whatever the totals."""
    if support.lines_only:
        return interval_flow(support.without_mask(m))
    found = torch.zeros(*m.row_mass.shape[:2], m.groups, dtype=torch.float64, device=m.row_mass.device)
    for n in range(m.row_mass.shape[0]):
        for h in range(m.row_mass.shape[1]):
            rows = active_pairs(read_pairs(support, n, h), m.row_mass[n, h] > 0, m.col_mass[n, h] > 0)
            a, b = transport_flow.dyadic(m.row_mass[n, h].tolist(), m.col_mass[n, h].tolist())
            segment = [0] * len(a) if m.row_segment is None else m.row_segment[n, 0].tolist()
            unit = float(m.row_mass[n, h].sum()) / max(1, sum(a))
            for lines, left in transport_flow.left_over(_graph(m, rows), a, b):
                found[n, h, segment[lines[0]]] += (sum(a[i] for i in lines) - left) * unit
    return found


Blocks = list[tuple[int, int, bytes]]  # rows after rows: first column, bytes of a row, packed pairs


def _problems(m: IntervalProblem, support: MaskedSupport) -> Iterator[tuple[int, int, bytes, Blocks]]:
    """The problems that differ from those before them: batch element, head, digest and pairs."""
    seen: set[bytes] = set()
    read: dict[tuple[int, int, int], tuple[Blocks, bytes]] = {}
    for n in range(m.row_mass.shape[0]):
        read.clear()
        for h in range(m.row_mass.shape[1]):
            at = n, h if support.mask.shape[1] > 1 else 0, 0
            if at not in read:
                pairs = read_pairs(support, n, h)
                digest = _digest(*(b"%d,%d;%b" % block for block in pairs))
                read = {at: (pairs, digest)}
            pairs, digest = read[at]
            segment = b"" if m.row_segment is None else bits.raw(m.row_segment[n, 0])
            masses = bits.raw(m.row_mass[n, h]), bits.raw(m.col_mass[n, h])
            key = _digest(digest, *masses, segment, repr((m.row_mass.shape, m.col_mass.shape, m.rounding)).encode())
            if key not in seen:
                seen.add(key)
                yield n, h, key, pairs


def _digest(*parts: bytes) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.digest()


def read_pairs(support: MaskedSupport, n: int, h: int) -> Blocks:
    """The pairs that the mask keeps inside the intervals, read where these are."""
    mask = support.mask[n if support.mask.shape[0] > 1 else 0, h if support.mask.shape[1] > 1 else 0]
    length, size = support.row_lo.shape[-1], mask.shape[-1]
    step = max(1, _BLOCK_ELEMENTS // max(1, size))
    if not support.banded:
        blocks = (mask[at : at + step] for at in range(0, length, step))
        return [(0, *bits.packed(kept(block, support.dtype))) for block in blocks]
    lo, hi = support.row_lo[n], support.row_hi[n]
    first, last = torch.where(lo < hi, lo, size), torch.where(lo < hi, hi, 0)
    found = []
    for at in range(0, length, min(step, _WINDOW_ROWS)):
        rows = slice(at, min(at + min(step, _WINDOW_ROWS), length))
        start = int(first[rows].min())
        column = torch.arange(start, max(start, int(last[rows].max())), device=last.device)
        tile = kept(mask[rows, start : start + len(column)], support.dtype)
        tile = tile & (column >= lo[rows, None]) & (column < hi[rows, None])
        found.append((start, *bits.packed(tile)))
    return found


def active_pairs(pairs: Blocks, row_active: Tensor, col_active: Tensor) -> list[int]:
    """The pairs of active tokens, by query, of those read."""
    every = bits.from_members(col_active.nonzero()[:, 0].tolist())
    rows = [row << first for first, width, data in pairs for row in bits.integers(width, data)]
    return [row & every if live else 0 for row, live in zip(rows, row_active.tolist(), strict=True)]


def _holds_intervals(plain: IntervalProblem, n: int, h: int, rows: list[int]) -> bool:
    """Whether every pair of active tokens inside the intervals is there."""
    before = torch.nn.functional.pad((plain.col_mass[n, h] > 0).cumsum(-1), (1, 0))
    count = torch.where(plain.row_mass[n, h] > 0, before[plain.row_hi[n, h]] - before[plain.row_lo[n, h]], 0)
    return [row.bit_count() for row in rows] == count.tolist()


def _graph(m: IntervalProblem, rows: list[int]) -> transport_flow.Graph:
    return transport_flow.Graph(rows, bits.transposed(rows, m.col_mass.shape[-1]))


def _check_flow(m: IntervalProblem, n: int, h: int, rows: list[int]) -> None:
    (a,), (b,) = (transport_flow.dyadic(x[n, h].tolist()) for x in (m.row_mass, m.col_mass))
    totals = [(sum(a), sum(b))] * len(a)
    if m.row_segment is not None and m.col_segment is not None:
        own = [[0, 0] for _ in range(m.groups)]
        for side, masses, segments in ((0, a, m.row_segment), (1, b, m.col_segment)):
            for mass, g in zip(masses, segments[n, 0].tolist(), strict=True):
                own[g][side] += mass
        totals = [(own[g][0], own[g][1]) for g in m.row_segment[n, 0].tolist()]
    cut = transport_flow.blocking_cut(_graph(m, rows), a, b, totals, m.rounding)
    if cut is None:
        return
    found = [torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device) for x in (m.row_mass, m.col_mass)]
    for inside, places in zip(found, (cut.rows, cut.cols), strict=True):
        inside[places] = True
    raise ValueError(refusal(m, n, h, found[0], found[1], cut.apart))
