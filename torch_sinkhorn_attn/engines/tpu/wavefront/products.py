"""Products of a banded matrix M(p, q)_ij = exp(S_ij + p_i + q_j) with vectors, in one pass along the path: what the
adjoints need that couple all rows.

A step forms the scores of one row block, its part of M y, and what M^T is to be applied to there:

    x_i = weight_i ((M y)_i + more_i)        columns: M^T x

so both products of a normal equation (`method.implicit`) cost one reading of the scores. The matrix cotangents are
left to the streaming kernels.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Statics
from torch_sinkhorn_attn.engines.tpu.method.sinkhorn import Augmented
from torch_sinkhorn_attn.engines.tpu.resident.strip import (
    BLOCK,
    DEAD,
    LOG2E,
    SUBLANES,
    Strip,
    along_lanes,
    along_rows,
    dot,
    fold,
    operands,
    pad_lanes,
)
from torch_sinkhorn_attn.engines.tpu.streaming.passes import StreamingPasses
from torch_sinkhorn_attn.engines.tpu.wavefront.launch import COLS, ROWS, Operand, Result, Scratch, launch
from torch_sinkhorn_attn.engines.tpu.wavefront.passes import (
    bytes_of,
    intervals,
    lines_for,
    mask_floor,
    mask_operands,
    pad_cols,
    shapes_of,
    without_padding,
)
from torch_sinkhorn_attn.engines.tpu.wavefront.path import Path, entries_of, path_of
from torch_sinkhorn_attn.engines.tpu.wavefront.stages import (
    Stages,
    Way,
    keep_unless,
    named,
    over_sublanes,
    rep_of_line,
    row_sums,
)


class ProductStatics(NamedTuple):
    """What the kernel compiles in: whether M y is formed (else x is the weight), and whether M^T x is."""

    path: Path
    statics: Statics
    dtype: Any
    rows: bool
    columns: bool
    mask_floor: float

    @property
    def way(self) -> Way:
        return Way(self.path, self.path.lag, 0)


class Refs(NamedTuple):
    """As in `forward.Refs`."""

    row: Any
    front: Any
    query: Any  # with p among its features
    key: Any
    row_lines: Any  # [1, 1, 2, 128] weight and more
    col_lines: Any  # [1, 1, 4, 128] first row and end of the columns' intervals, q, y
    mask: Any
    alive: Any
    rows: Any  # [1, 1, 1, 128] M y
    cols: Any  # [1, 1, 1, 128] M^T x
    keys: Any  # [window, E+b, 128]
    lines: Any  # [held, lines, 128] `col_lines`
    sums: Any  # [touched, 8, 128] column sums, to be added over sublanes


def kernel(o: ProductStatics, names: tuple[str, ...], *refs: Any) -> None:
    """The body of a grid step."""
    Products(o, Refs(*named(names, refs, Refs._fields, ("mask",)))).step()


class Products(Stages):
    """One step of one head."""

    def __init__(self, o: ProductStatics, r: Refs):
        super().__init__(o.path, o.way, o.statics.uniform, o.mask_floor, r)
        self.o, self.s = o, o.statics

    def step(self) -> None:
        r, o = self.r, self.o
        pl.when(self.at == 0)(lambda: self.clear({}, {"keys": 0, "lines": DEAD, "sums": 0}))
        if o.columns:  # read before anything is written
            _, behind = self.entry(o.path.lag)
            r.cols[0, 0] = over_sublanes(r.sums[self.touched(behind - 1)])[:1]
        row, front = self.entry(0)
        factor = self.s.scale / self.s.epsilon * LOG2E
        keys = self.with_new(r.keys, front, r.key[0, 0])
        scores = [dot(r.query[0, 0], key, (0, 0), o.dtype) * factor for key in keys]
        lines = [r.lines[self.held(c)] for c in self.window(front)[:-1]] + [r.col_lines[0, 0]]
        tiles = [
            jnp.exp2(tile + along_columns(line[2:3]) * LOG2E)
            for tile, line in zip(self.masked_scores(row, front, scores), lines)
        ]
        weight, more = (along_rows(r.row_lines[0, 0, k : k + 1, :]) for k in (0, 1))
        x = weight
        if o.rows:
            total = row_sums([tile * along_columns(line[3:4]) for tile, line in zip(tiles, lines)])
            x = weight * (total + more)
            keep_unless(row >= 0, r.rows, along_lanes(total))
        if o.columns:
            parts = [fold(jnp.where(row >= 0, tile * x, 0)) for tile in tiles]
            self.put(r.sums, front, self.added(r.sums, front, parts, self.stalled(0)))
        r.keys[self.in_window(front - 1)] = r.key[0, 0]
        r.lines[self.held(front - 1), : r.col_lines.shape[2], :] = r.col_lines[0, 0]


def along_columns(line: Array) -> Array:
    """`[1, 128]` as `[128, 128]`, every row the same."""
    return rep_of_line(jnp.broadcast_to(line, (SUBLANES, BLOCK)))


class BandPasses(StreamingPasses):
    """The streaming passes of a band, its products with vectors along the path. For data that keep to it."""

    def __init__(self, problem: Augmented, lowering: Lowering):
        super().__init__(problem.inputs, problem.constants, problem.statics, lowering)
        self.problem = problem

    def rows(self, p: Array, q: Array, y: Array) -> Array:
        return self._run(p, q, y, None, None, columns=False)["rows"]

    def columns(self, p: Array, q: Array, x: Array) -> Array:
        return self._run(p, q, None, x, None, columns=True)["cols"]

    def both(self, p: Array, q: Array, y: Array, weight: Array, more: Array) -> tuple[Array, Array]:
        """M(p, q) y, and M(p, q)^T x for x = weight * (M y + more)."""
        found = self._run(p, q, y, weight, more, columns=True)
        return found["rows"], found["cols"]

    def _run(
        self, p: Array, q: Array, y: Array | None, weight: Array | None, more: Array | None, columns: bool
    ) -> dict[str, Array]:
        """The products that `results_of` names."""
        o = options_of(self.problem, y is not None, columns)
        path = o.path
        entries = entries_of(self.constants, path, self.statics, o.way.before, o.way.steps)
        p, weight = (jnp.where(self.row_active, x, 0) for x in (p, jnp.zeros_like(p) if weight is None else weight))
        q = jnp.where(self.col_active, q, DEAD)
        y = jnp.where(self.col_active, jnp.zeros_like(q) if y is None else y, 0)
        given = operands_of(self.problem, o, p, q, y, weight, jnp.zeros_like(p) if more is None else more)
        found = launch(
            "sinkhorn_wavefront_products", functools.partial(kernel, o), self.problem, self.lowering, entries, path,
            o.way.before, given, results_of(o), scratch_of(o, given[1].array),
        )  # fmt: skip
        out = dict(zip((x.name for x in results_of(o)), found, strict=True))
        has_row = (self.constants.row_lo < self.constants.row_hi)[:, None]
        has_col = (self.constants.col_lo < self.constants.col_hi)[:, None]
        if "rows" in out:
            out["rows"] = jnp.where(has_row & self.row_active, out["rows"][:, :, 0, : self.length], 0)
        if "cols" in out:
            sums = without_padding(out["cols"], path, self.size)[:, :, 0]
            out["cols"] = jnp.where(has_col & self.col_active, sums, 0)
        return out


def options_of(problem: Augmented, rows: bool, columns: bool) -> ProductStatics:
    """What the kernel compiles in."""
    path = path_of(problem.length, problem.size, problem.statics)
    return ProductStatics(path, problem.statics, problem.dtype, rows, columns, mask_floor(problem))


def vmem(problem: Augmented) -> int:
    """Bytes of a core's memory that the kernel takes at most."""
    o = options_of(problem, True, True)

    def look() -> list[Operand]:
        u, v = problem.real(*problem.initial_potentials())
        return operands_of(problem, o, u, v, v, u, u)

    given = shapes_of(look)
    return bytes_of(given, results_of(o), scratch_of(o, given[1].array), problem.dtype)


def operands_of(
    problem: Augmented, o: ProductStatics, p: Array, q: Array, y: Array, weight: Array, more: Array
) -> list[Operand]:
    """What the kernel reads."""
    path, inputs = o.path, problem.inputs
    found = operands(inputs, problem.constants, problem.statics, Strip(path.rows, path.cols, path.width), p)
    row_lines = jnp.stack([pad_lanes(x, path.padded_length) for x in (weight, more)], 2)
    col_lines = [*intervals(problem, path), pad_cols(q, path, DEAD), pad_cols(y, path)]
    return [
        Operand("query", found["query"], ROWS),
        Operand("key", pad_cols(found["key"], path), COLS),
        Operand("row_lines", row_lines, ROWS),
        Operand("col_lines", jnp.stack(col_lines, 2), COLS),
        *mask_operands(problem, path),
    ]


def results_of(o: ProductStatics) -> list[Result]:
    """What it writes."""
    rows = [Result("rows", (1, o.path.padded_length), ROWS)] * o.rows
    return [*rows, *[Result("cols", (1, o.path.padded_cols * BLOCK), COLS, o.path.lag)] * o.columns]


def scratch_of(o: ProductStatics, key: Array) -> Scratch:
    """Its workspace."""
    return {
        "keys": ((o.way.window, key.shape[2], BLOCK), key.dtype),
        "lines": ((o.way.held, lines_for(4), BLOCK), o.dtype),
        "sums": ((o.way.touched, SUBLANES, BLOCK), o.dtype),
    }
