"""Supports made of monotone row intervals, as `torch_sinkhorn_attn.problem.support` builds them: band, lengths, packed
segments, and their transpose, in O(n) and in int32.

Row i may attend to columns `[lo_i, hi_i)`. Lengths and ids are data, so nothing here depends on their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from torch_sinkhorn_attn.problem.centers import around


class Support(NamedTuple):
    """Intervals, their transpose, and who is active before any mask: `[N, L]` and `[N, S]`; active is bool."""

    row_lo: Array
    row_hi: Array
    col_lo: Array
    col_hi: Array
    row_segment: Array
    col_segment: Array
    row_active: Array
    col_active: Array


def token_ids(
    batch: int, length: int, lengths: Array | None, segment_ids: Array | None, first: Array | int = 0
) -> Array:
    """`[batch, length]` int32: the id of the problem each token belongs to, -1 where it is inactive. `first`: number of
    the first of them."""
    position = first + jnp.arange(length, dtype=jnp.int32)
    if segment_ids is None:
        ids = jnp.zeros((batch, length), jnp.int32)
    else:
        ids = jnp.maximum(segment_ids, -1).astype(jnp.int32)
    return ids if lengths is None else jnp.where(position < lengths[:, None], ids, -1)


def window_ranks(rank: Array, n: Array, m: Array, left: int, right: int) -> tuple[Array, Array]:
    """Ranks `[lo, hi)` of the keys in the window of the query of rank `rank`; n, m active queries and keys. Exact for
    2 n + m < 2^24: the products of two lengths, which int32 does not hold, are divided digit by digit.

    >>> r = jnp.arange(4)
    >>> [x.tolist() for x in window_ranks(r, jnp.int32(4), jnp.int32(4), 1, 0)]
    [[0, 0, 1, 2], [1, 2, 3, 4]]
    """
    centre, remainder = _centre(rank, n, m)
    lo = jnp.zeros_like(centre) if left < 0 else jnp.maximum(centre + (remainder > 0) - left, 0)
    hi = jnp.broadcast_to(m, centre.shape)
    if right >= 0:
        hi = jnp.minimum(hi, centre + right + 1)
    return lo, jnp.maximum(hi, lo)


def _centre(rank: Array, n: Array, m: Array) -> tuple[Array, Array]:
    """Floor and remainder of ((2 rank + 1) m - n) / (2 n), where the query's centre lies among the keys."""
    n, m, odd = (x.astype(jnp.uint32) for x in (n, m, 2 * rank + 1))
    divisor = jnp.maximum(2 * n, 2)
    quotient = remainder = jnp.zeros_like(odd + n + m)
    for shift in (16, 8, 0):
        part = remainder * np.uint32(256) + (odd >> shift & np.uint32(255)) * m
        quotient, remainder = quotient * np.uint32(256) + part // divisor, part % divisor
    part = remainder + n
    quotient, remainder = quotient + part // divisor, part % divisor
    return quotient.astype(jnp.int32) - 1, remainder.astype(jnp.int32)


def transpose_intervals(row_lo: Array, row_hi: Array, num_cols: int) -> tuple[Array, Array]:
    """`[N, num_cols]` smallest row intervals holding every row that attends to a column; (k, k) where none does.

    >>> lo, hi = jnp.array([[0, 0, 1]]), jnp.array([[1, 2, 3]])
    >>> [x.tolist() for x in transpose_intervals(lo, hi, 3)]
    [[[0, 1, 2]], [[2, 3, 3]]]
    """
    empty = row_lo >= row_hi
    reach = lax.cummax(jnp.where(empty, 0, row_hi), 1)
    start = lax.cummin(jnp.where(empty, num_cols, row_lo), 1, reverse=True)
    column = jnp.zeros_like(row_lo, shape=(row_lo.shape[0], num_cols)) + jnp.arange(num_cols, dtype=jnp.int32)
    col_lo, col_hi = _search(reach, column, "right"), _search(start, column, "right")
    return col_lo, jnp.maximum(col_hi, col_lo)


def _number(marked: Array) -> Array:
    return marked.sum(-1, keepdims=True, dtype=jnp.int32)


def build_support(
    row_ids: Array,
    col_ids: Array,
    window: tuple[int, int] | None,
    packed: bool,
    causal: bool = False,
    centers: Array | None = None,
    first: tuple[Array | int, Array | int] = (0, 0),
    count: Callable[[Array], Array] = _number,
) -> Support:
    """The support of problems given by `row_ids [N, L]` and `col_ids [N, S]` (-1 = inactive).

    `packed` says that ids may differ or leave holes; without it the active tokens are prefixes of one problem, and no
    sort is needed. `causal` leaves to each query the keys of its problem whose rank is no higher than its own, and keys
    beyond the last query without a pair, inactive. `centers [N, L]`: of the window, in place of the aligned ones.

    `first` and `count` are for prefixes of which these are the tokens of one device: the numbers of the first row and
    column, and how many tokens `[N, n]` are marked on all. Row intervals are then of all columns, and those of columns,
    of the rows here, mean nothing.
    """
    num_rows, num_cols = row_ids.shape[-1], col_ids.shape[-1]
    left, right = (-1, -1) if window is None or centers is not None else window
    if packed and num_rows and num_cols:
        rows, cols = _match(row_ids, col_ids), _match(col_ids, row_ids)
        row_active, col_active = (row_ids >= 0) & (rows.matches > 0), (col_ids >= 0) & (cols.matches > 0)
        if causal:
            col_active = col_active & (cols.rank < cols.matches)
        lo, hi = window_ranks(rows.rank, rows.own_count, rows.matches, left, right)
        hi = jnp.minimum(hi, rows.rank + 1) if causal else hi
        nonempty = row_active & (lo < hi)
        at = jnp.take_along_axis(cols.order, jnp.minimum(rows.first + lo, num_cols - 1), -1)
        hi = jnp.take_along_axis(cols.order, jnp.clip(rows.first + hi - 1, 0, num_cols - 1), -1) + 1
        lo = at
        row_segment, col_segment = _segment_index(row_ids, row_active), _segment_index(col_ids, col_active)
    else:
        n, m = (count(x >= 0) for x in (row_ids, col_ids))
        row_active, col_active = (row_ids >= 0) & (m > 0), (col_ids >= 0) & (n > 0)
        rank = jnp.broadcast_to(first[0] + jnp.arange(num_rows, dtype=jnp.int32), row_ids.shape)
        lo, hi = window_ranks(rank, n, m, left, right)
        if causal:
            place = first[1] + jnp.arange(num_cols, dtype=jnp.int32)
            hi, col_active = jnp.minimum(hi, rank + 1), col_active & (place < n)
        nonempty = row_active & (lo < hi)
        row_segment, col_segment = jnp.zeros_like(row_ids), jnp.zeros_like(col_ids)
    if centers is not None and window is not None:
        low, high = around(centers, row_active, window, num_cols)
        lo, hi = jnp.maximum(lo, low), jnp.minimum(hi, high)
        nonempty &= lo < hi
    row_lo, row_hi = jnp.where(nonempty, lo, 0), jnp.where(nonempty, hi, 0)
    col_lo, col_hi = transpose_intervals(row_lo, row_hi, num_cols)
    return Support(row_lo, row_hi, col_lo, col_hi, row_segment, col_segment, row_active, col_active)


class _Match(NamedTuple):
    """One side of the problems, seen by a token: where its problem's tokens are. All `[N, length]` but `order`."""

    order: Array  # physical index of the tokens sorted by id
    first: Array  # start of the *other* side's tokens with this id in that side's order
    matches: Array  # how many of them
    rank: Array  # rank of this token among its own side's tokens with the same id
    own_count: Array


def _match(ids: Array, other_ids: Array) -> _Match:
    order = jnp.argsort(ids, axis=-1, stable=True).astype(jnp.int32)
    sorted_own, sorted_other = jnp.take_along_axis(ids, order, -1), jnp.sort(other_ids, axis=-1)
    first, own_first = _search(sorted_other, ids, "left"), _search(sorted_own, ids, "left")
    count, own_count = _search(sorted_other, ids, "right") - first, _search(sorted_own, ids, "right") - own_first
    place = jnp.argsort(order, axis=-1).astype(jnp.int32)  # the inverse of the order
    return _Match(order, first, count, place - own_first, own_count)


def _segment_index(ids: Array, active: Array) -> Array:
    """Number of the run each active token is in, counted from 0; 0 for inactive tokens before the first run."""
    position = jnp.broadcast_to(jnp.arange(ids.shape[-1], dtype=jnp.int32), ids.shape)
    last_active = lax.cummax(jnp.where(active, position, -1), 1)
    previous = jnp.pad(last_active, ((0, 0), (1, 0)), constant_values=-1)[..., :-1]
    previous_id = jnp.where(previous >= 0, jnp.take_along_axis(ids, jnp.maximum(previous, 0), -1), -1)
    return jnp.maximum(jnp.cumsum(active & (ids != previous_id), -1, dtype=jnp.int32) - 1, 0)


def _search(ordered: Array, wanted: Array, side: str) -> Array:
    return jax.vmap(lambda x, y: jnp.searchsorted(x, y, side=side))(ordered, wanted).astype(jnp.int32)
