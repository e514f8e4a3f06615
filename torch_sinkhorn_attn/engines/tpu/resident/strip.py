"""The strip of a band: where its blocks lie, and how a kernel fills and reads it.

Rows are taken in blocks of 128. Row block I keeps the columns of `width` column blocks from `first[I]` on, so the strip
is `[L, width * 128]` however long the keys are; `first` is data, `width` is compiled in.

    rows 0..127     x x x .          first 0, width 3
    rows 128..255   x x x .          first 0
    rows 256..383   . x x x          first 1
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_sinkhorn_attn.engines.tpu.method import dropout
from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Inputs, Statics

BLOCK = 128
SUBLANES = 8
LOG2E = math.log2(math.e)
DEAD = -1e30  # stands for -inf in sums that must stay finite
SLOPE = 1.5  # largest n/m a strip is laid out for where lengths are data; steeper problems stream
UNROLLED = 24  # blocks of 128 x 128 in one loop body, for the scheduler to overlap
DEEPER = 4  # times as many in the sweep that all iterations of the base but the last take


@dataclass(frozen=True)
class Strip:
    """Sizes of a strip, in blocks of 128: everything the kernels compile in about it."""

    rows: int
    cols: int
    width: int

    @property
    def padded_length(self) -> int:
        return self.rows * BLOCK

    @property
    def padded_size(self) -> int:
        return self.cols * BLOCK

    @property
    def columns(self) -> int:
        """Columns of a row block."""
        return self.width * BLOCK

    @property
    def unroll(self) -> int:
        """Row blocks in one loop body."""
        return self.unrolled(deep=False)

    def unrolled(self, deep: bool) -> int:
        """`DEEPER` times as many where the compiler's time pays off."""
        largest = max(1, (DEEPER if deep else 1) * UNROLLED // self.width)
        return chunk_blocks(self.rows, largest)


def strip_of(length: int, size: int, statics: Statics) -> Strip:
    """The strip for `length` queries and `size` keys.

    >>> strip_of(8192, 8192, Statics(scale=1.0, banded=True, window_left=128, window_right=128))
    Strip(rows=64, cols=64, width=3)
    """
    rows, cols = -(-length // BLOCK), -(-size // BLOCK)
    if not statics.banded or min(statics.window_left, statics.window_right) < 0:
        return Strip(rows, cols, cols)
    window = statics.window_left + statics.window_right + 1
    sequence = statics.sequence
    if statics.uniform:
        width = _uniform_width(length, size, statics)
    elif sequence is not None and sequence.halo is not None and sequence.rows == sequence.cols:
        width = -(-(sequence.halo[0] % BLOCK + BLOCK + window - 1) // BLOCK)  # a block's first columns lie beside it
    else:
        span = window + int((BLOCK - 1) * SLOPE * max(1.0, size / length)) + 1
        width = -(-(span - 1) // BLOCK) + 1
    return Strip(rows, cols, min(cols, width))


def _uniform_width(length: int, size: int, statics: Statics) -> int:
    """Column blocks of the widest row block when every token is active: the window of `support.window_ranks`."""
    row = np.arange(length, dtype=np.int64)
    centre, twice = (2 * row + 1) * size - length, 2 * length
    lo = np.clip(-((twice * statics.window_left - centre) // twice), 0, size - 1)
    hi = np.clip((centre + twice * statics.window_right) // twice + 1, lo + 1, size)
    start = np.arange(0, length, BLOCK)
    first = np.minimum.reduceat(lo, start) // BLOCK
    return int((-(-np.maximum.reduceat(hi, start) // BLOCK) - first).max())


def first_blocks(constants: Constants, strip: Strip) -> tuple[Array, Array]:
    """`first [N, rows]` int32 for the intervals given, and whether every row block's columns fit its width (scalar)."""
    pad = strip.padded_length - constants.row_lo.shape[-1]
    some = constants.row_lo < constants.row_hi
    lo = jnp.where(some, constants.row_lo, strip.padded_size)
    hi = jnp.where(some, constants.row_hi, 0)
    lo = jnp.pad(lo, ((0, 0), (0, pad)), constant_values=strip.padded_size).reshape(-1, strip.rows, BLOCK).min(-1)
    hi = jnp.pad(hi, ((0, 0), (0, pad))).reshape(-1, strip.rows, BLOCK).max(-1)
    first = jnp.minimum(lo // BLOCK, strip.cols - strip.width).astype(jnp.int32)
    return first, jnp.all(-(-hi // BLOCK) <= first + strip.width)


def dead_rows(constants: Constants) -> Array:
    """`[N, H, L]`: inactive tokens, and rows whose interval is empty."""
    return (constants.log_row_mass == -jnp.inf) | (constants.row_lo >= constants.row_hi)[:, None]


def operands(
    inputs: Inputs, constants: Constants, statics: Statics, strip: Strip, row_bias: Array, col_bias: Array | None = None
) -> dict[str, Array]:
    """`query [N, H, E+b, Lp]` and `key [N, Hk, E+b, Sp]`, features first, so that tokens lie along the lanes. Times
    scale/epsilon their products are the scores plus `row_bias [N, H, L]`, and `DEAD` on dead rows: the b features that
    say so cost nothing beside what the matrix unit leaves idle, and save the kernels an addition per score. With a
    `col_bias [N, H, S]` likewise for columns, and the keys are per query head."""
    factor, dtype = statics.scale / statics.epsilon, matmul_dtype(inputs.query)
    rows = jnp.where(dead_rows(constants), DEAD, row_bias)
    rows = split(_bias(pad_lanes(rows, strip.padded_length, DEAD), factor), dtype)
    query = pad_lanes(tokens_last(inputs.query), strip.padded_length)
    key = pad_lanes(tokens_last(inputs.key), strip.padded_size)
    if col_bias is None:
        ones = jnp.ones((*key.shape[:2], rows.shape[2], key.shape[3]), dtype)
        return {"query": jnp.concatenate([query, rows], 2), "key": jnp.concatenate([key, ones], 2)}
    key = jnp.repeat(key, query.shape[1] // key.shape[1], 1)
    cols = jnp.where(constants.log_col_mass == -jnp.inf, DEAD, col_bias)
    cols = split(_bias(pad_lanes(cols, strip.padded_size, DEAD), factor), dtype)
    return {
        "query": jnp.concatenate([query, rows, jnp.ones_like(rows)], 2),
        "head_key": jnp.concatenate([key, jnp.ones_like(cols), cols], 2),
    }


def _bias(x: Array, factor: float) -> Array:
    """`[..., n]` as a feature `[..., 1, n]` that the scale makes x of; what is dead stays finite."""
    return jnp.maximum(x / factor, -1e37)[..., None, :]


def tokens_last(x: Array) -> Array:
    """`[N, H, n, E]` to `[N, H, E, n]`, in the dtype of `matmul_dtype`."""
    return jnp.swapaxes(x.astype(matmul_dtype(x)), -1, -2)


def split(x: Array, dtype: jnp.dtype) -> Array:
    """`[N, H, 1, n]` as three terms of bfloat16 that sum to it, `[N, H, 3, n]`; as it is in a wider dtype."""
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    high = lax.reduce_precision(x, 8, 7)
    middle = lax.reduce_precision(x - high, 8, 7)
    return jnp.concatenate([high, middle, x - high - middle], 2).astype(dtype)


def pad_lanes(x: Array, size: int, value: float = 0.0) -> Array:
    """`[..., n]` to `[..., size]`."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, size - x.shape[-1]),), constant_values=value)


def matmul_dtype(x: Array | jax.ShapeDtypeStruct) -> jnp.dtype:
    """What the matrix unit is fed: bfloat16 as it is, float16 widened, the others as they are."""
    return jnp.dtype(jnp.float32) if x.dtype == jnp.float16 else jnp.dtype(x.dtype)


def dot(x: Array, y: Array, contract: tuple[int, int], dtype: jnp.dtype) -> Array:
    """A product on the matrix unit, summed in `dtype`; operands of float32 and float64 are not rounded."""
    exact = x.dtype != jnp.bfloat16
    return lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=dtype,
    )


# Inside a kernel


def rows_of(block: Array) -> Any:
    """The rows of a row block."""
    return pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)


def half_rows_of(block: Array) -> Any:
    """Those of a row block where two rows share a word."""
    return pl.ds(pl.multiple_of(block * (BLOCK // 2), BLOCK // 2), BLOCK // 2)


def in_pairs(x: Array) -> Array:
    """`[2n, C]` rounded to bfloat16, two rows a word: `[n, C]` uint32."""
    return pltpu.bitcast(x.astype(jnp.bfloat16), jnp.uint32)


def columns_of(first: Array, strip: Strip) -> Any:
    """The columns of a row block."""
    return pl.ds(pl.multiple_of(first * BLOCK, BLOCK), strip.columns)


def along_rows(lanes: Array) -> Array:
    """`[1, 128]` along the lanes to `[128, 128]`, row i holding entry i in every lane."""
    return jnp.broadcast_to(lanes, (BLOCK, BLOCK)).T


def along_lanes(rows: Array) -> Array:
    """The inverse of `along_rows`, `[1, 128]`: its diagonal, which takes the vector unit, not the transposing one."""
    row, lane = (lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), i) for i in (0, 1))
    diagonal = jnp.where(row == lane, rows, 0)
    return jnp.sum(fold(diagonal), 0, keepdims=True)


def replicated(x: Array) -> Array:
    """`[8, C]`, every line the same, as `[128, C]`."""
    return jnp.concatenate([x] * (BLOCK // SUBLANES), 0)


def side_by_side(x: Array, strip: Strip) -> Array:
    """`[n, 128]` for every column block, `[n, C]`. (`jnp.tile` goes through a reshape.)"""
    return jnp.concatenate([x] * strip.width, 1)


def side_by_side_of(x: Any, columns: int) -> Any:
    """A number as it is; one in every lane of `[n, 128]` in as many `columns`."""
    return jnp.concatenate([x] * (columns // BLOCK), 1) if isinstance(x, Array) else x


def fold(x: Array, combine: Callable[[Array, Array], Array] = jnp.add) -> Array:
    """`[128, C]` to `[8, C]`, whole registers at a time: slices, for reshapes are not free in every version of JAX."""
    return functools.reduce(combine, (x[i : i + SUBLANES] for i in range(0, BLOCK, SUBLANES)))


def sum_tiles(x: Array, strip: Strip) -> Array:
    """`[..., C]` summed over column blocks, `[..., 128]`. (`sum` would add 0 first, which a compiler keeps: of -0.)"""
    return functools.reduce(jnp.add, (x[..., k * BLOCK : (k + 1) * BLOCK] for k in range(strip.width)))


def row_sums(x: Array, strip: Strip) -> Array:
    """`[128, C]` summed along its lanes, `[128, 128]`: one reduction a row block, its result in every lane."""
    return jnp.broadcast_to(jnp.sum(sum_tiles(x, strip), 1, keepdims=True), (BLOCK, BLOCK))


def masked_scores(refs: Any, key: Any, block: Array, cols: Any, statics: Statics, dtype: jnp.dtype) -> Array:
    """The operands' scores on a row block, `[128, C]`, for `exp2`; `DEAD` outside the intervals."""
    factor = statics.scale / statics.epsilon * LOG2E
    tile = dot(refs.query[0, 0, :, rows_of(block)], key[0, 0, :, cols], (0, 0), dtype) * factor
    if not statics.banded:
        return tile
    return jnp.where(inside(block, refs.col_lo[0, :, cols], refs.col_hi[0, :, cols]), tile, DEAD)


def inside(block: Array, col_lo: Array, col_hi: Array) -> Array:
    """Where a row block lies in the intervals of its columns `[1, C]`, by one comparison of unsigned numbers."""
    row = block * BLOCK + lax.broadcasted_iota(jnp.int32, (BLOCK, col_lo.shape[-1]), 0)
    return (row - col_lo).astype(jnp.uint32) < (col_hi - col_lo).astype(jnp.uint32)


def dropout_keep(stream: Array, block: Array, first: Array, shape: tuple[int, ...], dropout_p: float) -> Array:
    """Where dropout keeps the entries of a row block."""
    row = block * BLOCK + lax.broadcasted_iota(jnp.int32, shape, 0)
    col = first * BLOCK + lax.broadcasted_iota(jnp.int32, shape, 1)
    return dropout.keep(stream, row, col, dropout_p)


def over_blocks(strip: Strip, *stages: Callable[[Array, int], None], deep: bool = False) -> None:
    """Every stage for a group of row blocks before the next: the matrix unit takes products in order, so a stage that
    waits for one must not stand between others. A stage is given the block and its place in the group."""
    unroll = strip.unrolled(deep)

    def step(i: Array, carry: None) -> None:
        for stage in stages:
            for g in range(unroll):
                stage(i * unroll + g, g)

    lax.fori_loop(0, strip.rows // unroll, step, None)


def over_chunks(blocks: int, largest: int, body: Callable[[Any], None]) -> None:
    """`body` on slices of `blocks` blocks of lanes, at most `largest` of them at once."""
    count = chunk_blocks(blocks, largest)
    lax.fori_loop(0, blocks // count, lambda j, _: body(chunk(j, count)), None)


def chunk_blocks(blocks: int, largest: int) -> int:
    """The largest divisor of `blocks` up to `largest`."""
    return max(g for g in range(1, largest + 1) if blocks % g == 0)


def chunk(j: Array, count: int) -> Any:
    """The lanes of the j-th chunk of `count` blocks."""
    return pl.ds(pl.multiple_of(j * (count * BLOCK), count * BLOCK), count * BLOCK)
