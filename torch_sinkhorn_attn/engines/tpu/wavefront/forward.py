"""The wavefront forward kernel: a band's row blocks pass through all iterations at once, so that what a core keeps does
not grow with the length.

A grid step is one step of the way (`path`) of one (batch element, head). The mathematics is that of the resident
kernel (`resident.forward`): a strip K_ij = exp(S_ij + u^start_i + v^abs_j), and half-steps that are matrix-vector
products. The strip of a row block stays in a ring in VMEM from the step in which its scores are formed to that of its
last iteration:

    entry e = s                  scores, and the column maxima v^abs is made of
    entry e = s - lag            K, and the column sums for x = 1
    entry e = s - (i + 1) lag    iteration i: y of the column block that comes in, x of the row block, its column sums
    entry e = s - (I + 2) lag    the columns' last sums, where asked for

Each iteration has column sums and y of its own, in rings of a few column blocks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from torch_sinkhorn_attn.engines.tpu.method.problem import Statics
from torch_sinkhorn_attn.engines.tpu.resident.columns import COL_LIMIT, END_LIMIT, TINY
from torch_sinkhorn_attn.engines.tpu.resident.strip import (
    BLOCK,
    DEAD,
    LOG2E,
    SUBLANES,
    along_lanes,
    along_rows,
    dot,
    dropout_keep,
    fold,
)
from torch_sinkhorn_attn.engines.tpu.wavefront.path import Path
from torch_sinkhorn_attn.engines.tpu.wavefront.stages import (
    Stages,
    Way,
    columns_of,
    keep_unless,
    line_of,
    named,
    over_sublanes,
    rep_of_line,
    row_sums,
)


class PassStatics(NamedTuple):
    """What the kernel compiles in. A pass makes iterations 1..base, over-relaxed, and base + 1..base + tail, plain. The
    last pass also has what the output is made of."""

    path: Path
    statics: Statics
    dtype: Any  # of sums and potentials
    base: int
    tail: int
    saved: tuple[int, ...]  # iterations whose potentials are results
    last: bool
    values: bool
    residuals: bool
    mask_floor: float = 0.0  # a float mask drops what is at or below
    unrolled: int = 1  # iterations in one loop body
    accelerated: bool = False  # columns of the base move on from their last two potentials
    dustbin: bool = False  # its part of all sums stands in the lines; of one iteration
    watched: bool = False  # how far the plain half-steps of the columns would go is a result; accelerated too

    @property
    def iterations(self) -> int:
        return self.base + self.tail

    @property
    def plain(self) -> bool:
        """Whether row half-steps are the scalings alone, without logarithms."""
        return self.statics.balanced and self.statics.over_relaxation == 1.0

    @property
    def plain_columns(self) -> bool:
        """Whether column half-steps are."""
        return self.plain and not self.accelerated

    def lag_of(self, iteration: int) -> int:
        """Steps that an iteration is behind."""
        return self.path.lag * (iteration + 1)

    @property
    def way(self) -> Way:
        last = self.lag_of(self.iterations)
        return Way(self.path, last + self.path.lag * self.residuals, last, memory=2 if self.accelerated else 1)


class Refs(NamedTuple):
    """The kernel's operands, results and scratch, by name; absent ones are None. Blocks of one row or column block:
    leading dimensions are 1. "rep" is `[128, 128]`, every lane the same; "line" is `[8, 128]`, every sublane the same.
    """

    row: Any  # [n * steps] SMEM: `path.Entries`
    front: Any
    stream: Any  # [N, H] SMEM: dropout's
    to_plain: Any  # [N * H * base] SMEM: how far v goes towards the plain half-step's value, in each iteration,
    onwards: Any  # and on from the potential before
    query: Any  # [1, 1, E+b, 128]
    key: Any  # [1, 1, E+b, 128]
    row_lines: Any  # [1, 1, 2 or 3, 128] u^start, and log a; DEAD on lines without support; the dustbin's score + v,
    # + u^start
    col_lines: Any  # [1, 1, 3..5, 128] first row and end of the columns' intervals, log b, and where the base is not
    # plain v^start and the v before it; or the dustbin's score + u
    mask: Any  # [1, 1, 128 or 1, 128 or 1] of each column block
    alive: Any  # [1, 1, 1, 128] beside a float mask: 1 where the row is active
    value: Any  # [1, 1, Ev, 128]
    rows: Any  # [1, 1, saved + 2 + Ev, 128] u of the saved iterations, the last x, and what it still has to scale: row
    # sums and P V
    cols: Any  # [1, 1, saved, 128] v of the saved iterations
    col_total: Any  # [1, 1, 1, 128] column sums of the last plan; only with residuals
    changes: Any  # [1, 1, 8 (iterations + 1), 128] the largest changes of v by plain half-steps, 8 lines an iteration
    range: Any  # [1, 1, 1, 128]: 1 while every scaling stayed in range
    strip: Any  # [ring, 128, C]
    row_rep: Any  # [ring] rep: a, or beside relaxation rho (log a + u^start) - u^start
    row_kept: Any  # [ring, lines, 128]: u^start, log a and u of the saved iterations
    col_kept: Any  # [held, lines, 128]: v of the saved iterations
    log_x: Any  # [ring] rep: kept for over-relaxation
    row_bin: Any  # [ring] rep: what the dustbin adds to row sums
    keys: Any  # [window, E+b, 128]
    lines: Any  # [held, lines, 128] `col_lines`
    values: Any  # [window, Ev, 128]
    tops: Any  # [touched, 8, 128] column maxima of the scores, to be taken over sublanes
    col_abs: Any  # [held] line: v^abs, DEAD on dead columns
    col_mass: Any  # [held] line: b, or log b
    col_bin: Any  # [held] line: what the dustbin adds to column sums
    sums: Any  # [iterations + 1, touched, 8, 128] column sums, to be added over sublanes
    y: Any  # [iterations + 1, touched] line: column scaling, 1 on dead columns
    log_y: Any  # [iterations + 2, touched] line: its logarithm, from the start's predecessor on
    worst: Any  # [2, 8, 128]: the largest y and 1 / y


class RowBlock(NamedTuple):
    """A row block in an iteration."""

    row: Array  # its number, or ~ of the last, where none comes in
    front: Array
    slot: Array  # its place in the ring
    tiles: list[Array]  # K, by column block
    weighted: list[Array]  # K y
    total: Array  # row sums of K y, rep
    x: Array  # rep


def kernel(o: PassStatics, names: tuple[str, ...], *refs: Any) -> None:
    """The body of a grid step; `names` says which fields of `Refs` are there, in order, those of `rows`, `cols` and
    `mask` once for each."""
    Wave(o, Refs(*named(names, refs, Refs._fields, ("mask",)))).step()


class Wave(Stages):
    """One step of one head."""

    def __init__(self, o: PassStatics, r: Refs):
        super().__init__(o.path, o.way, o.statics.uniform, o.mask_floor, r)
        self.o, self.s = o, o.statics

    def step(self) -> None:
        """The stages in an order in which everything that a ring holds is read before anything is written to it, so
        that the scheduler may overlap them: they work on different row blocks, `lag` steps apart."""
        o = self.o
        pl.when(self.at == 0)(self.begin)
        alike = max(0, min(o.base, o.saved[0] - 1))  # those before the first that is saved
        unroll = max(1, min(alike, o.unrolled))
        looped = alike // unroll * unroll
        if looped:
            lax.fori_loop(0, alike // unroll, lambda k, _: self.group(1 + k * unroll, unroll, alike=True), None)
        self.group(1 + looped, o.iterations - looped)
        if o.residuals:
            self.column_totals()
        self.exponentials()
        self.scores()
        self.note_range()

    def group(self, first: Any, count: int, alike: bool = False) -> None:
        """Iterations `first` and on."""
        iterations = [(first + g, alike or first + g <= self.o.base) for g in range(count)]
        for i, base in iterations:
            self.column_scaling(i, base)
        found = [self.row_products(i, base) for i, base in iterations]
        for (i, _), x in zip(iterations, found):
            self.column_sums(i, x)
        if not alike:
            for (i, _), x in zip(iterations, found):
                self.results(i, x)

    def begin(self) -> None:
        """Dead rows and columns before the first."""
        dead, dead_col = (0 if plain else DEAD for plain in (self.o.plain, self.o.plain_columns))
        self.clear(
            {"strip": TINY, "row_rep": dead, "row_kept": DEAD, "log_x": 0, "row_bin": 0},
            {
                "keys": 0, "values": 0, "lines": DEAD, "tops": DEAD, "col_abs": DEAD, "col_mass": dead_col,
                "col_bin": 0, "col_kept": 0, "sums": 0, "y": 1, "log_y": 0,
            },
        )  # fmt: skip
        self.r.worst[...] = jnp.zeros_like(self.r.worst)
        self.r.range[...] = jnp.ones_like(self.r.range)
        if self.o.watched:
            self.r.changes[...] = jnp.zeros_like(self.r.changes)

    # The strip

    def scores(self) -> None:
        """The scores of the row block that comes in, and their column maxima."""
        r, s = self.r, self.s
        row, front = self.entry(0)
        new = self.in_window(front - 1)
        slot, factor = self.slot(0), s.scale / s.epsilon * LOG2E
        keys = self.with_new(r.keys, front, r.key[0, 0])
        tiles = self.masked_scores(row, front, [dot(r.query[0, 0], key, (0, 0), self.o.dtype) * factor for key in keys])
        tops = [r.tops[self.touched(column)] for column in self.window(front)]
        tops[-1] = jnp.where(self.stalled(0), tops[-1], DEAD)
        self.put(r.tops, front, [jnp.maximum(top, fold(tile, jnp.maximum)) for top, tile in zip(tops, tiles)])
        for j, tile in enumerate(tiles):
            r.strip[slot, :, columns_of(j)] = tile
        r.keys[new] = r.key[0, 0]
        r.lines[self.held(front - 1), : r.col_lines.shape[2], :] = r.col_lines[0, 0]

    def exponentials(self) -> None:
        """K of a row block whose columns' maxima are known, and its column sums for x = 1."""
        r, o, s, lag = self.r, self.o, self.s, self.path.lag
        row, front = self.entry(lag)
        real, slot = row >= 0, self.slot(lag)
        new = front - 1
        top = jnp.max(r.tops[self.touched(new)], 0, keepdims=True) / LOG2E
        lines = r.lines[self.held(new)]
        log_b = lines[2:3]
        if o.dustbin:
            top = jnp.maximum(top, lines[3:4])
        alive = (top > DEAD / 2) & (log_b > DEAD / 2)
        col_abs = jnp.where(alive, -top, DEAD)
        held = self.held(new)
        r.col_mass[held] = line_of(jnp.exp(log_b) if o.plain_columns else log_b)
        if o.dustbin:
            r.col_bin[held] = line_of(jnp.where(alive, jnp.exp(lines[3:4] + col_abs), 0))
        if r.log_y is not None:
            for place, line in ((1, 3), (0, 4)):
                log_y = jnp.where(alive, lines[line : line + 1] - col_abs, 0)
                r.log_y[place, self.touched(new)] = line_of(log_y)
        shifts = [r.col_abs[self.held(column)] for column in self.window(front)[:-1]] + [line_of(col_abs)]
        tiles = [
            jnp.maximum(jnp.exp2(r.strip[slot, :, columns_of(j)] + rep_of_line(shift) * LOG2E), TINY)
            for j, shift in enumerate(shifts)
        ]
        self.put(r.sums, front, self.added(r.sums, front, [fold(tile) for tile in tiles], self.stalled(lag), 0), 0)
        for j, tile in enumerate(tiles):
            r.strip[slot, :, columns_of(j)] = tile
        r.col_abs[held] = line_of(col_abs)
        start = r.row_lines[0, 0, :1, :]
        log_a = jnp.where(real, r.row_lines[0, 0, 1:2, :], DEAD)
        if o.dustbin:
            r.row_bin[slot] = along_rows(jnp.where(real, jnp.exp(r.row_lines[0, 0, 2:3, :]), 0))
        r.row_rep[slot] = along_rows(jnp.exp(log_a) if o.plain else s.rho_row * (log_a + start) - start)
        r.row_kept[slot, :2, :] = jnp.concatenate([start, log_a], 0)
        if r.log_x is not None:
            r.log_x[slot] = jnp.zeros((BLOCK, BLOCK), o.dtype)

    # The iterations

    def column_scaling(self, i: Any, base: bool) -> None:
        """y of iteration i for the column block that comes in."""
        r, o, s = self.r, self.o, self.s
        _, front = self.entry(self.path.lag * (i + 1))
        new = front - 1
        held, place = self.held(new), self.touched(new)
        total = over_sublanes(r.sums[i - 1, place])
        total = jnp.maximum(total + r.col_bin[held] if o.dustbin else total, TINY)
        mass = r.col_mass[held]
        if o.plain_columns:
            live = mass > 0
            y = jnp.where(live, mass / total, 1)
            inverse = jnp.where(live, total / jnp.where(live, mass, 1), 1)
        else:
            col_abs = r.col_abs[held]
            live = (mass > DEAD / 2) & (col_abs > DEAD / 2)
            log_y = s.rho_col * (mass + col_abs - jnp.log(total)) - col_abs
            if base and o.accelerated:
                old, older = r.log_y[i, place], r.log_y[i - 1, place]
                if o.watched:
                    lines = pl.ds(i * SUBLANES, SUBLANES)
                    change = jnp.where(live, jnp.abs(log_y - old), 0)
                    r.changes[0, 0, lines, :] = jnp.maximum(r.changes[0, 0, lines, :], change)
                at = (self.n * pl.num_programs(1) + self.h) * o.base + i - 1
                log_y = old + r.to_plain[at] * (log_y - old) + r.onwards[at] * (old - older)
            elif base and s.over_relaxation != 1:
                log_y = (1 - s.over_relaxation) * r.log_y[i, place] + s.over_relaxation * log_y
            log_y = jnp.where(live, log_y, 0)
            if r.log_y is not None:
                r.log_y[i + 1, place] = log_y
            y, inverse = jnp.exp(log_y), jnp.exp(-log_y)
        r.y[i, place] = y
        r.worst[0] = jnp.maximum(r.worst[0], y)
        r.worst[1] = jnp.maximum(r.worst[1], inverse)

    def row_products(self, i: Any, base: bool) -> RowBlock:
        """x of iteration i for its row block."""
        r = self.r
        lag = self.path.lag * (i + 1)
        row, front = self.entry(lag)
        slot, columns = self.slot(lag), self.window(front)
        tiles = [r.strip[slot, :, columns_of(j)] for j in range(self.path.width)]
        weighted = [tile * rep_of_line(r.y[i, self.touched(c)]) for tile, c in zip(tiles, columns)]
        total = row_sums(weighted)
        if self.o.dustbin:
            total += r.row_bin[slot]
        return RowBlock(row, front, slot, tiles, weighted, total, self.row_scaling(slot, total, base))

    def column_sums(self, i: Any, b: RowBlock) -> None:
        """The column sums for x, where anything reads them."""
        if isinstance(i, int) and i == self.o.iterations and not self.o.residuals:
            return
        sums, parts = self.r.sums, [fold(tile * b.x) for tile in b.tiles]
        self.put(sums, b.front, self.added(sums, b.front, parts, self.stalled(self.path.lag * (i + 1)), i), i)

    def results(self, i: int, b: RowBlock) -> None:
        """What an iteration that is not only passed through leaves behind."""
        r, o = self.r, self.o
        if i not in o.saved and i != o.iterations:
            return
        x, last = along_lanes(b.x), i == o.iterations
        if i in o.saved:
            self.save(o.saved.index(i), i, b, x)
        if last:
            lines = r.row_kept[b.slot, 2 : 2 + len(o.saved), :]
            if o.last:
                values = [self.values(b)] if o.values else []
                lines = jnp.concatenate([lines, x, along_lanes(b.total), *values], 0)
            keep_unless(b.row >= 0, r.rows, lines)
            r.cols[0, 0] = r.col_kept[self.held(b.front - 1), : len(o.saved), :]

    def row_scaling(self, slot: Array, total: Array, base: bool) -> Array:
        """x for row sums `total`, rep."""
        r, s = self.r, self.s
        if self.o.plain:
            return r.row_rep[slot] / total
        log_x = r.row_rep[slot] - s.rho_row * jnp.log(total)
        if r.log_x is not None:
            if base:
                log_x = (1 - s.over_relaxation) * r.log_x[slot] + s.over_relaxation * log_x
            r.log_x[slot] = log_x
        return jnp.exp(log_x)

    def save(self, k: int, i: int, b: RowBlock, x: Array) -> None:
        """u and v of a saved iteration, in the rings until the last."""
        r, new = self.r, b.front - 1
        start, log_a = r.row_kept[b.slot, 0:1, :], r.row_kept[b.slot, 1:2, :]
        r.row_kept[b.slot, 2 + k : 3 + k, :] = start + jnp.log(jnp.maximum(x, TINY))
        y = r.y[i, self.touched(new)][:1]
        v = r.col_abs[self.held(new)][:1] + jnp.log(jnp.maximum(y, TINY))
        r.col_kept[self.held(new), k : k + 1, :] = v
        fine = (x >= math.exp(-END_LIMIT)) & (x <= math.exp(END_LIMIT))
        self.note(jnp.where((log_a > DEAD / 2) & ~fine, 1.0, 0.0))

    def values(self, b: RowBlock) -> Array:
        """P V of a row block, `[Ev, 128]`, not yet scaled."""
        r, o, p = self.r, self.o, self.s.dropout_p
        total: Any = 0
        values = self.with_new(r.values, b.front, r.value[0, 0])
        for tile, value, column in zip(b.weighted, values, self.window(b.front)):
            if p:
                block = column - self.path.width  # without the padding
                keep = dropout_keep(r.stream[self.n, self.h], jnp.maximum(b.row, 0), block, tile.shape, p)
                tile = jnp.where(keep, tile / (1 - p), 0)
            total = total + dot(value, tile.astype(value.dtype), (1, 1), o.dtype)
        r.values[self.in_window(b.front - 1)] = r.value[0, 0]
        return total

    def column_totals(self) -> None:
        """The column sums of the last plan."""
        r, i = self.r, self.o.iterations
        _, front = self.entry(self.path.lag * (i + 2))
        place = self.touched(front - 1)
        r.col_total[0, 0] = (r.y[i, place] * over_sublanes(r.sums[i, place]))[:1]

    # The range

    def note(self, bad: Array) -> None:
        self.r.range[0, 0] = jnp.minimum(self.r.range[0, 0], 1 - bad.astype(self.o.dtype))

    def note_range(self) -> None:
        """Whether y stayed in range, and is a number."""
        worst = jnp.maximum(self.r.worst[0], self.r.worst[1])[:1]
        self.note(jnp.where(worst <= math.exp(COL_LIMIT), 0.0, 1.0))
