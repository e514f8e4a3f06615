"""One kernel for the passes of the adjoint in which cotangents ride: with columns outside the factor's transpose times
a vector, dV and dK, with rows outside the factor times a vector and dQ. Nothing is added atomically: a program has its
own outer lines, of all query heads that read one key head where columns are outside, and its own block of features.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from torch_sinkhorn_attn.engines.triton.launch import chip_of, launch
from torch_sinkhorn_attn.engines.triton.layout import Layout, Lines, Number, Static
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_tiles import (
    UNROLLED,
    Dense,
    Dropout,
    Riders,
    Vectors,
    dropped_out,
    factor_tile,
    field_features,
    given_cotangent,
    kept_entries,
    products_and_chunk,
    score_cotangent,
)
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_vectors import Prepared
from torch_sinkhorn_attn.engines.triton.streaming.blocks import Blocks, adjoint_blocks
from torch_sinkhorn_attn.engines.triton.tiles import (
    clamped,
    edge_tile,
    edge_tiles,
    feature_pointers,
    number,
    own_features,
    scores,
    span,
)


class Results(NamedTuple):
    """What a pass writes; any tensor stands for what is not wanted."""

    image: Tensor  # [N, H, lines]
    sums: Tensor  # [chunks of V's features, N, H, lines]: parts of the column sums of P*D
    value: Tensor  # dV [N, Hk, S, Ev]
    grad: Tensor  # dK [N, Hk, S, E] or dQ [N, H, L, E], times scale / epsilon
    grad_scale: Number
    rho: Number  # of the deferred factor


@triton.jit
def pass_tile(
    first, sums, image, value, grad, later, own, own_value, own_field, outer, inner, outer_values, inner_values, mask,
    dense, scale, v, dropout, n, h, flat, own_at, outer_place, live, key_start, value_start,
    TEST: tl.constexpr, S: tl.constexpr, SV: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """One tile's part of all sums."""
    inner_place = flat * inner.width + first + tl.arange(0, S.inner)
    inner_at = clamped(first + tl.arange(0, S.inner), inner)
    inner_live = tl.load(v.inner_live + inner_place)
    outer_pointers = feature_pointers(outer, n, h, own_at, S.chunk)
    inner_pointers = feature_pointers(inner, n, h, inner_at, S.chunk)
    dots, features = products_and_chunk(own, outer_pointers, inner_pointers, key_start, S)
    x = scores(dots, scale, outer, inner, mask, n, h, own_at, first, inner_live, TEST, S)
    log_weights = x + live[:, None] + inner_live[None, :]
    w = tl.exp2(log_weights)
    if A.image:
        weight = tl.load(v.weight + inner_place)
        if A.plain or A.scaled:
            image += tl.sum(w * weight[None, :], 1)
        else:
            factor = factor_tile(
                log_weights, tl.load(v.factor_outer + outer_place), tl.load(v.factor_inner + inner_place)
            )
            image += tl.sum(factor * weight[None, :], 1)
    keep = w > 0  # anything, without dropout
    if A.dropout:
        keep = kept_entries(dropout, flat, own_at, inner_at, S)
    if A.dense == "":
        if A.values or A.field:
            value_pointers = feature_pointers(inner_values, n, h, inner_at, SV.chunk)
            own_pointers = feature_pointers(outer_values, n, h, own_at, SV.chunk)
            d, values = products_and_chunk(own_value, own_pointers, value_pointers, value_start, SV)
            d = dropped_out(d, keep, dropout, S, A)
            if A.values:
                weights = dropped_out(w, keep, dropout, S, A).to(values.dtype)
                value += tl.dot(weights, values, input_precision=S.precision, out_dtype=S.acc)
    else:
        d = given_cotangent(dense, n, h, own_at, inner_at, S)
        if A.dense == "log":
            d = tl.where(log_weights == float("-inf"), 0.0, d)
    if A.sums:
        if A.dense == "log":
            sums += tl.sum(d, 1)
        else:
            sums += tl.sum(w * d, 1)
    if A.field:
        if A.split > 0:
            d = tl.dot(own_field, tl.trans(field_features(v.field_inner, inner_place, A)), d, out_dtype=S.acc)
        ds = score_cotangent(d, w, log_weights, v, outer_place, outer.width, inner_place, inner.width, A)
        grad += tl.dot(ds.to(features.dtype), features, input_precision=S.precision, out_dtype=S.acc)
    if A.deferred:
        deferred_outer = tl.load(v.deferred_outer + outer_place)
        deferred_inner = tl.load(v.deferred_inner + inner_place)
        if A.scaled:  # given as exponentials
            factor = w * deferred_inner[None, :]
            if A.round_inside:
                factor *= deferred_outer[:, None]
        else:
            factor = factor_tile(log_weights, deferred_outer, deferred_inner)
        later += tl.dot(factor.to(features.dtype), features, input_precision=S.precision, out_dtype=S.acc)
    return sums, image, value, grad, later


@triton.jit
def adjoint_pass(
    outer, inner, outer_values, inner_values, mask, dense, scale, v, dropout, results, flags, heads,
    S: tl.constexpr, SV: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of outer lines over all heads (key heads where columns are outside); blocks of features."""
    OUTER: tl.constexpr = S.outer
    CHUNK: tl.constexpr = S.chunk
    VALUES: tl.constexpr = SV.chunk
    blocks = tl.cdiv(outer.size, OUTER)
    program = tl.program_id(0)
    group = (program // blocks).to(tl.int64)
    share = outer.share if S.column else 1
    groups = heads // share
    n, first_head = group // groups, group % groups * share
    if A.flagged:
        key_head = group if S.column else n * (heads // inner.share) + first_head // inner.share
        if (tl.load(flags + key_head) != 0) != A.scaled:
            return
    at = program % blocks * S.outer + tl.arange(0, S.outer)
    own_at, exists = clamped(at, outer), at < outer.size
    block = tl.program_id(1)
    key_block = tl.minimum(block, (S.features - 1) // S.chunk)
    value_block = tl.minimum(block, (SV.features - 1) // SV.chunk)
    key_start, value_start = key_block * S.chunk, value_block * SV.chunk
    own = own_features(feature_pointers(outer, n, first_head, own_at, S.chunk), S)
    own_value = own
    if (A.values or A.field) and A.dense == "":
        own_value = own_features(feature_pointers(outer_values, n, first_head, own_at, SV.chunk), SV)
    factor = number(scale, S)
    none = tl.zeros([1, 1], dtype=S.acc)
    grad = tl.zeros([OUTER, CHUNK], dtype=S.acc) if A.field else none
    for g in range(share):
        h = first_head + g
        flat = n * heads + h
        outer_place = flat * outer.width + at
        live = tl.load(v.outer_live + outer_place)
        start, stop, safe_start, safe_stop = span(outer, inner, n, own_at, live != float("-inf"), S)
        sums, image = tl.zeros([OUTER], dtype=S.acc), tl.zeros([OUTER], dtype=S.acc)
        value = tl.zeros([OUTER, VALUES], dtype=S.acc) if A.values else none
        later = tl.zeros([OUTER, CHUNK], dtype=S.acc) if A.deferred else none
        own_field = none
        if A.field and A.split > 0:
            own_field = field_features(v.field_outer, outer_place, A)
        for i in range(safe_start, safe_stop, S.inner):
            sums, image, value, grad, later = pass_tile(
                i, sums, image, value, grad, later, own, own_value, own_field, outer, inner, outer_values, inner_values,
                mask, dense, factor, v, dropout, n, h, flat, own_at, outer_place, live, key_start, value_start,
                False, S, SV, A,
            )  # fmt: skip
        for t in range(edge_tiles(start, stop, safe_start, safe_stop, S)):
            i = edge_tile(t, start, safe_start, safe_stop, S)
            sums, image, value, grad, later = pass_tile(
                i, sums, image, value, grad, later, own, own_value, own_field, outer, inner, outer_values, inner_values,
                mask, dense, factor, v, dropout, n, h, flat, own_at, outer_place, live, key_start, value_start,
                True, S, SV, A,
            )  # fmt: skip
        line = flat * outer.size + at
        if A.image:
            if A.scaled and not A.plain:
                image *= tl.exp2(tl.load(v.factor_outer + outer_place))
            tl.store(results.image + line, image, mask=exists & (block == 0))
        if A.values:
            value_at = value_start + tl.arange(0, SV.chunk)
            if not A.sums:
                own_chunk = own_value
                if SV.features > SV.chunk:
                    own_chunk = tl.load(
                        feature_pointers(outer_values, n, h, own_at, SV.chunk) + value_start,
                        mask=(value_at < SV.features)[None, :],
                        other=0.0,
                    )
                sums = tl.sum(value * own_chunk.to(S.acc), 1)
            place = results.value + ((group * outer.size + at) * SV.features)[:, None] + value_at[None, :]
            own_part = exists[:, None] & (value_at < SV.features)[None, :] & (block == value_block)
            if g > 0:
                value += tl.load(place, mask=own_part, other=0.0)
            tl.store(place, value, mask=own_part)
            tl.debug_barrier()  # the next head reads what this one wrote
        if A.sums or A.values:
            part = 0 if A.sums else value_block
            total = (tl.num_programs(0) // blocks).to(tl.int64) * share * outer.size
            tl.store(results.sums + part * total + line, sums, mask=exists & (block == part))
        if A.deferred:  # its weight, of which the image is all that was unknown
            weight = tl.load(v.beside + outer_place) - image
            if A.sums or A.values:
                weight += sums
            weight *= number(results.rho, S)
            if A.scaled and not A.round_inside:
                weight *= tl.load(v.deferred_outer + outer_place)
            grad -= weight[:, None] * later
    if A.field:
        key_at = key_start + tl.arange(0, S.chunk)
        place = results.grad + ((group * outer.size + at) * S.features)[:, None] + key_at[None, :]
        own_part = exists[:, None] & (key_at < S.features)[None, :] & (block == key_block)
        tl.store(place, grad * number(results.grad_scale, S), mask=own_part)


class Cotangents(NamedTuple):
    """Where D comes from."""

    outputs: Lines  # dO
    values: Lines  # V
    static: Static  # of their products
    dense: Dense  # or D itself, columns outside
    dropout: Dropout

    @property
    def chunks(self) -> int:
        """Blocks of V's features."""
        return max(1, -(-self.static.features // self.static.chunk))

    def sides(self, column: bool) -> tuple[Lines, Lines, Dense]:
        """Features of the outer and the inner lines, and D from there."""
        if column:
            return self.values, self.outputs, self.dense
        dense = self.dense
        turned = dense._replace(stride_outer=dense.stride_inner, stride_inner=dense.stride_outer)
        return self.outputs, self.values, turned


def run(
    layout: Layout, cotangents: Cotangents, prepared: Prepared, results: Results, riders: Riders, column: bool
) -> None:
    """Launch a pass; where data tell which heads are scaled, both kernels, each for its own heads."""
    blocks = blocks_of(layout, cotangents, column, riders.deferred)
    direction = layout.direction(column, blocks.outer, blocks.inner)
    outer, static = direction.outer, direction.static
    values = cotangents.static._replace(column=column, outer=blocks.outer, inner=blocks.inner)
    outer_values, inner_values, dense = cotangents.sides(column)
    heads = layout.heads // outer.share if column else layout.heads
    chunks = max(1, -(-static.features // static.chunk), cotangents.chunks)
    grid = (-(-outer.size // static.outer) * layout.num * heads, chunks)
    for vectors, some in both(prepared, riders):
        launch(
            adjoint_pass, grid, outer, direction.inner, outer_values, inner_values, direction.mask, dense,
            direction.scale, vectors, cotangents.dropout, results, prepared.flags, layout.heads,
            S=static, SV=values, A=some, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip


def blocks_of(layout: Layout, cotangents: Cotangents, column: bool, deferred: bool) -> Blocks:
    """How a pass is cut."""
    side, features = layout.cols if column else layout.rows, max(layout.static.features, cotangents.static.features)
    shared = chip_of(side.data.device).shared
    return adjoint_blocks(side.size, features, side.data.element_size(), deferred, shared)


def both(prepared: Prepared, riders: Riders) -> list[tuple[Vectors, Riders]]:
    """The launches of a pass: scaled and, where data decide, entry by entry."""
    terms = prepared.scaled.terms
    riders = riders._replace(terms=terms if terms <= UNROLLED else 0)
    scaled = riders._replace(split=prepared.split, round_inside=prepared.round_inside)
    if prepared.entrywise is None:
        return [(prepared.scaled, scaled)]
    entrywise = riders._replace(flagged=True, scaled=False)
    return [(prepared.scaled, scaled._replace(flagged=True)), (prepared.entrywise, entrywise)]
