"""The resident backward kernel: one head's plan stays in VMEM for all passes of the tail's adjoint.

P = exp(S + u^R + v^R) is filled once. The factors of the staircase are P with row and column exponentials of dual
differences outside of it, A^r = ra^r_i P_ij ca^r_j and B^r = rb^r_i P_ij cb^r_j (the caller sees to it that none is
large), so every pass is a matrix-vector product with P, and a row and the next column pass share one reading:

    fill     P, dV = P^T dO;   w^R = colsum(P*D) - rho_r ca^R (P^T ra^R z^R)
    r = R..2 z^(r-1) = -rho_c rb^r (P cb^r w^r);   w^(r-1) = -rho_r ca^(r-1) (P^T ra^(r-1) z^(r-1))
    last     z^0 likewise;   dS = P * (D - X^T Y);   dQ += dS K,  dK += dS^T Q

X and Y stack the weighted factors, `[2R, L]` and `[2R, S]`, so that the field is a product on the matrix unit beside
D = <dO_i, V_j>.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from torch_sinkhorn_attn.engines.tpu.method.problem import Statics
from torch_sinkhorn_attn.engines.tpu.resident.neighbours import Exchange, Neighbours
from torch_sinkhorn_attn.engines.tpu.resident.strip import (
    Strip,
    along_lanes,
    along_rows,
    columns_of,
    dot,
    dropout_keep,
    fold,
    masked_scores,
    over_blocks,
    over_chunks,
    replicated,
    row_sums,
    rows_of,
    side_by_side,
)

FIELD_CHUNK = 8  # blocks of lanes


class AdjointStatics(NamedTuple):
    """What the kernel compiles in."""

    strip: Strip
    statics: Statics
    dtype: Any  # of sums
    value_width: int
    field_parts: int
    dustbin: bool
    neighbours: Neighbours | None = None  # with whom columns are shared


class Refs(NamedTuple):
    """The kernel's operands, results and scratch, by name; absent ones are None. Blocks of one head."""

    first: Any  # [N, rows] SMEM
    stream: Any  # [N, H] SMEM: dropout's
    query: Any  # [1, 1, E+b, Lp], with u^R among its features
    head_key: Any  # [1, 1, E+b, Sp], with v^R
    value: Any  # [1, 1, Ev, Sp]
    grad: Any  # [1, 1, Ev+b, Lp] dO / a, and ra^R z^R
    col_lo: Any  # [1, 1, Sp]
    col_hi: Any
    row_sums: Any  # [1, 1, 1, Lp] of P*D
    col_sums: Any  # [1, 1, 1, Sp] likewise, the dustbin's part only
    row_a: Any  # [1, 1, R, Lp] ra^1..ra^R
    row_b: Any
    col_a: Any  # [1, 1, R, Sp]
    col_b: Any
    plan_col: Any  # [1, 1, 1, Lp] P at the dustbin's column
    plan_row: Any  # [1, 1, 1, Sp] and row
    bins: Any  # [1, 1, 3 + 4 R, 128] its scalars: P at the corner, row and column sums of P*D, ra, rb, ca, cb there
    grad_query: Any  # [1, 1, Lp, E+b] dS K
    grad_key: Any  # [1, 1, E+b, Sp] (dS^T Q)^T
    grad_value: Any  # [1, 1, Ev+b, Sp] (P^T dO)^T, and P^T ra^R z^R
    z: Any  # [1, 1, R+1, Lp] z^0..z^R
    w: Any  # [1, 1, R, Sp] w^1..w^R
    bin_z: Any  # [1, 1, R+1, 128]
    bin_w: Any  # [1, 1, R, 128]
    strip: Any  # [Lp, C]
    sums: Any  # [8, Sp] column sums, to be added over sublanes
    y: Any  # [8, Sp] cb^r w^r, replicated
    inner: Any  # [G, 128, C] D - X^T Y of a group of row blocks
    grad_scores: Any  # [G, 128, C] their dS
    field_rows: Any  # [Ev+f, Lp] dO and the parts of X
    field_cols: Any  # [Ev+f, Sp] V and the parts of Y
    sent: Any = None  # see `neighbours`
    got: Any = None
    send_done: Any = None
    got_done: Any = None
    turn: Any = None


def kernel(o: AdjointStatics, names: tuple[str, ...], *refs: Any) -> None:
    """The body of a grid step; `names` says which fields of `Refs` are there, in order."""
    present = dict(zip(names, refs, strict=True))
    Adjoint(o, Refs(*(present.get(name) for name in Refs._fields))).run()


class Adjoint:
    """One head's adjoint. r counts from 0 here: slot r of the factors belongs to iteration r + 1."""

    def __init__(self, o: AdjointStatics, r: Refs):
        self.o, self.r, self.s, self.strip = o, r, o.statics, o.strip
        self.n, self.h = pl.program_id(0), pl.program_id(1)
        self.exchange = Exchange(o.neighbours, r)

    def run(self) -> None:
        r, last = self.r, self.s.kept - 1
        self.exchange.begin()
        r.z[0, 0, last + 1 :, :] = r.row_sums[0, 0]
        if self.o.dustbin:
            r.bin_z[0, 0, last + 1 :, :] = self.bin(1)
        r.grad_key[...] = jnp.zeros_like(r.grad_key)
        r.grad_value[...] = jnp.zeros_like(r.grad_value)
        self.over_blocks(self.fill_scores, self.fill)
        width = self.o.value_width
        image = jnp.sum(r.grad_value[0, 0, width:, :], 0, keepdims=True)
        own = jnp.sum(r.grad_value[0, 0, :width, :] * r.value[0, 0].astype(self.o.dtype), 0, keepdims=True)
        self.column_cotangent(last, own + r.col_sums[0, 0], self.bin(2) if self.o.dustbin else None, image)

        def step(k: Array, carry: None) -> None:
            at = last - k
            self.over_blocks(lambda block, _: self.sweep(block, at))
            self.row_cotangent(at)
            self.column_cotangent(at - 1, 0.0, 0.0, jnp.sum(r.sums[...], 0, keepdims=True))

        if last:
            lax.fori_loop(0, last, step, None)
        self.stack_field()
        self.over_blocks(self.weights_cotangent, self.scores, self.gradients)
        self.row_cotangent(0)

    def over_blocks(self, *stages: Any) -> None:
        """The stages over all row blocks, with new column sums."""
        self.r.sums[...] = jnp.zeros_like(self.r.sums)
        over_blocks(self.strip, *stages)

    def bin(self, row: Any) -> Array:
        """A scalar of the dustbin, `[1, 128]`."""
        return self.r.bins[0, 0, pl.ds(row, 1), :]

    def bin_factor(self, which: int, r: Any) -> Array:
        """ra, rb, ca, cb (0..3) of slot r at the dustbin."""
        return self.bin(3 + which * self.s.kept + r)

    # The passes over row blocks

    def fill_scores(self, block: Array, g: int) -> None:
        r = self.r
        cols = columns_of(r.first[self.n, block], self.strip)
        r.inner[g] = masked_scores(r, r.head_key, block, cols, self.s, self.o.dtype)

    def fill(self, block: Array, g: int) -> None:
        r, o = self.r, self.o
        at, cols = rows_of(block), columns_of(r.first[self.n, block], self.strip)
        plan = jnp.exp2(r.inner[g])
        r.strip[at, :] = plan
        grad, low = r.grad[0, 0, :, at], plan.astype(r.grad.dtype)
        if self.s.dropout_p:
            kept = self.dropped_out(plan, block).astype(r.grad.dtype)
            parts = [
                dot(grad[: o.value_width], kept, (1, 0), o.dtype),
                dot(grad[o.value_width :], low, (1, 0), o.dtype),
            ]
            found = jnp.concatenate(parts, 0)
        else:
            found = dot(grad, low, (1, 0), o.dtype)
        r.grad_value[0, 0, :, cols] = r.grad_value[0, 0, :, cols] + found

    def row_products(self, block: Array, plan: Array, slot: Any) -> Array:
        """P cb w on a row block, rep, the dustbin's column included."""
        r, at = self.r, rows_of(block)
        cols = columns_of(r.first[self.n, block], self.strip)
        total = row_sums(plan * replicated(r.y[:, cols]), self.strip)
        if self.o.dustbin:
            weight = self.bin_factor(3, slot) * r.bin_w[0, 0, pl.ds(slot, 1), :]
            total = total + along_rows(r.plan_col[0, 0, :, at] * weight)
        return total

    def sweep(self, block: Array, slot: Array) -> None:
        """z of the slot below from w of this one, and its column sums."""
        r, s = self.r, self.s
        at, cols = rows_of(block), columns_of(r.first[self.n, block], self.strip)
        plan = r.strip[at, :]
        total = self.row_products(block, plan, slot)
        scale = -s.rho_col * r.row_b[0, 0, pl.ds(slot, 1), at]
        r.z[0, 0, pl.ds(slot, 1), at] = scale * along_lanes(total)
        weight = total * along_rows(scale * r.row_a[0, 0, pl.ds(slot - 1, 1), at])
        weight = side_by_side(weight, self.strip)
        r.sums[:, cols] = r.sums[:, cols] + fold(plan * weight)

    def weights_cotangent(self, block: Array, g: int) -> None:
        """D - X^T Y."""
        r, o = self.r, self.o
        at, cols = rows_of(block), columns_of(r.first[self.n, block], self.strip)
        split_at = o.field_parts
        if self.s.dropout_p:
            d = dot(r.field_rows[split_at:, at], r.field_cols[split_at:, cols], (0, 0), o.dtype)
            field = dot(r.field_rows[:split_at, at], r.field_cols[:split_at, cols], (0, 0), o.dtype)
            r.inner[g] = self.dropped_out(d, block) + field
        else:
            r.inner[g] = dot(r.field_rows[:, at], r.field_cols[:, cols], (0, 0), o.dtype)

    def scores(self, block: Array, g: int) -> None:
        """dS and z^0."""
        r, at = self.r, rows_of(block)
        plan = r.strip[at, :]
        total = self.row_products(block, plan, 0)
        r.z[0, 0, :1, at] = -self.s.rho_col * r.row_b[0, 0, :1, at] * along_lanes(total)
        r.grad_scores[g] = (plan * r.inner[g]).astype(r.grad_scores.dtype)

    def gradients(self, block: Array, g: int) -> None:
        """What dS gives to dQ and dK."""
        r, o = self.r, self.o
        at, cols = rows_of(block), columns_of(r.first[self.n, block], self.strip)
        grad_scores = r.grad_scores[g]
        r.grad_query[0, 0, at, :] = dot(grad_scores, r.head_key[0, 0, :, cols], (1, 1), o.dtype)
        found = dot(r.query[0, 0, :, at], grad_scores, (1, 0), o.dtype)
        r.grad_key[0, 0, :, cols] = r.grad_key[0, 0, :, cols] + found

    def dropped_out(self, tile: Array, block: Array) -> Array:
        if not self.s.dropout_p:
            return tile
        first, stream = self.r.first[self.n, block], self.r.stream[self.n, self.h]
        keep = dropout_keep(stream, block, first, tile.shape, self.s.dropout_p)
        return jnp.where(keep, tile / (1 - self.s.dropout_p), 0)

    # Between passes: vectors alone

    def column_cotangent(self, slot: Any, own: Any, bin_own: Any, image: Array) -> None:
        """w of a slot = own - rho_r ca (P^T ra z), whose real part is `image`, and y = cb w for the next row pass."""
        r, s = self.r, self.s
        at = pl.ds(slot, 1)
        if self.o.dustbin:
            z_bin = self.bin_factor(0, slot) * r.bin_z[0, 0, pl.ds(slot + 1, 1), :]
            x = r.row_a[0, 0, at, :] * r.z[0, 0, pl.ds(slot + 1, 1), :]
            from_rows = jnp.sum(r.plan_col[0, 0] * x, 1, keepdims=True) + self.bin(0) * z_bin
            r.bin_w[0, 0, at, :] = bin_own - s.rho_row * self.bin_factor(2, slot) * from_rows
            image = image + r.plan_row[0, 0] * z_bin[:, :1]
        w = self.exchange.complete(own - s.rho_row * r.col_a[0, 0, at, :] * image, jnp.add)
        r.w[0, 0, at, :] = w
        r.y[...] = jnp.broadcast_to(r.col_b[0, 0, at, :] * w, r.y.shape)

    def row_cotangent(self, slot: Any) -> None:
        """The dustbin's z of the slot below, from w of this one."""
        if not self.o.dustbin:
            return
        r = self.r
        w_bin = self.bin_factor(3, slot) * r.bin_w[0, 0, pl.ds(slot, 1), :]
        total = jnp.sum(r.plan_row[0, 0] * r.y[:1, :], 1, keepdims=True) + self.bin(0) * w_bin
        r.bin_z[0, 0, pl.ds(slot, 1), :] = -self.s.rho_col * self.bin_factor(1, slot) * total

    def stack_field(self) -> None:
        """-X and Y in parts, dO and V: so that one product gives D - X^T Y."""
        r, s, parts = self.r, self.s, self.o.field_parts

        def rows(at: Any) -> None:
            x = jnp.concatenate([s.rho_row * r.row_a[0, 0, :, at] * r.z[0, 0, 1:, at], r.row_b[0, 0, :, at]], 0)
            r.field_rows[:parts, at] = in_parts(-x, LEFT, parts, r.field_rows.dtype)
            r.field_rows[parts:, at] = r.grad[0, 0, : self.o.value_width, at]

        def cols(at: Any) -> None:
            y = jnp.concatenate([r.col_a[0, 0, :, at], s.rho_col * r.col_b[0, 0, :, at] * r.w[0, 0, :, at]], 0)
            r.field_cols[:parts, at] = in_parts(y, RIGHT, parts, r.field_cols.dtype)
            r.field_cols[parts:, at] = r.value[0, 0, :, at]

        over_chunks(self.strip.rows, FIELD_CHUNK, rows)
        over_chunks(self.strip.cols, FIELD_CHUNK, cols)


def in_parts(x: Array, order: tuple[int, ...], rows: int, dtype: Any) -> Array:
    """`[2R, n]` ready for the matrix unit, `[rows, n]`: in bfloat16 as the terms of `order` of its expansion in
    three."""
    stacked = x
    if dtype == jnp.bfloat16:
        high = x.astype(dtype).astype(x.dtype)
        middle = (x - high).astype(dtype).astype(x.dtype)
        terms = high, middle, x - high - middle
        stacked = jnp.concatenate([terms[i] for i in order], 0)
    missing = rows - stacked.shape[0]
    if missing:
        stacked = jnp.concatenate([stacked, jnp.zeros((missing, x.shape[1]), x.dtype)], 0)
    return stacked.astype(dtype)


LEFT, RIGHT = (0, 0, 1, 1, 0, 2), (0, 1, 0, 1, 2, 0)  # the products of terms that matter in float32


def field_parts(kept: int, dtype: jnp.dtype) -> int:
    """Rows the factors take beside those of V, in whole tiles."""
    rows = 2 * kept * (len(LEFT) if dtype == jnp.bfloat16 else 1)
    return -(-rows // 16) * 16
