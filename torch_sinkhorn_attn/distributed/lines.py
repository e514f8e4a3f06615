"""Sums and maxima over the lines of all ranks: each counts its own rows and the columns it owns, and the first rank the
dustbins, whose numbers all have."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed.columns import Columns
from torch_sinkhorn_attn.distributed.wire import Wire
from torch_sinkhorn_attn.engines.tiled.dustbin_plan import DustbinPlan
from torch_sinkhorn_attn.problem.problem import Inputs, Problem
from torch_sinkhorn_attn.problem.segments import Components, segment_logsumexp, segment_max, segment_sum


class SharedLines(Components):
    """A partition of the lines of all ranks, by the labels of those held here."""

    wire: Wire
    columns: Columns
    rows: int  # real ones here; dustbins follow

    @classmethod
    def of(cls, parts: Components, wire: Wire, columns: Columns, rows: int) -> SharedLines:
        found = cls(*parts)
        found.wire, found.columns, found.rows = wire, columns, rows
        return found

    def row_sum(self, x: Tensor) -> Tensor:
        return self.wire.all_reduce(segment_sum(self._rows(x), self._labels(self.row, self._rows), self.number))

    def row_max(self, x: Tensor) -> Tensor:
        return self.wire.maximum(segment_max(self._rows(x), self._labels(self.row, self._rows), self.number))

    def col_sum(self, x: Tensor) -> Tensor:
        return self.wire.all_reduce(segment_sum(self._cols(x), self._labels(self.col, self._cols), self.number))

    def col_max(self, x: Tensor) -> Tensor:
        return self.wire.maximum(segment_max(self._cols(x), self._labels(self.col, self._cols), self.number))

    def col_logsumexp(self, x: Tensor) -> Tensor:
        return self.wire.lse(segment_logsumexp(self._cols(x), self._labels(self.col, self._cols), self.number))

    def anywhere(self, marked: Tensor) -> bool:
        return bool(self.wire.maximum(marked.any().to(torch.int32)))

    def _rows(self, x: Tensor) -> Tensor:
        return x if self.wire.rank == 0 else x[..., : self.rows]

    def _cols(self, x: Tensor) -> Tensor:
        owned, bins = self.columns.own(x), x[..., self.columns.number :]
        return owned if self.wire.rank or bins.shape[-1] == 0 else torch.cat([owned, bins], -1)

    @staticmethod
    def _labels(labels: Tensor | None, counted: object) -> Tensor | None:
        return None if labels is None else counted(labels)  # type: ignore[operator]


class SharedDustbin(DustbinPlan):
    """The dustbin of a problem whose lines lie on several ranks."""

    def __init__(self, inputs: Inputs, problem: Problem, dtype: torch.dtype, wire: Wire, columns: Columns):
        super().__init__(inputs, problem, problem.solver.epsilon, dtype)
        self.wire, self.columns = wire, columns
        self.owned_index = None if self.col_index is None else columns.own(self.col_index)

    def sum_rows(self, x: Tensor) -> Tensor:
        return self.wire.all_reduce(super().sum_rows(x))

    def sum_cols(self, x: Tensor) -> Tensor:
        return self.wire.all_reduce(segment_sum(self.columns.own(x), self.owned_index, self.count))

    def lse_rows(self, x: Tensor) -> Tensor:
        return self.wire.lse(super().lse_rows(x))

    def lse_cols(self, x: Tensor) -> Tensor:
        return self.wire.lse(segment_logsumexp(self.columns.own(x), self.owned_index, self.count))
