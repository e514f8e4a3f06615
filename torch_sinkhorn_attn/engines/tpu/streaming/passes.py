"""`Passes` by Pallas TPU kernels that recompute the score tiles from q and k in each pass: any L and S, O(L) memory.

A mask that is constant along one side is a vector of the other, added to the potentials. One that is not is read tile
by tile where it lies; only booleans and float16, which a kernel cannot load, are converted first (to a byte and to
float32 an entry).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.method import dropout
from torch_sinkhorn_attn.engines.tpu.method.blockwise import kept, lowest_kept
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Field, Inputs, Passes, Statics, compute_dtype
from torch_sinkhorn_attn.engines.tpu.method.unfit import of_unfit_data
from torch_sinkhorn_attn.engines.tpu.streaming.kernels import (
    UNROLLED_TERMS,
    LogSumExp,
    MaskCotangent,
    ScoreCotangent,
    TimesMatrix,
    TimesVector,
)
from torch_sinkhorn_attn.engines.tpu.streaming.launch import Operands, Outputs, launch
from torch_sinkhorn_attn.engines.tpu.streaming.reading import LANES, Reading
from torch_sinkhorn_attn.engines.tpu.streaming.spans import most_tiles, spans
from torch_sinkhorn_attn.engines.tpu.streaming.walk import HeadsOfTile

LOG2_E = 1.4426950408889634
BLOCK = 512  # lines of a block
TILE, WIDE_TILE = 512, 1024  # what lies across in a tile; the wide one is 8 % faster where matrices are narrow
SMALLEST_TILE = 256  # beside a narrow window: a step of the grid costs about 250 bundles before its first entry
WIDEST_FOR_WIDE = 128  # features
LARGEST_EXPONENT = {jnp.dtype("float32"): 30.0, jnp.dtype("float64"): 300.0}  # that may be applied outside of P


class StreamingPasses(Passes):
    """The passes of one problem: every method is a kernel call, two where a mask's cotangent is wanted."""

    def __init__(self, inputs: Inputs, constants: Constants, statics: Statics, lowering: Lowering):
        self.constants, self.statics, self.lowering = constants, statics, lowering
        self.dtype = compute_dtype(inputs.query)
        self.num, self.heads, self.length = constants.log_row_mass.shape
        self.size = constants.log_col_mass.shape[-1]
        self.empty = 0 in (self.num, self.heads, self.length, self.size)
        self.query, self.key = _loadable(inputs.query), _loadable(inputs.key)
        self.value = None if inputs.value is None else _loadable(inputs.value)
        self.row_active, self.col_active = constants.log_row_mass > -jnp.inf, constants.log_col_mass > -jnp.inf
        self.mask = inputs.mask
        self.row_shift: Array | None = None  # [N or 1, H or 1, L or 1], what the mask adds to all of a row
        self.col_shift: Array | None = None
        self.tile_mask: Array | None = None
        self.mask_floor = 0.0
        if inputs.mask is not None:
            self._split_mask(inputs.mask)
        if not self.empty:  # made here, not where they are used: that may be inside of a loop
            self._rows, self._columns = self._reading(transposed=False), self._reading(transposed=True)

    def _split_mask(self, mask: Array) -> None:
        boolean = mask.dtype == jnp.bool_
        self.mask_floor = 0.0 if boolean else lowest_kept(mask.dtype, self.dtype)
        if mask.shape[-2] > 1 and mask.shape[-1] > 1:
            self.tile_mask = mask.astype(jnp.int8) if boolean else _loadable(mask)
            return
        shift = jnp.where(kept(mask, self.dtype), 0 if boolean else mask, -jnp.inf).astype(self.dtype)
        if mask.shape[-1] > 1:
            self.col_shift = shift[..., 0, :]
        else:
            self.row_shift = shift[..., :, 0]

    # The two directions

    def _reading(self, transposed: bool, terms: int = 1) -> Reading:
        c, statics = self.constants, self.statics
        length, size = (self.size, self.length) if transposed else (self.length, self.size)
        block = min(BLOCK if terms <= UNROLLED_TERMS else LANES, _padded(length))
        tile = min(self._tile(), _padded(size))
        lo, hi = (c.col_lo, c.col_hi) if transposed else (c.row_lo, c.row_hi)
        found = spans(lo, hi, block, tile)
        streams = None
        if c.dropout_seed is not None:
            streams = lax.bitcast_convert_type(dropout.head_streams(c).reshape(-1), jnp.int32)
        return Reading(
            lines=self.key if transposed else self.query,
            across=self.query if transposed else self.key,
            heads=self.heads,
            transposed=transposed,
            intervals=(lo, hi) if statics.banded else None,
            spans=found,
            most=most_tiles(found, statics, self.length, self.size, block, tile, transposed),
            mask=self.tile_mask,
            mask_floor=self.mask_floor,
            streams=streams,
            statics=statics,
            block=block,
            tile=tile,
            interpret=self.lowering.interpret,
            vmem_limit=self.lowering.vmem_limit,
        )

    def _tile(self) -> int:
        """About a window's width: narrower tiles waste less beside a band."""
        left, right = self.statics.window_left, self.statics.window_right
        if min(left, right) >= 0:
            return min(TILE, max(SMALLEST_TILE, _padded(left + right + 1)))
        return TILE if self.query.shape[-1] > WIDEST_FOR_WIDE or self.query.dtype != jnp.bfloat16 else WIDE_TILE

    def _for_terms(self, transposed: bool, terms: int) -> Reading:
        """Many terms of a field are held for few lines at a time."""
        if terms > UNROLLED_TERMS:
            return self._reading(transposed, terms)
        return self._columns if transposed else self._rows

    def _row_exponent(self, u: Array) -> Array:
        return _exponent(u, self.row_shift, self.row_active)

    def _col_exponent(self, v: Array) -> Array:
        return _exponent(v, self.col_shift, self.col_active)

    # Passes

    def row_lse(self, v: Array) -> Array:
        """LSE_j(S_ij + v_j), -inf on a row without support."""
        if self.empty:
            return jnp.full((self.num, self.heads, self.length), -jnp.inf, self.dtype)
        return _shifted(self._lse(self._rows, self._col_exponent(v)), self.row_shift)

    def column_lse(self, u: Array) -> Array:
        """LSE_i(S_ij + u_i), -inf on a column without support."""
        if self.empty:
            return jnp.full((self.num, self.heads, self.size), -jnp.inf, self.dtype)
        return _shifted(self._lse(self._columns, self._row_exponent(u)), self.col_shift)

    @staticmethod
    def _lse(reading: Reading, v: Array) -> Array:
        return launch(reading, LogSumExp(), Operands({}, {"v": (v, -jnp.inf)}), Outputs(("lse",), sums=2))["lse"]

    def rows(self, p: Array, q: Array, y: Array) -> Array:
        """M(p, q) y."""
        if self.empty:
            return jnp.zeros_like(p)
        return self._times_vector(self._rows, self._row_exponent(p), self._col_exponent(q), self._live_col(y))

    def columns(self, p: Array, q: Array, x: Array) -> Array:
        """M(p, q)^T x."""
        if self.empty:
            return jnp.zeros_like(q)
        return self._times_vector(self._columns, self._col_exponent(q), self._row_exponent(p), self._live_row(x))

    @staticmethod
    def _times_vector(reading: Reading, p: Array, q: Array, y: Array) -> Array:
        operands = Operands({"p": p}, {"q": (q, -jnp.inf), "y": (y, 0.0)})
        return launch(reading, TimesVector(), operands, Outputs(("out",), sums=1))["out"]

    def values(self, u: Array, v: Array) -> tuple[Array, Array]:
        """M(u, v) V with dropout `[N, H, L, Ev]`, and the row sums of M(u, v) without it `[N, H, L]`."""
        assert self.value is not None
        width = self.value.shape[-1]
        if self.empty:
            return jnp.zeros((*u.shape, width), self.dtype), jnp.zeros_like(u)
        operands = self._plan(self._row_exponent(u), self._col_exponent(v), self.value)
        found = launch(self._rows, TimesMatrix(), operands, Outputs(("sums",), {"out": width}, sums=1))
        return found["out"], found["sums"]

    def value_cotangent(self, u: Array, v: Array, grad: Array) -> Array:
        """M(u, v)^T grad with dropout, per query head: `[N, H, L, Ev]` to `[N, H, S, Ev]`."""
        if self.empty:
            return jnp.zeros((*v.shape, grad.shape[-1]), self.dtype)
        operands = self._plan(self._col_exponent(v), self._row_exponent(u), self._operand(grad))
        return launch(self._columns, TimesMatrix(), operands, Outputs(matrices={"out": grad.shape[-1]}))["out"]

    @staticmethod
    def _plan(p: Array, q: Array, w: Array) -> Operands:
        return Operands({"p": p}, {"q": (q, -jnp.inf)}, across_matrices={"w": w})

    def query_cotangent(
        self, u: Array, v: Array, grad: Array, field: Field, mask_grad: bool
    ) -> tuple[Array, Array | None]:
        """dS K `[N, H, L, E]`, and the cotangent of a float mask in the mask's shape."""
        mask = self.mask if mask_grad else None
        if self.empty:
            shape = (*u.shape, self.query.shape[-1])
            return jnp.zeros(shape, self.dtype), None if mask is None else jnp.zeros(mask.shape, self.dtype)
        wants_sums = mask is not None and mask.shape[-1] == 1
        out, sums = self._score_pass(u, v, grad, field, False, wants_sums)
        if mask is None:
            return out, None
        if self.tile_mask is not None:
            return out, self._mask_cotangent(u, v, grad, field, mask.shape)
        if sums is not None:
            return out, _sum_to(sums[..., None], mask.shape)
        _, sums = self._score_pass(u, v, grad, field, True, wants_sums=True)
        assert sums is not None
        return out, _sum_to(sums[..., None, :], mask.shape)

    def key_cotangent(self, u: Array, v: Array, grad: Array, field: Field) -> Array:
        """dS^T Q, per query head: `[N, H, S, E]`."""
        if self.empty:
            return jnp.zeros((*v.shape, self.query.shape[-1]), self.dtype)
        return self._score_pass(u, v, grad, field, True)[0]

    def _score_pass(
        self, u: Array, v: Array, grad: Array, field: Field, transposed: bool, wants_sums: bool = False
    ) -> tuple[Array, Array | None]:
        """dS times what lies across. Where no exponent of the field is far above that of P, its terms are rescalings of
        P: one exponential per entry instead of one per term, which halves the time at R = 2."""
        terms = len(field.p)
        reading = self._for_terms(transposed, terms)
        outputs = Outputs(("sums",) if wants_sums else (), {"out": reading.across.shape[-1]}, sums=int(wants_sums))
        row_gap, col_gap = self._live_row(field.p - u), self._live_col(field.q - v)
        limit = LARGEST_EXPONENT[self.dtype]
        near = (jnp.max(row_gap, initial=0) <= limit) & (jnp.max(col_gap, initial=0) <= limit)

        def scaled() -> dict[str, Array]:
            weights = field._replace(x=field.x * jnp.exp(row_gap), y=field.y * jnp.exp(col_gap))
            operands = self._score_operands(u, v, grad, weights, transposed)
            del operands.line_vectors["p"], operands.across_vectors["q"]
            return launch(reading, ScoreCotangent(terms, scaled=True), operands, outputs)

        def apart() -> dict[str, Array]:
            operands = self._score_operands(u, v, grad, field, transposed)
            return launch(reading, ScoreCotangent(terms, scaled=False), operands, outputs)

        found = lax.cond(near, scaled, of_unfit_data(apart))
        return found["out"], found.get("sums")

    def _score_operands(self, u: Array, v: Array, grad: Array, field: Field, transposed: bool) -> Operands:
        assert self.value is not None
        row = (self._row_exponent(u), self._row_exponent(field.p), self._live_row(field.x), self._operand(grad))
        col = (self._col_exponent(v), self._col_exponent(field.q), self._live_col(field.y), self.value)
        (u, p, x, g), (v, q, y, h) = (col, row) if transposed else (row, col)
        edges = {"v": (v, -jnp.inf), "q": (q, -jnp.inf), "y": (y, 0.0)}
        return Operands({"u": u, "p": p, "x": x}, edges, {"g": g}, {"h": h})

    def _mask_cotangent(self, u: Array, v: Array, grad: Array, field: Field, shape: tuple[int, ...]) -> Array:
        reading = self._for_terms(False, len(field.p))
        walk = HeadsOfTile(self.num, self.heads, reading.blocks, -(-self.size // reading.tile), shape[0], shape[1])
        operands = self._score_operands(u, v, grad, field, transposed=False)
        return launch(reading, MaskCotangent(len(field.p)), operands, Outputs(mask=shape), walk)["mask_cotangent"]

    # Operands

    def _operand(self, grad: Array) -> Array:
        """What multiplies values has their dtype: bfloat16 stays on the fast path of the matrix unit."""
        assert self.value is not None
        return grad.astype(self.value.dtype)

    def _live_row(self, x: Array) -> Array:
        return jnp.where(self.row_active, x, 0)

    def _live_col(self, y: Array) -> Array:
        return jnp.where(self.col_active, y, 0)


def _loadable(x: Array) -> Array:
    """float16 in float32: a TPU cannot load it."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _exponent(potential: Array, shift: Array | None, active: Array) -> Array:
    """A potential with the mask's part, in base 2, -inf on inactive tokens."""
    return jnp.where(active, _shifted(potential, shift) * LOG2_E, -jnp.inf)


def _shifted(x: Array, shift: Array | None) -> Array:
    return x if shift is None else x + shift


def _padded(length: int) -> int:
    """`length` in whole vectors of lanes."""
    return -(-length // LANES) * LANES


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """The sum over what a mask of that shape is broadcast along."""
    axes = tuple(axis for axis, (have, want) in enumerate(zip(x.shape, shape, strict=True)) if have != want)
    return x.sum(axes, keepdims=True)
