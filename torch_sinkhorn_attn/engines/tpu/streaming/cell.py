"""What a kernel sees of one grid step: a block of lines, a tile across it, and the entries of the scores there.

Inside a kernel a vector of the lines is `[block, 128]`, the same in every lane, a vector across is `[1, tile]`, and a
running sum of the lines is `[block, 128]`, reduced over its lanes once per block: no tile crosses lanes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from torch_sinkhorn_attn.engines.tpu.method import dropout
from torch_sinkhorn_attn.engines.tpu.streaming.reading import LANES, Reading
from torch_sinkhorn_attn.engines.tpu.streaming.walk import Place


class Cell:
    """A step of the grid (batch element, head, block of lines, tile)."""

    def __init__(
        self,
        reading: Reading,
        place: Place,
        scalars: Sequence[Any],
        refs: dict[str, Any],
        wide: dict[str, Any],
        sums: Sequence[Any],
    ):
        self.reading, self.place, self.refs, self.sums, self.dtype = reading, place, refs, sums, reading.dtype
        at = place.num * reading.blocks + place.block
        self.first, self.end, self.inner_first, self.inner_end = (x[at] for x in scalars[:4])
        self._stream = scalars[4][place.num * reading.heads + place.head] if len(scalars) > 4 else None
        self._wide = wide

    def visit(self, body: Callable[[bool], None]) -> None:
        """Run `body` if the tile is touched; without the test of the intervals where all of it is inside."""
        tile = self.place.tile
        touched = (tile >= self.first) & (tile < self.end)
        if self.reading.intervals is None or not self.reading.has_inner_tiles:
            pl.when(touched)(lambda: body(self.reading.intervals is not None))
            return
        inner = (tile >= self.inner_first) & (tile < self.inner_end)
        pl.when(touched & jnp.logical_not(inner))(lambda: body(True))
        pl.when(touched & inner)(lambda: body(False))

    # Vectors and matrices

    def widen_line_vectors(self) -> None:
        """Turn the lines' vectors from lanes to sublanes, once per block."""
        for name, wide in self._wide.items():
            for k in range(wide.shape[0]):
                wide[k] = jnp.broadcast_to(self.across(name, k), (LANES, self.reading.block)).T

    def line(self, name: str, k: Any = 0) -> Array:
        """A vector of the lines, at every entry of the tile."""
        return self.all_lanes(self._wide[name][k])

    def all_lanes(self, column: Array) -> Array:
        """`[block, 128]` to `[block, tile]`."""
        return jnp.concatenate([column] * (self.reading.tile // LANES), axis=1)

    def across(self, name: str, k: Any = 0) -> Array:
        """A vector across, `[1, tile]`."""
        ref = self.refs[name]
        return ref[k] if ref.ndim == 3 else ref[...]

    def matrix(self, name: str) -> Array:
        """The tile's part of a matrix across, with 0 past the edge: what is read there may be NaN."""
        value = self.refs[name][...]
        size, tile = self.reading.size, self.reading.tile
        if size % tile == 0:
            return value

        def cleared(value: Array) -> Array:
            row = lax.broadcasted_iota(jnp.int32, value.shape, 0)
            return jnp.where(row < size % tile, value.astype(self.dtype), 0).astype(value.dtype)

        return lax.cond(self.place.tile == size // tile, cleared, lambda value: value, value)

    # The tile

    def scores(self, boundary: bool, across: str, lines: str | None = None) -> Array:
        """S in base 2, -inf where the mask or, on a boundary tile, the intervals exclude. `across` and `lines` name the
        exponents that will be added, -inf on dead lines: what a mask holds there may be NaN."""
        reading = self.reading
        factor = reading.statics.scale / reading.statics.epsilon * math.log2(math.e)
        found = self.product(self.refs["lines"][...], self.matrix("across"), 1) * self.constant(factor)
        if reading.mask is not None:
            found = self._masked(found, across, lines)
        if boundary:
            column = self._positions(1).astype(self.dtype)
            keep = (column >= self.line("lo")) & (column < self.line("hi"))
            found = jnp.where(keep, found, -jnp.inf)
        return found

    def _masked(self, scores: Array, across: str, lines: str | None) -> Array:
        reading = self.reading
        assert reading.mask is not None
        mask = self.refs["mask"][...]
        if mask.dtype == jnp.int8:
            mask = mask.astype(jnp.int32)
        mask = mask.astype(self.dtype)
        mask = mask.T if reading.transposed else mask
        if reading.mask.dtype == jnp.int8:
            return jnp.where(mask != 0, scores, -jnp.inf)
        keep = jnp.logical_not(mask <= self.constant(reading.mask_floor))  # NaN stays, to be seen
        keep = keep & (self.across(across) != -jnp.inf)  # as it is past the edge
        if lines is not None:
            keep = keep & (self.line(lines) != -jnp.inf)
        return jnp.where(keep, scores + mask * self.constant(math.log2(math.e)), -jnp.inf)

    @staticmethod
    def plan(scores: Array, p: Array, q: Array) -> Array:
        """exp(S + p + q)."""
        return jnp.exp2(scores + p + q)

    def dropped_out(self, tile: Array) -> Array:
        """The tile after dropout: entries kept and scaled by 1 / (1 - p), or zeroed."""
        if self._stream is None:
            return tile
        reading = self.reading
        stream = self._stream.astype(jnp.uint32)
        lines = self.place.block * reading.block + lax.broadcasted_iota(jnp.int32, (reading.block, 1), 0)
        rows, cols = (self._positions(1), lines) if reading.transposed else (lines, self._positions(1))
        keep = dropout.keep(stream, rows, cols, reading.statics.dropout_p)
        return jnp.where(keep, tile * self.constant(1 / (1 - reading.statics.dropout_p)), 0)

    def product(self, a: Array, b: Array, contracted: int) -> Array:
        """a b^T (contracted = 1) or a b (0), accumulated in the compute dtype."""
        precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        return lax.dot_general(
            a, b, (((1,), (contracted,)), ((), ())), precision=precision, preferred_element_type=self.dtype
        )

    def fold(self, tile: Array, op: Callable[[Array, Array], Array] = jnp.add) -> Array:
        """`[block, tile]` to `[block, 128]`, lane by lane."""
        pieces = (tile[:, at : at + LANES] for at in range(0, self.reading.tile, LANES))
        return functools.reduce(op, pieces)

    def _positions(self, axis: int) -> Array:
        tile = self.reading.tile
        return self.place.tile * tile + lax.broadcasted_iota(jnp.int32, (1, tile), axis)

    def constant(self, value: float) -> Array:
        return jnp.asarray(value, self.dtype)


def total(running: Array) -> Array:
    """`[block, 128]` running sums to the lane-major sums `[1, block]`."""
    return jnp.sum(running.T, axis=0, keepdims=True)
