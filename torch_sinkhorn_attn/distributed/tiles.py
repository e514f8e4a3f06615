"""The tiles of a rank: its rows and the columns they reach, as the tiled engine has them, and its vectors completed."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_sinkhorn_attn.distributed.lines import SharedDustbin, SharedLines
from torch_sinkhorn_attn.engines.tiled.augmented import AugmentedPlan
from torch_sinkhorn_attn.engines.tiled.engine import TiledPasses
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.method.dropout import keep_tile
from torch_sinkhorn_attn.method.staircase import Staircase
from torch_sinkhorn_attn.problem.problem import Inputs, OutputGrads, Potentials
from torch_sinkhorn_attn.problem.segments import Components

if TYPE_CHECKING:
    from torch_sinkhorn_attn.distributed.share import Share


class OfRank(AugmentedPlan):
    """A plan of the rows here and the columns they reach; vectors of columns are completed by the other ranks."""

    share: Share

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


class SharedTiles(OfRank, Tiles):
    """Tiles of it, in plain PyTorch."""

    def __init__(self, inputs: Inputs, share: Share):
        self.share = share
        super().__init__(inputs, share.problem)

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
    """The passes of the adjoint over such tiles. `may_scale`: what `alike` says, where it was asked."""

    def __init__(
        self, tiles: Tiles, output: Tensor, grads: OutputGrads, potentials: Potentials, may_scale: bool | None = None
    ):
        super().__init__(tiles, output, grads)
        self.may_scale = alike(tiles, potentials) if may_scale is None else may_scale


def alike(tiles: AugmentedPlan, potentials: Potentials) -> bool:
    """Whether factors may be scaled, `staircase.Factor`: one answer for all ranks."""
    scaled = Staircase(potentials, tiles.problem).scaled
    return not tiles.own.anywhere(torch.tensor(not scaled, device=tiles.u.device))
