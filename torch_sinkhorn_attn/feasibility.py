"""Refusing problems without finite potentials before any iteration: eager, O(n), in float64.

Finite potentials exist iff some plan is positive on the whole support. For monotone intervals with cumulative masses A
and B that is, for every row i,

    B(lo_i) <= A(i-1), equality only if i = 1 or hi_{i-1} <= lo_i
    A(i) <= B(hi_i),   equality only if i = n or lo_{i+1} >= hi_i

For an attn_mask the hull of its kept entries, made monotone, gives the same cuts: a violation there is a proof too,
which covers empty lines and triangular masks. With a dustbin the real part must be able to carry strictly more than
sum(a) - col_capacity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.support import segment_sum

RELATIVE_TOLERANCE = 1e-6  # differences of masses below this share of the total count as equal


class Marginals(NamedTuple):
    """Everything the checks look at, float64 and on the CPU; masses are 0 where inactive."""

    row_mass: Tensor  # [N, H, L]
    col_mass: Tensor  # [N, H, S]
    row_lo: Tensor  # [N, H, L] interval, or hull of the mask inside it
    row_hi: Tensor
    col_covered: Tensor  # [N, H, S] bool
    request: str  # the arguments that shape the support, as the user wrote them, for messages


_WAYS_OUT = (
    "widen the window on both sides, pass dustbin=Dustbin(...) to take what cannot be matched, or relaxation=tau to "
    "relax the marginals"
)


def check_balanced_totals(row_total: Tensor, col_total: Tensor) -> None:
    """Equal totals in every problem `[N, H, G]` of a balanced request."""
    wrong = (row_total - col_total).abs() > RELATIVE_TOLERANCE * torch.maximum(row_total, col_total)
    if wrong.any():
        n, h, g = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"row_mass sums to {row_total[n, h, g]:.6g} and col_mass to {col_total[n, h, g]:.6g} (batch {n}, head {h}, "
            f"segment {g}): a balanced plan needs equal totals. Rescale one, leave one out (it is then derived), or "
            "pass relaxation=tau."
        )


def check_lines(m: Marginals) -> None:
    """No active line is emptied by the window."""
    bare_rows = (m.row_mass > 0) & (m.row_lo >= m.row_hi)
    if bare_rows.any():
        n, h, i = bare_rows.nonzero()[0].tolist()
        raise ValueError(
            f"{m.request} leaves query {i} (batch {n}, head {h}) without any key: {_WAYS_OUT} (on both sides)."
        )
    bare_cols = (m.col_mass > 0) & ~m.col_covered
    if bare_cols.any():
        n, h, j = bare_cols.nonzero()[0].tolist()
        raise ValueError(
            f"{m.request} leaves key {j} (batch {n}, head {h}) uncovered by any query, but a balanced plan must use "
            f"its mass: {_WAYS_OUT} (on both sides)."
        )


def check_interior(m: Marginals) -> None:
    """Some plan is positive on the whole support; see the module's formula."""
    live = m.row_mass > 0
    if not live.any():
        return
    zero = m.row_mass.new_zeros(*m.row_mass.shape[:2], 1)
    a_before = torch.cat([zero, m.row_mass.cumsum(-1)], -1)
    b_before = torch.cat([zero, m.col_mass.cumsum(-1)], -1)
    size = m.col_mass.shape[-1]
    lo, hi = monotone_hull(m)
    first, last = torch.zeros_like(lo[..., :1]), torch.full_like(lo[..., :1], size)
    hi_before = torch.cat([first, hi[..., :-1]], -1)
    lo_after = torch.cat([lo[..., 1:], last], -1)
    # The overlap matters only where it holds mass: columns between may be inactive.
    lower = b_before.gather(-1, lo) - a_before[..., :-1]
    lower_strict = b_before.gather(-1, hi_before) > b_before.gather(-1, lo)
    upper = a_before[..., 1:] - b_before.gather(-1, hi)
    upper_strict = b_before.gather(-1, hi) > b_before.gather(-1, lo_after)
    tolerance = RELATIVE_TOLERANCE * a_before[..., -1:].clamp(min=1e-300)
    starved = live & (lower > torch.where(lower_strict, -tolerance, tolerance))
    crowded = live & (upper > torch.where(upper_strict, -tolerance, tolerance))
    bad = starved | crowded
    if bad.any():
        n, h, i = bad.nonzero()[0].tolist()
        rows, cols = a_before[n, h, i + 1].item(), b_before[n, h, hi[n, h, i]].item()
        if crowded[n, h, i]:
            why = f"queries 0..{i} hold mass {rows:.6g} but reach keys of mass {cols:.6g} only"
            tight = upper[n, h, i] >= -tolerance[n, h, 0] and upper[n, h, i] <= tolerance[n, h, 0]
        else:
            rows, cols = a_before[n, h, i].item(), b_before[n, h, lo[n, h, i]].item()
            keys = int(lo[n, h, i]) - 1
            why = f"keys 0..{keys} hold mass {cols:.6g} but are reached by queries 0..{i - 1} of mass {rows:.6g} only"
            tight = lower[n, h, i] >= -tolerance[n, h, 0] and lower[n, h, i] <= tolerance[n, h, 0]
        forced = (
            " Equal masses force a block (the identity, for a causal or one-sided window) and leave the rest of the "
            "support empty: the iteration would crawl towards it with diverging potentials."
            if tight
            else ""
        )
        raise ValueError(
            f"{m.request} has no balanced plan that is positive on its support (batch {n}, head {h}): {why}.{forced} "
            f"Ways out: {_WAYS_OUT}."
        )


def mirrored(m: Marginals) -> Marginals:
    """The same problem with its columns in reverse order."""
    size = m.col_mass.shape[-1]
    bare = m.row_lo >= m.row_hi
    lo, hi = (torch.where(bare, 0, size - x) for x in (m.row_hi, m.row_lo))
    request = m.request + " (columns counted from the end)"
    return Marginals(m.row_mass, m.col_mass.flip(-1), lo, hi, m.col_covered.flip(-1), request)


def check_dustbin(m: Marginals, needed: Tensor, row_segment: Tensor | None) -> None:
    """With a dustbin: every problem must carry strictly more real mass than `needed [N, H, G]` = sum(a) - col_capacity.

    For the default capacities `needed` is 0, and one pair of the support is enough.
    """
    count = needed.shape[-1]
    lo, hi = monotone_hull(m)
    reachable = m.row_mass * (m.row_lo < m.row_hi)
    total, flow = segment_sum(m.row_mass, row_segment, count), segment_sum(reachable, row_segment, count)
    tolerance = RELATIVE_TOLERANCE * total
    tight = needed > tolerance
    if tight.any():
        flow = torch.where(tight, segment_sum(greedy_flow(m, lo, hi), row_segment, count), flow)
    wrong = (total > 0) & (needed > flow - tolerance) & (tight | (flow <= tolerance))
    wrong &= (needed >= -tolerance) | tight
    if wrong.any():
        n, h, g = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"Dustbin capacities leave {needed[n, h, g]:.6g} of mass to real pairs, but {m.request} can carry "
            f"{flow[n, h, g]:.6g} at most (batch {n}, head {h}, segment {g}), and the plan must stay below that: raise "
            "row_capacity and col_capacity together, or widen the support."
        )


def monotone_hull(m: Marginals) -> tuple[Tensor, Tensor]:
    """The smallest monotone intervals holding the live rows' intervals; identity on monotone ones."""
    live = (m.row_mass > 0) & (m.row_lo < m.row_hi)
    hi = torch.where(live, m.row_hi, 0).cummax(-1).values
    lo = torch.where(live, m.row_lo, m.col_mass.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    return lo, hi


def greedy_flow(m: Marginals, lo: Tensor, hi: Tensor) -> Tensor:
    """`[N, H, L]` mass each row takes when keys are filled from the left, row after row: a largest flow."""
    left = torch.nn.functional.pad(m.col_mass.cumsum(-1), (1, 0))
    begin_at, end_at = left.gather(-1, lo), left.gather(-1, hi)
    used_to = torch.zeros_like(begin_at[..., 0])  # keys are filled up to this cumulative mass
    live = m.row_lo < m.row_hi
    taken = []
    for i in range(m.row_mass.shape[-1]):
        begin = torch.maximum(used_to, begin_at[..., i])
        room = torch.where(live[..., i], end_at[..., i] - begin, 0.0).clamp(min=0)
        taken.append(torch.minimum(m.row_mass[..., i], room))
        used_to = torch.where(taken[-1] > 0, begin + taken[-1], used_to)
    return torch.stack(taken, -1)
