"""Partners of all tokens from one pass over the tiles of a plan."""

from __future__ import annotations

import torch

from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
from torch_sinkhorn_attn.method.partners import Best, leading, merged, nobody
from torch_sinkhorn_attn.problem.problem import Partners


def partners(tiles: Tiles, k: int) -> Partners:
    """The k largest entries of each row and column of the plan, in the memory of one tile."""
    heads = tiles.num, tiles.heads
    rows, cols = (nobody(tiles.u, *heads, n, k) for n in (tiles.length, tiles.size))
    for i, at in enumerate(tiles.row_blocks):
        for j in tiles.columns(i):
            tile = tiles.supported_log_plan(i, j).exp_()
            _take(rows, at, leading(tile, k), tiles.col_blocks[j].start)
            _take(cols, tiles.col_blocks[j], leading(tile, k, dim=-2), at.start)
    to_bin, from_bin, _ = tiles.dustbin_plan
    return Partners(rows.place, rows.mass, cols.place, cols.mass, to_bin, from_bin)


def _take(best: Best, at: slice, found: Best, first: int) -> None:
    """Put what is found in a tile, whose lines start at index `first`, among the best of its lines."""
    found = Best(found.mass, torch.where(found.place < 0, -1, found.place + first))
    mass, index = merged(Best(best.mass[..., at, :], best.place[..., at, :]), found)
    best.mass[..., at, :], best.place[..., at, :] = mass, index
