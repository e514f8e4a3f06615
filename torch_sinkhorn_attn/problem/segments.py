"""Problems packed side by side: sums and maxima by segment, components of the support, and the gauge of each. For torch
and for JAX.

Index arrays broadcast against `[..., n]` vectors; None stands for one segment that holds all.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch_sinkhorn_attn.arrays import Array, namespace


class Components(NamedTuple):
    """A partition of the lines, by labels that broadcast to `[N, H, L(+G)]` and `[N, H, S(+G)]`; None: all in one.

    Its methods reduce vectors over each part, `[..., n]` to `[..., number]`. Where lines lie on several devices
    (`distributed.lines`) they count those of all.
    """

    row: Array | None
    col: Array | None
    number: int

    def row_sum(self, x: Array) -> Array:
        """Over rows."""
        return segment_sum(x, self.row, self.number)

    def row_max(self, x: Array) -> Array:
        """The largest over rows; -inf over none."""
        return segment_max(x, self.row, self.number)

    def col_sum(self, x: Array) -> Array:
        """Over columns."""
        return segment_sum(x, self.col, self.number)

    def col_max(self, x: Array) -> Array:
        """The largest over columns; -inf over none."""
        return segment_max(x, self.col, self.number)

    def col_logsumexp(self, x: Array) -> Array:
        """log sum exp over columns; -inf over none."""
        return segment_logsumexp(x, self.col, self.number)

    def anywhere(self, marked: Array) -> bool:
        """Whether any entry of what may be looked at is marked."""
        return bool(marked.any())


def segment_sum(x: Array, index: Array | None, count: int) -> Array:
    """Sum over the last dimension by segment: `[..., n]` and `index [..., n]` (broadcasting) to `[..., count]`.

    >>> import torch
    >>> segment_sum(torch.tensor([1., 2., 3.]), torch.tensor([0, 1, 1]), 2)
    tensor([1., 5.])
    """
    if index is None or count == 1:
        return x.sum(-1, keepdims=True)
    return namespace(x).add_at(x, index, count)


def segment_max(x: Array, index: Array | None, count: int) -> Array:
    """Maximum likewise; -inf over none.

    >>> import torch
    >>> segment_max(torch.tensor([1., 2., 3.]), torch.tensor([0, 1, 1]), 3)
    tensor([1., 3., -inf])
    """
    if index is None or count == 1:
        return namespace(x).max(x, -1, keepdims=True, initial=-math.inf)
    return namespace(x).max_at(x, index, count)


def by_segment(x: Array, index: Array | None, length: int) -> Array:
    """The inverse look-up: `x [..., G]` read at each of `length` tokens, `[..., length]`."""
    xp, shape = namespace(x), (*x.shape[:-1], length)
    if index is None or x.shape[-1] == 1:
        return xp.broadcast_to(x, shape)
    return xp.take_along_axis(x, xp.broadcast_to(index, shape), -1)


def segment_logsumexp(x: Array, index: Array | None, count: int) -> Array:
    """LSE over the last dimension by segment, `[..., n]` to `[..., count]`; -inf for an empty segment."""
    xp = namespace(x)
    if index is None or count == 1:
        return xp.logsumexp(x, -1, keepdims=True)
    top = xp.max_at(x, index, count)
    safe = xp.where(top == -math.inf, 0.0, top)
    return xp.log(segment_sum(xp.exp(x - by_segment(safe, index, x.shape[-1])), index, count)) + safe


def segments(problem: Any) -> Components:
    """Which problem of its batch element and head each line belongs to, the dustbins' lines included. The problem is
    torch's, or the arrays of JAX's, which stand in one."""
    support = getattr(problem, "support", problem)
    row, col = support.row_segment, support.col_segment
    if row is None:
        return Components(None, None, 1)
    number = max(1, min(row.shape[-1], col.shape[-1]))
    row, col = (_with_own_bins(index, problem.num_dustbins) for index in (row, col))
    return Components(row, col, number)


def _with_own_bins(index: Array, bins: int) -> Array:
    """The segments of n tokens `[N, n]`, followed by those of the dustbins, 0..bins-1: `[N, 1, n + bins]`."""
    xp = namespace(index)
    own = xp.broadcast_to(xp.arange(bins, index), (index.shape[0], bins))
    return xp.concat([index, own], -1)[:, None]


def components(problem: Any, statics: Any = None) -> Components:
    """Connected components of the intervals with active ends, one gauge freedom each; a dustbin joins all tokens of its
    segment. The scalars of JAX's problem stand apart, in `statics`.

    An attn_mask may split them further; that is not looked for (it would take O(n m)): a gauge shared by several
    components is still a gauge.
    """
    support, marginals = (getattr(problem, part, problem) for part in ("support", "marginals"))
    lo, hi = support.row_lo, support.row_hi
    if problem.num_dustbins and support.row_segment is not None:
        return segments(problem)._replace(number=problem.num_dustbins)
    if problem.num_dustbins or not (problem.outline if statics is None else statics).banded:
        return Components(None, None, 1)
    row_active, col_active = marginals.log_row_mass > -math.inf, marginals.log_col_mass > -math.inf
    if 0 in (*row_active.shape, col_active.shape[-1]):
        return Components(None, None, 1)
    xp = namespace(lo)
    lo, hi = (xp.broadcast_to(x[:, None], row_active.shape) for x in (lo, hi))
    live = row_active & (lo < hi)
    before = xp.cumsum(xp.astype(col_active, lo.dtype), -1)  # active columns before each
    before = xp.concat([xp.zeros_like(before[..., :1]), before], -1)
    reach = xp.last_marked(hi, live, before=True)
    starts = live & (xp.take_along_axis(before, lo, -1) >= xp.take_along_axis(before, reach, -1))
    starts = xp.astype(starts, lo.dtype)
    row = xp.clip(xp.cumsum(starts, -1) - 1, 0)
    col = xp.clip(xp.cumsum(xp.add_at(starts, lo, before.shape[-1]), -1)[..., :-1] - 1, 0)
    return Components(row, col, max(1, row.shape[-1]))


def centre_gauge(u: Array, v: Array, log_a: Array, log_b: Array, parts: Components) -> tuple[Array, Array]:
    """Subtract the mean of u over each component's active rows from u and add it to v: the plan does not change."""
    xp = namespace(u)
    row_active, col_active = (xp.astype(x > -math.inf, u.dtype) for x in (log_a, log_b))
    size = xp.clip(parts.row_sum(row_active), 1)
    mean = parts.row_sum(u * row_active) / size
    return (
        (u - by_segment(mean, parts.row, u.shape[-1])) * row_active,
        (v + by_segment(mean, parts.col, v.shape[-1])) * col_active,
    )


def with_dustbin(real: Array, bins: Array | None) -> Array:
    """`[..., n]` and `[..., G]` to `[..., n+G]`; the real part alone without a dustbin."""
    return real if bins is None else namespace(real).concat([real, bins], -1)


def mass_of(log_mass: Array) -> Array:
    """exp, with 1 for inactive tokens, by which their zero rows of the plan may be divided."""
    xp = namespace(log_mass)
    return xp.exp(xp.where(log_mass == -math.inf, 0.0, log_mass))


def largest(error: Array) -> Array:
    """Largest absolute value over the last dimension, 0 over none."""
    xp = namespace(error)
    return xp.max(xp.abs(error), -1, initial=0.0)
