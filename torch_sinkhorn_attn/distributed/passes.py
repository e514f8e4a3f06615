"""`thermometer.passes` over a process group, in vectors of the whole problem, which every rank has and so all compute
the same with; what meets pairs, each rank does for its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed.parts import whole_parts
from torch_sinkhorn_attn.distributed.share import Share
from torch_sinkhorn_attn.distributed.tiles import SharedTiles
from torch_sinkhorn_attn.engines.base import each_tensor
from torch_sinkhorn_attn.engines.tiled.engine import iterate
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.problem.problem import Inputs, Potentials, Problem
from torch_sinkhorn_attn.problem.segments import Components
from torch_sinkhorn_attn.thermometer.passes import Passes


class WholePasses(Passes):
    """`inputs` are those of the rank's tiles, `problem` is the whole one."""

    def __init__(self, share: Share, inputs: Inputs, whole: Problem):
        super().__init__("tiled", inputs, whole)
        self.share = share

    def solve(self, u: Tensor | None = None, v: Tensor | None = None, **solver: Any) -> Potentials:
        found = iterate(self._tiles(self.inputs, self._problem(u, v, solver)))
        return Potentials(self.share.whole_rows(found.row), self.share.whole_cols(found.col))

    def times(self, v: Tensor, x: Tensor) -> Tensor:
        inputs, share, size = self._wide(), self.share, self.share.columns.number
        x = share.held_of(x)
        inputs = inputs._replace(value=x[..., :size].movedim(0, -1))
        tiles, held = self._tiles(inputs, self._problem(None, None, {})), share.held_of(v)
        at = tiles.at(tiles.row_half_step(held), held)
        return share.whole_rows(at.complete_rows(at.value_pass()[0].movedim(-1, 0), x))

    def parts(self) -> Components:
        return whole_parts(self.share, self.inputs, self.problem)

    def at(self, n: int, h: int) -> WholePasses:
        one = super().at(n, h)

        def own(x: Tensor) -> Tensor:
            x = x[n : n + 1] if x.shape[0] > 1 else x
            return x[:, h : h + 1] if x.ndim > 2 and x.shape[1] > 1 else x

        share, given = self.share, self.share.problem
        support, marginals = (each_tensor(x, own) for x in (given.support, given.marginals))
        problem = replace(given, support=support, marginals=marginals, initial_row=None, initial_col=None)
        lines = [
            Components(each_tensor(x.row, own), each_tensor(x.col, own), x.number) for x in (share.own, share.parts)
        ]
        intervals = each_tensor(share.intervals, own)
        cut = replace(share, problem=problem, own=lines[0], parts=lines[1], intervals=intervals)
        return WholePasses(cut, one.inputs, one.problem)

    def _tiles(self, inputs: Inputs, whole: Problem) -> SharedTiles:
        share = self.share
        row, col = whole.initial_row, whole.initial_col
        problem = replace(
            share.problem,
            solver=whole.solver,
            dropout_seed=None,
            initial_row=None if row is None else share.local_of(row).contiguous(),
            initial_col=None if col is None else share.held_of(col).contiguous(),
        )
        return SharedTiles(inputs, replace(share, problem=problem))


def dense_scores(share: Share, inputs: Inputs) -> Tensor:
    """The augmented scores of all pairs, on every rank."""
    own = reference.dense_problem(inputs, share.problem).scores  # [N, H, l(+G), held(+G)]
    length, columns = share.problem.sizes[2], share.columns
    rows, total = own[..., :length, :], sum(columns.counts)
    real = torch.nn.functional.pad(rows[..., : columns.number], (columns.start, total - columns.end), value=-torch.inf)
    real = torch.cat([real, rows[..., columns.number :]], -1)
    return torch.cat([share.wire.gathered(real, share.row_counts, -2), share.whole_cols(own[..., length:, :])], -2)
