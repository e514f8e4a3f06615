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
    BLOCK,
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
    fill,
    keep_unless,
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
    value_width: int
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
    query: Any  # [1, 1, E+b, 128], with u^R among its features
    head_key: Any  # [1, 1, E+b, 128], with v^R
    grad: Any  # [1, 1, Ev+b, 128] dO / a, and ra^R z^R
    col_lo: Any  # [1, 1, 1, 128]
    col_hi: Any
    mask: Any  # [1, 1, 128 or 1, 128 or 1] of each column block
    alive: Any  # [1, 1, 1, 128] beside a float mask: 1 where the row is active
    first_value: Any  # [1, 1, Ev, 128]: V at the first reading,
    first_col_sums: Any  # [1, 1, 1, 128] and column sums of P*D
    row_a: Any  # [1, 1, R, 128] ra^1..ra^R, at each reading
    row_b: Any
    col_a: Any
    col_b: Any
    last_row_sums: Any  # [1, 1, 1, 128] of P*D, at the last reading
    last_query: Any
    last_key: Any
    last_value: Any
    last_grad: Any
    grad_query: Any  # [1, 1, 128, E+b] dS K
    grad_key: Any  # [1, 1, E+b, 128] (dS^T Q)^T
    grad_value: Any  # [1, 1, Ev+b, 128] (P^T dO)^T, and P^T ra^R z^R
    z: Any  # [1, 1, R, 128] z^0..z^(R-1)
    w: Any  # [1, 1, R, 128] w^1..w^R
    plan: Any  # [ring, 128, C]
    zs: Any  # [ring, R', 128] z^0..z^(R-1) of a row block
    ws: Any  # [held, R', 128] w^1..w^R of a column block
    sums: Any  # [R + 1, touched, 8, 128] column sums of a reading, to be added over sublanes
    y: Any  # [R + 1, touched] line: cb^r w^r
    los: Any  # [window] line, int32
    his: Any
    keys: Any  # [window, E+b, 128]
    last_keys: Any
    field_cols: Any  # [window, f+Ev, 128] the parts of Y, and V
    value_sums: Any  # [touched, Ev+b, 128]
    key_sums: Any  # [touched, E+b, 128]


SEVERAL = ("mask", "row_a", "row_b", "col_a", "col_b")


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
        pl.when(self.at == 0)(self.clear)
        for q in range(1, self.kept + 1):
            self.column_cotangent(q)
        for q in range(1, self.kept):
            self.read(q)
        self.last_reading()
        self.completed_keys()
        self.form_plan()

    def clear(self) -> None:
        """What is read before it is written must be numbers."""
        r = self.r
        for ref in (r.plan, r.zs, r.ws, r.sums, r.y, r.los, r.his, r.last_keys, r.field_cols, r.value_sums, r.key_sums):
            fill(ref, 0)

    def begin(self, ref: Any, lag: int, front: Array, *index: Any) -> None:
        """Sums of the column block that comes in begin at 0."""
        at = (*index, self.touched(front - 1))
        ref[at] = jnp.where(self.stalled(lag), ref[at], 0)

    # P

    def form_plan(self) -> None:
        """P of the row block that comes in, and what it gives to dV."""
        r, o, s = self.r, self.o, self.s
        row, front = self.entry(0)
        r.keys[self.in_window(front - 1)] = r.head_key[0, 0]
        self.take_in(front)
        slot, factor = self.slot(0), s.scale / s.epsilon * LOG2E
        self.begin(r.value_sums, 0, front)
        grad, plans = r.grad[0, 0], []
        for j, column in enumerate(self.window(front)):
            scores = dot(r.query[0, 0], r.keys[self.in_window(column)], (0, 0), o.dtype) * factor
            plans.append(jnp.exp2(self.masked_scores(row, column, j, scores)))
        for plan, column in zip(plans, self.window(front)):
            low, at = plan.astype(grad.dtype), self.touched(column)
            if s.dropout_p:
                kept = self.dropped_out(plan, row, column).astype(grad.dtype)
                width = o.value_width
                parts = [dot(grad[:width], kept, (1, 0), o.dtype), dot(grad[width:], low, (1, 0), o.dtype)]
                found = jnp.concatenate(parts, 0)
            else:
                found = dot(grad, low, (1, 0), o.dtype)
            r.value_sums[at] = r.value_sums[at] + found
        for j, plan in enumerate(plans):
            r.plan[slot, :, columns_of(j)] = plan

    def dropped_out(self, tile: Array, row: Array, column: Array) -> Array:
        p = self.s.dropout_p
        block = column - self.path.width  # without the padding
        keep = dropout_keep(self.r.stream[self.n, self.h], jnp.maximum(row, 0), block, tile.shape, p)
        return jnp.where(keep, tile / (1 - p), 0)

    # The readings

    def column_cotangent(self, q: int) -> None:
        """w of the column block that comes in = own - rho_r ca (P^T ra z), and y = cb w for the row blocks."""
        r, s, o, slot = self.r, self.s, self.o, self.kept - q
        _, front = self.entry(q * self.path.lag)
        new = front - 1
        own: Any = 0
        if q == 1:
            sums = r.value_sums[self.touched(new)]
            width = o.value_width
            image = jnp.sum(sums[width:], 0, keepdims=True)
            own = jnp.sum(sums[:width] * r.first_value[0, 0].astype(o.dtype), 0, keepdims=True) + r.first_col_sums[0, 0]
            r.grad_value[0, 0] = sums
        else:
            image = over_sublanes(r.sums[q - 1, self.touched(new)])[:1]
        w = own - s.rho_row * r.col_a[q - 1][0, 0, slot : slot + 1, :] * image
        r.ws[self.held(new), slot : slot + 1, :] = w
        y = r.col_b[q - 1][0, 0, slot : slot + 1, :] * w
        r.y[q, self.touched(new)] = jnp.broadcast_to(y, (SUBLANES, BLOCK))

    def products(self, q: int) -> tuple[Array, Array, list[Array], list[Array], Array]:
        """Row block, its place, columns and tiles of P in a reading, and P y, rep."""
        r = self.r
        row, front = self.entry(q * self.path.lag)
        slot, columns = self.slot(q * self.path.lag), self.window(front)
        tiles = [r.plan[slot, :, columns_of(j)] for j in range(self.path.width)]
        weighted = [tile * rep_of_line(r.y[q, self.touched(c)]) for tile, c in zip(tiles, columns)]
        return row, slot, columns, tiles, row_sums(weighted)

    def read(self, q: int) -> None:
        """z of the iteration before, and its column sums."""
        r, s, slot = self.r, self.s, self.kept - q
        _, place, columns, tiles, total = self.products(q)
        scale = -s.rho_col * r.row_b[q - 1][0, 0, slot : slot + 1, :]
        r.zs[place, slot : slot + 1, :] = scale * along_lanes(total)
        weight = total * along_rows(scale * r.row_a[q - 1][0, 0, slot - 1 : slot, :])
        self.begin(r.sums, q * self.path.lag, columns[-1] + 1, q)
        for tile, column in zip(tiles, columns):
            at = self.touched(column)
            r.sums[q, at] = r.sums[q, at] + fold(tile * weight)

    def last_reading(self) -> None:
        """z^0, and dS = P * (D - X^T Y) with what it gives to dQ and dK."""
        r, o, s, q = self.r, self.o, self.s, self.kept
        row, place, columns, tiles, total = self.products(q)
        front, real = columns[-1] + 1, row >= 0
        row_a, row_b = r.row_a[q - 1][0, 0], r.row_b[q - 1][0, 0]
        r.zs[place, 0:1, :] = -s.rho_col * row_b[:1] * along_lanes(total)
        z = jnp.concatenate([r.zs[place, 1:q, :], r.last_row_sums[0, 0]], 0) if q > 1 else r.last_row_sums[0, 0]
        x = jnp.concatenate([s.rho_row * row_a * z, row_b], 0)
        low = r.last_value.dtype
        field_rows = in_parts(-x, LEFT, o.field_parts, low)
        new = front - 1
        w = r.ws[self.held(new), :q, :]
        y = jnp.concatenate([r.col_a[q - 1][0, 0], s.rho_col * r.col_b[q - 1][0, 0] * w], 0)
        at = self.in_window(new)
        r.field_cols[at, : o.field_parts, :] = in_parts(y, RIGHT, o.field_parts, low)
        r.field_cols[at, o.field_parts :, :] = r.last_value[0, 0]
        r.last_keys[at] = r.last_key[0, 0]
        self.begin(r.key_sums, q * self.path.lag, front)
        keep_unless(real, r.z, r.zs[place, :q, :])
        r.w[0, 0] = w
        grad = r.last_grad[0, 0, : o.value_width, :]
        grad_scores = []
        for tile, column in zip(tiles, columns):
            cols = r.field_cols[self.in_window(column)]
            if s.dropout_p:
                d = self.dropped_out(dot(grad, cols[o.field_parts :], (0, 0), o.dtype), row, column)
                inner = d + dot(field_rows, cols[: o.field_parts], (0, 0), o.dtype)
            else:
                inner = dot(jnp.concatenate([field_rows, grad], 0), cols, (0, 0), o.dtype)
            grad_scores.append((tile * inner).astype(low))
        found: Any = 0
        for tile, column in zip(grad_scores, columns):
            found = found + dot(tile, r.last_keys[self.in_window(column)], (1, 1), o.dtype)
        keep_unless(real, r.grad_query, found)
        for tile, column in zip(grad_scores, columns):
            at = self.touched(column)
            r.key_sums[at] = r.key_sums[at] + dot(r.last_query[0, 0], tile, (1, 0), o.dtype)

    def completed_keys(self) -> None:
        _, front = self.entry((self.kept + 1) * self.path.lag)
        self.r.grad_key[0, 0] = self.r.key_sums[self.touched(front - 1)]
