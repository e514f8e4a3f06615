"""The tiles of a rank: its rows and the columns they reach, as the tiled engine has them, and its vectors completed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed.columns import Columns
from torch_sinkhorn_attn.distributed.lines import SharedDustbin, SharedLines
from torch_sinkhorn_attn.distributed.wire import Wire
from torch_sinkhorn_attn.engines.tiled.engine import TiledPasses, attend, gradients, marginal_errors
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.method.dropout import keep_tile
from torch_sinkhorn_attn.method.staircase import Staircase
from torch_sinkhorn_attn.problem.arguments import Prepared
from torch_sinkhorn_attn.problem.mass_scale import MassScale
from torch_sinkhorn_attn.problem.problem import Inputs, OutputGrads, Potentials, Problem, Result
from torch_sinkhorn_attn.problem.segments import Components, largest


@dataclass(frozen=True)
class Share:
    """What one rank has of a problem: rows from `first_row` on of all columns that it holds."""

    problem: Problem  # of its rows and held columns, counted from the first of each
    wire: Wire
    columns: Columns
    first_row: int
    own: Components  # of its lines, in the numbers of the whole problem
    parts: Components
    intervals: tuple[Tensor, Tensor] | None  # of its rows among held columns, on the CPU; None: all

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

    def solve(self, local: Inputs, residuals: bool) -> Result:
        """Output, rows' potentials and masses of the rows here, those of columns for the owned ones; residuals of the
        whole problem."""
        tiles = SharedTiles(self.gathered(local), self)
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

    def owned(self, col: Tensor) -> Tensor:
        """The owned of augmented column vectors."""
        real, bins = self.columns.own(col), col[..., self.columns.number :]
        return torch.cat([real, bins], -1) if bins.shape[-1] else real.contiguous()

    def held(self, col: Tensor) -> Tensor:
        """Its inverse."""
        bins = self.problem.num_dustbins
        real = self.columns.spread(col[..., : col.shape[-1] - bins], -1)
        return torch.cat([real, col[..., col.shape[-1] - bins :]], -1) if bins else real

    def tiles(self, local: Inputs, potentials: Potentials) -> Tiles:
        """At the last of the potentials that `solve` gave."""
        col = self.held(potentials.col)
        return SharedTiles(self.gathered(local), self).at(potentials.row[-1], col[-1])

    def gradients(self, local: Inputs, output: Tensor, potentials: Potentials, grads: OutputGrads) -> Inputs:
        """The adjoint of `solve`. What all ranks have alike (corner, the dustbin's value, masks of one row) gets its
        cotangent in parts, to be summed over ranks, as a parameter does."""
        whole = potentials._replace(col=self.held(potentials.col))
        tiles = SharedTiles(self.gathered(local), self).at(whole.row[-1], whole.col[-1])
        if grads.from_bin is not None:
            grads = grads._replace(from_bin=self.columns.spread(grads.from_bin, -1))
        found = gradients(SharedPasses(tiles, output, grads, whole), whole).inputs
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


class SharedTiles(Tiles):
    """Tiles of the rows here; vectors of columns are completed by the other ranks."""

    def __init__(self, inputs: Inputs, share: Share):
        self.share = share
        super().__init__(inputs, share.problem)

    def _dustbin(self) -> SharedDustbin:
        return SharedDustbin(self.inputs, self.problem, self.dtype, self.share.wire, self.share.columns)

    @cached_property
    def own(self) -> Components:
        return SharedLines.of(self.share.own, self.share.wire, self.share.columns, self.length)

    @cached_property
    def parts(self) -> Components:
        return SharedLines.of(self.share.parts, self.share.wire, self.share.columns, self.length)

    def complete_lse(self, partial: Tensor) -> Tensor:
        return self.share.columns.lse(partial)

    def complete_sums(self, partial: Tensor) -> Tensor:
        return self.share.columns.sum(partial)

    def _intervals(self) -> tuple[Tensor, Tensor] | None:
        return self.share.intervals

    def _keep(self, tile: Tensor, i: int, j: int) -> Tensor:
        seed, solver = self.problem.dropout_seed, self.problem.solver
        assert seed is not None
        rows, cols = self.row_blocks[i], self.col_blocks[j]
        place = [
            torch.arange(at.start + first, at.stop + first, device=tile.device)
            for at, first in ((rows, self.share.first_row), (cols, self.share.columns.start))
        ]
        head = torch.arange(self.num * self.heads, device=tile.device).view(self.num, self.heads)
        return keep_tile(seed, head, place[0], place[1], solver.dropout_p).to(tile.dtype)


class SharedPasses(TiledPasses):
    """The passes of the adjoint over such tiles. Whether factors may be scaled is one answer for all ranks."""

    def __init__(self, tiles: Tiles, output: Tensor, grads: OutputGrads, potentials: Potentials):
        super().__init__(tiles, output, grads)
        scaled = Staircase(potentials, tiles.problem).scaled
        self.may_scale = not tiles.own.anywhere(torch.tensor(not scaled, device=output.device))
