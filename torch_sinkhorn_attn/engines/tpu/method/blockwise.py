"""The passes in plain XLA: score tiles recomputed from q and k, block by block, with O(n) temporaries.

For XLA devices where a kernel cannot run, and for XLA:CPU. A tile is `[N, H, rows, columns]`, all heads at once; the
loops run over the blocks that the intervals touch, whose bounds are data. The last block of a side starts early enough
to be whole: its tokens that an earlier block has had are masked where they are summed over, and written twice, the
same, where they are not. So nothing is padded and the caller's mask is read in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.method import dropout
from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Field, Inputs, Passes, Statics, compute_dtype

TILE_ELEMENTS = 1 << 20  # of one tile over all heads
SMALLEST_BLOCK, BAND_BLOCK, LARGEST_BLOCK = 32, 128, 512
UNROLLED_TERMS = 8  # of a field; more are looped over
HIGHEST = lax.Precision.HIGHEST  # a TPU would round float32 factors to bfloat16


def block_size(heads: int, reach: int | None = None) -> int:
    """Rows and columns of a tile for `heads` = N * H heads worked on together: a power of two. `reach` is the width of
    a window: smaller tiles waste less beside a band.

    >>> block_size(1), block_size(64), block_size(100_000), block_size(1, reach=9), block_size(1, reach=601)
    (512, 128, 32, 128, 256)
    """
    side = math.isqrt(TILE_ELEMENTS // max(1, heads))
    if reach is not None:
        side = min(side, max(BAND_BLOCK, reach // 2))
    return max(SMALLEST_BLOCK, min(LARGEST_BLOCK, 1 << max(0, side.bit_length() - 1)))


class Axis:
    """The rows or the columns in blocks of one size."""

    def __init__(self, length: int, block: int):
        self.length, self.block = length, max(1, min(length, block))
        self.count = -(-length // self.block)

    @property
    def all(self) -> tuple[Array, Array]:
        """The range of its blocks."""
        return jnp.int32(0), jnp.int32(self.count)

    def start(self, i: Array) -> Array:
        """Where block i is read: the last one early enough to be whole."""
        return jnp.minimum(i * self.block, self.length - self.block)

    def index(self, i: Array) -> Array:
        """The tokens of block i."""
        return self.start(i) + jnp.arange(self.block, dtype=jnp.int32)

    def fresh(self, i: Array) -> Array | None:
        """Those that no earlier block holds; None where the blocks fit."""
        return None if self.length % self.block == 0 else self.index(i) >= i * self.block

    def read(self, x: Array, i: Array, axis: int = -1) -> Array:
        return lax.dynamic_slice_in_dim(x, self.start(i), self.block, axis)

    def write(self, x: Array, part: Array, i: Array, axis: int = -1) -> Array:
        return lax.dynamic_update_slice_in_dim(x, part, self.start(i), axis % x.ndim)


class BlockwisePasses(Passes):
    """`Passes` over tiles of `block` rows and columns."""

    def __init__(self, inputs: Inputs, constants: Constants, statics: Statics, block: int | None = None):
        self.inputs, self.constants, self.statics = inputs, constants, statics
        self.dtype = compute_dtype(inputs.query)
        self.num, self.heads, length = constants.log_row_mass.shape
        self.groups = inputs.key.shape[1]
        left, right = statics.window_left, statics.window_right
        if block is None:
            block = block_size(self.num * self.heads, left + right + 1 if min(left, right) >= 0 else None)
        self.row, self.col = Axis(length, block), Axis(constants.log_col_mass.shape[-1], block)
        self.empty = 0 in (self.num, self.heads, length, self.col.length)
        self.row_active, self.col_active = constants.log_row_mass > -jnp.inf, constants.log_col_mass > -jnp.inf

    # Loops

    def _span(self, lo: Array, hi: Array, own: Axis, other: Axis, i: Array) -> tuple[Array, Array]:
        """The blocks of the other side that block i touches in any batch element: [first, last)."""
        if not self.statics.banded:
            return other.all
        lo, hi = own.read(lo, i), own.read(hi, i)
        first = jnp.where(lo < hi, lo, other.length).min()
        return first // other.block, (hi.max() + other.block - 1) // other.block

    def _over_rows(self, body: Callable[[Array, Array, Any], Any], start: Any, i: Array) -> Any:
        """`body(i, j, state)` over the column blocks j of row block i."""
        first, last = self._span(self.constants.row_lo, self.constants.row_hi, self.row, self.col, i)
        return lax.fori_loop(first, last, lambda j, state: body(i, j, state), start)

    def _over_cols(self, body: Callable[[Array, Array, Any], Any], start: Any, j: Array) -> Any:
        """`body(i, j, state)` over the row blocks i of column block j."""
        first, last = self._span(self.constants.col_lo, self.constants.col_hi, self.col, self.row, j)
        return lax.fori_loop(first, last, lambda i, state: body(i, j, state), start)

    # Tiles

    def _scores(self, i: Array, j: Array, fresh: str) -> Array:
        """S on the tile, -inf off the support; and off the `fresh` "rows" or "cols"."""
        query = self.row.read(self.inputs.query, i, -2).astype(self.dtype) * (self.statics.scale / self.statics.epsilon)
        tile = self._product(query, self.col.read(self.inputs.key, j, -2))
        keep = (self.row.read(self.row_active, i)[..., None]) & self.col.read(self.col_active, j)[..., None, :]
        if self.statics.banded:
            column = self.col.index(j)
            lo, hi = (self.row.read(x, i)[:, None, :, None] for x in (self.constants.row_lo, self.constants.row_hi))
            keep = keep & (column >= lo) & (column < hi)
        new = self.row.fresh(i) if fresh == "rows" else self.col.fresh(j)
        if new is not None:
            keep = keep & (new[:, None] if fresh == "rows" else new)
        if self.inputs.mask is not None:
            mask = self._mask_tile(self.inputs.mask, i, j)
            if mask.dtype == jnp.bool_:
                keep = keep & mask
            else:
                keep = keep & kept(mask, self.dtype)
                tile = tile + mask.astype(self.dtype)
        return jnp.where(keep, tile, -jnp.inf)

    def _mask_tile(self, mask: Array, i: Array, j: Array) -> Array:
        mask = mask if mask.shape[-2] == 1 else self.row.read(mask, i, -2)
        return mask if mask.shape[-1] == 1 else self.col.read(mask, j, -1)

    def _matrix(self, p: Array, q: Array, i: Array, j: Array, fresh: str) -> Array:
        """M(p, q) on the tile."""
        return jnp.exp(self._scores(i, j, fresh) + self._outer_sum(p, q, i, j))

    def _outer_sum(self, p: Array, q: Array, i: Array, j: Array) -> Array:
        return self.row.read(p, i)[..., :, None] + self.col.read(q, j)[..., None, :]

    def _dropped_out(self, tile: Array, i: Array, j: Array) -> Array:
        """The tile after dropout: entries kept and scaled by 1 / (1 - p), or zeroed."""
        if self.constants.dropout_seed is None:
            return tile
        stream = dropout.head_streams(self.constants)[..., None, None]
        row, col = self.row.index(i), self.col.index(j)
        if (sequence := self.statics.sequence) is not None:
            row, col = row + sequence.first_row, col + sequence.first_held
        keep = dropout.keep(stream, row[:, None], col, self.statics.dropout_p)
        return jnp.where(keep, tile / (1 - self.statics.dropout_p), 0)

    def _score_cotangent(self, u: Array, v: Array, grad: Array, field: Field, i: Array, j: Array, fresh: str) -> Array:
        """dS on the tile."""
        scores = self._scores(i, j, fresh)
        d = self._product(self.row.read(grad, i, -2), self.col.read(self._value, j, -2))
        total = jnp.exp(scores + self._outer_sum(u, v, i, j)) * self._dropped_out(d, i, j)

        def subtract(k: Any, total: Array) -> Array:
            p, q, x, y = (z[k] for z in field)
            weights = self.row.read(x, i)[..., :, None] * self.col.read(y, j)[..., None, :]
            return total - jnp.exp(scores + self._outer_sum(p, q, i, j)) * weights

        terms = field.p.shape[0]
        return lax.fori_loop(0, terms, subtract, total, unroll=terms <= UNROLLED_TERMS)

    # Grouped queries: the heads that share a key head lie side by side, so keys and values are never repeated

    @property
    def _value(self) -> Array:
        assert self.inputs.value is not None
        return self.inputs.value

    def _by_group(self, x: Array) -> Array:
        return x.reshape(self.num, self.groups, self.heads // self.groups, *x.shape[2:])

    def _product(self, x: Array, y: Array) -> Array:
        """<x_i, y_j> `[N, H, rows, columns]` of `x [N, H, rows, E]` and `y [N, Hk, columns, E]`."""
        tile = self._einsum("nkgie,nkje->nkgij", self._by_group(x), y)
        return tile.reshape(self.num, self.heads, *tile.shape[3:])

    def _times(self, tile: Array, y: Array) -> Array:
        """A tile times `y [N, Hk, columns, E]`, `[N, H, rows, E]`."""
        out = self._einsum("nkgij,nkje->nkgie", self._by_group(tile), y)
        return out.reshape(self.num, self.heads, *out.shape[3:])

    def _einsum(self, equation: str, *arrays: Array) -> Array:
        return jnp.einsum(equation, *(x.astype(self.dtype) for x in arrays), precision=HIGHEST)

    # The passes

    def row_lse(self, v: Array) -> Array:
        out = self._full(-jnp.inf, self.row.length)

        def update(i: Array, j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            return online(self._scores(i, j, "cols") + self.col.read(v, j)[..., None, :], -1, *state)

        def block(i: Array, out: Array) -> Array:
            return self.row.write(out, closed(*self._over_rows(update, self._opened(self.row), i)), i)

        return out if self.empty else lax.fori_loop(*self.row.all, block, out)

    def column_lse(self, u: Array) -> Array:
        out = self._full(-jnp.inf, self.col.length)

        def update(i: Array, j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            return online(self._scores(i, j, "rows") + self.row.read(u, i)[..., None], -2, *state)

        def block(j: Array, out: Array) -> Array:
            return self.col.write(out, closed(*self._over_cols(update, self._opened(self.col), j)), j)

        return out if self.empty else lax.fori_loop(*self.col.all, block, out)

    def _opened(self, axis: Axis) -> tuple[Array, Array]:
        return self._full(-jnp.inf, axis.block), self._full(0, axis.block)

    def _full(self, value: float, *shape: int) -> Array:
        """`[N, H, *shape]` of one value."""
        return jnp.full_like(self.row_active, value, self.dtype, (self.num, self.heads, *shape))

    def rows(self, p: Array, q: Array, y: Array) -> Array:
        def tile(i: Array, j: Array) -> Array:
            matrix = self._matrix(p, q, i, j, "cols")
            return jnp.einsum("nhij,nhj->nhi", matrix, self.col.read(y, j), precision=HIGHEST)

        return self._row_sums(tile, (), -1)

    def columns(self, p: Array, q: Array, x: Array) -> Array:
        def tile(i: Array, j: Array) -> Array:
            matrix = self._matrix(p, q, i, j, "rows")
            return jnp.einsum("nhij,nhi->nhj", matrix, self.row.read(x, i), precision=HIGHEST)

        return self._column_sums(tile, (), -1)

    def values(self, u: Array, v: Array) -> tuple[Array, Array]:
        width = self._value.shape[-1]

        def tile(i: Array, j: Array) -> Array:
            plan = self._matrix(u, v, i, j, "cols")
            out = self._times(self._dropped_out(plan, i, j), self.col.read(self._value, j, -2))
            return jnp.concatenate([out, plan.sum(-1, keepdims=True)], -1)

        out = self._row_sums(tile, (width + 1,), -2)
        return out[..., :width], out[..., width]

    def value_cotangent(self, u: Array, v: Array, grad: Array) -> Array:
        def tile(i: Array, j: Array) -> Array:
            plan = self._dropped_out(self._matrix(u, v, i, j, "rows"), i, j)
            return jnp.einsum("nhij,nhie->nhje", plan, self.row.read(grad, i, -2), precision=HIGHEST)

        return self._column_sums(tile, (grad.shape[-1],), -2)

    def query_cotangent(
        self, u: Array, v: Array, grad: Array, field: Field, mask_grad: bool
    ) -> tuple[Array, Array | None]:
        mask = self.inputs.mask if mask_grad else None
        width = self.inputs.query.shape[-1]
        out = self._full(0, self.row.length, width)
        total = None if mask is None else jnp.zeros_like(mask, self.dtype)
        if self.empty:
            return out, total

        def update(i: Array, j: Array, state: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
            tile = self._score_cotangent(u, v, grad, field, i, j, "cols")
            part, total = state
            if total is not None:
                total = self._add_to_mask(total, tile, i, j)
            return part + self._times(tile, self.col.read(self.inputs.key, j, -2)), total

        def block(i: Array, state: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
            part = self._full(0, self.row.block, width)
            part, total = self._over_rows(update, (part, state[1]), i)
            return self.row.write(state[0], part, i, -2), total

        return lax.fori_loop(*self.row.all, block, (out, total))

    def _add_to_mask(self, total: Array, tile: Array, i: Array, j: Array) -> Array:
        """Add a tile to an array of the mask's shape, summing over what the mask broadcast."""
        new = self.row.fresh(i)
        tile = tile if new is None else jnp.where(new[:, None], tile, 0)
        broadcast = tuple(d for d in range(4) if total.shape[d] == 1 and tile.shape[d] != 1)
        zero = jnp.int32(0)
        row, col = self.row.start(i), self.col.start(j)
        starts = (zero, zero, zero if 2 in broadcast else row, zero if 3 in broadcast else col)
        part = tile.sum(broadcast, keepdims=True)
        return lax.dynamic_update_slice(total, lax.dynamic_slice(total, starts, part.shape) + part, starts)

    def key_cotangent(self, u: Array, v: Array, grad: Array, field: Field) -> Array:
        def tile(i: Array, j: Array) -> Array:
            part = self._score_cotangent(u, v, grad, field, i, j, "rows")
            query = self.row.read(self.inputs.query, i, -2).astype(self.dtype)
            return jnp.einsum("nhij,nhie->nhje", part, query, precision=HIGHEST)

        return self._column_sums(tile, (self.inputs.query.shape[-1],), -2)

    def _row_sums(self, tile: Callable[[Array, Array], Array], width: tuple[int, ...], axis: int) -> Array:
        """`tile(i, j)` summed over the columns, `[N, H, L, *width]`."""
        out = self._full(0, self.row.length, *width)

        def block(i: Array, out: Array) -> Array:
            start = self._full(0, self.row.block, *width)
            return self.row.write(out, self._over_rows(lambda i, j, part: part + tile(i, j), start, i), i, axis)

        return out if self.empty else lax.fori_loop(*self.row.all, block, out)

    def _column_sums(self, tile: Callable[[Array, Array], Array], width: tuple[int, ...], axis: int) -> Array:
        """`tile(i, j)` summed over the rows, `[N, H, S, *width]`."""
        out = self._full(0, self.col.length, *width)

        def block(j: Array, out: Array) -> Array:
            start = self._full(0, self.col.block, *width)
            return self.col.write(out, self._over_cols(lambda i, j, part: part + tile(i, j), start, j), j, axis)

        return out if self.empty else lax.fori_loop(*self.col.all, block, out)


def online(tile: Array, axis: int, top: Array, total: Array) -> tuple[Array, Array]:
    """The running maximum and sum of exponentials, a tile further."""
    new = jnp.maximum(top, tile.max(axis))
    safe = jnp.where(new == -jnp.inf, 0, new)
    return new, total * jnp.exp(top - safe) + jnp.exp(tile - jnp.expand_dims(safe, axis)).sum(axis)


def closed(top: Array, total: Array) -> Array:
    """Their LSE, -inf over nothing."""
    return jnp.where(top == -jnp.inf, -jnp.inf, jnp.log(total) + top)


def kept(mask: Array, dtype: jnp.dtype) -> Array:
    """True where a mask keeps the entry; a float one drops what is at or below `lowest_kept`."""
    return mask if mask.dtype == jnp.bool_ else ~(mask <= lowest_kept(mask.dtype, dtype))  # NaN stays, to be seen


def lowest_kept(mask_dtype: jnp.dtype, dtype: jnp.dtype) -> float:
    """Half the lowest value of a float mask's own or of the compute dtype."""
    return max(float(jnp.finfo(mask_dtype).min), float(jnp.finfo(dtype).min)) / 2
