"""The resident forward kernel: one head's strip of absorbed exponentials stays in VMEM for the whole solve.

A grid step is one (batch element, head). The strip K_ij = exp(S_ij + u^start_i + v^abs_j), with v^abs_j = -max_i
(S_ij + u^start_i), is filled once; from then on a half-step is a matrix-vector product, and one sweep takes a row and
the next column half-step from one reading of the strip (B. Schmitzer's stabilised scaling, 2019):

    r = K y        x = a / r        c = K^T x        y = b / c          u = u^start + log x,  v = v^abs + log y

Row vectors live along sublanes in the sweep ("rep": `[128, 128]`, every lane the same), column vectors along lanes, so
nothing is transposed in it. What leaves the range in which nothing that matters underflows is reported in `range`, and
the caller computes those problems by streaming.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_sinkhorn_attn.engines.tpu.resident.columns import (
    END_LIMIT,
    ROW_LIMIT,
    TINY,
    Bin,
    ColumnHalfStep,
    Refs,
    SolveStatics,
)
from torch_sinkhorn_attn.engines.tpu.resident.strip import (
    BLOCK,
    DEAD,
    LOG2E,
    SUBLANES,
    along_lanes,
    along_rows,
    columns_of,
    dot,
    dropout_keep,
    fold,
    half_rows_of,
    in_pairs,
    masked_scores,
    over_blocks,
    replicated,
    row_sums,
    rows_of,
    side_by_side,
    sum_tiles,
)


def kernel(o: SolveStatics, names: tuple[str, ...], *refs: Any) -> None:
    """The body of a grid step; `names` says which fields of `Refs` are there, in order."""
    present = dict(zip(names, refs, strict=True))
    HeadSolve(o, Refs(**{name: present.get(name) for name in Refs._fields})).run()


class HeadSolve(ColumnHalfStep):
    """One head's solve."""

    # The order of half-steps

    def run(self) -> None:
        s = self.s
        self.exchange.begin()
        self.r.range[...] = jnp.ones_like(self.r.range)
        self.fill()
        if s.stopped:
            self.update_columns(0)
            if s.tolerance:
                self.until_tolerance()
            else:
                self.fixed_base()
            self.save(0)
        if s.kept > 1:
            lax.fori_loop(1, s.kept, self.tail_step, None)
        self.update_columns()
        self.sweep(saved=True, base=False, last=True)
        self.save(s.kept)
        if self.r.top_x is not None:
            top = jnp.exp2(jnp.max(self.r.top_x[...], 0, keepdims=True))
            self.check(top, jnp.ones((1, BLOCK)) > 0, ROW_LIMIT)

    def fixed_base(self) -> None:
        if self.s.stopped > 1:
            lax.fori_loop(1, self.s.stopped, self.base_step, None)
        self.sweep(saved=True, base=True, limit=END_LIMIT)

    def base_step(self, t: Array, carry: None) -> None:
        self.sweep(saved=False, base=True)
        self.update_columns(t)

    def tail_step(self, k: Array, carry: None) -> None:
        self.update_columns()
        self.sweep(saved=True, base=False)
        self.save(k)

    def until_tolerance(self) -> None:
        """The base, ended early as `reference.stopped_base` ends it."""

        def body(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            t, _ = carry
            self.sweep(saved=True, base=True, limit=END_LIMIT)
            more = (t + 1 < self.s.stopped) & (self.change() > self.s.tolerance)
            pl.when(more)(lambda: self.update_columns(t + 1))
            return t + 1, more

        lax.while_loop(lambda carry: carry[1], body, (jnp.int32(0), jnp.bool_(True)))

    def save(self, k: Any) -> None:
        """u^k and v^k, from the scalings."""
        r = self.r
        at = pl.ds(k, 1)
        r.rows[0, 0, at, :] = r.start_row[0, 0] + jnp.log(jnp.maximum(r.x[...], TINY))
        r.cols[0, 0, at, :] = r.col_abs[...] + jnp.log(jnp.maximum(r.y[:1, :], TINY))
        if self.o.dustbin:
            r.bin_rows[0, 0, at, :] = r.bins[0, 0, 3:4, :] + jnp.log(self.bin(Bin.X))
            r.bin_cols[0, 0, at, :] = self.bin(Bin.COL_ABS) + jnp.log(self.bin(Bin.Y))

    # The strip

    def fill(self) -> None:
        """K, v^abs and the column sums of K for x = 1."""
        r, o = self.r, self.o
        r.sums[...] = jnp.full_like(r.sums, DEAD)
        over_blocks(self.strip, self._fill_scores)
        top = self.exchange.complete(jnp.max(r.sums[...], 0, keepdims=True), jnp.maximum) / LOG2E
        if o.dustbin:
            start_row, start_col = r.bins[0, 0, 3:4, :], r.bins[0, 0, 0:1, :]
            top = jnp.maximum(top, r.col_score[0, 0] + start_row[:, :1])
            column = jnp.max(r.row_score[0, 0] + r.start_row[0, 0], 1, keepdims=True)
            col_abs = -jnp.maximum(column, start_row + start_col)
            r.bin[Bin.COL_ABS : Bin.COL_ABS + 1, :] = col_abs
            r.bin[Bin.CORNER : Bin.CORNER + 1, :] = jnp.exp(start_col + start_row + col_abs)
            r.bin[Bin.X : Bin.X + 1, :] = jnp.ones_like(col_abs)
            r.bin[Bin.SUM : Bin.SUM + 1, :] = jnp.zeros_like(col_abs)
        alive = (top > DEAD / 2) & (r.log_b[0, 0] > DEAD / 2)
        r.col_abs[...] = jnp.where(alive, -top, DEAD)
        if o.dustbin:
            r.bin_row[...] = jnp.exp(r.col_score[0, 0] + r.col_abs[...] + start_row[:, :1])
        self.start_columns(alive)
        r.sums[...] = jnp.zeros_like(r.sums)
        over_blocks(self.strip, self._fill_exponentials)

    def _fill_scores(self, block: Array, g: int) -> None:
        """S, and its column maxima."""
        r = self.r
        cols = columns_of(r.first[self.n, block], self.strip)
        tile = masked_scores(r, r.key, block, cols, self.s, self.o.dtype)
        r.strip[rows_of(block), :] = tile
        r.sums[:, cols] = jnp.maximum(r.sums[:, cols], fold(tile, jnp.maximum))

    def _fill_exponentials(self, block: Array, g: int) -> None:
        r, o, strip, s = self.r, self.o, self.strip, self.s
        at, cols = rows_of(block), columns_of(r.first[self.n, block], strip)
        tile = jnp.maximum(jnp.exp2(r.strip[at, :] + r.col_abs[:, cols] * LOG2E), TINY)
        r.strip[at, :] = tile
        if o.low_base:
            r.low[half_rows_of(block), :] = in_pairs(tile)
        r.sums[:, cols] = r.sums[:, cols] + fold(tile)
        log_a, start = r.log_a[0, 0, :, at], r.start_row[0, 0, :, at]
        lanes = jnp.exp(log_a) if o.plain_rows else (s.rho_row * (log_a + start) - start) * LOG2E
        r.row_rep[at, :] = along_rows(lanes)
        if o.low_base:
            r.low_mass[half_rows_of(block), :] = in_pairs(along_rows(lanes))
        if r.log_x is not None:
            r.log_x[at, :] = jnp.zeros((BLOCK, BLOCK), o.dtype)
            r.top_x[...] = jnp.zeros_like(r.top_x)
        if o.dustbin:
            column = jnp.exp(r.row_score[0, 0, :, at] + start + self.bin(Bin.COL_ABS))
            r.bin_col[at, :] = along_rows(column)
            r.bin[Bin.SUM : Bin.SUM + 1, :] = self.bin(Bin.SUM) + jnp.sum(column, 1, keepdims=True)

    # The sweep

    def sweep(self, saved: bool, base: bool, last: bool = False, limit: float = ROW_LIMIT) -> None:
        """x from y, row block by row block, and the column sums for it (in the last only for the residuals)."""
        r, o = self.r, self.o
        columns = not last or o.residuals
        if o.dustbin:
            r.bin[Bin.SUM : Bin.SUM + 1, :] = jnp.zeros((1, BLOCK), o.dtype)

        def block(block: Array, g: int) -> None:
            if base and o.low_base and not saved:
                self.low_block(block)
            else:
                self.block(block, g, saved, base, last, columns)

        over_blocks(self.strip, block, *([self.add_values] if last and o.values else []), deep=base and not saved)
        if o.dustbin:
            self._dustbin_row(base)
        if saved:
            self.check(r.x[...], r.log_a[0, 0] > DEAD / 2, limit)
        if last and o.residuals:
            r.col_total[0, 0] = r.y[:1, :] * jnp.sum(r.sums[...], 0, keepdims=True)

    def block(self, block: Array, g: int, saved: bool, base: bool, last: bool, columns: bool) -> None:
        r, o, strip = self.r, self.o, self.strip
        at, cols = rows_of(block), columns_of(r.first[self.n, block], strip)
        tile = r.strip[at, :]
        weighted = tile * replicated(r.y[:, cols])
        real = total = row_sums(weighted, strip)
        if o.dustbin:
            total = real + r.bin_col[at, :] * self.bin(Bin.Y)
        x = self.row_scaling(at, total, base)
        if saved:
            r.x[:, at] = along_lanes(x)
        if o.dustbin:
            r.bin[Bin.SUM : Bin.SUM + 1, :] = self.bin(Bin.SUM) + jnp.sum(x * r.bin_col[at, :], 0, keepdims=True)
        if columns:
            part = fold(tile * side_by_side(x, strip))
            r.sums[:, cols] = r.sums[:, cols] + part
        if last:
            r.scale[0, 0, :, at], r.row_total[0, 0, :, at] = r.x[:, at], along_lanes(real)
        if last and o.values:
            plan = weighted
            if self.s.dropout_p:
                stream = r.stream[self.n, self.h]
                keep = dropout_keep(stream, block, r.first[self.n, block], plan.shape, self.s.dropout_p)
                plan = jnp.where(keep, plan / (1 - self.s.dropout_p), 0)
            r.plan[g] = plan.astype(r.plan.dtype)

    def add_values(self, block: Array, g: int) -> None:
        cols = columns_of(self.r.first[self.n, block], self.strip)
        self.r.mass[0, 0, rows_of(block), :] = dot(self.r.plan[g], self.r.value[0, 0, :, cols], (1, 1), self.o.dtype)

    def row_scaling(self, at: Any, total: Array, base: bool) -> Array:
        """x for row sums `total`, rep."""
        r, s = self.r, self.s
        if self.o.plain_rows:
            return r.row_rep[at, :] / total
        log_x = r.row_rep[at, :] - s.rho_row * LOG2E * jnp.log(total)
        if r.log_x is not None:
            if base:
                log_x = (1 - s.over_relaxation) * r.log_x[at, :] + s.over_relaxation * log_x
            r.log_x[at, :] = log_x
            r.top_x[...] = jnp.maximum(r.top_x[...], fold(log_x, jnp.maximum))
        return jnp.exp2(log_x)

    def _dustbin_row(self, base: bool) -> None:
        """The dustbin row's x."""
        r, s = self.r, self.s
        total = jnp.sum(r.bin_row[...] * r.y[:1, :], 1, keepdims=True) + self.bin(Bin.CORNER) * self.bin(Bin.Y)
        capacity, start = r.bins[0, 0, 1:2, :], r.bins[0, 0, 3:4, :]
        u = s.rho_row * (capacity + start - jnp.log(total))
        if base and s.over_relaxation != 1:
            u = (1 - s.over_relaxation) * (start + jnp.log(self.bin(Bin.X))) + s.over_relaxation * u
        x = jnp.where(capacity > DEAD / 2, jnp.exp(u - start), 1)
        r.bin[Bin.X : Bin.X + 1, :] = x
        self.check(x, capacity > DEAD / 2, END_LIMIT)

    def low_block(self, block: Array) -> None:
        """`block` with products in bfloat16, where the vector unit takes two rows at once: x, y and a are rounded, row
        sums are summed by the matrix unit and column sums in pairs."""
        r, strip = self.r, self.strip
        at, cols = rows_of(block), columns_of(r.first[self.n, block], strip)
        half = half_rows_of(block)
        tile, y = pltpu.bitcast(r.low[half, :], jnp.bfloat16), pltpu.bitcast(r.low_y[:, cols], jnp.bfloat16)
        pairs = range(0, BLOCK, 2 * SUBLANES)
        slabs = [tile[i : i + 2 * SUBLANES] for i in pairs]
        weighted = jnp.concatenate([sum_tiles(slab * y, strip) for slab in slabs], 0)
        total = dot(weighted, jnp.ones((BLOCK, BLOCK), jnp.bfloat16), (1, 0), jnp.dtype(jnp.float32))
        if self.o.dustbin:
            total = total + r.bin_col[at, :] * self.bin(Bin.Y)
        x = pltpu.bitcast(r.low_mass[half, :], jnp.bfloat16) / total.astype(jnp.bfloat16)
        if self.o.dustbin:
            column = x.astype(jnp.float32) * r.bin_col[at, :]
            r.bin[Bin.SUM : Bin.SUM + 1, :] = self.bin(Bin.SUM) + jnp.sum(column, 0, keepdims=True)
        x = opaque(x)
        parts = [slab * side_by_side(x[i : i + 2 * SUBLANES], strip) for i, slab in zip(pairs, slabs, strict=True)]
        while len(parts) > 1:
            parts = [p + q for p, q in zip(parts[::2], parts[1::2], strict=True)]
        part = parts[0].astype(jnp.float32)
        r.sums[:, cols] = r.sums[:, cols] + part[:SUBLANES] + part[SUBLANES:]


def opaque(x: Array) -> Array:
    """bfloat16 as it is: two rows in one register, which the compiler would else take apart and widen."""
    return pltpu.bitcast(pltpu.bitcast(x, jnp.uint32), jnp.bfloat16)
