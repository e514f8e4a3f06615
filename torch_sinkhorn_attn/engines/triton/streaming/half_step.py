"""A half-step in one launch: for each outer line the log-sum-exp of its scores and the inner potentials, and from it
the new potential.

    u_i = rho (log a_i - LSE_j(S_ij + v_j))

With potentials from the step before S + u + v is a plan, or nearly one, so its exponentials need no running maximum:
the sum is taken of exp2(S + v + c), c one number for the block of outer lines, the middle of its last potentials. Where
a sum so found is not safely inside the range of float32 (scores of 1e4, a first iteration, NaN) the program takes the
block again by the maximum. That is decided on the device, and no other block waits for it.
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
    number,
    own_block,
    own_features,
    products,
    scores,
    span,
)

SMALLEST_SUM = tl.constexpr(2.0**-60)  # of a block summed with a guess for its maximum
LARGEST_SUM = tl.constexpr(2.0**100)


@triton.jit
def half_step(
    outer,
    inner,
    mask,
    scale,
    heads,
    live,
    own_live,
    log_mass,
    found,
    rho,
    omega,
    stride,
    FINISH: tl.constexpr,
    RELAX: tl.constexpr,
    S: tl.constexpr,
):
    """Args:

    live: `[N*H, inner.width]` the inner potentials. own_live: `[N*H, outer.width]` the outer ones of the step before;
        they are overwritten by the new ones with `FINISH`.
    log_mass: `[N*H, outer.width]` to base 2, -inf on dead lines. found: `[N*H, stride]`, the new potential in natural
        units, 0 on dead lines and on those without support; or, without `FINISH`, the log-sum-exp.
    RELAX: over-relax from the old potential by omega.
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
    old = tl.load(own_live + flat * outer.width + index)
    alive = old != float("-inf")
    start, stop, safe_start, safe_stop = span(outer, inner, n, at, alive, S)
    edges = edge_tiles(start, stop, safe_start, safe_stop, S)
    line = live + flat * inner.width
    offset = tl.arange(0, INNER)

    high = tl.max(tl.where(alive, old, float("-inf")), 0)
    low = tl.min(tl.where(alive, old, float("inf")), 0)
    shift = tl.where(high >= low, 0.5 * (high + low), 0.0)
    sums = tl.zeros([OUTER, INNER], dtype=S.acc)
    pointers = feature_pointers(inner, n, h, safe_start + offset, S.chunk)
    for j in range(safe_start, safe_stop, INNER):
        potential = tl.load(line + j + offset)
        dots = products(own, outer_pointers, pointers, S)
        x = scores(dots, scale2, outer, inner, mask, n, h, at, j, potential, False, S)
        sums += tl.exp2(x + (potential + shift)[None, :])
        pointers += tl.full([], INNER, tl.int64) * inner.stride_l
    for t in tl.range(0, edges, num_stages=1):
        j = edge_tile(t, start, safe_start, safe_stop, S)
        potential = tl.load(line + j + offset)
        pointers = feature_pointers(inner, n, h, clamped(j + offset, inner), S.chunk)
        dots = products(own, outer_pointers, pointers, S)
        x = scores(dots, scale2, outer, inner, mask, n, h, at, j, potential, True, S)
        sums += tl.exp2(x + (potential + shift)[None, :])
    total = tl.sum(sums, 1)
    top = tl.zeros([OUTER], dtype=S.acc) - shift

    safe = (total > SMALLEST_SUM) & (total < LARGEST_SUM)
    if tl.max(tl.where(safe | (alive == 0), 0, 1), 0) > 0:
        top = tl.full([OUTER], float("-inf"), dtype=S.acc)
        for j in tl.range(start, stop, INNER, num_stages=1):
            potential = tl.load(line + j + offset)
            pointers = feature_pointers(inner, n, h, clamped(j + offset, inner), S.chunk)
            dots = products(own, outer_pointers, pointers, S)
            x = scores(dots, scale2, outer, inner, mask, n, h, at, j, potential, True, S) + potential[None, :]
            top = tl.maximum(top, tl.max(x, 1))
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros([OUTER], dtype=S.acc)
        for j in tl.range(start, stop, INNER, num_stages=1):
            potential = tl.load(line + j + offset)
            pointers = feature_pointers(inner, n, h, clamped(j + offset, inner), S.chunk)
            dots = products(own, outer_pointers, pointers, S)
            x = scores(dots, scale2, outer, inner, mask, n, h, at, j, potential, True, S) + potential[None, :]
            total += tl.sum(tl.exp2(x - top[:, None]), 1)

    inside = index < outer.size
    lse = tl.log2(total) + top
    place = found + flat * stride + index
    if not FINISH:
        tl.store(place, tl.where(total == 0.0, float("-inf"), lse * constant(LN2, S)), mask=inside)
    else:
        mass = tl.load(log_mass + flat * outer.width + index)
        new = number(rho, S) * (mass - lse)
        if RELAX:
            new = (1 - number(omega, S)) * old + number(omega, S) * new
        new = tl.where(total == 0.0, 0.0, new)
        tl.store(place, tl.where(alive, new * constant(LN2, S), 0.0), mask=inside)
        tl.store(own_live + flat * outer.width + index, tl.where(alive, new, float("-inf")), mask=inside)
