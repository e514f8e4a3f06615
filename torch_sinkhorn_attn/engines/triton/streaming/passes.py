"""Passes over the plan P = exp2(S + U_i + V_j): weighted sums of its lines, its product with values, the plan itself.

Potentials come as live vectors (`tiles`), with whatever a factor of the staircase adds to them. One launch a pass, and
a pass with columns outside is the same kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torch_sinkhorn_attn.engines.triton.tiles import (
    LN2,
    clamped,
    constant,
    edge_tile,
    edge_tiles,
    feature_pointers,
    keep_tile,
    load_features,
    number,
    own_block,
    own_features,
    products,
    scores,
    span,
)


@triton.jit
def weighted_pass(outer, inner, mask, scale, heads, live, own_live, weights, found, stride, S: tl.constexpr):
    """sum_j w_j exp2(S_ij + U_i + V_j) for each outer line i, 0 on dead ones.

    live, weights: `[N*H, inner.width]`, V and w. own_live: `[N*H, outer.width]`, U. found: `[N*H, stride]`.
    """
    OUTER: tl.constexpr = S.outer
    INNER: tl.constexpr = S.inner
    flat, first = own_block(outer, S)
    n, h = flat // heads, flat % heads
    index = first + tl.arange(0, OUTER)
    at = clamped(index, outer)
    scale2 = number(scale, S)
    outer_pointers = feature_pointers(outer, n, h, at, S.chunk)
    own = own_features(outer_pointers, S)
    potential = tl.load(own_live + flat * outer.width + index)
    alive = potential != float("-inf")
    start, stop, safe_start, safe_stop = span(outer, inner, n, at, alive, S)
    edges = edge_tiles(start, stop, safe_start, safe_stop, S)
    line = flat * inner.width + tl.arange(0, INNER)
    offset = tl.arange(0, INNER)

    sums = tl.zeros([OUTER, INNER], dtype=S.acc)
    pointers = feature_pointers(inner, n, h, safe_start + offset, S.chunk)
    for j in range(safe_start, safe_stop, INNER):
        other = tl.load(live + line + j)
        dots = products(own, outer_pointers, pointers, S)
        x = scores(dots, scale2, outer, inner, mask, n, h, at, j, other, False, S)
        x = tl.exp2((x + other[None, :]) + potential[:, None])
        sums += x * tl.load(weights + line + j)[None, :]
        pointers += tl.full([], INNER, tl.int64) * inner.stride_l
    for t in tl.range(0, edges, num_stages=1):
        j = edge_tile(t, start, safe_start, safe_stop, S)
        other = tl.load(live + line + j)
        pointers = feature_pointers(inner, n, h, clamped(j + offset, inner), S.chunk)
        dots = products(own, outer_pointers, pointers, S)
        x = scores(dots, scale2, outer, inner, mask, n, h, at, j, other, True, S)
        x = tl.exp2((x + other[None, :]) + potential[:, None])
        sums += x * tl.load(weights + line + j)[None, :]
    total = tl.where(alive, tl.sum(sums, 1), 0.0)
    tl.store(found + flat * stride + index, total, mask=index < outer.size)


@triton.jit
def value_pass(
    outer,
    inner,
    mask,
    scale,
    heads,
    values,
    live,
    own_live,
    seed,
    threshold,
    found,
    sums_found,
    FEATURES: tl.constexpr,
    CHUNK: tl.constexpr,
    DROPOUT: tl.constexpr,
    S: tl.constexpr,
):
    """P V with dropout (not yet divided by 1 - p), and the sums of P without it; rows are outside.

    values: the value's `Lines`, of `FEATURES` features, `CHUNK` of them in each program of the second axis.
    found: `[N*H, L, FEATURES]`; sums_found: `[N*H, L]`.
    """
    OUTER: tl.constexpr = S.outer
    INNER: tl.constexpr = S.inner
    flat, first = own_block(outer, S)
    n, h = flat // heads, flat % heads
    index = first + tl.arange(0, OUTER)
    at = clamped(index, outer)
    scale2 = number(scale, S)
    outer_pointers = feature_pointers(outer, n, h, at, S.chunk)
    own = own_features(outer_pointers, S)
    potential = tl.load(own_live + flat * outer.width + index)
    alive = potential != float("-inf")
    start, stop, safe_start, safe_stop = span(outer, inner, n, at, alive, S)
    edges = edge_tiles(start, stop, safe_start, safe_stop, S)
    line = live + flat * inner.width
    offset = tl.arange(0, INNER)
    feature = tl.program_id(1) * CHUNK

    sums = tl.zeros([OUTER], dtype=S.acc)
    mass = tl.zeros([OUTER, CHUNK], dtype=S.acc)
    pointers = feature_pointers(inner, n, h, safe_start + offset, S.chunk)
    value_pointers = feature_pointers(values, n, h, safe_start + offset, CHUNK)
    for j in range(safe_start, safe_stop, INNER):
        other = tl.load(line + j + offset)
        dots = products(own, outer_pointers, pointers, S)
        x = scores(dots, scale2, outer, inner, mask, n, h, at, j, other, False, S)
        x = tl.exp2((x + other[None, :]) + potential[:, None])
        sums += tl.sum(x, 1)
        if DROPOUT:
            x = tl.where(keep_tile(seed, flat, at[:, None], (j + offset)[None, :], threshold), x, 0.0)
        value = load_features(value_pointers, feature, FEATURES, CHUNK, False).to(S.product)
        mass += tl.dot(x.to(S.product), value, input_precision=S.plan_precision, out_dtype=S.acc)
        pointers += tl.full([], INNER, tl.int64) * inner.stride_l
        value_pointers += tl.full([], INNER, tl.int64) * values.stride_l
    for t in tl.range(0, edges, num_stages=1):
        j = edge_tile(t, start, safe_start, safe_stop, S)
        other = tl.load(line + j + offset)
        inner_at = clamped(j + offset, inner)
        pointers = feature_pointers(inner, n, h, inner_at, S.chunk)
        dots = products(own, outer_pointers, pointers, S)
        x = scores(dots, scale2, outer, inner, mask, n, h, at, j, other, True, S)
        x = tl.exp2((x + other[None, :]) + potential[:, None])
        sums += tl.sum(x, 1)
        if DROPOUT:
            x = tl.where(keep_tile(seed, flat, at[:, None], (j + offset)[None, :], threshold), x, 0.0)
        value_pointers = feature_pointers(values, n, h, inner_at, CHUNK)
        value = load_features(value_pointers, feature, FEATURES, CHUNK, False).to(S.product)
        value = tl.where((j + offset < inner.size)[:, None], value, 0.0)  # the last line is there again, beyond itself
        mass += tl.dot(x.to(S.product), value, input_precision=S.plan_precision, out_dtype=S.acc)
    inside = index < outer.size
    offset = flat * outer.size + index
    if tl.program_id(1) == 0:
        tl.store(sums_found + offset, tl.where(alive, sums, 0.0), mask=inside)
    place = feature + tl.arange(0, CHUNK)
    tl.store(
        found + offset[:, None] * FEATURES + place[None, :],
        tl.where(alive[:, None], mass, 0.0),
        mask=inside[:, None] & (place < FEATURES)[None, :],
    )


@triton.jit
def write_plan(
    outer, inner, mask, scale, heads, live, own_live, found, stride_head, stride_row, LOG: tl.constexpr, S: tl.constexpr
):
    """The plan, or with `LOG` its natural logarithm, into `found`, whose last stride is 1; rows are outside."""
    OUTER: tl.constexpr = S.outer
    INNER: tl.constexpr = S.inner
    flat, first = own_block(outer, S)
    n, h = flat // heads, flat % heads
    index = first + tl.arange(0, OUTER)
    at = clamped(index, outer)
    scale2 = number(scale, S)
    outer_pointers = feature_pointers(outer, n, h, at, S.chunk)
    own = own_features(outer_pointers, S)
    potential = tl.load(own_live + flat * outer.width + index)
    offset = tl.arange(0, INNER)
    place = found + flat * stride_head + index.to(tl.int64)[:, None] * stride_row
    for j in range(0, inner.size, INNER):
        other = tl.load(live + flat * inner.width + j + offset)
        pointers = feature_pointers(inner, n, h, clamped(j + offset, inner), S.chunk)
        dots = products(own, outer_pointers, pointers, S)
        x = scores(dots, scale2, outer, inner, mask, n, h, at, j, other, True, S)
        x = tl.where((potential == float("-inf"))[:, None], float("-inf"), x + other[None, :] + potential[:, None])
        if LOG:
            x = x * constant(LN2, S)
        else:
            x = tl.exp2(x)
        inside = (index < outer.size)[:, None] & (j + offset < inner.size)[None, :]
        tl.store(place + (j + offset)[None, :], x, mask=inside)
