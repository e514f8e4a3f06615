"""What the kernels of the adjoint share: a tile of the plan, of its cotangent D, and of dS.

The reference tile is W = P/a, the attention weights, so that D' = <dO, V> is what D is to P, and nothing is divided:
every exponent on rows is told for W, log a added. (Where D is given, entry by entry, W is P.)
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from torch_sinkhorn_attn.engines.triton.layout import Number
from torch_sinkhorn_attn.engines.triton.tiles import keep_tile, load_features, number, products

UNROLLED = 8  # terms of a field up to which their loop is unrolled


class Riders(NamedTuple):
    """What an adjoint kernel is compiled for. `scaled`: exponentials are applied outside of W; else they are formed
    entry by entry. `plain`: the factor is W itself."""

    image: bool = True  # the factor times a vector
    plain: bool = False
    scaled: bool = True
    flagged: bool = False  # whether the heads that are scaled are told by data
    values: bool = False  # dV rides along
    field: bool = False  # dK (columns outside) or dQ does, and the field is known
    deferred: bool = False  # all but one factor of it is
    sums: bool = False  # sums of W * D' are taken entry by entry
    dense: str = ""  # "plan": D is a tensor, not <dO, V>; "log": P*D is
    dropout: bool = False
    terms: int = 0  # of the field, where they are few; 0: they are counted by `Vectors.terms`
    split: int = 0  # features that a scaled field is told by (`Vectors.field_outer`); 0: by its terms, one by one
    round_inside: bool = False  # whether a factor tile must be in range before its outer exponentials


class Vectors(NamedTuple):
    """Vectors of an adjoint kernel, `[N*H, Lines.width]` each, those of a field `[K, N*H, width]`; exponents are to
    base 2. Any tensor stands for what is not there."""

    outer_live: Tensor  # the live vectors of W
    inner_live: Tensor
    weight: Tensor  # what the factor is multiplied with; scaled: exponentials of its own side included
    factor_outer: Tensor  # the factor's exponents
    factor_inner: Tensor
    field_outer: Tensor  # weights of the field; scaled: exponentials included; split: features `[N*H, width, split]`
    field_inner: Tensor
    field_outer_exponents: Tensor
    field_inner_exponents: Tensor
    deferred_outer: Tensor  # exponents of the deferred factor
    deferred_inner: Tensor
    beside: Tensor  # what the deferred weight has from beside the tiles
    terms: int
    stride: int  # N*H: of a field's terms, in vectors


class Dense(NamedTuple):
    """D or P*D `[N, H, L, S]` from one direction."""

    data: Tensor
    stride_n: int
    stride_h: int
    stride_outer: int
    stride_inner: int


class Dropout(NamedTuple):
    seed: Tensor  # [2] int64
    threshold: int
    factor: Number  # 1 / (1 - p)


@triton.jit
def products_and_chunk(own, outer_pointers, inner_pointers, start, S: tl.constexpr):
    """`products`, and the inner features from `start` on."""
    if S.features <= S.chunk:
        other = load_features(inner_pointers, 0, S.features, S.chunk, S.widen)
        return tl.dot(own, tl.trans(other), input_precision=S.precision, out_dtype=S.acc), other
    dots = products(own, outer_pointers, inner_pointers, S)
    return dots, load_features(inner_pointers, start, S.features, S.chunk, S.widen)


@triton.jit
def kept_entries(dropout, flat, outer_at, inner_at, S: tl.constexpr):
    """Which entries dropout keeps, as the tile lies."""
    if S.column:
        return keep_tile(dropout.seed, flat, inner_at[None, :], outer_at[:, None], dropout.threshold)
    return keep_tile(dropout.seed, flat, outer_at[:, None], inner_at[None, :], dropout.threshold)


@triton.jit
def dropped_out(tile, keep, dropout, S: tl.constexpr, A: tl.constexpr):
    """The tile after dropout."""
    if A.dropout:
        return tl.where(keep, tile * number(dropout.factor, S), 0.0)
    return tile


@triton.jit
def given_cotangent(dense, n, h, outer_at, inner_at, S: tl.constexpr):
    """A tile of what `Dense` holds."""
    place = dense.data + n * dense.stride_n + h * dense.stride_h + outer_at.to(tl.int64)[:, None] * dense.stride_outer
    return tl.load(place + inner_at.to(tl.int64)[None, :] * dense.stride_inner).to(S.acc)


@triton.jit
def factor_tile(log_weights, outer_exponents, inner_exponents):
    """W * 2^(outer + inner), formed in the log domain."""
    return tl.exp2(log_weights + outer_exponents[:, None] + inner_exponents[None, :])


@triton.jit
def field_features(features, place, A: tl.constexpr):
    """A field's features on the lines at `place`, `[lines, split]`."""
    SPLIT: tl.constexpr = A.split
    return tl.load(features + (place * SPLIT)[:, None] + tl.arange(0, SPLIT)[None, :])


@triton.jit
def less_term(d, log_weights, v, outer_place, inner_place, A: tl.constexpr):
    """One term of the field subtracted: from D' where exponentials are outside, else from W * D'."""
    x, y = tl.load(v.field_outer + outer_place), tl.load(v.field_inner + inner_place)
    if A.scaled:
        return d - x[:, None] * y[None, :]
    factor = factor_tile(
        log_weights, tl.load(v.field_outer_exponents + outer_place), tl.load(v.field_inner_exponents + inner_place)
    )
    return d - factor * x[:, None] * y[None, :]


@triton.jit
def score_cotangent(d, w, log_weights, v, outer_place, outer_width, inner_place, inner_width, A: tl.constexpr):
    """dS from D' (W * D' where that is given) on a tile; places are those of the tile's lines in a vector."""
    if A.dense == "log":
        if A.scaled:  # d is W * D' then, and a field without exponents is W * X Y^T
            field = tl.zeros_like(w)
            field = less_field(field, log_weights, v, outer_place, outer_width, inner_place, inner_width, A)
            return d + w * field
        return less_field(d, log_weights, v, outer_place, outer_width, inner_place, inner_width, A)
    if A.split > 0:  # is subtracted already
        return w * d
    if A.scaled:
        return w * less_field(d, log_weights, v, outer_place, outer_width, inner_place, inner_width, A)
    return less_field(w * d, log_weights, v, outer_place, outer_width, inner_place, inner_width, A)


@triton.jit
def less_field(d, log_weights, v, outer_place, outer_width, inner_place, inner_width, A: tl.constexpr):
    """All terms of the field subtracted."""
    TERMS: tl.constexpr = A.terms
    outer_step, inner_step = v.stride.to(tl.int64) * outer_width, v.stride.to(tl.int64) * inner_width
    if TERMS > 0:
        for k in tl.static_range(TERMS):
            d = less_term(d, log_weights, v, outer_place + k * outer_step, inner_place + k * inner_step, A)
    else:
        for k in range(v.terms):
            d = less_term(d, log_weights, v, outer_place + k * outer_step, inner_place + k * inner_step, A)
    return d
