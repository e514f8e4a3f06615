"""The gradient of a float mask: dS summed over what the mask broadcast, over its own entries' tiles.

A program has a tile of the mask (one line or one entry where it broadcasts) and walks over what shares it in a fixed
order. Where a mask has few tiles, several programs share one, and their parts are added afterwards, in order: nothing
is added atomically, and no memory is taken but the gradient's and a constant number of tiles.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_sinkhorn_attn.engines.triton.launch import launch
from torch_sinkhorn_attn.engines.triton.layout import Layout
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_pass import Cotangents, blocks_of, both
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_tiles import (
    Riders,
    dropped_out,
    field_features,
    given_cotangent,
    kept_entries,
    score_cotangent,
)
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_vectors import Prepared
from torch_sinkhorn_attn.engines.triton.tiles import (
    clamped,
    feature_pointers,
    number,
    own_features,
    products,
    scores,
    span,
)

PROGRAMS = 1024  # about so many share the work


@triton.jit
def mask_tile(
    total, n, h, row, first, rows, cols, outputs, values, mask, dense, scale, v, dropout, flags, heads,
    S: tl.constexpr, SV: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """dS of rows from `row` on and columns from `first` on added."""
    flat = n * heads + h
    mine = True
    if A.flagged:
        mine = (tl.load(flags + n * (heads // cols.share) + h // cols.share) != 0) == A.scaled
    if mine:
        at = row + tl.arange(0, S.outer)
        own_at, inner_at = clamped(at, rows), clamped(first + tl.arange(0, S.inner), cols)
        outer_place = flat * rows.width + at
        live = tl.load(v.outer_live + outer_place)
        start, stop, _, _ = span(rows, cols, n, own_at, live != float("-inf"), S)
        if (first < stop) & (first + S.inner > start):
            inner_place = flat * cols.width + first + tl.arange(0, S.inner)
            inner_live = tl.load(v.inner_live + inner_place)
            own_pointers = feature_pointers(rows, n, h, own_at, S.chunk)
            own = own_features(own_pointers, S)
            dots = products(own, own_pointers, feature_pointers(cols, n, h, inner_at, S.chunk), S)
            x = scores(dots, scale, rows, cols, mask, n, h, own_at, first, inner_live, True, S)
            log_weights = x + live[:, None] + inner_live[None, :]
            w = tl.exp2(log_weights)
            if A.dense == "":
                own_pointers = feature_pointers(outputs, n, h, own_at, SV.chunk)
                inner_pointers = feature_pointers(values, n, h, inner_at, SV.chunk)
                d = products(own_features(own_pointers, SV), own_pointers, inner_pointers, SV)
                if A.dropout:
                    d = dropped_out(d, kept_entries(dropout, flat, own_at, inner_at, S), dropout, S, A)
            else:
                d = given_cotangent(dense, n, h, own_at, inner_at, S)
                if A.dense == "log":
                    d = tl.where(log_weights == float("-inf"), 0.0, d)
            if A.split > 0:
                own_field = field_features(v.field_outer, outer_place, A)
                d = tl.dot(own_field, tl.trans(field_features(v.field_inner, inner_place, A)), d, out_dtype=S.acc)
            total += score_cotangent(d, w, log_weights, v, outer_place, rows.width, inner_place, cols.width, A)
    return total


@triton.jit
def mask_gradient(
    rows, cols, outputs, values, mask, dense, scale, v, dropout, flags, found, num, heads,
    mask_num, mask_heads, mask_rows, mask_cols, each, ADD: tl.constexpr,
    S: tl.constexpr, SV: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of the mask, over its batch elements and heads; parts of what shares one, of `each` tiles. `ADD`: to
    what `found` `[parts, *mask]` holds."""
    OUTER: tl.constexpr = S.outer
    INNER: tl.constexpr = S.inner
    row_blocks, col_blocks = tl.cdiv(mask_rows, OUTER), tl.cdiv(mask_cols, INNER)
    program, part = tl.program_id(0), tl.program_id(1)
    head = (program // (row_blocks * col_blocks)).to(tl.int64)
    rest = program % (row_blocks * col_blocks)
    own_row, own_col = rest // col_blocks * OUTER, rest % col_blocks * INNER
    own_n, own_h = head // mask_heads, head % mask_heads
    shared_nums, shared_heads = tl.where(mask_num == 1, num, 1), tl.where(mask_heads == 1, heads, 1)
    shared_rows = tl.where(mask_rows == 1, tl.cdiv(rows.size, OUTER), 1)
    shared_cols = tl.where(mask_cols == 1, tl.cdiv(cols.size, INNER), 1)
    factor = number(scale, S)
    total = tl.zeros([OUTER, INNER], dtype=S.acc)
    last = shared_nums * shared_heads * shared_rows * shared_cols
    for t in range(part * each, tl.minimum((part + 1) * each, last)):
        col, line = own_col + t % shared_cols * INNER, t // shared_cols
        row, other = own_row + line % shared_rows * OUTER, line // shared_rows
        n, h = own_n + other // shared_heads, own_h + other % shared_heads
        total = mask_tile(
            total, n, h, row, col, rows, cols, outputs, values, mask, dense, factor, v, dropout, flags, heads, S, SV, A
        )
    row_at, col_at = own_row + tl.arange(0, OUTER), own_col + tl.arange(0, INNER)
    heads_of_part = tl.num_programs(0) // (row_blocks * col_blocks)
    place = found + (part.to(tl.int64) * heads_of_part + head) * mask_rows * mask_cols
    if (mask_rows == 1) & (mask_cols == 1):
        store(place, tl.sum(total), True, ADD)
    elif mask_rows == 1:
        store(place + col_at, tl.sum(total, 0), col_at < mask_cols, ADD)
    elif mask_cols == 1:
        store(place + row_at, tl.sum(total, 1), row_at < mask_rows, ADD)
    else:
        inside = (row_at < mask_rows)[:, None] & (col_at < mask_cols)[None, :]
        store(place + row_at.to(tl.int64)[:, None] * mask_cols + col_at[None, :], total, inside, ADD)


@triton.jit
def store(place, x, inside, ADD: tl.constexpr):
    if ADD:
        x += tl.load(place, mask=inside, other=0.0)
    tl.store(place, x, mask=inside)


def run(layout: Layout, cotangents: Cotangents, prepared: Prepared, riders: Riders, mask: Tensor) -> Tensor:
    """The gradient `[N', H', L', S']` of the mask, in the dtype of the sums. Where data tell which heads are scaled,
    one launch for either way: each adds its own heads."""
    blocks = blocks_of(layout, cotangents, False, True)
    direction = layout.direction(False, blocks.outer, blocks.inner)
    values_static = cotangents.static._replace(column=False, outer=blocks.outer, inner=blocks.inner)
    outputs, values, dense = cotangents.sides(False)
    num, heads, rows, cols = mask.shape
    tiles = num * heads * -(-rows // blocks.outer) * -(-cols // blocks.inner)
    walk = -(-layout.rows.size // blocks.outer), -(-layout.cols.size // blocks.inner)
    shared = [x for x, size in zip((layout.num, layout.heads, *walk), mask.shape) if size == 1]
    walked = math.prod(shared)
    each = max(1, -(-walked * tiles // PROGRAMS))
    parts = max(1, -(-walked // each))
    found = torch.zeros((parts, *mask.shape), dtype=layout.dtype, device=mask.device)
    for i, (vectors, some) in enumerate(both(prepared, riders)):
        launch(
            mask_gradient, (tiles, parts), direction.outer, direction.inner, outputs, values, direction.mask, dense,
            direction.scale, vectors, cotangents.dropout, prepared.flags, found, layout.num, layout.heads,
            num, heads, rows, cols, each,
            ADD=i > 0, S=direction.static, SV=values_static, A=some, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return found[0] if parts == 1 else found.sum(0)
