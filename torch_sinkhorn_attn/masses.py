"""Masses of the marginals and of the dustbin: defaults, and one value per problem where a problem has one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.argument_checks import broadcasts, constant
from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.problem import compute_dtype
from torch_sinkhorn_attn.support import by_segment, segment_sum


def marginal_masses(
    row: Tensor | None,
    col: Tensor | None,
    row_active: Tensor,
    col_active: Tensor,
    row_segment: Tensor | None,
    col_segment: Tensor | None,
    groups: int,
    dustbin: Dustbin | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """a [N, H, L] and b [N, H, S]: the given ones, 0 where inactive, or the default: uniform with the other side's
    total in each problem; 1 with a dustbin."""
    row_on, col_on = row_active.to(dtype), col_active.to(dtype)
    a, b = (None if x is None else torch.where(on, x, 0.0) for x, on in ((row, row_active), (col, col_active)))
    if dustbin is not None:
        return row_on if a is None else a, col_on if b is None else b
    if a is None:
        a = row_on
        if b is not None:
            share = segment_sum(b, _heads(col_segment), groups) / segment_sum(
                row_on, _heads(row_segment), groups
            ).clamp(min=1)
            a = row_on * by_segment(share, _heads(row_segment), row_on.shape[-1])
    if b is None:
        share = segment_sum(a, _heads(row_segment), groups) / segment_sum(col_on, _heads(col_segment), groups).clamp(
            min=1
        )
        b = col_on * by_segment(share, _heads(col_segment), col_on.shape[-1])
    return a, b


def dustbin_capacities(
    given: tuple[Tensor | None, Tensor | None],
    a: Tensor,
    b: Tensor,
    row_segment: Tensor | None,
    col_segment: Tensor | None,
    num_bins: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """(row_capacity, col_capacity) [N, H, G], 0 for segments that do not exist."""
    if num_bins == 0:
        return None, None
    row_total = segment_sum(a, _heads(row_segment), num_bins)
    col_total = segment_sum(b, _heads(col_segment), num_bins)
    live = (row_total > 0) & (col_total > 0)
    row, col = (
        None if x is None else _per_problem(x.to(dtype), on > 0, segment, num_bins)
        for x, on, segment in ((given[0], a, row_segment), (given[1], b, col_segment))
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


def _heads(segment: Tensor | None) -> Tensor | None:
    return None if segment is None else segment[:, None]


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
