"""How a problem lies before the kernels: pointers, strides and what is known when they are compiled.

One place for all launches: `Layout.of(inputs, problem)`, then `layout.direction(...)` for the arguments that every
kernel has. Kernels get named tuples, so a signature names a side and not its dozen numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from torch_sinkhorn_attn.engines.triton import interpreted
from torch_sinkhorn_attn.problem.problem import Inputs, Problem, compute_dtype

LOG2E = 1.4426950408889634
PADDING = 256  # live vectors end at a multiple of it: no smaller than any block of lines
LARGEST_CHUNK = 128  # features that a tile's product takes at once
EXACT_CHUNK = 16  # where it is not made by tensor cores: more of them spill registers
ACCUMULATOR = {torch.float32: tl.float32, torch.float64: tl.float64}


class Lines(NamedTuple):
    """One side of a problem. Features are `[N, heads, lines, E]`, the last stride 1."""

    data: Tensor
    stride_n: int
    stride_h: int
    stride_l: int
    share: int  # query heads to each head of it
    size: int  # lines
    width: int  # of its live vectors: size up to a multiple of PADDING
    lo: Tensor  # [N, lines] int64, the lines of the other side it reaches, as in `Intervals`
    hi: Tensor
    safe_lo: Tensor  # [N, lines], those of which it reaches every live one
    safe_hi: Tensor


class Mask(NamedTuple):
    """The attn_mask from one direction; any tensor and zeros where there is none."""

    data: Tensor
    stride_n: int
    stride_h: int
    stride_outer: int
    stride_inner: int


class Number(NamedTuple):
    """A real number as two of float32, whose sum is good to 48 bits: that is all a kernel's argument can be."""

    high: float
    low: float

    @staticmethod
    def of(x: float) -> Number:
        high = torch.tensor(x, dtype=torch.float32, device="cpu").item()
        return Number(high, x - high)


class Static(NamedTuple):
    """What a kernel is compiled for, but for what is its own."""

    column: bool  # columns outside, rows inside
    outer: int  # lines of a block
    inner: int
    features: int  # E
    chunk: int  # of them at once: a power of two from 16 on
    mask: str  # "none", "bool" or "float"
    limit: float  # entries of a float mask at or below it are dropped
    banded: bool
    widen: bool  # features to float32 before products
    precision: str  # of float32 products: "ieee" or "tf32"
    acc: Any  # tl.float32 or tl.float64: sums, and what vectors are
    product: Any  # type of plan tiles and of what they are multiplied with
    plan_precision: str  # of those products

    @property
    def exact(self) -> bool:
        """Whether products are float32's own, on no tensor core: their tiles are written out, so they must be small."""
        return self.precision == "ieee" and self.product != tl.bfloat16 and self.plan_precision == "ieee"


class Direction(NamedTuple):
    """The arguments that all kernels have."""

    outer: Lines
    inner: Lines
    mask: Mask
    scale: Number
    heads: int
    static: Static


@dataclass(frozen=True)
class Layout:
    """A problem before the kernels. `values` are the value's lines, with `share` as the keys', where it is given."""

    rows: Lines
    cols: Lines
    values: Lines | None
    row_mask: Mask  # rows outside
    col_mask: Mask
    scale: Number  # scale / epsilon * log2 e
    num: int
    heads: int
    static: Static
    dtype: torch.dtype  # of potentials and sums

    @staticmethod
    def of(inputs: Inputs, problem: Problem) -> Layout:
        num, heads, length, size = problem.sizes
        query, key = _features(inputs.query), _features(inputs.key)
        rows, cols = sides(problem)
        dtype = compute_dtype(query.dtype)
        width = query.shape[-1]
        largest = EXACT_CHUNK if query.dtype == torch.float32 and precision() == "ieee" else LARGEST_CHUNK
        mask = inputs.mask
        kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
        floats = () if mask is None or kind == "bool" else (torch.finfo(mask.dtype).min, torch.finfo(dtype).min)
        static = Static(
            column=False,
            outer=0,
            inner=0,
            features=width,
            chunk=min(largest, power_of_two(width)),
            mask=kind,
            limit=max(floats) / 2 if floats else 0.0,
            banded=problem.outline.banded,
            widen=interpreted() and query.dtype == torch.bfloat16,  # whose products its interpreter gets wrong
            precision=precision(),
            acc=ACCUMULATOR[dtype],
            product=tl.bfloat16 if query.dtype == torch.bfloat16 and not interpreted() else ACCUMULATOR[dtype],
            plan_precision=half_precision() if query.dtype == torch.float16 else precision(),
        )
        value = None if inputs.value is None else _features(inputs.value)
        share = heads // max(1, key.shape[1])
        return Layout(
            _lines(query, 1, length, rows),
            _lines(key, share, size, cols),
            None if value is None else _lines(value, share, size, cols),
            _mask(mask, query, column=False),
            _mask(mask, query, column=True),
            Number.of(problem.solver.scale / problem.solver.epsilon * LOG2E),
            num,
            heads,
            static,
            dtype,
        )

    def direction(self, column: bool, outer: int, inner: int) -> Direction:
        """The arguments of a kernel with blocks of `outer` and `inner` lines; `column`: columns are outside."""
        sides = (self.cols, self.rows) if column else (self.rows, self.cols)
        static = self.static._replace(column=column, outer=outer, inner=inner)
        return Direction(*sides, self.col_mask if column else self.row_mask, self.scale, self.heads, static)

    def programs(self, column: bool, outer: int) -> int:
        """Blocks of outer lines, over all heads: the grid that `tiles.own_block` reads."""
        count = self.cols.size if column else self.rows.size
        return -(-count // outer) * self.num * self.heads

    def live(self, potential: Tensor, dead: Tensor, column: bool) -> Tensor:
        """The live vector `[N*H, width]` of a potential `[N, H, lines(+G)]` in natural units."""
        side = self.cols if column else self.rows
        found = potential.new_full((self.num * self.heads, side.width), -torch.inf)
        inside = (potential[..., : side.size] * LOG2E).masked_fill(dead[..., : side.size], -torch.inf)
        found.view(self.num, self.heads, side.width)[..., : side.size] = inside
        return found

    def padded(self, x: Tensor, column: bool) -> Tensor:
        """A vector `[N, H, lines(+G)]` of one side as `[N*H, width]`, 0 after the last line."""
        side = self.cols if column else self.rows
        found = x.new_zeros(self.num * self.heads, side.width)
        found.view(self.num, self.heads, side.width)[..., : side.size] = x[..., : side.size]
        return found


def precision() -> str:
    """How float32 products are made: as torch is told to make its own on a GPU (its "high" and "medium" are one)."""
    told = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if told == "tf32" and torch.version.hip is None else "ieee"


def half_precision() -> str:
    """How float16's products with plan tiles are made: entries of a plan leave the range of float16, but TF32 has its
    digits."""
    return "ieee" if torch.version.hip is not None else "tf32"


def power_of_two(x: int) -> int:
    """The smallest power of two that is 16 or more and holds x."""
    return max(16, 1 << max(0, x - 1).bit_length())


def _features(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _lines(x: Tensor, share: int, count: int, intervals: tuple[Tensor, Tensor, Tensor, Tensor]) -> Lines:
    width = -(-count // PADDING) * PADDING
    return Lines(x, x.stride(0), x.stride(1), x.stride(2), share, count, width, *intervals)


def _mask(mask: Tensor | None, other: Tensor, column: bool) -> Mask:
    if mask is None:
        return Mask(other, 0, 0, 0, 0)
    n, h, row, col = (0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return Mask(mask, n, h, col, row) if column else Mask(mask, n, h, row, col)


Reach = tuple[Tensor, Tensor, Tensor, Tensor]


def sides(problem: Problem) -> tuple[Reach, Reach]:
    """lo, hi, safe_lo and safe_hi of rows and of columns.

    A row's interval says all. A column's is the smallest that holds its rows, and may hold rows that do not reach it:
    it is safe where it counts no live one of them.
    """
    support = problem.support
    if not problem.outline.banded:  # never read
        rows, cols = (support.row_lo, support.row_hi), (support.col_lo, support.col_hi)
        return (*rows, *rows), (*cols, *cols)
    lo, hi, col_lo, col_hi = (x.contiguous() for x in (support.row_lo, support.row_hi, support.col_lo, support.col_hi))
    size = problem.sizes[3]
    alive = (problem.marginals.log_row_mass > -torch.inf).any(1)
    some = (alive & (lo < hi)).to(lo.dtype)
    ends = torch.zeros(lo.shape[0], size + 1, dtype=lo.dtype, device=lo.device)
    ends = ends.scatter_add(-1, lo, some).scatter_add(-1, hi, -some)
    reaching = ends.cumsum(-1)[:, :-1]  # live rows whose interval holds the column
    before = torch.nn.functional.pad(alive.to(lo.dtype).cumsum(-1), (1, 0))
    length = lo.shape[-1]
    inside = before.gather(-1, col_hi.clamp(0, length)) - before.gather(-1, col_lo.clamp(0, length))
    exact = inside == reaching
    safe = torch.where(exact, col_lo, length), torch.where(exact, col_hi, 0)
    return (lo, hi, lo, hi), (col_lo, col_hi, *safe)


def lines_of(x: Tensor, like: Lines) -> Lines:
    """Another tensor `[N, H, lines, features]` on the lines of a side."""
    x = _features(x)
    return like._replace(data=x, stride_n=x.stride(0), stride_h=x.stride(1), stride_l=x.stride(2), share=1)
