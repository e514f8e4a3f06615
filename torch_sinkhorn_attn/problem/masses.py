"""Masses of the marginals and capacities of the dustbin: defaults, and one value for each problem where it has one. For
torch and for JAX."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch_sinkhorn_attn.arrays import Array, namespace
from torch_sinkhorn_attn.problem.segments import by_segment, segment_max, segment_sum

Pair = tuple[Array | None, Array | None]  # a row side and a column side


class Side(NamedTuple):
    """Rows or columns: the masses given `[N, H, n]` or None, who is active, and the segment of each token `[N, n]` or
    None. Where tokens lie on several devices too, `shared` has their `total(x)` and `highest(x)` over devices."""

    given: Array | None
    active: Array
    segment: Array | None
    shared: Any = None

    def labels(self) -> Array | None:  # a method: torch.compile does not trace properties of tuples
        """The segment, to be broadcast over heads."""
        return None if self.segment is None else self.segment[:, None]

    def total(self, x: Array, groups: int) -> Array:
        """`[N, H, n]` summed over each problem, `[N, H, G]`."""
        found = segment_sum(x, self.labels(), groups)
        return found if self.shared is None else self.shared.total(found)

    def highest(self, x: Array, groups: int) -> Array:
        """The highest of each problem likewise."""
        found = segment_max(x, self.labels(), groups)
        return found if self.shared is None else self.shared.highest(found)

    def spread(self, total: Array, on: Array) -> Array:
        """The mass `[N, H, G]` of each problem shared evenly by its active tokens; `on` is 1 where active, else 0."""
        share = total / namespace(on).clip(self.total(on, total.shape[-1]), 1)
        return on * by_segment(share, self.labels(), on.shape[-1])


def marginal_masses(rows: Side, cols: Side, groups: int, has_dustbin: bool, dtype: Any) -> tuple[Array, Array]:
    """a [N, H, L] and b [N, H, S]: the given ones, 0 where inactive, or the default: uniform with the other side's
    total in each problem (1 and n/m if neither is given); 1 with a dustbin."""
    xp = namespace(rows.active)
    row_on, col_on = xp.astype(rows.active, dtype), xp.astype(cols.active, dtype)
    a, b = (None if x.given is None else xp.where(x.active, xp.astype(x.given, dtype), 0.0) for x in (rows, cols))
    if has_dustbin:
        return row_on if a is None else a, col_on if b is None else b
    if a is None:
        a = row_on if b is None else rows.spread(cols.total(b, groups), row_on)
    if b is None:
        b = cols.spread(rows.total(a, groups), col_on)
    return a, b


def dustbin_capacities(given: Pair, a: Array, b: Array, rows: Side, cols: Side, bins: int) -> Pair:
    """(row_capacity, col_capacity) `[N, H, G]` from the caller's `[N, H, L]` and `[N, H, S]`, in the dtype of a and b;
    0 for segments that do not exist, None without a dustbin."""
    if bins == 0:
        return None, None
    xp = namespace(a)
    row_total, col_total = rows.total(a, bins), cols.total(b, bins)
    row, col = (
        None if x is None else side.highest(xp.where(mass > 0, xp.astype(x, a.dtype), 0.0), bins)
        for x, mass, side in ((given[0], a, rows), (given[1], b, cols))
    )
    if row is None:
        row = col_total if col is None else col_total + col - row_total
    if col is None:
        col = row_total + row - col_total
    live = (row_total > 0) & (col_total > 0)
    return xp.where(live, row, 0.0), xp.where(live, col, 0.0)


def log_mass(mass: Array, dtype: Any) -> Array:
    """log, -inf for the 0 of inactive tokens."""
    xp = namespace(mass)
    return xp.astype(xp.log(mass), dtype)
