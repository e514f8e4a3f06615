"""What the wavefront kernels share: where a stage stands, and the rings it reads and writes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_sinkhorn_attn.engines.tpu.resident.strip import BLOCK, DEAD, LOG2E, SUBLANES, along_rows, inside
from torch_sinkhorn_attn.engines.tpu.wavefront.path import Path


class Way:
    """Sizes that follow from a path and the lag of its last stage; row blocks are kept until `kept` steps later, and
    columns of an iteration read by the `memory` next."""

    def __init__(self, path: Path, before: int, kept: int, memory: int = 1):
        self.path, self.before, self.steps = path, before, path.entries + before
        self.ring = kept + 1  # row blocks in flight
        self.window = power_of_two(path.width)  # rings of the column blocks of one strip,
        self.touched = power_of_two(path.width + memory * path.lag + 1)  # of those being summed up,
        self.held = power_of_two(before + path.width + 1)  # and of all in flight


def power_of_two(least: int) -> int:
    """The next one.

    >>> [power_of_two(n) for n in (1, 3, 4)]
    [1, 4, 4]
    """
    return 1 << (least - 1).bit_length()


class Stages:
    """A step of one head, seen from the stage `lag` steps behind. `r.row` and `r.front` are those of `path.Entries`.
    `mask_floor`: a float mask drops what is at or below."""

    def __init__(self, path: Path, way: Way, uniform: bool, mask_floor: float, r: Any):
        self.path, self.way, self.mask_floor, self.r = path, way, mask_floor, r
        self.n, self.h, self.at = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        self.base = 0 if uniform else self.n * (way.before + way.steps)

    def entry(self, lag: Any) -> tuple[Array, Array]:
        """Row block (or ~ of the last, where none comes in) and front."""
        at = self.base + self.at + self.way.before - lag
        return self.r.row[at], self.r.front[at]

    def stalled(self, lag: Any) -> Array:
        """Whether the front did not move."""
        at = self.base + self.at + self.way.before - lag
        return self.r.front[at] == self.r.front[jnp.maximum(at - 1, 0)]

    def slot(self, lag: Any) -> Array:
        """The place of its row block in the ring; before the first one comes there, that behind the ring's last, which
        `clear` filled."""
        at = lax.rem(self.at, np.int32(self.way.ring)) - lag
        at = jnp.where(at < 0, at + self.way.ring, at)
        return jnp.where(self.at < lag, self.way.ring, at)

    def window(self, front: Array) -> list[Array]:
        """The column blocks of its strip."""
        return [front - self.path.width + j for j in range(self.path.width)]

    def in_window(self, block: Array) -> Array:
        return block & (self.way.window - 1)

    def touched(self, block: Array) -> Array:
        return block & (self.way.touched - 1)

    def held(self, block: Array) -> Array:
        return block & (self.way.held - 1)

    def masked_scores(self, row: Array, front: Array, scores: list[Array]) -> list[Array]:
        """The tiles of scores of a strip for `exp2`, `DEAD` outside of the intervals and where the mask excludes. What
        a mask holds there may be NaN."""
        r = self.r
        block = jnp.where(row >= 0, row, self.path.rows)  # behind the last: in no interval
        found = []
        bounds = [r.lines[self.held(column), :2, :] for column in self.window(front)[:-1]] + [r.col_lines[0, 0, :2, :]]
        for j, (tile, ends) in enumerate(zip(scores, bounds)):
            lo, hi = (x.astype(jnp.int32) for x in (ends[:1], ends[1:]))
            keep = inside(block, lo, hi)
            if r.mask is not None:
                mask = r.mask[j][0, 0]
                if mask.dtype == jnp.int8:
                    keep &= jnp.broadcast_to(mask.astype(jnp.int32), keep.shape) != 0
                else:
                    mask = mask.astype(tile.dtype)
                    keep &= jnp.logical_not(
                        jnp.broadcast_to(mask, keep.shape) <= self.mask_floor
                    )  # NaN stays, to be seen
                    keep &= along_rows(r.alive[0, 0]) > 0
                    tile = tile + mask * LOG2E
            found.append(jnp.where(keep, tile, DEAD))
        return found

    def clear(self, rows: dict[str, float], columns: dict[str, float]) -> None:
        """What is read before anything is written there must be numbers: of the row block before the first, and of the
        padding's columns, the only ones that a front has when it begins. By the names of `r`'s rings."""
        for name, value in rows.items():
            ref = getattr(self.r, name)
            if ref is not None:
                ref[self.way.ring] = jnp.full(ref.shape[1:], value, ref.dtype)
        for name, value in columns.items():
            ref = getattr(self.r, name)
            if ref is None:
                continue
            for column in range(self.path.width):
                if len(ref.shape) == 3:
                    ref[column] = jnp.full(ref.shape[1:], value, ref.dtype)
                else:  # one for each iteration
                    for i in range(ref.shape[0]):
                        ref[i, column] = jnp.full(ref.shape[2:], value, ref.dtype)

    def with_new(self, ring: Any, front: Array, new: Array) -> list[Array]:
        """What a ring of the window holds of the strip's columns, and `new` for the one that comes in: so that reading
        need not wait for its being written."""
        return [*(ring[self.in_window(column)] for column in self.window(front)[:-1]), new]

    def added(self, ring: Any, front: Array, parts: list[Array], stalled: Array, *index: Any) -> list[Array]:
        """Sums of the strip's columns and their new parts; those of the column block that comes in begin at 0."""
        old = [ring[(*index, self.touched(column))] for column in self.window(front)]
        old[-1] = jnp.where(stalled, old[-1], 0)
        return [x + part for x, part in zip(old, parts)]

    def put(self, ring: Any, front: Array, values: list[Array], *index: Any) -> None:
        """Into the ring, for the strip's columns."""
        for column, x in zip(self.window(front), values):
            ring[(*index, self.touched(column))] = x


def columns_of(j: int) -> slice:
    """The j-th column block of a row block in the ring."""
    return slice(j * BLOCK, (j + 1) * BLOCK)


def keep_unless(wanted: Array, ref: Any, x: Array) -> None:
    """x, where wanted; else what the block holds, for it is not written back until another takes its place."""
    ref[0, 0] = jnp.where(wanted, x, ref[0, 0])


def line_of(x: Array) -> Array:
    """`[1, 128]` in every sublane."""
    return jnp.broadcast_to(x, (SUBLANES, BLOCK))


def rep_of_line(x: Array) -> Array:
    """A line as `[128, 128]`."""
    return jnp.concatenate([x] * (BLOCK // SUBLANES), 0)


def over_sublanes(x: Array) -> Array:
    """`[8, 128]` summed over its sublanes, a line."""
    for shift in (4, 2, 1):
        x = x + pltpu.roll(x, shift, 0)
    return x


def row_sums(weighted: list[Array]) -> Array:
    """Of a row block's tiles, rep."""
    return jnp.broadcast_to(jnp.sum(sum(weighted), 1, keepdims=True), (BLOCK, BLOCK))


def named(
    names: tuple[str, ...], refs: tuple[Any, ...], fields: tuple[str, ...], several: tuple[str, ...]
) -> list[Any]:
    """Refs in the order of `fields`, absent ones None; those of a name in `several` in a tuple."""
    found: dict[str, Any] = {}
    for name, ref in zip(names, refs, strict=True):
        found[name] = (*found.get(name, ()), ref) if name in several else ref
    return [found.get(name) for name in fields]
