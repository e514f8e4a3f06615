"""The column half-step of the resident forward kernel, and what the kernel works on.

A column's scaling is y_j = exp(v_j - v^abs_j). Balanced and not over-relaxed it is b / c, without logarithms.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_sinkhorn_attn.engines.tpu.method.problem import Statics
from torch_sinkhorn_attn.engines.tpu.resident.strip import (
    BLOCK,
    DEAD,
    SUBLANES,
    Strip,
    chunk,
    chunk_blocks,
    over_chunks,
)

CHUNK = 32  # blocks of columns taken at once
TINY = 1e-37  # stands for 0 in the strip, so that no sum is 0
# Logarithms of the scalings in range. Entries of K below exp(-85) are lost. y is looked at in every half-step, x at the
# end of the base: half-steps do not expand, so until then x has been within that and twice y's limit; and what is lost
# stays below exp(-15) of a mass.
COL_LIMIT, END_LIMIT = 16.0, 22.0
ROW_LIMIT = END_LIMIT + 2 * COL_LIMIT


class SolveStatics(NamedTuple):
    """What the kernel compiles in."""

    strip: Strip
    statics: Statics
    dtype: Any  # of sums and potentials
    low_base: bool  # products of the stopped sweeps in bfloat16
    dustbin: bool
    values: bool
    residuals: bool

    @property
    def plain(self) -> bool:
        """Whether a half-step of the base is the scaling alone, without logarithms."""
        return self.statics.balanced and self.statics.over_relaxation == 1.0


class Refs(NamedTuple):
    """The kernel's operands, results and scratch, by name; absent ones are None. Blocks of one head: leading dimensions
    are 1."""

    first: Any  # [N, rows] SMEM
    stream: Any  # [N, H] SMEM: dropout's
    bins: Any  # [1, 1, 8, 128]: corner score, log capacities of row and column, start of u and v at the dustbin
    query: Any  # [1, 1, E+b, Lp], with u^start among its features
    key: Any  # [1, 1, E+b, Sp]
    value: Any  # [1, 1, Ev, Sp]
    col_lo: Any  # [1, 1, Sp]
    col_hi: Any
    log_a: Any  # [1, 1, 1, Lp]; DEAD on lines without support
    log_b: Any  # [1, 1, 1, Sp]
    start_row: Any  # [1, 1, 1, Lp]
    start_col: Any  # [1, 1, 1, Sp]
    row_score: Any  # [1, 1, 1, Lp], divided by epsilon; DEAD where inactive
    col_score: Any  # [1, 1, 1, Sp]
    mass: Any  # [1, 1, Lp, Ev] P V, rows not yet scaled
    rows: Any  # [1, 1, R+1, Lp] u^0..u^R
    cols: Any  # [1, 1, R+1, Sp] v^0..v^R
    scale: Any  # [1, 1, 1, Lp] the last x: what scales them
    row_total: Any  # [1, 1, 1, Lp] row sums of the last plan, without the dustbin's part, not yet scaled
    col_total: Any  # [1, 1, 1, Sp] column sums likewise; only with residuals
    bin_rows: Any  # [1, 1, R+1, 128] u and v of the dustbin
    bin_cols: Any
    range: Any  # [1, 1, 1, 128]: 1 while every scaling stayed in range
    strip: Any  # [Lp, C]
    low: Any  # [Lp/2, C] uint32: the strip in bfloat16, two rows a word
    row_rep: Any  # [Lp, 128] rep: a, or beside relaxation rho (log a + u^start) - u^start
    bin_col: Any  # [Lp, 128] rep: the dustbin column's entries of the strip
    bin_row: Any  # [1, Sp]: the dustbin row's
    y: Any  # [8, Sp] column scaling, replicated; 1 on dead columns, so that no row sum is 0
    col_mass: Any  # [8, Sp] b, 1 / b (0 where b is) and 1 where b is 0, replicated
    col_share: Any
    col_dead: Any
    sums: Any  # [8, Sp] column sums, to be added over sublanes
    col_abs: Any  # [1, Sp] v^abs, DEAD on dead columns
    x: Any  # [1, Lp] row scaling of the last saved sweep
    log_x: Any  # [Lp, 128] rep: its logarithm, kept for over-relaxation
    plan: Any  # [G, 128, C] K y of a group of row blocks, for the matrix unit
    bin: Any  # [8, 128], the dustbin's scalars: see `Bin`


class Bin:
    """Rows of `Refs.bin`."""

    X, Y, SUM, COL_ABS, CORNER = range(5)


class ColumnHalfStep:
    """y from the column sums of one head."""

    def __init__(self, o: SolveStatics, r: Refs):
        self.o, self.r, self.s, self.strip = o, r, o.statics, o.strip
        self.n, self.h = pl.program_id(0), pl.program_id(1)

    def bin(self, row: int) -> Array:
        """A scalar of the dustbin, `[1, 128]`."""
        return self.r.bin[row : row + 1, :]

    def update_columns(self, base: bool, first: bool = False) -> None:
        """y from the column sums, and whether it is in range."""
        r, o = self.r, self.o
        if o.plain:
            self._divide_columns()
        if o.dustbin:
            bins = self.bin(Bin.SUM) + self.bin(Bin.CORNER) * self.bin(Bin.X)
            old = r.bins[0, 0, 4:5, :] if first else self.bin(Bin.COL_ABS) + jnp.log(self.bin(Bin.Y))
            capacity = r.bins[0, 0, 2:3, :]
            y = self.column_scaling(bins, capacity, self.bin(Bin.COL_ABS), old, base)
            r.bin[Bin.Y : Bin.Y + 1, :] = y
            self.check(y, capacity > DEAD / 2, COL_LIMIT)

        def one(at: Any) -> None:
            log_b, col_abs, y = r.log_b[0, 0, :, at], r.col_abs[:, at], r.y[:1, at]
            old = r.start_col[0, 0, :, at] if first else col_abs + jnp.log(jnp.maximum(y, TINY))
            y = self.column_scaling(self.column_sums(at), log_b, col_abs, old, base)
            r.y[:, at] = jnp.broadcast_to(y, (SUBLANES, y.shape[-1]))
            self.check(y, log_b > DEAD / 2, COL_LIMIT)

        if not o.plain:
            over_chunks(self.strip.cols, CHUNK, one)

    def _divide_columns(self) -> None:
        """y = b / c, in every sublane at once, and its range by running maxima of y and 1 / y."""
        r, count = self.r, chunk_blocks(self.strip.cols, CHUNK)

        def part(j: Array, worst: tuple[Array, Array]) -> tuple[Array, Array]:
            at = chunk(j, count)
            total = r.sums[:, at]
            for shift in (4, 2, 1):
                total = total + pltpu.roll(total, shift, 0)
            if self.o.dustbin:
                total = total + r.bin_row[:, at] * self.bin(Bin.X)[:, :1]
            total = jnp.maximum(total, TINY)
            y = r.col_mass[:, at] / total + r.col_dead[:, at]
            r.y[:, at] = y
            return jnp.maximum(worst[0], self._top(y)), jnp.maximum(worst[1], self._top(total * r.col_share[:, at]))

        ones = jnp.zeros((SUBLANES, BLOCK), self.o.dtype)
        top, inverse = lax.fori_loop(0, self.strip.cols // count, part, (ones, ones))
        self.check(jnp.maximum(top, inverse)[:1], jnp.ones((1, BLOCK)) > 0, COL_LIMIT, -math.inf)

    def _top(self, x: Array) -> Array:
        """Maximum over blocks of lanes, `[8, 128]`."""
        return functools.reduce(jnp.maximum, (x[:, i : i + BLOCK] for i in range(0, x.shape[1], BLOCK)))

    def column_sums(self, at: Any) -> Array:
        """Sums of K x at some columns, the dustbin's part included, `[1, columns]`."""
        total = jnp.sum(self.r.sums[:, at], 0, keepdims=True)
        return total + self.r.bin_row[:, at] * self.bin(Bin.X)[:, :1] if self.o.dustbin else total

    def column_scaling(self, total: Array, log_b: Array, col_abs: Array, old: Array, base: bool) -> Array:
        """y for column sums `total`, over-relaxed from the potential `old` in the base; 1 on dead columns."""
        total = jnp.maximum(total, TINY)
        if self.o.plain:
            return jnp.where(log_b > DEAD / 2, jnp.exp(log_b) / total, 1)
        v = self.plain_potential(total, log_b, col_abs)
        omega = self.s.over_relaxation
        if base and omega != 1:
            v = (1 - omega) * old + omega * v
        return jnp.where(log_b > DEAD / 2, jnp.exp(v - col_abs), 1)

    def plain_potential(self, total: Array, log_b: Array, col_abs: Array) -> Array:
        """v = rho_c (log b - LSE), not over-relaxed."""
        return self.s.rho_col * (log_b + col_abs - jnp.log(jnp.maximum(total, TINY)))

    def change(self) -> Array:
        """How far the next plain column half-step would move a v_j at most."""
        r, count = self.r, chunk_blocks(self.strip.cols, CHUNK)

        def part(j: Array, worst: Array) -> Array:
            at = chunk(j, count)
            log_b, col_abs = r.log_b[0, 0, :, at], r.col_abs[:, at]
            v = col_abs + jnp.log(jnp.maximum(r.y[:1, at], TINY))
            moved = jnp.abs(self.plain_potential(self.column_sums(at), log_b, col_abs) - v)
            return jnp.maximum(worst, jnp.max(jnp.where(log_b > DEAD / 2, moved, 0)))

        worst = lax.fori_loop(0, self.strip.cols // count, part, jnp.zeros((), self.o.dtype))
        if self.o.dustbin:
            total = self.bin(Bin.SUM) + self.bin(Bin.CORNER) * self.bin(Bin.X)
            col_abs = self.bin(Bin.COL_ABS)
            v = self.plain_potential(total, r.bins[0, 0, 2:3, :], col_abs)
            worst = jnp.maximum(worst, jnp.max(jnp.abs(v - col_abs - jnp.log(self.bin(Bin.Y)))))
        return worst

    def check(self, scaling: Array, live: Array, limit: float, lowest: float | None = None) -> None:
        """Note a scaling beyond exp(+-limit), or exp(lowest), or NaN."""
        fine = (scaling >= math.exp(-limit if lowest is None else lowest)) & (scaling <= math.exp(limit))
        bad = jnp.where(live & ~fine, 1.0, 0.0).astype(self.o.dtype)
        seen = jnp.max(bad, 1, keepdims=True)
        self.r.range[0, 0] = jnp.minimum(self.r.range[0, 0], 1 - jnp.broadcast_to(seen, (1, BLOCK)))
