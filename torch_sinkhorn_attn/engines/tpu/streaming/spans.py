"""Which tiles a block of lines touches: the intervals, as data, reduced to a few integers per block.

"Lines" are the side a pass reduces to (rows for a row pass, columns for a column pass), "across" is the other side.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from torch_sinkhorn_attn.engines.tpu.method.problem import Statics


class Spans(NamedTuple):
    """Tiles [first, end) that some line of a block reaches and [inner_first, inner_end) that all its lines cover.

    int32 `[N * blocks]`, flat: scalar memory pads the last dimension of anything else.
    """

    first: Array
    end: Array
    inner_first: Array
    inner_end: Array


def spans(lo: Array, hi: Array, block: int, tile: int) -> Spans:
    """From intervals `[N, n]` of lines (empty where lo >= hi); an untouched block gets (0, 0)."""
    num, length = lo.shape
    padding = ((0, 0), (0, -length % block))
    held = lo < hi
    far = jnp.iinfo(jnp.int32).max
    low, high, inner_low, inner_high = (
        jnp.pad(x.astype(jnp.int32), padding, constant_values=fill).reshape(num, -1, block)
        for x, fill in (
            (jnp.where(held, lo, far), far),
            (jnp.where(held, hi, 0), 0),
            (lo, 0),
            (hi, far),
        )
    )
    first, end = low.min(-1) // tile, -(-high.max(-1) // tile)
    some = first < end
    inner_first, inner_end = -(-inner_low.max(-1) // tile), inner_high.min(-1) // tile
    return Spans(
        *(x.astype(jnp.int32).reshape(-1) for x in (jnp.where(some, first, 0), jnp.where(some, end, 0))),
        *(x.astype(jnp.int32).reshape(-1) for x in (inner_first, inner_end)),
    )


def most_tiles(
    found: Spans, statics: Statics, rows: int, cols: int, block: int, tile: int, transposed: bool
) -> int | Array:
    """How many tiles a block of lines touches at most: a number where shapes and window tell, else a traced scalar."""
    length, size = (cols, rows) if transposed else (rows, cols)
    if statics.uniform and not statics.banded:
        return max(1, -(-size // tile))
    if not statics.uniform:
        return jnp.maximum(jnp.max(found.end - found.first, initial=0), 1)
    lo, hi = window_intervals(rows, cols, statics.window_left, statics.window_right, transposed)
    starts = np.arange(0, length, block)
    ends = np.minimum(starts + block, length) - 1  # intervals are monotone: the first and the last line tell
    return max(1, int((-(-hi[ends] // tile) - lo[starts] // tile).max(initial=0)))


def window_intervals(rows: int, cols: int, left: int, right: int, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Columns `[lo, hi)` in the window of each row, or rows in that of each column, all tokens active."""
    n2 = 2 * max(1, rows)
    centre = (2 * np.arange(rows, dtype=np.int64) + 1) * cols - rows
    lo = np.zeros_like(centre) if left < 0 else np.maximum(-((n2 * left - centre) // n2), 0)
    hi = np.full_like(centre, cols) if right < 0 else np.minimum((centre + n2 * right) // n2 + 1, cols)
    hi = np.maximum(lo, hi)
    if not transposed:
        return lo, hi
    col = np.arange(cols)
    return np.searchsorted(hi, col, side="right"), np.searchsorted(lo, col, side="right")


def joins(rows: int, cols: int, left: int, right: int) -> bool:
    """Whether the window of all tokens makes one component of them."""
    lo, hi = window_intervals(rows, cols, left, right, False)
    some = lo < hi
    return bool((lo[some][1:] < np.maximum.accumulate(hi[some])[:-1]).all())
