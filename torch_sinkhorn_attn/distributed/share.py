"""What one rank has of a problem, and the verbs that every function computes with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed.columns import Columns, blocks, part
from torch_sinkhorn_attn.distributed.tiles import OfRank, SharedPasses, SharedTiles
from torch_sinkhorn_attn.distributed.wire import Wire
from torch_sinkhorn_attn.engines.base import Engine
from torch_sinkhorn_attn.engines.tiled.engine import attend, gradients, iterate, marginal_errors
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.problem.arguments import Prepared
from torch_sinkhorn_attn.problem.mass_scale import MassScale
from torch_sinkhorn_attn.problem.problem import Inputs, OutputGrads, Potentials, Problem, Result
from torch_sinkhorn_attn.problem.segments import Components, largest


@dataclass(frozen=True)
class Share:
    """What one rank has of a problem: rows from `first_row` on of all columns that it holds.

    Vectors are *local*, `[N, H, l(+G)]` of its rows; *held*, `[N, H, held(+G)]`; *owned*, of the columns it owns; or
    *whole*, of all rows or columns.
    """

    problem: Problem  # of its rows and held columns, counted from the first of each
    wire: Wire
    columns: Columns
    row_counts: list[int]  # of all ranks
    own: Components  # of its lines, in the numbers of the whole problem
    parts: Components
    intervals: tuple[Tensor, Tensor] | None  # of its rows among held columns, on the CPU; None: all
    chosen: Engine | None = None  # the engine of its half-steps; None: tiles of plain PyTorch

    @property
    def first_row(self) -> int:
        return blocks(self.row_counts)[self.wire.rank][0]

    def gathered(self, local: Inputs) -> Inputs:
        """The inputs of its tiles, from its shards: with the keys of the held columns."""
        columns, mask = self.columns, local.mask
        if mask is not None and mask.shape[-1] > 1:
            mask = mask[..., columns.start : columns.end]
        key, value, score = (
            None if x is None else columns.spread(x, dim)
            for x, dim in ((local.key, -2), (local.value, -2), (local.col_score, -1))
        )
        assert key is not None
        return local._replace(key=key, value=value, mask=mask, col_score=score)

    def scores(self, local: Inputs) -> SharedTiles:
        """Its tiles, before there are potentials."""
        return SharedTiles(self.gathered(local), self)

    def plan(self, local: Inputs) -> OfRank:
        """Likewise, by the engine that makes half-steps and the passes of attention."""
        if self.chosen is None:
            return self.scores(local)
        return self.chosen.rank_plan(self.gathered(local), self)

    # Attention

    def solve(self, local: Inputs, residuals: bool) -> Result:
        """Output, rows' potentials and masses of the rows here, those of columns for the owned ones; residuals of the
        whole problem."""
        tiles = self.plan(local)
        found = attend(tiles, residuals)
        potentials = found.potentials._replace(col=self.owned(found.potentials.col))
        if tiles.bins:
            found = found._replace(col_dustbin=self.columns.own(found.col_dustbin))
        if residuals:
            worst = self.wire.maximum(torch.stack([found.row_residual, found.col_residual]))
            found = found._replace(row_residual=worst[0], col_residual=worst[1])
        return found._replace(potentials=potentials)

    def errors(self, local: Inputs, potentials: Potentials, scale: MassScale) -> list[Tensor]:
        """The residuals of the whole problem, in the caller's unit of mass."""
        last = potentials._replace(col=potentials.col[-1:])
        found = marginal_errors(self.tiles(local, last), scale)
        return list(self.wire.maximum(torch.stack([largest(x) for x in found])))

    def owned_only(self, prepared: Prepared) -> Prepared:
        """With the masses of the columns that are given back."""
        marginals = self.problem.marginals
        marginals = replace(marginals, log_col_mass=self.columns.own(marginals.log_col_mass))
        return prepared._replace(problem=replace(self.problem, marginals=marginals))

    def tiles(self, local: Inputs, potentials: Potentials) -> Tiles:
        """At the last of the potentials that `solve` gave."""
        col = self.held(potentials.col)
        return self.scores(local).at(potentials.row[-1], col[-1])

    def gradients(self, local: Inputs, output: Tensor, potentials: Potentials, grads: OutputGrads) -> Inputs:
        """The adjoint of `solve`. What all ranks have alike (corner, the dustbin's value, masks of one row) gets its
        cotangent in parts, to be summed over ranks, as a parameter does."""
        whole = potentials._replace(col=self.held(potentials.col))
        if grads.from_bin is not None:
            grads = grads._replace(from_bin=self.columns.spread(grads.from_bin, -1))
        plan = self.plan(local).at(whole.row[-1], whole.col[-1])
        if self.chosen is None:
            assert isinstance(plan, Tiles)
            found = gradients(SharedPasses(plan, output, grads, whole), whole).inputs
        else:
            found = self.chosen.rank_gradients(plan, output, whole, grads)
        return self.home(local, found)

    def home(self, local: Inputs, found: Inputs) -> Inputs:
        """Cotangents of the shards, from those of the tiles' inputs."""
        columns, mask, corner = self.columns, found.mask, found.corner_score
        if mask is not None and local.mask is not None and mask.shape != local.mask.shape:
            wide = mask.new_zeros(local.mask.shape)
            wide[..., columns.start : columns.end] = mask
            mask = wide
        if corner is not None and self.wire.rank:
            corner = torch.zeros_like(corner)
        return found._replace(
            key=columns.home(found.key, -2),
            value=None if found.value is None else columns.home(found.value, -2),
            mask=mask,
            col_score=None if found.col_score is None else columns.own(found.col_score),
            corner_score=corner,
        )

    # Potentials alone

    def potentials(self, local: Inputs, known: Potentials | None = None) -> tuple[Tiles, Potentials]:
        """The tiles at the last potentials; all kept ones, local and held. `known`: local and owned."""
        scores = self.scores(local)
        if known is not None:
            found = known._replace(col=self.held(known.col))
        else:
            found = iterate(scores if self.chosen is None else self.plan(local))
        return scores.at(found.row[-1], found.col[-1]), found

    # Augmented vectors

    def owned(self, col: Tensor) -> Tensor:
        """The owned of held ones."""
        real, bins = self.columns.own(col), col[..., self.columns.number :]
        return torch.cat([real, bins], -1) if bins.shape[-1] else real.contiguous()

    def held(self, owned: Tensor) -> Tensor:
        """Its inverse."""
        return self._extended(owned, lambda x: self.columns.spread(x, -1))

    def whole_cols(self, held: Tensor) -> Tensor:
        """Those of all columns, gathered."""
        return self._extended(self.owned(held), lambda x: self.wire.gathered(x, self.columns.counts, -1))

    def whole_rows(self, local: Tensor) -> Tensor:
        return self._extended(local, lambda x: self.wire.gathered(x, self.row_counts, -1))

    def held_of(self, whole: Tensor) -> Tensor:
        """The held of those of all columns."""
        return part(whole, (self.columns.start, self.columns.end), sum(self.columns.counts))

    def owned_of(self, whole: Tensor) -> Tensor:
        return part(whole, blocks(self.columns.counts)[self.wire.rank], sum(self.columns.counts))

    def local_of(self, whole: Tensor) -> Tensor:
        return part(whole, blocks(self.row_counts)[self.wire.rank], sum(self.row_counts))

    def _extended(self, x: Tensor, function: Any) -> Tensor:
        """A function of the real part, the dustbins' entries behind as they are."""
        count = x.shape[-1] - self.problem.num_dustbins
        real = function(x[..., :count])
        return torch.cat([real, x[..., count:]], -1) if x.shape[-1] > count else real
