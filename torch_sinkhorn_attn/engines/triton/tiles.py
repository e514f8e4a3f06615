"""What all kernels share: which lines a program has, which tiles it walks, the scores of a tile, dropout bits.

Every kernel is written for *outer* lines, which are one program's own, and *inner* lines, over which it sums. Rows
(queries) outside make it a row pass, columns (keys) outside a column pass: `Layout.direction` exchanges the sides, and
one source serves both. Arguments of a kernel: `outer`, `inner` (`layout.Lines`), `mask` (`layout.Mask`), and what is
known when it is compiled, `S` (`layout.Static`).

Logarithms are to base 2 in here, so that exp2 and log2 are one instruction: a score is (q.k) * scale with
scale / epsilon * log2 e folded into `scale`. A *live vector* is a potential in that unit, -inf on dead lines and on the
padding after the last line: `[N*H, Lines.width]`. Whatever a tile holds beyond the last line is annulled by it, so
loads need no predicates: line numbers are clamped instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# What a program works on


@triton.jit
def own_block(outer, S: tl.constexpr):
    """The flat head n * H + h (int64) and the first outer line of this program: the blocks of a head lie side by
    side, so that they read its inner lines while the cache has them."""
    blocks = tl.cdiv(outer.size, S.outer)
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), (program % blocks) * S.outer


@triton.jit
def clamped(index, lines):
    """Line numbers that may be read, for those beyond the last line too."""
    return tl.minimum(index, lines.size - 1)


@triton.jit
def number(x, S: tl.constexpr):
    """A `layout.Number` in the type of the sums."""
    return tl.full([], x.high, S.acc) + tl.full([], x.low, S.acc)


@triton.jit
def constant(VALUE: tl.constexpr, S: tl.constexpr):
    """A number of the kernel's own in the type of the sums: written out, it would be one of float32."""
    return tl.full([], VALUE, S.acc)


# Features


@triton.jit
def feature_pointers(lines, n, h, index, WIDTH: tl.constexpr):
    """`[lines, WIDTH]` pointers to the features of the lines `index` of head h, from the first feature on."""
    base = lines.data + n * lines.stride_n + (h // lines.share) * lines.stride_h
    return base + index.to(tl.int64)[:, None] * lines.stride_l + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_features(pointers, start, TOTAL: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr):
    """A block of features `start` to `start + WIDTH` of `TOTAL`, 0 beyond the last one."""
    if TOTAL % WIDTH == 0:
        x = tl.load(pointers + start)
    else:
        x = tl.load(pointers + start, mask=(start + tl.arange(0, WIDTH) < TOTAL)[None, :], other=0.0)
    if WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def own_features(pointers, S: tl.constexpr):
    """The features of the outer lines, loaded once; where there are too many, only their first chunk (unused)."""
    return load_features(pointers, 0, S.features, S.chunk, S.widen)


@triton.jit
def products(own, outer_pointers, inner_pointers, S: tl.constexpr):
    """<outer, inner> `[OUTER, INNER]`, not scaled. `own` is what `own_features` gave."""
    if S.features <= S.chunk:
        other = load_features(inner_pointers, 0, S.features, S.chunk, S.widen)
        return tl.dot(own, tl.trans(other), input_precision=S.precision, out_dtype=S.acc)
    OUTER: tl.constexpr = S.outer
    INNER: tl.constexpr = S.inner
    total = tl.zeros([OUTER, INNER], dtype=S.acc)
    for e in range(0, S.features, S.chunk):
        left = load_features(outer_pointers, e, S.features, S.chunk, S.widen)
        right = load_features(inner_pointers, e, S.features, S.chunk, S.widen)
        total += tl.dot(left, tl.trans(right), input_precision=S.precision, out_dtype=S.acc)
    return total


# Which tiles


@triton.jit
def span(outer, inner, n, at, alive, S: tl.constexpr):
    """The inner lines that some outer line reaches, from a multiple of INNER on, and among them those of whole tiles in
    which every pair of live lines is on the support before the mask: (start, stop, safe_start, safe_stop)."""
    whole = inner.size // S.inner * S.inner
    if not S.banded:
        return 0 * inner.size, inner.size, 0 * inner.size, whole
    offset = n * outer.size + at
    lo, hi = tl.load(outer.lo + offset).to(tl.int32), tl.load(outer.hi + offset).to(tl.int32)
    start = tl.min(tl.where(lo < hi, lo, inner.size), 0) // S.inner * S.inner
    stop = tl.max(tl.where(lo < hi, hi, 0), 0)
    low, high = tl.load(outer.safe_lo + offset).to(tl.int32), tl.load(outer.safe_hi + offset).to(tl.int32)
    low, high = tl.max(tl.where(alive, low, 0), 0), tl.min(tl.where(alive, high, inner.size), 0)
    safe_start = tl.cdiv(low, S.inner) * S.inner
    safe_stop = tl.minimum(high // S.inner * S.inner, whole)
    start, stop = tl.minimum(start, stop), tl.maximum(start, stop)
    safe_start = tl.maximum(safe_start, start)
    safe_stop = tl.minimum(safe_stop, stop // S.inner * S.inner)
    empty = safe_stop <= safe_start
    return start, stop, tl.where(empty, start, safe_start), tl.where(empty, start, safe_stop)


@triton.jit
def edge_tiles(start, stop, safe_start, safe_stop, S: tl.constexpr):
    """How many tiles of a span are not safe."""
    return tl.cdiv(stop - start - (safe_stop - safe_start), S.inner)


@triton.jit
def edge_tile(t, start, safe_start, safe_stop, S: tl.constexpr):
    """First inner line of the t-th tile that is not safe."""
    j = start + t * S.inner
    return tl.where(j >= safe_start, j + (safe_stop - safe_start), j)


@triton.jit
def in_interval(outer, inner, n, outer_at, inner_at, S: tl.constexpr):
    """Whether the row's interval holds the column, `[OUTER, INNER]`: one unsigned comparison of column - lo."""
    if S.column:
        offset = n * inner.size + inner_at
        lo, hi = tl.load(inner.lo + offset).to(tl.int32), tl.load(inner.hi + offset).to(tl.int32)
        place, width = outer_at[:, None] - lo[None, :], (hi - lo)[None, :]
    else:
        offset = n * outer.size + outer_at
        lo, hi = tl.load(outer.lo + offset).to(tl.int32), tl.load(outer.hi + offset).to(tl.int32)
        place, width = inner_at[None, :] - lo[:, None], (hi - lo)[:, None]
    return place.to(tl.uint32) < width.to(tl.uint32)


# Scores


@triton.jit
def scores(dots, scale, outer, inner, mask, n, h, outer_at, first, live, TEST: tl.constexpr, S: tl.constexpr):
    """S of a tile, -inf off the support, from its `products`: base 2.

    `outer_at` are the outer lines, clamped; the inner lines are those from `first` on, and `live` is the live vector
    there. Without `TEST` the tile must be safe (`span`); then only the mask is asked. Entries on dead lines are
    anything, until the live vectors of both sides are added; what a float mask holds there is nobody's. With `TEST`
    they are -inf on dead inner lines, NaN or not.
    """
    x = dots * scale
    inner_at = first + tl.arange(0, S.inner)
    if TEST:
        inner_at = clamped(inner_at, inner)
    if S.mask != "none":
        place = mask.data + n * mask.stride_n + h * mask.stride_h
        place = place + outer_at.to(tl.int64)[:, None] * mask.stride_outer
        entry = tl.load(place + inner_at.to(tl.int64)[None, :] * mask.stride_inner)
        if S.mask == "bool":
            x = tl.where(entry, x, float("-inf"))
        else:
            entry = entry.to(S.acc)
            keep = (entry > S.limit) | (entry != entry)  # NaN stays, to be seen
            keep = keep & (live != float("-inf"))[None, :]
            x = tl.where(keep, x + entry * constant(LOG2E, S), float("-inf"))
    if TEST:
        keep = (live != float("-inf"))[None, :]
        if S.banded:
            keep = keep & in_interval(outer, inner, n, outer_at, inner_at, S)
        x = tl.where(keep, x, float("-inf"))
    return x


# Dropout: `method.dropout.keep_tile`, in uint32


@triton.jit
def mix(x):
    """Murmur3's 32-bit finaliser."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def keep_tile(seed, flat, rows, cols, threshold):
    """Bool tile: True keeps the entry. `rows` and `cols` are line numbers with a new axis each, as the tile lies;
    `threshold` is int(dropout_p * 2**32); `seed` points to `[2]` int64."""
    first, second = tl.load(seed).to(tl.uint32), tl.load(seed + 1).to(tl.uint32)
    stream = mix(mix(first ^ flat.to(tl.uint32)) + second)
    line = mix(stream + rows.to(tl.uint32) * 0x9E3779B1)
    return mix(line + cols.to(tl.uint32) * 0x85EBCA77).to(tl.int64) >= threshold
