"""The way of a wavefront through a band: at which step which row block enters, and how far iterations lie apart.

A step of the grid takes in one row block of 128 queries. Its strip reaches from column block `front - width` to
`front`, and `front` grows by at most one a step: where a band is steeper, steps without a row block stand in between.
Iteration i works on the row block that came in `lag` steps before the one that iteration i - 1 works on. So far apart,
the columns that the row block reaches have been summed up by the iteration before:

    step          s         s - 3       s - 6        (lag 3, a window of 128 tokens on each side)
    work on it    fill      iteration 1  iteration 2  ...

Column blocks are counted with `width` blocks of padding before them, so that no front is out of range.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Statics
from torch_sinkhorn_attn.engines.tpu.resident.strip import BLOCK, SLOPE
from torch_sinkhorn_attn.engines.tpu.streaming.spans import window_intervals


@dataclass(frozen=True)
class Path:
    """What the kernels compile in about the way: numbers of row and column blocks, the strip's width in column blocks,
    how many steps iterations lie apart, and the steps in which row blocks come in."""

    rows: int
    cols: int
    width: int
    lag: int
    entries: int

    @property
    def padded_length(self) -> int:
        return self.rows * BLOCK

    @property
    def padded_cols(self) -> int:
        """Column blocks with those of padding."""
        return self.cols + 2 * self.width

    @property
    def columns(self) -> int:
        """Columns of a row block."""
        return self.width * BLOCK


class Entries(NamedTuple):
    """The way as data, int32 `[N or 1, steps]` from step `-before` on."""

    row: Array  # the row block; where none comes in, ~ of the last that did
    front: Array  # the column block behind the strip's last one
    fits: Array  # scalar: whether the data keep to the path compiled in


def path_of(length: int, size: int, statics: Statics) -> Path:
    """The path for `length` queries and `size` keys in a window.

    >>> path_of(8192, 8192, Statics(scale=1.0, banded=True, window_left=128, window_right=128))
    Path(rows=64, cols=64, width=3, lag=3, entries=65)
    """
    rows, cols = -(-length // BLOCK), -(-size // BLOCK)
    if not statics.uniform:
        window = statics.window_left + statics.window_right + 1
        span = window + int((BLOCK - 1) * SLOPE * max(1.0, size / length)) + 1
        width = min(cols, -(-(span - 1) // BLOCK) + 1)
        lag = math.ceil(SLOPE * max(1.0, length / size) * width) + 1
        return Path(rows, cols, width, lag, rows + max(0, cols - rows) + cols // 3 + width)
    width, front, position = _of_window(length, size, statics.window_left, statics.window_right)
    steps = np.arange(position[-1] + 1)
    after = np.searchsorted(position, steps)
    fronts = front[after] - (position[after] - steps)
    last = np.minimum(np.searchsorted(fronts, fronts - 1 + width, side="right") - 1, position[-1])
    return Path(rows, cols, width, int((last - steps).max()) + 1, len(steps))


@functools.lru_cache(maxsize=64)
def _of_window(length: int, size: int, left: int, right: int) -> tuple[int, np.ndarray, np.ndarray]:
    """The strip's width in column blocks, and of each row block its front, without the padding, and its step, where all
    tokens are active."""
    rows, cols = -(-length // BLOCK), -(-size // BLOCK)
    low, high = window_intervals(length, size, left, right, False)
    start = np.arange(0, length, BLOCK)
    some = low < high
    lo = np.minimum.reduceat(np.where(some, low, size), start) // BLOCK
    hi = -(-np.maximum.reduceat(np.where(some, high, 0), start) // BLOCK)
    width = max(1, int((np.maximum.accumulate(hi) - lo)[hi > 0].max(initial=1)))
    least, most = _bounds(hi, lo, cols, width)
    front, reach = np.zeros(rows, np.int64), 0
    for row in range(rows):
        front[row] = reach = min(most[row], max(least[row], reach + 1))
    position = np.arange(rows) + np.cumsum(np.maximum(np.diff(front, prepend=0) - 1, 0))
    return width, front, position


def _bounds(hi: np.ndarray, lo: np.ndarray, cols: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the front of each row block may lie at least and at most, without the padding."""
    most = np.minimum.accumulate(np.where(hi > 0, lo, cols)[::-1])[::-1] + width
    return np.maximum.accumulate(hi), most


def entries_of(constants: Constants, path: Path, statics: Statics, before: int, steps: int) -> Entries:
    """The way of the intervals given, from step `-before` to step `steps`; a constant where all tokens are active."""
    lo, hi = constants.row_lo, constants.row_hi
    if statics.uniform:
        window = lo.shape[-1], constants.col_lo.shape[-1], statics.window_left, statics.window_right
        _, fronts_of, places = _of_window(*window)
        known = _steps(np, places[None], fronts_of[None] + path.width, path, np.arange(-before, steps))
        row, fronts = (jnp.asarray(x.astype(np.int32)) for x in known)
        return Entries(row, fronts, jnp.bool_(True))
    pad = path.padded_length - lo.shape[-1]
    some = lo < hi
    low, high = (
        jnp.pad(jnp.where(some, x, fill), ((0, 0), (0, pad)), constant_values=fill).reshape(-1, path.rows, BLOCK)
        for x, fill in ((lo, path.cols * BLOCK), (hi, 0))
    )
    first, end = low.min(-1) // BLOCK, -(-high.max(-1) // BLOCK)
    held = end > 0
    block = jnp.arange(path.rows, dtype=jnp.int32)
    least = lax.cummax(end, 1)
    most = lax.cummin(jnp.where(held, first, path.cols), 1, reverse=True) + path.width
    fits = jnp.all(least <= most)
    # The front moves on by one where it may: min(most, max(least, one more)), a composition of clamps of front - block.
    low, high = lax.associative_scan(_then, (least - block, most - block), axis=1)
    front = jnp.clip(-1, low, high) + block + path.width
    jump = jnp.diff(front, axis=1, prepend=jnp.full_like(front[:, :1], path.width))
    position = block + jnp.cumsum(jnp.maximum(jump - 1, 0), 1, dtype=jnp.int32)
    step = jnp.arange(-before, steps, dtype=jnp.int32)
    row, fronts = _steps(jnp, position, front, path, step)
    # The last step that still adds to the columns a step starts to read.
    end_step = jnp.max(jnp.where(held, position, 0), 1, keepdims=True)
    last = jnp.minimum(_search(fronts, fronts - 1 + path.width, "right") - 1 - before, end_step)
    late = jnp.where((step >= 0) & (step <= end_step), last - step, 0)
    fits &= (jnp.max(late) < path.lag) & (jnp.max(position) < path.entries)
    return Entries(row.astype(jnp.int32), fronts.astype(jnp.int32), fits)


def _steps(xp: Any, position: Any, front: Any, path: Path, step: Any) -> tuple[Any, Any]:
    """Row blocks and fronts of the steps, from the steps and the fronts of the row blocks `[N, rows]`; in NumPy or
    JAX."""
    after = _search(position, step) if xp is jnp else np.searchsorted(position[0], step)[None]
    inner = xp.minimum(after, path.rows - 1)
    at, reach = (xp.take_along_axis(x, inner, 1) for x in (position, front))
    beyond = after >= path.rows
    fronts = xp.where(beyond, xp.minimum(reach + step - at, path.padded_cols), reach - (at - step))
    row = xp.where(~beyond & (at == step), inner, ~xp.maximum(after - 1, 0))
    return row, xp.maximum(fronts, path.width)


def _then(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """The clamp to one interval and then to another, as one."""
    (low, high), (below, above) = first, second
    return jnp.clip(low, below, above), jnp.clip(high, below, above)


def _search(table: Array, values: Array, side: str = "left") -> Array:
    """`searchsorted` in each line of `table [N, n]`, for `values [k]` or `[N, k]`."""
    values = jnp.broadcast_to(values, (table.shape[0], values.shape[-1]))
    return jax.vmap(lambda line, x: jnp.searchsorted(line, x, side=side))(table, values).astype(jnp.int32)
