"""A plan as a band: for each row the entries at W columns from its first one on, and the adjoint of that.

A band is read out of the tiles and, where it is a cotangent, written into them, one after the other: O(L W) memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.tiled.adjoint import AdjointPasses, adjoint_field, score_gradients
from torch_sinkhorn_attn.engines.tiled.engine import TiledPasses
from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.method.dustbin_vectors import Vectors
from torch_sinkhorn_attn.method.staircase import Field
from torch_sinkhorn_attn.problem.problem import Inputs, Potentials


def band(tiles: Tiles, first: Tensor, width: int, log: bool) -> tuple[Tensor, Tensor, Tensor]:
    """P (or log P) at the `width` columns from `first` `[N, L]` on, `[N, H, L, W]`, 0 (-inf) off the support; and on
    the dustbin's column `[N, H, L]` and row `[N, H, S]`, empty without one."""
    values = tiles.u.new_full((tiles.num, tiles.heads, tiles.length, width), -torch.inf)
    offset = torch.arange(width, device=first.device)
    for i, rows in enumerate(tiles.row_blocks):
        reached = tiles.columns(i)
        if not reached:
            continue
        parts = [tiles.supported_log_plan(i, j) for j in reached]
        line = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        place = first[:, None, rows, None] + offset - tiles.col_blocks[reached[0]].start
        found = line.gather(-1, place.clamp(0, line.shape[-1] - 1).expand(*line.shape[:2], -1, -1))
        values[..., rows, :] = found.masked_fill_((place < 0) | (place >= line.shape[-1]), -torch.inf)
    to_bin, from_bin, _ = tiles.log_dustbin_plan if log else tiles.dustbin_plan
    return values if log else values.exp_(), to_bin, from_bin


def band_gradients(
    tiles: Tiles,
    potentials: Potentials,
    first: Tensor,
    values: Tensor,
    grads: tuple[Tensor, Tensor | None, Tensor | None],
    mask: bool,
    log: bool,
) -> Inputs:
    """The adjoint of `band`, of whose result it is given the values, for cotangents of its three results."""
    return plan_gradients(BandPasses(tiles, first, values, grads, mask, log), potentials)


def plan_gradients(passes: BandPasses, potentials: Potentials) -> Inputs:
    """The adjoint by such passes."""
    field, _ = adjoint_field(passes, potentials)
    return score_gradients(passes, field)


class BandPasses(TiledPasses):
    """The passes of the adjoint where P*D, the plan times its cotangent, is a band, and vectors for the dustbin. For a
    cotangent G of log P, P*D is G itself, so nothing is divided by P."""

    gathers_value = False

    def __init__(
        self,
        tiles: Tiles,
        first: Tensor,
        values: Tensor,
        grads: tuple[Tensor, Tensor | None, Tensor | None],
        mask: bool,
        log: bool,
        corner_grad: Tensor | None = None,
    ):
        """`corner_grad` `[N, H]`: the cotangent of the corner, where there is one, summed over segments."""
        AdjointPasses.__init__(self, tiles)
        self.tiles, self.first, self.wants_mask = tiles, first, mask
        grad, to_bin, from_bin = (None if x is None else x.to(tiles.dtype) for x in grads)
        assert grad is not None
        self.weighted = grad.masked_fill(values == -torch.inf, 0.0) if log else grad * values
        if tiles.dustbin is not None:
            column, row, corner = tiles.dustbin_plan
            self.bins = Vectors(
                _weighted(column, to_bin, tiles.log_dustbin_plan.column, log),
                _weighted(row, from_bin, tiles.log_dustbin_plan.row, log),
                _weighted_corner(corner, corner_grad, tiles.log_dustbin_plan.corner, log),
            )
        self.row_sums = self.complete_row_sums(self.weighted.sum(-1))

    def real_column_sums(self) -> Tensor:
        t, width = self.tiles, self.weighted.shape[-1]
        if t.size == 0:
            return self.weighted.new_zeros(t.num, t.heads, 0)
        place = self.first[..., None] + torch.arange(width, device=self.first.device)
        place = place.clamp(0, t.size - 1).flatten(-2)[:, None].expand(t.num, t.heads, -1)
        return self.weighted.new_zeros(t.num, t.heads, t.size).scatter_add(-1, place, self.weighted.flatten(-2))

    def score_cotangent(self, field: Field, i: int, j: int) -> Tensor:
        t, width = self.tiles, self.weighted.shape[-1]
        rows, cols = t.row_blocks[i], t.col_blocks[j]
        column = torch.arange(cols.start, cols.stop, device=self.first.device)
        place = column - self.first[:, None, rows, None]
        index = place.clamp(0, width - 1).expand(t.num, t.heads, -1, -1)
        found = self.weighted[..., rows, :].gather(-1, index)
        return t.less_field(found.masked_fill_((place < 0) | (place >= width), 0.0), field, i, j)


def _weighted(plan: Tensor, grad: Tensor | None, log_plan: Tensor, log: bool) -> Tensor:
    """P*D of a vector of the plan, for the cotangent of it or of its logarithm."""
    if grad is None:
        return torch.zeros_like(plan)
    return grad.masked_fill(log_plan == -torch.inf, 0.0) if log else plan * grad


def _weighted_corner(plan: Tensor, grad: Tensor | None, log_plan: Tensor, log: bool) -> Tensor:
    """P*D of the corners `[N, H, G]`, for the cotangent of their sum or of its logarithm."""
    if grad is None:
        return torch.zeros_like(plan)
    share = log_plan.softmax(-1).masked_fill(log_plan == -torch.inf, 0.0) if log else plan
    return share * grad[..., None]
