"""Supports made of monotone row intervals: band, lengths, packed segments, and their transpose, all in O(n).

A support lets row i attend to columns `[lo_i, hi_i)` with lo and hi non-decreasing. Full, band of (1, 1), two segments:

    1 1 1 1      1 1 . .      1 1 . .
    1 1 1 1      1 1 1 .      1 1 . .
    1 1 1 1      . 1 1 1      . . 1 1
    1 1 1 1      . . 1 1      . . 1 1

A window follows the aligned centres of the n active queries and m active keys, c_i = (i + 1/2) m/n - 1/2: key j is in
row i's window (left, right) iff -left <= j - c_i <= right, decided in integers; `centers.py` has those given as data.
Everything is tensor code without a
host synchronisation (lengths and ids are data), of operations that XLA does right: no cummax, cummin, searchsorted, nor
cumsum of bool.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.arrays.of_torch import last_marked, unsplit
from torch_sinkhorn_attn.compat.tracing import for_onnx, recording
from torch_sinkhorn_attn.problem.centers import around


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


class _Match(NamedTuple):
    """One side of the problems, seen by a token: where its problem's tokens are. All `[N, length]` but `order`."""

    order: Tensor  # physical index of the tokens sorted by id
    first: Tensor  # start of the *other* side's tokens with this id in that side's order
    matches: Tensor  # how many of them
    rank: Tensor  # rank of this token among its own side's tokens with the same id
    own_count: Tensor


def _match(row_ids: Tensor, col_ids: Tensor) -> tuple[_Match, _Match]:
    """Both sides, from one sort of all tokens, by which the ids are numbered: rows first among equals."""
    length, total = row_ids.shape[-1], row_ids.shape[-1] + col_ids.shape[-1]
    row_ids, col_ids = unsplit(row_ids, col_ids)
    ids, order = _stable_sort(torch.cat([row_ids, col_ids], -1))
    position = torch.arange(total, device=ids.device).expand_as(ids)
    place = torch.zeros_like(order).scatter(-1, order, position)  # of each token in the sorted ones
    number = torch.nn.functional.pad((ids[..., 1:] != ids[..., :-1]).to(ids.dtype).cumsum(-1), (1, 0)).gather(-1, place)
    side = torch.stack([position < length, position >= length]).to(ids.dtype)
    counts = torch.zeros_like(side).scatter_add(-1, number.expand_as(side), side)  # rows and columns with each number
    first = counts.cumsum(-1) - counts
    (rows, cols), (first_row, first_col) = (x.gather(-1, number.expand_as(x)).unbind() for x in (counts, first))
    rank = place - first_row - first_col - torch.where(position < length, 0, rows)
    row, col = slice(None, length), slice(length, None)
    of_rows = _order(first_row, rank, row), *(x[..., row] for x in (first_col, cols, rank, rows))
    of_cols = _order(first_col, rank, col), *(x[..., col] for x in (first_row, rows, rank, cols))
    found = unsplit(*of_rows, *of_cols)
    return _Match(*found[:5]), _Match(*found[5:])


def _stable_sort(ids: Tensor) -> tuple[Tensor, Tensor]:
    if not (recording() and for_onnx()):
        return ids.sort(dim=-1, stable=True)
    position = torch.arange(ids.shape[-1], device=ids.device)  # ONNX has none; its programs are dense anyway
    mine, other = ids[..., :, None], ids[..., None, :]
    before = (other < mine) | ((other == mine) & (position[None, :] < position[:, None]))
    place = before.to(ids.dtype).sum(-1)
    order = torch.zeros_like(place).scatter(-1, place, position.expand_as(place))
    return ids.gather(-1, order), order


def _order(first: Tensor, rank: Tensor, tokens: slice) -> Tensor:
    """The tokens of one side sorted by id, from their places."""
    place = (first + rank)[..., tokens]
    index = torch.arange(place.shape[-1], device=place.device).expand_as(place)
    return torch.zeros_like(place).scatter(-1, place, index)


def whole_support(num: int, length: int, size: int, window: tuple[int, int] | None, device: torch.device) -> Support:
    """What `build_support` finds where all tokens are active in one problem, in few steps: each call pays for them."""
    row, col = (torch.arange(n, device=device) for n in (length, size))
    if window is None:
        lo, hi = torch.zeros_like(row), torch.full_like(row, size)
        first, end = torch.zeros_like(col), torch.full_like(col, length)
    else:
        n, m = (torch.full((), x, device=device) for x in (length, size))
        lo, hi = window_ranks(row, n, m, *window)
        first, end = window_rows(col, n, m, *window)
        some = lo < hi
        lo, hi = torch.where(some, lo, 0), torch.where(some, hi, 0)
    row_ids, col_ids = (torch.zeros_like(x) for x in (row, col))
    active = torch.full((), length > 0 and size > 0, device=device)
    parts = (lo, hi, first, end, row_ids, col_ids, active.expand(length), active.expand(size))
    return Support(*(x.expand(num, -1) for x in parts))


def window_ranks(rank: Tensor, n: Tensor, m: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Ranks `[lo, hi)` of the keys in the window of the query of rank `rank`; n, m active queries and keys.

    >>> r = torch.arange(4)
    >>> window_ranks(r, torch.tensor(4), torch.tensor(4), 1, 0)
    (tensor([0, 0, 1, 2]), tensor([1, 2, 3, 4]))
    """
    unit = 2 * n.clamp(min=1)
    return _ranks(rank, n, m, *(None if side < 0 else side * unit for side in (left, right)))


def window_rows(rank: Tensor, n: Tensor, m: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Ranks `[lo, hi)` of the queries in whose window the key of rank `rank` is.

    >>> r = torch.arange(4)
    >>> window_rows(r, torch.tensor(4), torch.tensor(4), 1, 0)
    (tensor([0, 1, 2, 3]), tensor([2, 3, 4, 4]))
    """
    return _ranks(rank, m, n, *(None if side < 0 else side * 2 * n for side in (right, left)))


def _ranks(rank: Tensor, n: Tensor, m: Tensor, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ranks of the other side's m tokens within `left` and `right` of the centre of a token of n, all times 2 n."""
    n2 = 2 * n.clamp(min=1)
    centre = (2 * rank + 1) * m - n
    lo = torch.zeros_like(centre) if left is None else -torch.div(left - centre, n2, rounding_mode="floor")
    hi = m + torch.zeros_like(centre)
    if right is not None:
        hi = torch.minimum(hi, torch.div(centre + right, n2, rounding_mode="floor") + 1)
    lo = lo.clamp(min=0)
    return lo, torch.maximum(hi, lo)


def _segment_index(ids: Tensor, active: Tensor) -> Tensor:
    """Number of the run each active token is in, counted from 0; 0 for inactive tokens before the first run."""
    starts = active & (ids + 1 != last_marked(ids + 1, active, before=True))
    return (starts.to(ids.dtype).cumsum(-1) - 1).clamp(min=0)


def transpose_intervals(row_lo: Tensor, row_hi: Tensor, num_cols: int) -> tuple[Tensor, Tensor]:
    """`[N, num_cols]` smallest row intervals holding every row that attends to a column; (k, k) where none does.

    >>> lo, hi = torch.tensor([[0, 0, 1]]), torch.tensor([[1, 2, 3]])
    >>> transpose_intervals(lo, hi, 3)
    (tensor([[0, 1, 2]]), tensor([[2, 3, 3]]))
    """
    some = row_lo < row_hi
    reach = last_marked(row_hi, some)
    start = num_cols - last_marked((num_cols - row_lo).flip(-1), some.flip(-1))
    col_lo, col_hi = (_number_up_to(x, num_cols) for x in (reach, start))
    return col_lo, torch.maximum(col_hi, col_lo)


def _number_up_to(x: Tensor, count: int) -> Tensor:
    """How many of the values `[N, n]`, from 0 to `count`, are j or less: `[N, count]`."""
    (x,) = unsplit(x)
    counts = torch.zeros(x.shape[0], count + 1, dtype=x.dtype, device=x.device)
    return unsplit(counts.scatter_add(-1, x, torch.ones_like(x)).cumsum(-1)[:, :-1])[0]


def build_support(
    row_ids: Tensor,
    col_ids: Tensor,
    window: tuple[int, int] | None,
    packed: bool,
    causal: bool = False,
    centers: Tensor | None = None,
) -> Support:
    """The support of problems given by `row_ids [N, L]` and `col_ids [N, S]` (-1 = inactive).

    `packed` says that ids may differ or leave holes; without it the active tokens are prefixes of one problem, and no
    sort is needed. `causal` leaves to each query the keys of its problem whose rank is no higher than its own, and keys
    beyond the last query without a pair, inactive. `centers [N, L]`: of the window, in place of the aligned ones.
    """
    num_cols = col_ids.shape[-1]
    left, right = (-1, -1) if window is None or centers is not None else window
    if packed and row_ids.shape[-1] and num_cols:
        rows, cols = _match(row_ids, col_ids)
        row_active, col_active = (row_ids >= 0) & (rows.matches > 0), (col_ids >= 0) & (cols.matches > 0)
        if causal:
            col_active = col_active & (cols.rank < cols.matches)
        lo, hi = window_ranks(rows.rank, rows.own_count, rows.matches, left, right)
        hi = torch.minimum(hi, rows.rank + 1) if causal else hi
        nonempty = row_active & (lo < hi)
        at = cols.order.gather(-1, (rows.first + lo).clamp(max=num_cols - 1))
        end = cols.order.gather(-1, (rows.first + hi - 1).clamp(0, num_cols - 1)) + 1
        row_lo, row_hi = torch.where(nonempty, at, 0), torch.where(nonempty, end, 0)
        row_segment, col_segment = _segment_index(row_ids, row_active), _segment_index(col_ids, col_active)
    else:
        row_active, col_active = row_ids >= 0, col_ids >= 0
        n, m = row_active.sum(-1, keepdim=True), col_active.sum(-1, keepdim=True)
        row_active, col_active = row_active & (m > 0), col_active & (n > 0)
        row, col = (torch.arange(x.shape[-1], device=x.device).expand_as(x) for x in (row_ids, col_ids))
        lo, hi = window_ranks(row, n, m, left, right)
        first, end = window_rows(col, n, m, left, right)
        if causal:
            hi, first = torch.minimum(hi, row + 1), torch.maximum(first, col)
            end, col_active = torch.maximum(end, first), col_active & (col < n)
        nonempty = row_active & (lo < hi)
        row_lo, row_hi = torch.where(nonempty, lo, 0), torch.where(nonempty, hi, 0)
        row_segment, col_segment = torch.zeros_like(row_ids), torch.zeros_like(col_ids)
    if centers is not None and window is not None:
        low, high = around(centers, row_active, window, num_cols)
        row_lo, row_hi = torch.maximum(row_lo, low), torch.minimum(row_hi, high)
        some = row_lo < row_hi
        row_lo, row_hi = torch.where(some, row_lo, 0), torch.where(some, row_hi, 0)
    if packed or centers is not None:
        col_lo, col_hi = transpose_intervals(row_lo, row_hi, num_cols)
    else:
        col_lo, col_hi = (torch.where(col_active, x, row_ids.shape[-1]) for x in (first, end))
    return Support(row_lo, row_hi, col_lo, col_hi, row_segment, col_segment, row_active, col_active)
