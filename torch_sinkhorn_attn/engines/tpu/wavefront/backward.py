"""The wavefront backward kernel: a band's row blocks pass through all readings of the tail's adjoint at once.

The mathematics and the names are those of `resident.backward`: P = exp(S + u^R + v^R), of which a row block is kept
from the step that forms it to its last reading.

    entry e = s                 P, dV = P^T dO
    entry e = s - q lag         reading q = 1..R, of iteration r = R + 1 - q: w^r of the column block that comes in,
                                z^(r-1) of the row block, and in the last the cotangents dS, dQ, dK
    entry e = s - (R + 1) lag   dK of a column block is complete
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from torch_sinkhorn_attn.engines.tpu.method.problem import Statics
from torch_sinkhorn_attn.engines.tpu.resident.backward import LEFT, RIGHT, in_parts
from torch_sinkhorn_attn.engines.tpu.resident.strip import (
    LOG2E,
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


class AdjointStatics(NamedTuple):
    """What the kernel compiles in."""

    path: Path
    statics: Statics
    dtype: Any  # of sums
    features: int  # F, of Q and K in whole tiles
    value_width: int  # Ev
    field_parts: int
    mask_floor: float = 0.0  # a float mask drops what is at or below

    @property
    def way(self) -> Way:
        last = self.path.lag * self.statics.kept
        return Way(self.path, last + self.path.lag, last)


class Refs(NamedTuple):
    """The kernel's operands, results and scratch, by name; absent ones are None. Blocks of one row or column block."""

    row: Any  # [n * steps] SMEM: `path.Entries`
    front: Any
    stream: Any  # [N, H] SMEM: dropout's
    row_features: Any  # [1, 1, F+G, 128] Q, with u^R among its features; dO / a, and ra^R z^R
    col_features: Any  # [1, 1, F+Ev', 128] K, with v^R; V
    mask: Any  # [1, 1, 128 or 1, 128 or 1] of each column block
    alive: Any  # [1, 1, 1, 128] beside a float mask: 1 where the row is active
    row_lines: Any  # [1, 1, 2R + 1, 128] ra^1..ra^R, rb^1..rb^R, row sums of P*D
    col_lines: Any  # [1, 1, 2R + 3, 128] first row and end of the columns' intervals; ca, cb and column sums likewise
    rows: Any  # [1, 1, F+R, 128] (dS K)^T, z^0..z^(R-1)
    cols: Any  # [1, 1, F+R, 128] (dS^T Q)^T, w^1..w^R
    grad_value: Any  # [1, 1, G, 128] (P^T dO)^T, and P^T ra^R z^R
    plan: Any  # [ring, 128, C]
    zs: Any  # [ring, R', 128] z^0..z^(R-1) of a row block
    ws: Any  # [held, R', 128] w^1..w^R of a column block
    sums: Any  # [R + 1, touched, 8, 128] column sums of a reading, to be added over sublanes
    y: Any  # [R + 1, touched] line: cb^r w^r
    row_kept: Any  # [ring, F+G, 128] the operands of row and column blocks in flight
    col_kept: Any  # [held, F+Ev', 128]
    row_factors: Any  # [ring, lines, 128]
    lines: Any  # [held, lines, 128]
    field_cols: Any  # [window, f+Ev, 128] the parts of Y, and V
    value_sums: Any  # [touched, G, 128]
    key_sums: Any  # [touched, F, 128]


SEVERAL = ("mask",)


class Columns(NamedTuple):
    """The column block that comes in at a reading."""

    front: Array
    w: Array  # [1, 128]
    y: Array  # line


class LastBlock(NamedTuple):
    """The row block of the last reading."""

    row: Array
    front: Array
    z: list[Array]  # z^0..z^(R-1) [R, 128], once known
    field_cols: Array  # [f+Ev, 128] likewise
    inner: list[Array]  # D - X^T Y by column block, then dS


def kernel(o: AdjointStatics, names: tuple[str, ...], *refs: Any) -> None:
    """The body of a grid step; `names` says which fields of `Refs` are there, in order, those of `SEVERAL` as often as
    they are."""
    Adjoint(o, Refs(*named(names, refs, Refs._fields, SEVERAL))).step()


class Adjoint(Stages):
    """One step of one head. r counts from 0: slot r of the factors belongs to iteration r + 1."""

    def __init__(self, o: AdjointStatics, r: Refs):
        super().__init__(o.path, o.way, o.statics.uniform, o.mask_floor, r)
        self.o, self.s, self.kept = o, o.statics, o.statics.kept

    def step(self) -> None:
        """Products that wait for nothing stand before those that wait for them, for the matrix unit takes them in
        order; and what rings hold is read before anything is written to them."""
        pl.when(self.at == 0)(self.begin)
        columns = {q: self.column_cotangent(q) for q in range(1, self.kept + 1)}
        plans = self.plans()
        last = self.last_block(columns)
        for q in range(1, self.kept):
            self.read(q, columns[q])
        self.last_totals(last, columns[self.kept])
        self.completed_columns()
        self.value_products(plans)
        self.score_products(last)
        self.keep(plans, last, columns)

    def begin(self) -> None:
        """Nothing before the first rows and columns."""
        rows = "plan", "zs", "row_kept", "row_factors"
        columns = "ws", "sums", "y", "col_kept", "lines", "field_cols", "value_sums", "key_sums"
        self.clear(dict.fromkeys(rows, 0), dict.fromkeys(columns, 0))

    # P

    def plans(self) -> tuple[Array, Array, list[Array]]:
        """Row block, front and P of the row block that comes in."""
        r, o, s = self.r, self.o, self.s
        row, front = self.entry(0)
        factor = s.scale / s.epsilon * LOG2E
        keys = [r.col_kept[self.held(column), : o.features, :] for column in self.window(front)[:-1]]
        keys.append(r.col_features[0, 0, : o.features, :])
        query = r.row_features[0, 0, : o.features, :]
        scores = [dot(query, key, (0, 0), o.dtype) * factor for key in keys]
        return row, front, [jnp.exp2(tile) for tile in self.masked_scores(row, front, scores)]

    def value_products(self, plans: tuple[Array, Array, list[Array]]) -> None:
        """What P gives to dV."""
        r, o, s, (row, front, tiles) = self.r, self.o, self.s, plans
        grad, width, parts = r.row_features[0, 0, o.features :, :], o.value_width, []
        for tile, column in zip(tiles, self.window(front)):
            low = tile.astype(grad.dtype)
            if s.dropout_p:
                kept = self.dropped_out(tile, row, column).astype(grad.dtype)
                both = dot(grad[:width], kept, (1, 0), o.dtype), dot(grad[width:], low, (1, 0), o.dtype)
                parts.append(jnp.concatenate(both, 0))
            else:
                parts.append(dot(grad, low, (1, 0), o.dtype))
        self.put(r.value_sums, front, self.added(r.value_sums, front, parts, self.stalled(0)))

    def dropped_out(self, tile: Array, row: Array, column: Array) -> Array:
        p = self.s.dropout_p
        block = column - self.path.width  # without the padding
        keep = dropout_keep(self.r.stream[self.n, self.h], jnp.maximum(row, 0), block, tile.shape, p)
        return jnp.where(keep, tile / (1 - p), 0)

    # The readings

    def value(self, place: Array) -> Array:
        """V of a column block in flight."""
        return self.r.col_kept[place, self.o.features : self.o.features + self.o.value_width, :]

    def row_factors(self, place: Array) -> tuple[Array, Array, Array]:
        """ra and rb, `[R, 128]`, and the row sums of P*D, `[1, 128]`, of a row block in flight."""
        lines, kept = self.r.row_factors[place], self.kept
        return lines[:kept], lines[kept : 2 * kept], lines[2 * kept : 2 * kept + 1]

    def col_factors(self, place: Array) -> tuple[Array, Array, Array]:
        """ca, cb and column sums likewise."""
        lines, kept = self.r.lines[place], self.kept
        return lines[2 : 2 + kept], lines[2 + kept : 2 + 2 * kept], lines[2 + 2 * kept : 3 + 2 * kept]

    def column_cotangent(self, q: int) -> Columns:
        """w of the column block that comes in = own - rho_r ca (P^T ra z), and y = cb w for the row blocks."""
        r, s, o, slot = self.r, self.s, self.o, self.kept - q
        _, front = self.entry(q * self.path.lag)
        new = front - 1
        own: Any = 0
        col_a, col_b, col_sums = self.col_factors(self.held(new))
        if q == 1:
            sums, width = r.value_sums[self.touched(new)], o.value_width
            image = jnp.sum(sums[width:], 0, keepdims=True)
            value = self.value(self.held(new)).astype(o.dtype)
            own = jnp.sum(sums[:width] * value, 0, keepdims=True) + col_sums
            r.grad_value[0, 0] = sums
        else:
            image = over_sublanes(r.sums[q - 1, self.touched(new)])[:1]
        w = own - s.rho_row * col_a[slot : slot + 1] * image
        return Columns(front, w, line_of(col_b[slot : slot + 1] * w))

    def products(self, q: int, columns: Columns) -> tuple[list[Array], Array]:
        """Tiles of P in a reading, and P y, rep."""
        r, slot = self.r, self.slot(q * self.path.lag)
        tiles = [r.plan[slot, :, columns_of(j)] for j in range(self.path.width)]
        lines = [r.y[q, self.touched(column)] for column in self.window(columns.front)[:-1]] + [columns.y]
        return tiles, row_sums([tile * rep_of_line(y) for tile, y in zip(tiles, lines)])

    def read(self, q: int, columns: Columns) -> None:
        """z of the iteration before, and its column sums."""
        r, s, slot, lag = self.r, self.s, self.kept - q, q * self.path.lag
        tiles, total = self.products(q, columns)
        row_a, row_b, _ = self.row_factors(self.slot(lag))
        scale = -s.rho_col * row_b[slot : slot + 1]
        weight = total * along_rows(scale * row_a[slot - 1 : slot])
        sums = self.added(r.sums, columns.front, [fold(tile * weight) for tile in tiles], self.stalled(lag), q)
        self.put(r.sums, columns.front, sums, q)
        r.zs[self.slot(lag), slot : slot + 1, :] = scale * along_lanes(total)

    def last_block(self, columns: dict[int, Columns]) -> LastBlock:
        """dS = P * (D - X^T Y) of the last reading."""
        r, o, s, q = self.r, self.o, self.s, self.kept
        row, front = self.entry(q * self.path.lag)
        place, new = self.slot(q * self.path.lag), front - 1
        row_a, row_b, row_sums = self.row_factors(place)
        z = jnp.concatenate([r.zs[place, 1:q, :], row_sums], 0) if q > 1 else row_sums
        low, held = r.col_kept.dtype, self.held(new)
        field_rows = in_parts(-jnp.concatenate([s.rho_row * row_a * z, row_b], 0), LEFT, o.field_parts, low)
        w = columns[q].w if q == 1 else jnp.concatenate([columns[q].w, r.ws[held, 1:q, :]], 0)
        col_a, col_b, _ = self.col_factors(held)
        y = jnp.concatenate([col_a, s.rho_col * col_b * w], 0)
        field_cols = jnp.concatenate([in_parts(y, RIGHT, o.field_parts, low), self.value(held)], 0)
        grad, found = r.row_kept[place, o.features : o.features + o.value_width, :], []
        for cols, column in zip(self.with_new(r.field_cols, front, field_cols), self.window(front)):
            if s.dropout_p:
                d = self.dropped_out(dot(grad, cols[o.field_parts :], (0, 0), o.dtype), row, column)
                found.append(d + dot(field_rows, cols[: o.field_parts], (0, 0), o.dtype))
            else:
                found.append(dot(jnp.concatenate([field_rows, grad], 0), cols, (0, 0), o.dtype))
        return LastBlock(row, front, [], field_cols, found)

    def last_totals(self, b: LastBlock, columns: Columns) -> None:
        """z^0, and dS from D - X^T Y."""
        r, s, q = self.r, self.s, self.kept
        tiles, total = self.products(q, columns)
        b.inner[:] = [(tile * inner).astype(r.col_kept.dtype) for tile, inner in zip(tiles, b.inner)]
        place = self.slot(q * self.path.lag)
        first = -s.rho_col * self.row_factors(place)[1][:1] * along_lanes(total)
        b.z.append(first if q == 1 else jnp.concatenate([first, r.zs[place, 1:q, :]], 0))

    def score_products(self, b: LastBlock) -> None:
        """What dS gives to dQ and dK."""
        r, o = self.r, self.o
        query = r.row_kept[self.slot(self.kept * self.path.lag), : o.features, :]
        found: Any = 0
        for tile, column in zip(b.inner, self.window(b.front)):
            found = found + dot(r.col_kept[self.held(column), : o.features, :], tile, (1, 1), o.dtype)
        parts = [dot(query, tile, (1, 0), o.dtype) for tile in b.inner]
        keep_unless(b.row >= 0, r.rows, jnp.concatenate([found, *b.z], 0))
        stalled = self.stalled(self.kept * self.path.lag)
        self.put(r.key_sums, b.front, self.added(r.key_sums, b.front, parts, stalled))

    def completed_columns(self) -> None:
        """dK and w of a column block that no row block adds to any more."""
        r = self.r
        _, front = self.entry((self.kept + 1) * self.path.lag)
        w = r.ws[self.held(front - 1), : self.kept, :]
        r.cols[0, 0] = jnp.concatenate([r.key_sums[self.touched(front - 1)], w], 0)

    def keep(self, plans: tuple[Array, Array, list[Array]], last: LastBlock, columns: dict[int, Columns]) -> None:
        """What the steps to come will read."""
        r, (_, front, tiles) = self.r, plans
        slot = self.slot(0)
        for j, tile in enumerate(tiles):
            r.plan[slot, :, columns_of(j)] = tile
        r.row_kept[slot] = r.row_features[0, 0]
        r.row_factors[slot, : 2 * self.kept + 1, :] = r.row_lines[0, 0]
        held = self.held(front - 1)
        r.col_kept[held] = r.col_features[0, 0]
        r.lines[held, : 2 * self.kept + 3, :] = r.col_lines[0, 0]
        r.field_cols[self.in_window(last.front - 1)] = last.field_cols
        for q, found in columns.items():
            new, line = found.front - 1, self.kept - q
            r.ws[self.held(new), line : line + 1, :] = found.w
            r.y[q, self.touched(new)] = found.y
