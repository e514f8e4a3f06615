"""Tiles of the scores and of the plan, and the passes over them that the tiled engine and the certificates are made of.

Layout: a tile is `[N, H, rows, columns]`. Vectors are those of `augmented.AugmentedPlan`.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.tiled.augmented import AugmentedPlan
from torch_sinkhorn_attn.method.dropout import keep_mask
from torch_sinkhorn_attn.method.staircase import Factor, Field, subtract_field
from torch_sinkhorn_attn.problem.looking import can_look
from torch_sinkhorn_attn.problem.masks.entries import kept
from torch_sinkhorn_attn.problem.problem import Inputs, Problem
from torch_sinkhorn_attn.problem.support import window_ranks

TILE_ELEMENTS = 1 << 20  # of one tile over all heads: 4 MiB in float32, near the last-level cache
KEPT_ELEMENTS = 4 * TILE_ELEMENTS  # of the score and of the plan tiles kept from pass to pass: a constant
SMALLEST_BLOCK, BAND_BLOCK, LARGEST_BLOCK = 32, 128, 512


def block_size(heads: int, reach: int | None = None) -> int:
    """Rows and columns of a tile for `heads` = N * H heads worked on together: a power of two.

    `reach` is the width of a window: tiles of half of it waste little beside the band (a third of the time of the
    largest tiles at 16384 tokens and a window of (128, 128)), but not below `BAND_BLOCK`, where calls would dominate.

    >>> block_size(1), block_size(64), block_size(100_000), block_size(1, reach=9), block_size(1, reach=601)
    (512, 128, 32, 128, 256)
    """
    side = math.isqrt(TILE_ELEMENTS // max(1, heads))
    if reach is not None:
        side = min(side, max(BAND_BLOCK, reach // 2))
    return max(SMALLEST_BLOCK, min(LARGEST_BLOCK, 1 << max(0, side.bit_length() - 1)))


class _Kept:
    """The first tiles that fit in `KEPT_ELEMENTS`: small problems are computed once, large ones in constant memory."""

    def __init__(self) -> None:
        self.tiles: dict[tuple[int, int], Tensor] = {}
        self.elements = 0

    def keep(self, index: tuple[int, int], tile: Tensor) -> Tensor:
        if self.elements + tile.numel() <= KEPT_ELEMENTS:
            self.tiles[index] = tile
            self.elements += tile.numel()
        return tile


class Tiles(AugmentedPlan):
    """The scores of a problem by tiles, and half-steps over them; after `at(u, v)` the plan and its passes."""

    _of_potentials = ("_finite",)

    def __init__(self, inputs: Inputs, problem: Problem):
        super().__init__(inputs, problem)
        left, right = problem.outline.window_left, problem.outline.window_right
        self.block = block_size(self.num * self.heads, left + right + 1 if min(left, right) >= 0 else None)
        self.row_blocks = [slice(i, min(i + self.block, self.length)) for i in range(0, self.length, self.block)]
        self.col_blocks = [slice(j, min(j + self.block, self.size)) for j in range(0, self.size, self.block)]
        self._scores, self._plans = _Kept(), _Kept()

    def at(self, u: Tensor, v: Tensor) -> Tiles:
        """The same tiles with potentials, augmented: the plan exp(S + u + v). Kept scores are shared."""
        other = super().at(u, v)
        other._plans = _Kept()
        return other

    # Which tiles

    @cached_property
    def _spans(self) -> list[tuple[int, int, int, int]]:
        """For each row block the columns [lo, hi) some row reaches, and [inner_lo, inner_hi) every row reaches."""
        if self.num * self.heads == 0:
            return [(0, 0, 0, 0)] * len(self.row_blocks)
        intervals = self._intervals()
        if intervals is None:  # visit every tile
            return [(0, self.size, 0, 0 if self.problem.outline.banded else self.size) for _ in self.row_blocks]
        lo, hi = intervals
        spans: list[tuple[int, int, int, int]] = []
        for rows in self.row_blocks:
            low, high = lo[..., rows], hi[..., rows]
            outer = torch.where(low < high, low, self.size).min(), high.max()
            spans.append((int(outer[0]), int(outer[1]), int(low.max()), int(high.min())))
        return spans

    def _intervals(self) -> tuple[Tensor, Tensor] | None:
        """Those of the rows, on the CPU; None where they are data that to read would force a synchronisation."""
        problem = self.problem
        if can_look(problem.support.row_lo):
            return problem.support.row_lo, problem.support.row_hi
        if not (problem.outline.uniform and problem.outline.banded):
            return None
        n, m = (torch.tensor(x, device="cpu") for x in (self.length, self.size))
        rank = torch.arange(self.length, device="cpu")
        return window_ranks(rank, n, m, problem.outline.window_left, problem.outline.window_right)

    def columns(self, i: int) -> range:
        """Indices of the column blocks that row block i touches."""
        lo, hi, _, _ = self._spans[i]
        return range(lo // self.block, -(-hi // self.block)) if lo < hi else range(0)

    def rows(self, j: int) -> list[int]:
        """Indices of the row blocks that touch column block j."""
        return self._rows_of[j]

    @cached_property
    def _rows_of(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.col_blocks]
        for i in range(len(self.row_blocks)):
            for j in self.columns(i):
                found[j].append(i)
        return found

    # Tiles

    def scores(self, i: int, j: int) -> Tensor:
        """S on the tile of row block i and column block j, -inf off the support; not to be written to."""
        if (i, j) in self._scores.tiles:
            return self._scores.tiles[i, j]
        rows, cols = self.row_blocks[i], self.col_blocks[j]
        tile = self._grouped(self.inputs.query, rows, self.problem.solver.scale / self.problem.solver.epsilon)
        tile = self._ungrouped(torch.bmm(tile, self._key(cols).transpose(1, 2)))
        tile = self._masked(tile, rows, cols, interior=self._interior(i, cols))
        return self._scores.keep((i, j), tile)

    def _interior(self, i: int, cols: slice) -> bool:
        _, _, lo, hi = self._spans[i]
        return lo <= cols.start and cols.stop <= hi

    def _masked(self, tile: Tensor, rows: slice, cols: slice, interior: bool) -> Tensor:
        mask = self._mask_tile(rows, cols)
        if mask is not None:
            keep = kept(mask, self.dtype)
            if mask.dtype != torch.bool:
                tile = tile + mask.to(self.dtype).masked_fill(~keep, 0.0)
                dead = self.row_dead[..., rows, None] | self.col_dead[..., None, cols]
                keep = keep & ~dead  # what it holds there, NaN or infinity, is nobody's
            tile = tile.masked_fill(~keep, -torch.inf)
        if self.problem.outline.banded and not interior:
            column = torch.arange(cols.start, cols.stop, device=tile.device)
            lo, hi = (x[:, None, rows, None] for x in (self.problem.support.row_lo, self.problem.support.row_hi))
            tile = tile.masked_fill((column < lo) | (column >= hi), -torch.inf)
        return tile

    def _mask_tile(self, rows: slice, cols: slice) -> Tensor | None:
        mask = self.inputs.mask
        return None if mask is None else mask[(..., *self._mask_slices(mask, rows, cols))]

    @staticmethod
    def _mask_slices(mask: Tensor, rows: slice, cols: slice) -> tuple[slice, slice]:
        whole = slice(None)
        return (whole if mask.shape[-2] == 1 else rows), (whole if mask.shape[-1] == 1 else cols)

    def log_plan(self, i: int, j: int) -> Tensor:
        """log P = S + u + v on the tile, a fresh tensor."""
        rows, cols = self.row_blocks[i], self.col_blocks[j]
        return (self.scores(i, j) + self._u[..., rows, None]).add_(self._v[..., None, cols])

    def supported_log_plan(self, i: int, j: int) -> Tensor:
        """log P, -inf off the support beside potentials that are NaN too."""
        tile = self.log_plan(i, j)
        if self._finite:
            return tile
        dead = self.row_dead[..., self.row_blocks[i], None] | self.col_dead[..., None, self.col_blocks[j]]
        return tile.masked_fill_((self.scores(i, j) == -torch.inf) | dead, -torch.inf)

    @cached_property
    def _finite(self) -> bool:
        """Whether the potentials can be seen to be."""
        return can_look(self.u) and all(bool(x.isfinite().all()) for x in (self.u, self.v))

    def plan(self, i: int, j: int) -> Tensor:
        """P on the tile; not to be written to."""
        if (i, j) in self._plans.tiles:
            return self._plans.tiles[i, j]
        return self._plans.keep((i, j), self.log_plan(i, j).exp_())

    def factor(self, factor: Factor, i: int, j: int) -> Tensor:
        """P * exp(row_i + col_j) on the tile, formed in the log domain."""
        tile = self.log_plan(i, j)
        rows, cols = self.row_blocks[i], self.col_blocks[j]
        return tile.add_(factor.row[..., rows, None]).add_(factor.col[..., None, cols]).exp_()

    def dropped_out(self, tile: Tensor, i: int, j: int) -> Tensor:
        """The tile after dropout: entries kept and scaled by 1 / (1 - p), or zeroed."""
        if self.problem.dropout_seed is None:
            return tile
        return tile * self._keep(tile, i, j) / (1 - self.problem.solver.dropout_p)

    def _keep(self, tile: Tensor, i: int, j: int) -> Tensor:
        """What dropout keeps of a tile, as 0/1."""
        return keep_mask(self.problem, tile, self.row_blocks[i], self.col_blocks[j])

    def weights_cotangent(self, grad: Tensor, i: int, j: int) -> Tensor:
        """D_ij = <grad_i, V_j> on the tile, dropout applied."""
        tile = torch.bmm(self._grouped(grad, self.row_blocks[i]), self._value(self.col_blocks[j]).transpose(1, 2))
        return self.dropped_out(self._ungrouped(tile), i, j)

    def score_cotangent(self, grad: Tensor, field: Field, i: int, j: int) -> Tensor:
        """dS on the tile: P * (D - X Y^T), or with the factors formed one by one where the field has exponents."""
        d = self.weights_cotangent(grad, i, j)
        if field.row_exponents is None:
            x, y = field.row_terms[..., self.row_blocks[i], :], field.col_terms[..., self.col_blocks[j], :]
            return d.sub_(x @ y.transpose(-1, -2)).mul_(self.plan(i, j))
        return self.less_field(d.mul_(self.plan(i, j)), field, i, j)

    def less_field(self, weighted: Tensor, field: Field, i: int, j: int) -> Tensor:
        """dS on the tile from `weighted` = P * D there."""
        rows, cols = self.row_blocks[i], self.col_blocks[j]
        sides = (rows, field.row_terms, field.row_exponents), (cols, field.col_terms, field.col_exponents)
        (x, a), (y, b) = ((terms[..., at, :], None if e is None else e[..., at, :]) for at, terms, e in sides)
        return subtract_field(weighted, self.log_plan(i, j), Field(x, y, a, b))

    # Grouped queries: the heads that share a key head lie side by side, so keys and values are never repeated

    def _grouped(self, x: Tensor, rows: slice, factor: float = 1.0) -> Tensor:
        """`[N, H, L, E]` at `rows` to `[N*Hk, (H/Hk) rows, E]`."""
        block = x[..., rows, :].to(self.dtype)
        block = block if factor == 1.0 else block * factor
        size = (self.heads // self.groups) * (rows.stop - rows.start)
        return block.reshape(self.num * self.groups, size, x.shape[-1])

    def _ungrouped(self, x: Tensor) -> Tensor:
        """`[N*Hk, (H/Hk) rows, s]` to `[N, H, rows, s]`."""
        per_head = x.shape[1] * self.groups // self.heads
        return x.view(self.num, self.heads, per_head, x.shape[-1])

    def _key(self, cols: slice) -> Tensor:
        return self.inputs.key[..., cols, :].to(self.dtype).flatten(0, 1)

    def _value(self, cols: slice) -> Tensor:
        assert self.inputs.value is not None
        return self.inputs.value[..., cols, :].to(self.dtype).flatten(0, 1)

    def _merged(self, tile: Tensor) -> Tensor:
        """`[N, H, rows, s]` to `[N*Hk, (H/Hk) rows, s]`."""
        size = (self.heads // self.groups) * tile.shape[-2]
        return tile.reshape(self.num * self.groups, size, tile.shape[-1])

    def times_key(self, tile: Tensor, cols: slice) -> Tensor:
        """A tile times K, `[N, H, rows, E]`."""
        return self._ungrouped(torch.bmm(self._merged(tile), self._key(cols)))

    def times_value(self, tile: Tensor, cols: slice) -> Tensor:
        """A tile times V, `[N, H, rows, Ev]`."""
        return self._ungrouped(torch.bmm(self._merged(tile), self._value(cols)))

    def add_to_mask(self, total: Tensor, tile: Tensor, rows: slice, cols: slice) -> None:
        """Add a tile to a tensor of the mask's shape, summing over what the mask broadcast."""
        part = total[(..., *self._mask_slices(total, rows, cols))]
        part += tile.sum_to_size(part.shape)

    # Passes over real pairs

    def real_column_lse(self, u: Tensor) -> Tensor:
        lse = u.new_full((self.num, self.heads, self.size), -torch.inf)
        for j, cols in enumerate(self.col_blocks):
            for i in self.rows(j):
                tile = self.scores(i, j) + u[..., self.row_blocks[i], None]
                lse[..., cols] = torch.logaddexp(lse[..., cols], logsumexp_(tile, -2))
        return lse

    def real_row_lse(self, v: Tensor) -> Tensor:
        lse = v.new_full((self.num, self.heads, self.length), -torch.inf)
        for i, rows in enumerate(self.row_blocks):
            for j in self.columns(i):
                tile = self.scores(i, j) + v[..., None, self.col_blocks[j]]
                lse[..., rows] = torch.logaddexp(lse[..., rows], logsumexp_(tile, -1))
        return lse

    def real_row_pass(self, y: Tensor, factor: Factor | None = None) -> Tensor:
        out = y.new_zeros(self.num, self.heads, self.length)
        for i, rows in enumerate(self.row_blocks):
            for j in self.columns(i):
                tile = self.plan(i, j) if factor is None else self.factor(factor, i, j)
                out[..., rows] += (tile @ y[..., self.col_blocks[j], None])[..., 0]
        return out

    def real_column_pass(self, x: Tensor, factor: Factor | None = None) -> Tensor:
        out = x.new_zeros(self.num, self.heads, self.size)
        for i, rows in enumerate(self.row_blocks):
            for j in self.columns(i):
                tile = self.plan(i, j) if factor is None else self.factor(factor, i, j)
                out[..., self.col_blocks[j]] += (x[..., None, rows] @ tile)[..., 0, :]
        return out

    def value_pass(self) -> tuple[Tensor, Tensor]:
        assert self.inputs.value is not None
        out = self._u.new_zeros(self.num, self.heads, self.length, self.inputs.value.shape[-1])
        sums = self._u.new_zeros(self.num, self.heads, self.length)
        for i, rows in enumerate(self.row_blocks):
            for j in self.columns(i):
                tile = self.plan(i, j)
                sums[..., rows] += tile.sum(-1)
                out[..., rows, :] += self.times_value(self.dropped_out(tile, i, j), self.col_blocks[j])
        return out, sums


def logsumexp_(x: Tensor, dim: int) -> Tensor:
    """log sum exp over `dim`, overwriting x; -inf on a line of -inf. A third of torch.logsumexp's time on a CPU."""
    top = x.amax(dim, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    return x.sub_(top).exp_().sum(dim).log_() + top.squeeze(dim)
