"""Masses of the marginals and of the dustbin: defaults, and one value per problem where a problem has one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.problem.argument_checks import constant
from torch_sinkhorn_attn.problem.problem import compute_dtype
from torch_sinkhorn_attn.problem.scalars import broadcasts
from torch_sinkhorn_attn.problem.segments import by_segment, segment_sum


class Side(NamedTuple):
    """Rows or columns: the masses given `[N, H, n]` or None, who is active, and the segment of each token or None."""

    given: Tensor | None
    active: Tensor
    segment: Tensor | None

    def total(self, x: Tensor, groups: int) -> Tensor:
        """`[N, H, n]` summed over each problem, `[N, H, G]`."""
        return segment_sum(x, self._index(), groups)

    def spread(self, total: Tensor, on: Tensor) -> Tensor:
        """The mass `[N, H, G]` of each problem shared evenly by its active tokens; `on` is 1 where active, else 0."""
        share = total / self.total(on, total.shape[-1]).clamp(min=1)
        return on * by_segment(share, self._index(), on.shape[-1])

    def _index(self) -> Tensor | None:  # a method: torch.compile does not trace properties of tuples
        return None if self.segment is None else self.segment[:, None]


def marginal_masses(
    rows: Side, cols: Side, groups: int, dustbin: Dustbin | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """a [N, H, L] and b [N, H, S]: the given ones, 0 where inactive, or the default: uniform with the other side's
    total in each problem (1 and n/m if neither is given); 1 with a dustbin."""
    row_on, col_on = rows.active.to(dtype), cols.active.to(dtype)
    a, b = (None if x.given is None else torch.where(x.active, x.given.to(dtype), 0.0) for x in (rows, cols))
    if dustbin is not None:
        return row_on if a is None else a, col_on if b is None else b
    if a is None:
        a = row_on if b is None else rows.spread(cols.total(b, groups), row_on)
    if b is None:
        b = cols.spread(rows.total(a, groups), col_on)
    return a, b


def dustbin_capacities(
    given: tuple[Tensor | None, Tensor | None],
    a: Tensor,
    b: Tensor,
    rows: Side,
    cols: Side,
    num_bins: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """(row_capacity, col_capacity) [N, H, G], 0 for segments that do not exist."""
    if num_bins == 0:
        return None, None
    row_total, col_total = rows.total(a, num_bins), cols.total(b, num_bins)
    live = (row_total > 0) & (col_total > 0)
    row, col = (
        None if x is None else _per_problem(x.to(dtype), mass > 0, side.segment, num_bins)
        for x, mass, side in ((given[0], a, rows), (given[1], b, cols))
    )
    if row is None:
        row = col_total if col is None else col_total + col - row_total
    if col is None:
        col = row_total + row - col_total
    return torch.where(live, row, 0.0), torch.where(live, col, 0.0)


def _per_problem(x: Tensor, active: Tensor, segment: Tensor | None, count: int) -> Tensor:
    """The value of a per-token constant in each problem: its largest over the active tokens."""
    index = torch.zeros_like(x, dtype=torch.int64) if segment is None else segment[:, None].expand(x.shape)
    out = torch.zeros(*x.shape[:-1], count, dtype=x.dtype, device=x.device)
    return out.scatter_reduce(-1, index, torch.where(active, x, 0.0), "amax")


def log_mass(mass: Tensor, dtype: torch.dtype) -> Tensor:
    """log, -inf for the 0 of inactive tokens."""
    return mass.log().to(dtype)


def dustbin_tensors(
    dustbin: Dustbin | None,
    batch: torch.Size,
    heads: int,
    length: int,
    size: int,
    value: Tensor | None,
    query: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(row_score [N, H, L], col_score [N, H, S], corner_score [N, H], value [N, H, Ev] or None), differentiable."""
    if dustbin is None:
        return None, None, None, None
    dtype, flat = compute_dtype(query.dtype), math.prod(batch)

    def expanded(name: str, x: Any, shape: tuple[int, ...]) -> Tensor:
        if not isinstance(x, Tensor):
            x = torch.full((), float(x), dtype=dtype, device=query.device)
        if x.device != query.device:
            raise ValueError(f"Dustbin {name} is on {x.device} but query is on {query.device}; move it.")
        if not broadcasts(x.shape, shape):
            raise ValueError(
                f"Dustbin {name} has shape {tuple(x.shape)}, which does not broadcast to {shape}; per head is (H, 1)."
            )
        return x.to(dtype).expand(shape).reshape(flat, *shape[len(batch) :])

    vector = None
    if dustbin.value is not None and value is not None:
        vector = expanded("value", dustbin.value, (*batch, heads, value.shape[-1]))
    return (
        expanded("row_score", dustbin.row_score, (*batch, heads, length)),
        expanded("col_score", dustbin.col_score, (*batch, heads, size)),
        expanded("corner_score", dustbin.corner_score, (*batch, heads)),
        vector,
    )


def given_capacities(
    dustbin: Dustbin | None, batch: torch.Size, heads: int, length: int, size: int, query: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The user's capacities as [N, H, L] and [N, H, S], None where not given."""
    if dustbin is None:
        return None, None
    pair = []
    for name, x, n in (("row_capacity", dustbin.row_capacity, length), ("col_capacity", dustbin.col_capacity, size)):
        if x is not None and not isinstance(x, Tensor):
            x = torch.full((), float(x), dtype=torch.float64, device=query.device)
        x = constant(f"Dustbin {name}", x, (*batch, heads, n), query)
        pair.append(None if x is None else x.reshape(math.prod(batch), heads, n))
    return pair[0], pair[1]
