"""The column half-step of the resident forward kernel, and what the kernel works on.

A column's scaling is y_j = exp(v_j - v^abs_j). Balanced it is b / c, without logarithms. Damped, over-relaxed and
accelerated half-steps (`method.acceleration`) are steps of log y, kept beside y:

    log y + to_plain (plain - log y) + onwards (log y - log y before)     plain = rho_c (log b + v^abs - log c) - v^abs
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_sinkhorn_attn.engines.tpu.method.problem import Statics
from torch_sinkhorn_attn.engines.tpu.resident.neighbours import Exchange, Neighbours
from torch_sinkhorn_attn.engines.tpu.resident.strip import (
    BLOCK,
    DEAD,
    SUBLANES,
    Strip,
    chunk,
    chunk_blocks,
    in_pairs,
    side_by_side_of,
)
from torch_sinkhorn_attn.method.acceleration import estimate
from torch_sinkhorn_attn.options import plain_iterations

CHUNK = 32  # blocks of columns taken at once
TINY = 1e-37  # stands for 0 in the strip, so that no sum is 0
# Logarithms of the scalings in range. Entries of K below exp(-85) are lost. y is looked at in every half-step, x at the
# end of the base: half-steps do not expand, so until then x has been within that and twice y's limit; and what is lost
# stays below exp(-15) of a mass. Over-relaxed half-steps do expand: the largest log x of all sweeps is looked at too; a
# small x loses nothing, for it is its logarithm that is kept.
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
    neighbours: Neighbours | None = None  # with whom columns are shared

    @property
    def plain_rows(self) -> bool:
        """Whether row half-steps are the scalings alone, without logarithms."""
        return self.statics.balanced and self.statics.over_relaxation == 1.0

    @property
    def accelerated(self) -> bool:
        """Whether columns of the base gather momentum."""
        s = self.statics
        return s.acceleration is not None and s.stopped > plain_iterations(s.contraction)

    @property
    def plain_columns(self) -> bool:
        """Whether column half-steps are the scalings alone."""
        return self.plain_rows and not self.accelerated

    @property
    def remembers(self) -> bool:
        """Whether a column half-step of the base starts from the potentials before it."""
        return self.accelerated or self.statics.over_relaxation != 1.0


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
    low_mass: Any  # [Lp/2, 128] uint32: `row_rep` likewise
    low_y: Any  # [8, Sp] uint32: y likewise
    row_rep: Any  # [Lp, 128] rep: a, or where rows take logarithms rho (log a + u^start) - u^start, of base 2
    bin_col: Any  # [Lp, 128] rep: the dustbin column's entries of the strip
    bin_row: Any  # [1, Sp]: the dustbin row's
    y: Any  # [8, Sp] column scaling, replicated; 1 on dead columns, so that no row sum is 0
    col_mass: Any  # [8, Sp] b, 1 / b (0 where b is) and 1 where b is 0, replicated
    col_share: Any
    col_dead: Any
    sums: Any  # [8, Sp] column sums, to be added over sublanes
    log_y: Any  # [8, Sp] log y of the base where it steps on from there, 0 on dead columns, replicated
    log_before: Any  # [8, Sp] log y before that
    momentum: Any  # [5, 8, 128]: see `Momentum`
    col_abs: Any  # [1, Sp] v^abs, DEAD on dead columns
    x: Any  # [1, Lp] row scaling of the last saved sweep
    log_x: Any  # [Lp, 128] rep: its logarithm of base 2, kept for over-relaxation
    top_x: Any  # [8, 128]: the largest of them in any sweep, or 0
    plan: Any  # [G, 128, C] K y of a group of row blocks, for the matrix unit
    bin: Any  # [8, 128], the dustbin's scalars: see `Bin`
    sent: Any = None  # see `neighbours`
    got: Any = None
    send_done: Any = None
    got_done: Any = None
    turn: Any = None


class Bin:
    """Rows of `Refs.bin`."""

    X, Y, SUM, COL_ABS, CORNER, LOG_Y, LOG_BEFORE = range(7)


class Momentum:
    """Entries of `Refs.momentum`, one number in each: g, mu^2 / 4 and omega of `method.acceleration`. WEIGHT is that of
    mu^2 / 4 in the next omega: 2, and then omega."""

    LOG_CHANGE, G, QUARTER, OMEGA, WEIGHT = range(5)


class Step(NamedTuple):
    """How far log y goes: numbers, or `[8, 128]` of one number. None: all the way to the plain value, and not
    onwards."""

    to_plain: Any = None
    onwards: Any = None


class ColumnHalfStep:
    """y from the column sums of one head."""

    def __init__(self, o: SolveStatics, r: Refs):
        self.o, self.r, self.s, self.strip = o, r, o.statics, o.strip
        self.n, self.h = pl.program_id(0), pl.program_id(1)
        self.exchange = Exchange(o.neighbours, r)

    def bin(self, row: int) -> Array:
        """A scalar of the dustbin, `[1, 128]`."""
        return self.r.bin[row : row + 1, :]

    def start_columns(self, alive: Array) -> None:
        """What column half-steps go on from; `alive [1, Sp]` says which columns are not dead."""
        r, o, s = self.r, self.o, self.s
        if o.plain_columns:
            mass = jnp.exp(r.log_b[0, 0])
            r.col_mass[...] = jnp.broadcast_to(mass, r.col_mass.shape)
            r.col_share[...] = jnp.broadcast_to(jnp.where(mass > 0, 1 / mass, 0), r.col_share.shape)
            r.col_dead[...] = jnp.broadcast_to(jnp.where(mass > 0, 0, 1).astype(o.dtype), r.col_dead.shape)
        if o.remembers:
            log_y = jnp.where(alive, r.start_col[0, 0] - r.col_abs[...], 0)
            r.log_y[...] = jnp.broadcast_to(log_y, r.log_y.shape)
            if o.dustbin:
                self._set_bin(Bin.LOG_Y, r.bins[0, 0, 4:5, :] - self.bin(Bin.COL_ABS))
        if o.accelerated:
            r.log_before[...] = r.log_y[...]
            if o.dustbin:
                self._set_bin(Bin.LOG_BEFORE, self.bin(Bin.LOG_Y))
            one = jnp.ones((SUBLANES, BLOCK), o.dtype)
            r.momentum[Momentum.LOG_CHANGE] = 0 * one
            r.momentum[Momentum.OMEGA], r.momentum[Momentum.WEIGHT] = one, 2 * one
            self._set_contraction(s.contraction * one)

    def update_columns(self, t: Any = None) -> None:
        """y from the column sums, which are taken, and whether it is in range. `t` counts the iterations of the base
        from 0; None in the tail."""
        self._complete_sums()
        step = self._step(t)
        if self.o.plain_columns:
            self._divide_columns()
        else:
            self._move_columns(step)
        if self.o.dustbin:
            self._move_bin(step)

    def _complete_sums(self) -> None:
        """The column sums with the neighbours' parts, in the first sublane."""
        if self.o.neighbours is None:
            return
        sums = self.r.sums
        total = self.exchange.complete(jnp.sum(sums[...], 0, keepdims=True), jnp.add)
        sums[...] = jnp.concatenate([total, jnp.zeros((SUBLANES - 1, total.shape[1]), self.o.dtype)], 0)

    def _step(self, t: Any) -> Step:
        r, s = self.r, self.s
        if not self.o.accelerated:
            return Step(None if t is None or s.over_relaxation == 1 else s.over_relaxation)
        if t is None or isinstance(t, int):  # the first
            return Step()
        first = plain_iterations(s.contraction)
        if not s.contraction:
            pl.when(t < first)(lambda: self._measure(t == first - 1))
        names = Momentum.G, Momentum.QUARTER, Momentum.OMEGA, Momentum.WEIGHT
        g, quarter, omega, weight = (r.momentum[name] for name in names)
        moves = t >= first
        following = jnp.where(moves, 1 / (1 - weight * quarter), omega)
        r.momentum[Momentum.OMEGA] = following
        r.momentum[Momentum.WEIGHT] = jnp.where(moves, following, weight)
        return Step(jnp.where(moves, omega * g, 1), jnp.where(moves, omega - 1, 0))

    def _measure(self, last: Array) -> None:
        """Note the norm of the change to come, and after the last of them lambda."""
        r, change = self.r, self._log_change()
        lam = estimate(change, r.momentum[Momentum.LOG_CHANGE])
        r.momentum[Momentum.LOG_CHANGE] = change
        self._set_contraction(jnp.where(last, lam, 0))

    def _set_contraction(self, lam: Array) -> None:
        mu = lam / (2 - lam)
        self.r.momentum[Momentum.G], self.r.momentum[Momentum.QUARTER] = 2 / (2 - lam), mu * mu / 4

    def _log_change(self) -> Array:
        """log ||F(v) - v||_b, `[8, 128]`; -inf for 0. By running logarithms of sums, lane by lane."""
        r, count = self.r, chunk_blocks(self.strip.cols, CHUNK)

        def part(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            top, total = carry
            at = chunk(j, count)
            terms = _log_square(self.moves(at)) + r.log_b[0, 0, :, at]
            new = jnp.maximum(top, _over_blocks(jnp.maximum, terms))
            added = jnp.exp(terms - side_by_side_of(new, terms.shape[1]))
            return new, total * jnp.exp(top - new) + _over_blocks(jnp.add, added)

        zero = jnp.zeros((SUBLANES, BLOCK), self.o.dtype)
        lanes, total = lax.fori_loop(0, self.strip.cols // count, part, (zero + 2 * DEAD, zero))
        top = jnp.max(lanes, 1, keepdims=True)
        if self.o.dustbin:
            own = (_log_square(self.bin_move()) + r.bins[0, 0, 2:3, :])[:, :1]
            top = jnp.maximum(top, own)
        total = jnp.sum(total * jnp.exp(lanes - top), 1, keepdims=True)
        if self.o.dustbin:
            total = total + jnp.exp(own - top)
        found = jnp.where(top > DEAD / 2, (top + jnp.log(total)) / 2, -math.inf)
        return jnp.broadcast_to(found, zero.shape)

    def _divide_columns(self) -> None:
        """y = b / c, in every sublane at once, and its range by running maxima of y and 1 / y."""
        r, count = self.r, chunk_blocks(self.strip.cols, CHUNK)

        def part(j: Array, worst: tuple[Array, Array]) -> tuple[Array, Array]:
            at = chunk(j, count)
            total = self._take_sums(at)
            y = r.col_mass[:, at] / total + r.col_dead[:, at]
            self._put_y(at, y)
            top, inverse = (_over_blocks(jnp.maximum, x) for x in (y, total * r.col_share[:, at]))
            return jnp.maximum(worst[0], top), jnp.maximum(worst[1], inverse)

        ones = jnp.zeros((SUBLANES, BLOCK), self.o.dtype)
        top, inverse = lax.fori_loop(0, self.strip.cols // count, part, (ones, ones))
        self.check(jnp.maximum(top, inverse)[:1], jnp.ones((1, BLOCK)) > 0, COL_LIMIT, -math.inf)

    def _move_columns(self, step: Step) -> None:
        """log y by a step, y from it, and its range by the largest |log y|."""
        r, o, count = self.r, self.o, chunk_blocks(self.strip.cols, CHUNK)

        def part(j: Array, worst: Array) -> Array:
            at = chunk(j, count)
            plain = self.plain_log(self._take_sums(at), r.log_b[0, 0, :, at], r.col_abs[:, at])
            log_y = plain
            if step.to_plain is not None:
                old, before = r.log_y[:, at], None if step.onwards is None else r.log_before[:, at]
                log_y = self._moved(step, plain, old, before)
                if step.onwards is not None:
                    r.log_before[:, at] = old
            log_y = jnp.where(r.log_b[0, 0, :, at] > DEAD / 2, log_y, 0)
            if o.remembers:
                r.log_y[:, at] = log_y
            self._put_y(at, jnp.exp(log_y))
            return jnp.maximum(worst, _over_blocks(jnp.maximum, jnp.abs(log_y)))

        zero = jnp.zeros((SUBLANES, BLOCK), o.dtype)
        worst = lax.fori_loop(0, self.strip.cols // count, part, zero)
        self.check(jnp.exp(worst)[:1], jnp.ones((1, BLOCK)) > 0, COL_LIMIT)

    def _put_y(self, at: Any, y: Array) -> None:
        self.r.y[:, at] = y
        if self.o.low_base:
            self.r.low_y[:, at] = in_pairs(jnp.concatenate([y, y], 0))

    def _move_bin(self, step: Step) -> None:
        """The dustbin column's y."""
        live = self.r.bins[0, 0, 2:3, :] > DEAD / 2
        log_y = plain = self._plain_bin()
        if step.to_plain is not None:
            step = Step(*(x[:1] if isinstance(x, Array) else x for x in step))
            old, before = self.bin(Bin.LOG_Y), None if step.onwards is None else self.bin(Bin.LOG_BEFORE)
            log_y = self._moved(step, plain, old, before)
            if step.onwards is not None:
                self._set_bin(Bin.LOG_BEFORE, old)
        log_y = jnp.where(live, log_y, 0)
        if self.o.remembers:
            self._set_bin(Bin.LOG_Y, log_y)
        y = jnp.exp(log_y)
        self._set_bin(Bin.Y, y)
        self.check(y, live, COL_LIMIT)

    def _moved(self, step: Step, plain: Array, old: Array, before: Array | None) -> Array:
        """A step from `old`; all of one shape, in whole blocks of lanes."""
        to_plain, onwards = (side_by_side_of(x, old.shape[1]) for x in step)
        found = old + to_plain * (plain - old)
        return found if before is None else found + onwards * (old - before)

    def _set_bin(self, row: int, value: Array) -> None:
        self.r.bin[row : row + 1, :] = value

    def column_sums(self, at: Any) -> Array:
        """Sums of K x at some columns, the dustbin's part included, `[8, columns]` in every sublane; never 0."""
        total = self.r.sums[:, at]
        for shift in (4, 2, 1):
            total = total + pltpu.roll(total, shift, 0)
        if self.o.dustbin:
            total = total + self.r.bin_row[:, at] * self.bin(Bin.X)[:, :1]
        return jnp.maximum(total, TINY)

    def _take_sums(self, at: Any) -> Array:
        """`column_sums`, and zeros in their place, for the sweep to come."""
        total = self.column_sums(at)
        self.r.sums[:, at] = jnp.zeros_like(total)
        return total

    def plain_log(self, total: Array, log_b: Array, col_abs: Array) -> Array:
        """log y of the plain half-step; anything on dead columns."""
        if self.s.rho_col == 1:
            return log_b - jnp.log(total)
        return self.s.rho_col * (log_b + col_abs - jnp.log(total)) - col_abs

    def _plain_bin(self) -> Array:
        total = jnp.maximum(self.bin(Bin.SUM) + self.bin(Bin.CORNER) * self.bin(Bin.X), TINY)
        return self.plain_log(total, self.r.bins[0, 0, 2:3, :], self.bin(Bin.COL_ABS))

    def moves(self, at: Any) -> Array:
        """How far the plain half-step would move log y, `[8, columns]`; 0 on dead columns."""
        r = self.r
        log_b = r.log_b[0, 0, :, at]
        old = r.log_y[:, at] if self.o.remembers else jnp.log(jnp.maximum(r.y[:, at], TINY))
        return jnp.where(log_b > DEAD / 2, self.plain_log(self.column_sums(at), log_b, r.col_abs[:, at]) - old, 0)

    def bin_move(self) -> Array:
        """Likewise the dustbin's, `[1, 128]`."""
        old = self.bin(Bin.LOG_Y) if self.o.remembers else jnp.log(self.bin(Bin.Y))
        return jnp.where(self.r.bins[0, 0, 2:3, :] > DEAD / 2, self._plain_bin() - old, 0)

    def change(self) -> Array:
        """How far the next plain column half-step would move a v_j at most."""
        count = chunk_blocks(self.strip.cols, CHUNK)

        def part(j: Array, worst: Array) -> Array:
            return jnp.maximum(worst, jnp.max(jnp.abs(self.moves(chunk(j, count)))))

        worst = lax.fori_loop(0, self.strip.cols // count, part, jnp.zeros((), self.o.dtype))
        return jnp.maximum(worst, jnp.max(jnp.abs(self.bin_move()))) if self.o.dustbin else worst

    def check(self, scaling: Array, live: Array, limit: float, lowest: float | None = None) -> None:
        """Note a scaling beyond exp(+-limit), or exp(lowest), or NaN."""
        fine = (scaling >= math.exp(-limit if lowest is None else lowest)) & (scaling <= math.exp(limit))
        bad = jnp.where(live & ~fine, 1.0, 0.0).astype(self.o.dtype)
        self.r.range[0, 0] = jnp.minimum(self.r.range[0, 0], 1 - _over_blocks(jnp.maximum, bad))


def _log_square(x: Array) -> Array:
    """2 log |x|; 2 DEAD for 0."""
    size = jnp.abs(x)
    return 2 * jnp.where(size > 0, jnp.log(jnp.where(size > 0, size, 1)), DEAD)


def _over_blocks(combine: Callable[[Array, Array], Array], x: Array) -> Array:
    """`[8, C]` taken together over blocks of lanes, `[8, 128]`."""
    return functools.reduce(combine, (x[:, i : i + BLOCK] for i in range(0, x.shape[1], BLOCK)))
