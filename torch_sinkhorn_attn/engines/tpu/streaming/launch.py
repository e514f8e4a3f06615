"""The `pallas_call` that every streaming pass goes through.

A grid step holds a block of lines and one tile across it; blocks are independent, the tiles of a block are accumulated
in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_sinkhorn_attn.engines.tpu.method.manual import vary_together
from torch_sinkhorn_attn.engines.tpu.releases import kernel_body, result_type
from torch_sinkhorn_attn.engines.tpu.streaming.cell import Cell
from torch_sinkhorn_attn.engines.tpu.streaming.reading import LANES, Reading
from torch_sinkhorn_attn.engines.tpu.streaming.walk import Place, TilesOfLines, Walk


class Kernel(Protocol):
    """A pass: what to do before the first tile of a block of lines, at each tile, and after the last one."""

    def begin(self, cell: Cell) -> None: ...

    def tile(self, cell: Cell, boundary: bool) -> None:
        """`boundary`: the tile may hold entries outside of the intervals."""

    def end(self, cell: Cell) -> None: ...


@dataclass(frozen=True)
class Operands:
    """Arrays of a pass by name: vectors `[N, H, n]` or stacked `[K, N, H, n]`, those across with the value that stands
    past the edge, and matrices `[N, heads, n, E]`."""

    line_vectors: dict[str, Array]
    across_vectors: dict[str, tuple[Array, float]]
    line_matrices: dict[str, Array] = field(default_factory=dict)
    across_matrices: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Outputs:
    """What a pass returns: names of vectors `[N, H, n]`, widths of matrices `[N, H, n, width]`, the shape of a mask's
    cotangent; and the number of running sums of its lines."""

    vectors: tuple[str, ...] = ()
    matrices: dict[str, int] = field(default_factory=dict)
    mask: tuple[int, ...] | None = None
    sums: int = 0


def launch(
    reading: Reading, kernel: Kernel, operands: Operands, outputs: Outputs, walk: Walk | None = None
) -> dict[str, Array]:
    """Run a pass over the tiles that the intervals touch."""
    walk = walk or TilesOfLines(reading.num, reading.heads, reading.blocks, reading.most)
    arrays, specs = _operands(reading, operands, walk)
    scalars, values = vary_together((_scalars(reading), list(arrays.values())))
    arrays = dict(zip(arrays, values, strict=True))
    result = _results(reading, outputs, walk)
    stacks = {name: (1 if vector.ndim == 3 else vector.shape[0]) for name, vector in operands.line_vectors.items()}
    if reading.intervals is not None:
        stacks |= {"lo": 1, "hi": 1}

    def body(*refs: Any) -> None:
        rest = list(refs[len(scalars) :])
        named = {name: rest.pop(0) for name in (*arrays, *result)}
        wide = {name: rest.pop(0) for name in stacks}
        ids = tuple(pl.program_id(axis) for axis in range(len(walk.grid)))
        cell = Cell(reading, walk.place(ids, refs), refs[: len(scalars)], named, wide, sums=rest)
        pl.when(walk.new_lines(ids))(cell.widen_line_vectors)
        pl.when(walk.first(ids))(lambda: kernel.begin(cell))
        cell.visit(lambda boundary: kernel.tile(cell, boundary))
        pl.when(walk.last(ids))(lambda: kernel.end(cell))

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=walk.grid,
        in_specs=list(specs.values()),
        out_specs=[spec for _, spec in result.values()],
        scratch_shapes=[
            *(pltpu.VMEM((count, reading.block, LANES), reading.dtype) for count in stacks.values()),
            *(pltpu.VMEM((reading.block, LANES), reading.dtype) for _ in range(outputs.sums)),
        ],
    )
    parameters = pltpu.CompilerParams(dimension_semantics=walk.order, vmem_limit_bytes=reading.vmem_limit)
    found = pl.pallas_call(
        kernel_body(body),
        grid_spec=grid,
        out_shape=[result_type(shape.shape, shape.dtype, (scalars, arrays)) for shape, _ in result.values()],
        compiler_params=parameters,
        interpret=reading.interpret,
    )(*scalars, *arrays.values())
    done = dict(zip(result, found, strict=True))
    return done | {name: done[name][..., 0, :] for name in outputs.vectors}


def _scalars(reading: Reading) -> tuple[Array, ...]:
    return tuple(reading.spans) if reading.streams is None else (*reading.spans, reading.streams)


def _operands(reading: Reading, operands: Operands, walk: Walk) -> tuple[dict[str, Array], dict[str, pl.BlockSpec]]:
    arrays = {"lines": reading.lines, "across": reading.across}
    specs = {
        "lines": _matrix(reading, reading.lines, walk, False),
        "across": _matrix(reading, reading.across, walk, True),
    }
    if reading.intervals is not None:
        for name, bound in zip(("lo", "hi"), reading.intervals, strict=True):
            arrays[name] = bound.astype(reading.dtype)[:, None, None]
            specs[name] = _vector(reading, arrays[name], walk, False)
    if reading.mask is not None:
        arrays["mask"], specs["mask"] = reading.mask, _mask_spec(reading, reading.mask.shape, walk, fetched=True)
    for name, vector in operands.line_vectors.items():
        arrays[name] = vector[..., None, :]
        specs[name] = _vector(reading, arrays[name], walk, False)
    for name, (vector, edge) in operands.across_vectors.items():
        past = [(0, 0)] * (vector.ndim - 1) + [(0, -reading.size % reading.tile)]
        arrays[name] = jnp.pad(vector, past, constant_values=edge)[..., None, :]
        specs[name] = _vector(reading, arrays[name], walk, True)
    for across, matrices in ((False, operands.line_matrices), (True, operands.across_matrices)):
        for name, matrix in matrices.items():
            arrays[name], specs[name] = matrix, _matrix(reading, matrix, walk, across)
    return arrays, specs


def _results(reading: Reading, outputs: Outputs, walk: Walk) -> dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
    found = {}
    for name in outputs.vectors:
        shape = jax.ShapeDtypeStruct((reading.num, reading.heads, 1, reading.length), reading.dtype)
        found[name] = (shape, _vector(reading, shape, walk, False))
    for name, width in outputs.matrices.items():
        shape = jax.ShapeDtypeStruct((reading.num, reading.heads, reading.length, width), reading.dtype)
        found[name] = (shape, _matrix(reading, shape, walk, False))
    if outputs.mask is not None:
        shape = jax.ShapeDtypeStruct(outputs.mask, reading.dtype)
        found["mask_cotangent"] = (shape, _mask_spec(reading, outputs.mask, walk, fetched=False))
    return found


def _index(reading: Reading, walk: Walk, args: tuple[Any, ...], fetched: bool = True) -> Place:
    """Where a grid step is. What is fetched stays in place past the last tile, so that nothing is."""
    scalars = args[len(walk.grid) :]
    place = walk.place(args[: len(walk.grid)], scalars)
    if not fetched:
        return place
    at = place.num * reading.blocks + place.block
    first, end = scalars[0][at], scalars[1][at]
    return place._replace(tile=jnp.clip(place.tile, first, jnp.maximum(end - 1, first)))


def _matrix(reading: Reading, array: Array | jax.ShapeDtypeStruct, walk: Walk, across: bool) -> pl.BlockSpec:
    group = reading.heads // array.shape[1]

    def index(*args: Any) -> tuple[Any, ...]:
        at = _index(reading, walk, args)
        head = at.head if group == 1 else lax.div(at.head, jnp.int32(group))
        return at.num, head, at.tile if across else at.block, 0

    return pl.BlockSpec((None, None, reading.tile if across else reading.block, array.shape[-1]), index)


def _vector(reading: Reading, array: Array | jax.ShapeDtypeStruct, walk: Walk, across: bool) -> pl.BlockSpec:
    """Of `[..., N, H or 1, 1, n]`: along the lanes, or an (n, 1) column would be padded to 128 of them in HBM."""
    stack = array.shape[:-4]

    def index(*args: Any) -> tuple[Any, ...]:
        at = _index(reading, walk, args)
        head = 0 if array.shape[-3] == 1 else at.head
        return (*(0 for _ in stack), at.num, head, 0, at.tile if across else at.block)

    return pl.BlockSpec((*stack, None, None, 1, reading.tile if across else reading.block), index)


def _mask_spec(reading: Reading, shape: tuple[int, ...], walk: Walk, fetched: bool) -> pl.BlockSpec:
    def index(*args: Any) -> tuple[Any, ...]:
        at = _index(reading, walk, args, fetched)
        rows, cols = (at.tile, at.block) if reading.transposed else (at.block, at.tile)
        return 0 if shape[0] == 1 else at.num, 0 if shape[1] == 1 else at.head, rows, cols

    block = (reading.tile, reading.block) if reading.transposed else (reading.block, reading.tile)
    return pl.BlockSpec((None, None, *block), index)
