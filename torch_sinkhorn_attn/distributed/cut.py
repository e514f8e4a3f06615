"""From the whole problem, in vectors, to a rank's share of it: its rows, and the columns that they reach."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed.agreement import Agreed
from torch_sinkhorn_attn.distributed.columns import Span, blocks, columns_of, part
from torch_sinkhorn_attn.distributed.share import Share
from torch_sinkhorn_attn.distributed.wire import Wire
from torch_sinkhorn_attn.problem.problem import Intervals, Marginals, Problem
from torch_sinkhorn_attn.problem.segments import Components, components, segments


def share_of(wire: Wire, problem: Problem, agreed: Agreed, heads: tuple[int, int], engine: str | None = None) -> Share:
    """A rank's rows of the whole problem, and the columns it holds, for (N, H) `heads`."""
    support, marginals = problem.support, problem.marginals
    start, end = blocks(agreed.rows)[wire.rank]
    reached, intervals = None, None
    if problem.outline.banded:
        lo, hi = support.row_lo.cpu(), support.row_hi.cpu()
        reached = [_reach(lo[:, a:b], hi[:, a:b]) for a, b in blocks(agreed.rows)]
        intervals = lo[:, start:end], hi[:, start:end]
    columns = columns_of(wire, agreed.cols, reached)
    rows, cols = slice(start, end), slice(columns.start, columns.end)
    if intervals is not None:
        intervals = _shifted(*intervals, columns.start)
    lo, hi = _shifted(support.row_lo[:, rows], support.row_hi[:, rows], columns.start)
    first, last = (x[:, cols].clamp(start, end) for x in (support.col_lo, support.col_hi))
    first, last = _shifted(first, last, start)

    def of_rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else part(x, (start, end), sum(agreed.rows))

    def of_cols(x: Tensor | None) -> Tensor | None:
        return None if x is None else part(x, (columns.start, columns.end), sum(agreed.cols))

    log_a, log_b = of_rows(marginals.log_row_mass), of_cols(marginals.log_col_mass)
    segment = of_rows(support.row_segment), of_cols(support.col_segment)
    of_tokens = (None if x is None else x.expand(heads[0], -1) for x in (lo, hi, first, last, *segment))
    masses = (log_a, log_b, marginals.log_row_capacity, marginals.log_col_capacity)
    own = Problem(
        Intervals(*of_tokens),  # type: ignore[arg-type]
        Marginals(*(None if x is None else x.expand(*heads, -1) for x in masses)),  # type: ignore[arg-type]
        of_rows(problem.initial_row),
        of_cols(problem.initial_col),
        problem.dropout_seed,
        problem.solver,
        replace(problem.outline, uniform=False),
    )

    own_lines, parts = (
        Components(of_rows(x.row), of_cols(x.col), x.number) for x in (segments(problem), few(components(problem)))
    )
    return Share(own, wire, columns, agreed.rows, own_lines, parts, intervals)


def few(parts: Components) -> Components:
    """With as many numbers as there are parts, where that may be looked at: they go over the wire."""
    if parts.row is None or parts.col is None or parts.number == 1:
        return parts
    number = 1 + max(int(x.max()) if x.numel() else 0 for x in (parts.row, parts.col))
    return Components(None, None, 1) if number == 1 else parts._replace(number=number)


def _shifted(lo: Tensor, hi: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Intervals counted from another column; (0, 0) where empty."""
    some = lo < hi
    return torch.where(some, lo - start, 0), torch.where(some, hi - start, 0)


def _reach(lo: Tensor, hi: Tensor) -> Span:
    if lo.numel() == 0:
        return 0, 0
    some = lo < hi
    return int(torch.where(some, lo, torch.iinfo(lo.dtype).max).min().clamp(max=int(hi.max()))), int(hi.max())
