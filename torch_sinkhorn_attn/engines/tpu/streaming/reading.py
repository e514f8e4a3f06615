"""One direction of reading the scores by tiles, and the `pallas_call` every streaming pass goes through.

A grid step holds a block of lines and one tile across it; blocks are independent, the tiles of a block are accumulated
in order. The column passes are the kernels of the row passes with query and key exchanged and the mask's tile
transposed. Exponents are in base 2, in which a TPU works.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torch_sinkhorn_attn.engines.tpu.method.problem import Statics
from torch_sinkhorn_attn.engines.tpu.streaming.cell import LANES, Cell
from torch_sinkhorn_attn.engines.tpu.streaming.spans import Spans
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


@dataclass(frozen=True)
class Reading:
    """The scores read along lines.

    Attributes:
        lines, across: `[N, Hl, n, E]`, `[N, Ha, m, E]`: query and key, or key and query.
        intervals: lo, hi `[N, n]` of the lines where they are tested entry by entry, else None.
        spans, most: the tiles each block of lines touches, and the number of tile steps, static or traced.
        mask: `[N', H', L, S]`, int8 for a boolean one, or None.
        mask_floor: a float mask drops what is at or below.
        streams: `[N * H]` int32, the bits of the dropout streams, or None.
        interpret: of `pallas_call`.
    """

    lines: Array
    across: Array
    heads: int
    transposed: bool
    intervals: tuple[Array, Array] | None
    spans: Spans
    most: int | Array
    mask: Array | None
    mask_floor: float
    streams: Array | None
    statics: Statics
    block: int
    tile: int
    interpret: Any
    vmem_limit: int

    @property
    def dtype(self) -> Any:
        return jnp.dtype("float64" if self.lines.dtype == jnp.float64 else "float32")

    @property
    def num(self) -> int:
        return int(self.lines.shape[0])

    @property
    def length(self) -> int:
        return int(self.lines.shape[2])

    @property
    def size(self) -> int:
        return int(self.across.shape[2])

    @property
    def has_inner_tiles(self) -> bool:
        """Whether a second kernel body, for tiles inside of all intervals, pays: hardly beside a narrow window."""
        left, right = self.statics.window_left, self.statics.window_right
        return min(left, right) < 0 or left + right + 2 > self.tile + self.block

    @property
    def blocks(self) -> int:
        return -(-self.length // self.block)

    def call(self, kernel: Kernel, operands: Operands, outputs: Outputs, walk: Walk | None = None) -> dict[str, Array]:
        """Run a pass over the tiles that the intervals touch."""
        walk = walk or TilesOfLines(self.num, self.heads, self.blocks, self.most)
        arrays, specs = self._operands(operands, walk)
        result = self._results(outputs, walk)
        scalars = self._scalars()
        stacks = {name: (1 if vector.ndim == 3 else vector.shape[0]) for name, vector in operands.line_vectors.items()}
        if self.intervals is not None:
            stacks |= {"lo": 1, "hi": 1}

        def body(*refs: Any) -> None:
            rest = list(refs[len(scalars) :])
            named = {name: rest.pop(0) for name in (*arrays, *result)}
            wide = {name: rest.pop(0) for name in stacks}
            ids = tuple(pl.program_id(axis) for axis in range(len(walk.grid)))
            cell = Cell(self, walk.place(ids, refs), refs[: len(scalars)], named, wide, sums=rest)
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
                *(pltpu.VMEM((count, self.block, LANES), self.dtype) for count in stacks.values()),
                *(pltpu.VMEM((self.block, LANES), self.dtype) for _ in range(outputs.sums)),
            ],
        )
        parameters = pltpu.CompilerParams(dimension_semantics=walk.order, vmem_limit_bytes=self.vmem_limit)
        found = pl.pallas_call(
            body,
            grid_spec=grid,
            out_shape=[shape for shape, _ in result.values()],
            compiler_params=parameters,
            interpret=self.interpret,
        )(*scalars, *arrays.values())
        done = dict(zip(result, found, strict=True))
        return done | {name: done[name][..., 0, :] for name in outputs.vectors}

    def _scalars(self) -> tuple[Array, ...]:
        return tuple(self.spans) if self.streams is None else (*self.spans, self.streams)

    # Operands and their blocks

    def _operands(self, operands: Operands, walk: Walk) -> tuple[dict[str, Array], dict[str, pl.BlockSpec]]:
        arrays = {"lines": self.lines, "across": self.across}
        specs = {"lines": self._matrix(self.lines, walk, False), "across": self._matrix(self.across, walk, True)}
        if self.intervals is not None:
            for name, bound in zip(("lo", "hi"), self.intervals, strict=True):
                arrays[name] = bound.astype(self.dtype)[:, None, None]
                specs[name] = self._vector(arrays[name], walk, False)
        if self.mask is not None:
            arrays["mask"], specs["mask"] = self.mask, self._mask_spec(self.mask.shape, walk, fetched=True)
        for name, vector in operands.line_vectors.items():
            arrays[name] = vector[..., None, :]
            specs[name] = self._vector(arrays[name], walk, False)
        for name, (vector, edge) in operands.across_vectors.items():
            past = [(0, 0)] * (vector.ndim - 1) + [(0, -self.size % self.tile)]
            arrays[name] = jnp.pad(vector, past, constant_values=edge)[..., None, :]
            specs[name] = self._vector(arrays[name], walk, True)
        for across, matrices in ((False, operands.line_matrices), (True, operands.across_matrices)):
            for name, matrix in matrices.items():
                arrays[name], specs[name] = matrix, self._matrix(matrix, walk, across)
        return arrays, specs

    def _results(self, outputs: Outputs, walk: Walk) -> dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
        found = {}
        for name in outputs.vectors:
            shape = jax.ShapeDtypeStruct((self.num, self.heads, 1, self.length), self.dtype)
            found[name] = (shape, self._vector(shape, walk, False))
        for name, width in outputs.matrices.items():
            shape = jax.ShapeDtypeStruct((self.num, self.heads, self.length, width), self.dtype)
            found[name] = (shape, self._matrix(shape, walk, False))
        if outputs.mask is not None:
            shape = jax.ShapeDtypeStruct(outputs.mask, self.dtype)
            found["mask_cotangent"] = (shape, self._mask_spec(outputs.mask, walk, fetched=False))
        return found

    def _index(self, walk: Walk, args: tuple[Any, ...], fetched: bool = True) -> Place:
        """Where a grid step is. What is fetched stays in place past the last tile, so that nothing is."""
        scalars = args[len(walk.grid) :]
        place = walk.place(args[: len(walk.grid)], scalars)
        if not fetched:
            return place
        at = place.num * self.blocks + place.block
        first, end = scalars[0][at], scalars[1][at]
        return place._replace(tile=jnp.clip(place.tile, first, jnp.maximum(end - 1, first)))

    def _matrix(self, array: Array | jax.ShapeDtypeStruct, walk: Walk, across: bool) -> pl.BlockSpec:
        group = self.heads // array.shape[1]

        def index(*args: Any) -> tuple[Any, ...]:
            at = self._index(walk, args)
            head = at.head if group == 1 else lax.div(at.head, jnp.int32(group))
            return at.num, head, at.tile if across else at.block, 0

        return pl.BlockSpec((None, None, self.tile if across else self.block, array.shape[-1]), index)

    def _vector(self, array: Array | jax.ShapeDtypeStruct, walk: Walk, across: bool) -> pl.BlockSpec:
        """Of `[..., N, H or 1, 1, n]`: along the lanes, or an (n, 1) column would be padded to 128 of them in HBM."""
        stack = array.shape[:-4]

        def index(*args: Any) -> tuple[Any, ...]:
            at = self._index(walk, args)
            head = 0 if array.shape[-3] == 1 else at.head
            return (*(0 for _ in stack), at.num, head, 0, at.tile if across else at.block)

        return pl.BlockSpec((*stack, None, None, 1, self.tile if across else self.block), index)

    def _mask_spec(self, shape: tuple[int, ...], walk: Walk, fetched: bool) -> pl.BlockSpec:
        def index(*args: Any) -> tuple[Any, ...]:
            at = self._index(walk, args, fetched)
            rows, cols = (at.tile, at.block) if self.transposed else (at.block, at.tile)
            return 0 if shape[0] == 1 else at.num, 0 if shape[1] == 1 else at.head, rows, cols

        block = (self.tile, self.block) if self.transposed else (self.block, self.tile)
        return pl.BlockSpec((None, None, *block), index)
