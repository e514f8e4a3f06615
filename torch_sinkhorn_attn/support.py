"""Supports made of monotone row intervals: band, lengths, packed segments, and their transpose, all in O(n).

A support lets row i attend to columns `[lo_i, hi_i)` with lo and hi non-decreasing. Full, band of (1, 1), two segments:

    1 1 1 1      1 1 . .      1 1 . .
    1 1 1 1      1 1 1 .      1 1 . .
    1 1 1 1      . 1 1 1      . . 1 1
    1 1 1 1      . . 1 1      . . 1 1

A window follows the aligned centres of the n active queries and m active keys, c_i = (i + 1/2) m/n - 1/2: key j is in
row i's window (left, right) iff -left <= j - c_i <= right, decided in integers. Everything is tensor code without a
host synchronisation: lengths and ids are data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.problem import Problem


class Support(NamedTuple):
    """Intervals, their transpose, and who is active before any attn_mask. Shapes as in `Problem`; active is bool."""

    row_lo: Tensor
    row_hi: Tensor
    col_lo: Tensor
    col_hi: Tensor
    row_segment: Tensor
    col_segment: Tensor
    row_active: Tensor
    col_active: Tensor


def token_ids(
    batch: int, length: int, lengths: Tensor | None, segment_ids: Tensor | None, device: torch.device
) -> Tensor:
    """`[batch, length]` int64: the id of the problem each token belongs to, -1 where it is inactive."""
    position = torch.arange(length, device=device)
    if segment_ids is None:
        ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
    else:
        ids = segment_ids.to(torch.int64).clamp(min=-1)
    if lengths is not None:
        ids = torch.where(position < lengths.to(torch.int64)[:, None], ids, -1)
    return ids


class _Side(NamedTuple):
    """One side of the problems, seen by a token: where its problem's tokens are. All `[N, length]` but `order`."""

    order: Tensor  # physical index of the tokens sorted by id
    first: Tensor  # start of the *other* side's tokens with this id in that side's order
    matches: Tensor  # how many of them
    rank: Tensor  # rank of this token among its own side's tokens with the same id
    own_count: Tensor


def _match(ids: Tensor, other_ids: Tensor) -> _Side:
    sorted_own, order = ids.sort(dim=-1, stable=True)
    sorted_other = other_ids.sort(dim=-1, stable=True).values
    first = torch.searchsorted(sorted_other, ids)
    count = torch.searchsorted(sorted_other, ids, right=True) - first
    own_first = torch.searchsorted(sorted_own, ids)
    own_count = torch.searchsorted(sorted_own, ids, right=True) - own_first
    place = torch.zeros_like(order).scatter(-1, order, torch.arange(ids.shape[-1], device=ids.device).expand_as(order))
    return _Side(order, first, count, place - own_first, own_count)


def window_ranks(rank: Tensor, n: Tensor, m: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Ranks `[lo, hi)` of the keys in the window of the query of rank `rank`; n, m active queries and keys.

    >>> r = torch.arange(4)
    >>> window_ranks(r, torch.tensor(4), torch.tensor(4), 1, 0)
    (tensor([0, 0, 1, 2]), tensor([1, 2, 3, 4]))
    """
    n2 = 2 * n.clamp(min=1)
    centre = (2 * rank + 1) * m - n
    lo = torch.zeros_like(centre) if left < 0 else -torch.div(n2 * left - centre, n2, rounding_mode="floor")
    hi = m + torch.zeros_like(centre)
    if right >= 0:
        hi = torch.minimum(hi, torch.div(centre + n2 * right, n2, rounding_mode="floor") + 1)
    lo = lo.clamp(min=0)
    return lo, torch.maximum(hi, lo)


def _segment_index(ids: Tensor, active: Tensor) -> Tensor:
    """Number of the run each active token is in, counted from 0; 0 for inactive tokens before the first run."""
    position = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    last_active = torch.where(active, position, -1).cummax(-1).values
    previous = torch.nn.functional.pad(last_active, (1, 0), value=-1)[..., :-1]
    previous_id = torch.where(previous >= 0, ids.gather(-1, previous.clamp(min=0)), -1)
    return ((active & (ids != previous_id)).cumsum(-1) - 1).clamp(min=0)


def transpose_intervals(row_lo: Tensor, row_hi: Tensor, num_cols: int) -> tuple[Tensor, Tensor]:
    """`[N, num_cols]` smallest row intervals holding every row that attends to a column; (k, k) where none does.

    >>> lo, hi = torch.tensor([[0, 0, 1]]), torch.tensor([[1, 2, 3]])
    >>> transpose_intervals(lo, hi, 3)
    (tensor([[0, 1, 2]]), tensor([[2, 3, 3]]))
    """
    empty = row_lo >= row_hi
    reach = torch.where(empty, 0, row_hi).cummax(-1).values
    start = torch.where(empty, num_cols, row_lo).flip(-1).cummin(-1).values.flip(-1)
    column = torch.arange(num_cols, device=row_lo.device) + row_lo.new_zeros(row_lo.shape[0], 1)
    col_lo = torch.searchsorted(reach.contiguous(), column, right=True)
    col_hi = torch.searchsorted(start.contiguous(), column, right=True)
    return col_lo, torch.maximum(col_hi, col_lo)


def build_support(row_ids: Tensor, col_ids: Tensor, window: tuple[int, int] | None, packed: bool) -> Support:
    """The support of problems given by `row_ids [N, L]` and `col_ids [N, S]` (-1 = inactive).

    `packed` says that ids may differ or leave holes; without it the active tokens are prefixes of one problem, and no
    sort is needed.
    """
    num_cols = col_ids.shape[-1]
    left, right = (-1, -1) if window is None else window
    if packed and row_ids.shape[-1] and num_cols:
        rows, cols = _match(row_ids, col_ids), _match(col_ids, row_ids)
        row_active, col_active = (row_ids >= 0) & (rows.matches > 0), (col_ids >= 0) & (cols.matches > 0)
        lo, hi = window_ranks(rows.rank, rows.own_count, rows.matches, left, right)
        nonempty = row_active & (lo < hi)
        at = cols.order.gather(-1, (rows.first + lo).clamp(max=num_cols - 1))
        end = cols.order.gather(-1, (rows.first + hi - 1).clamp(0, num_cols - 1)) + 1
        lo, hi = at, end
        row_segment, col_segment = _segment_index(row_ids, row_active), _segment_index(col_ids, col_active)
    else:
        row_active, col_active = row_ids >= 0, col_ids >= 0
        n, m = row_active.sum(-1, keepdim=True), col_active.sum(-1, keepdim=True)
        row_active, col_active = row_active & (m > 0), col_active & (n > 0)
        rank = torch.arange(row_ids.shape[-1], device=row_ids.device).expand_as(row_ids)
        lo, hi = window_ranks(rank, n, m, left, right)
        nonempty = row_active & (lo < hi)
        row_segment, col_segment = torch.zeros_like(row_ids), torch.zeros_like(col_ids)
    row_lo, row_hi = torch.where(nonempty, lo, 0), torch.where(nonempty, hi, 0)
    col_lo, col_hi = transpose_intervals(row_lo, row_hi, num_cols)
    return Support(row_lo, row_hi, col_lo, col_hi, row_segment, col_segment, row_active, col_active)


def segment_sum(x: Tensor, index: Tensor | None, count: int) -> Tensor:
    """Sum over the last dimension by segment: `[..., n]` and `index [..., n]` (broadcasting) to `[..., count]`.

    >>> segment_sum(torch.tensor([1., 2., 3.]), torch.tensor([0, 1, 1]), 2)
    tensor([1., 5.])
    """
    if index is None or count == 1:
        return x.sum(-1, keepdim=True)
    out = torch.zeros(*x.shape[:-1], count, dtype=x.dtype, device=x.device)
    return out.scatter_add(-1, index.expand_as(x), x)


def segment_max(x: Tensor, index: Tensor | None, count: int) -> Tensor:
    """Maximum likewise; -inf over none.

    >>> segment_max(torch.tensor([1., 2., 3.]), torch.tensor([0, 1, 1]), 3)
    tensor([1., 3., -inf])
    """
    where = torch.zeros_like(x, dtype=torch.int64) if index is None else index.expand_as(x)
    return x.new_full((*x.shape[:-1], count), -torch.inf).scatter_reduce(-1, where, x, "amax")


def by_segment(x: Tensor, index: Tensor | None, length: int) -> Tensor:
    """The inverse look-up: `x [..., G]` read at each of `length` tokens, `[..., length]`."""
    if index is None or x.shape[-1] == 1:
        return x.expand(*x.shape[:-1], length)
    return x.gather(-1, index.expand(*x.shape[:-1], length))


class Components(NamedTuple):
    """A partition of the lines, by labels that broadcast to `[N, H, L(+G)]` and `[N, H, S(+G)]`; None: all in one."""

    row: Tensor | None
    col: Tensor | None
    number: int


def segments(problem: Problem) -> Components:
    """Which problem of its batch element and head each line belongs to, the dustbins' lines included."""
    if problem.row_segment is None or problem.col_segment is None:
        return Components(None, None, 1)
    batch, bins = problem.row_segment.shape[0], problem.num_dustbins
    own = torch.arange(bins, device=problem.row_segment.device).expand(batch, bins)
    row, col = (torch.cat([s, own], -1)[:, None] for s in (problem.row_segment, problem.col_segment))
    return Components(row, col, max(1, min(problem.row_segment.shape[-1], problem.col_segment.shape[-1])))


def components(problem: Problem) -> Components:
    """Connected components of the intervals with active ends, one gauge freedom each; a dustbin joins all tokens of its
    segment.

    An attn_mask may split them further; that is not looked for (it would take O(n m)): a gauge shared by several
    components is still a gauge.
    """
    segments = problem.row_segment, problem.col_segment
    heads = problem.log_row_mass.shape[:2]
    if problem.has_dustbin:
        if segments[0] is None:
            return Components(None, None, 1)
        bins = torch.arange(problem.num_dustbins, device=segments[0].device).expand(*heads, -1)
        row, col = (torch.cat([s[:, None].expand(*heads, -1), bins], -1) for s in segments if s is not None)
        return Components(row, col, problem.num_dustbins)
    if not problem.banded:
        return Components(None, None, 1)
    row_active, col_active = problem.log_row_mass > -torch.inf, problem.log_col_mass > -torch.inf
    lo, hi = (x[:, None].expand(row_active.shape) for x in (problem.row_lo, problem.row_hi))
    live = row_active & (lo < hi)
    active_before = torch.nn.functional.pad(col_active.cumsum(-1), (1, 0))  # number of active columns before each
    reach = torch.nn.functional.pad(torch.where(live, hi, 0).cummax(-1).values, (1, 0))[..., :-1]
    starts = live & (active_before.gather(-1, lo) >= active_before.gather(-1, reach))
    row = (starts.cumsum(-1) - 1).clamp(min=0)
    begun = torch.zeros_like(active_before).scatter_add(-1, lo, starts.to(active_before.dtype))
    col = (begun.cumsum(-1)[..., :-1] - 1).clamp(min=0)
    return Components(row, col, max(1, row.shape[-1]))


def centre_gauge(u: Tensor, v: Tensor, problem: Problem, parts: Components) -> tuple[Tensor, Tensor]:
    """Subtract the mean of u over each component's active rows from u and add it to v: the plan does not change."""
    row_active = (with_dustbin(problem.log_row_mass, problem.log_row_capacity) > -torch.inf).to(u.dtype)
    col_active = (with_dustbin(problem.log_col_mass, problem.log_col_capacity) > -torch.inf).to(u.dtype)
    size = segment_sum(row_active, parts.row, parts.number).clamp(min=1)
    mean = segment_sum(u * row_active, parts.row, parts.number) / size
    return (
        (u - by_segment(mean, parts.row, u.shape[-1])) * row_active,
        (v + by_segment(mean, parts.col, v.shape[-1])) * col_active,
    )


def with_dustbin(real: Tensor, bins: Tensor | None) -> Tensor:
    """`[..., n]` and `[..., G]` to `[..., n+G]`; the real part alone without a dustbin."""
    return real if bins is None else torch.cat([real, bins], -1)


def mass_of(log_mass: Tensor) -> Tensor:
    """exp, with 1 for inactive tokens, by which their zero rows of the plan may be divided."""
    return log_mass.masked_fill(log_mass == -torch.inf, 0.0).exp()


def largest(error: Tensor) -> Tensor:
    """Largest absolute value over the last dimension, 0 over none."""
    return error.abs().amax(-1) if error.shape[-1] else error.new_zeros(error.shape[:-1])
