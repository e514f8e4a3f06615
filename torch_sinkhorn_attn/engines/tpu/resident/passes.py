"""The resident shape: operands laid out for its kernels, their results laid out for everyone else.

What a kernel cannot keep in range, or lay out, is told by the data; those calls are computed by streaming, inside the
same program (`lax.cond`).
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array

from torch_sinkhorn_attn.engines.tpu.method import sinkhorn
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Result
from torch_sinkhorn_attn.engines.tpu.resident.columns import SolveStatics
from torch_sinkhorn_attn.engines.tpu.resident.forward import kernel
from torch_sinkhorn_attn.engines.tpu.resident.launch import Scratch, Shapes, launch, resident_or_streamed
from torch_sinkhorn_attn.engines.tpu.resident.neighbours import neighbours_of
from torch_sinkhorn_attn.engines.tpu.resident.strip import (
    BLOCK,
    DEAD,
    SUBLANES,
    Strip,
    first_blocks,
    matmul_dtype,
    operands,
    pad_lanes,
    strip_of,
    tokens_last,
)
from torch_sinkhorn_attn.problem.segments import centre_gauge


def forward(problem: sinkhorn.Augmented, lowering: Lowering, residuals: bool) -> Result:
    """`sinkhorn.forward` by the resident kernel, and by `problem`'s own passes where the data want that."""
    strip = strip_of(problem.length, problem.size, problem.statics)
    first, fits = first_blocks(problem.constants, strip)
    found, in_range = solve_resident(problem, lowering, strip, first, residuals)
    streamed = functools.partial(sinkhorn.forward, problem, residuals)
    return resident_or_streamed(~problem.anywhere(~(fits & in_range)), lambda: found, streamed)


def solve_resident(
    problem: sinkhorn.Augmented, lowering: Lowering, strip: Strip, first: Array, residuals: bool
) -> tuple[Result, Array]:
    """The result, and whether every scaling of every head stayed in range."""
    statics, length, size = problem.statics, problem.length, problem.size
    call = call_of(problem, lowering, strip, residuals)
    options = call.o
    body = functools.partial(kernel, options)
    out = launch(
        "sinkhorn_resident_forward", body, problem, lowering, first, call.operands(), call.results(), call.scratch(),
        options.neighbours,
    )  # fmt: skip
    rows, cols = (jnp.moveaxis(out[name], 2, 0) for name in ("rows", "cols"))
    rows, cols = rows[..., :length], cols[..., :size]
    if problem.dustbin is not None:
        bins = (jnp.moveaxis(out[name], 2, 0)[..., :1] for name in ("bin_rows", "bin_cols"))
        rows, cols = (jnp.concatenate(pair, -1) for pair in zip((rows, cols), bins, strict=True))
    if statics.stopped == 0:
        u, v = problem.initial_potentials()
        rows, cols = rows.at[0].set(u), cols.at[0].set(v)
    rows = jnp.where(call.dead(problem.log_a, call.log_a), 0, rows)
    cols = jnp.where(call.dead(problem.log_b, call.log_b), 0, cols)
    if statics.balanced and statics.stopped:
        rows, cols = centred(problem, rows, cols)
    scale = out["scale"][:, :, 0, :length]
    mass = out["mass"][:, :, :length] * scale[..., None] if options.values else None
    row_sums = out["row_total"][:, :, 0, :length] * scale
    col_sums = problem.complete_sums(out["col_total"][:, :, 0, :size]) if residuals else None
    result = sinkhorn.finish(problem, (rows, cols), mass, row_sums, col_sums)
    return result, jnp.all(out["range"] > 0)


def call_of(problem: sinkhorn.Augmented, lowering: Lowering, strip: Strip, residuals: bool) -> Call:
    """The launch for a problem."""
    options = SolveStatics(
        strip=strip,
        statics=problem.statics,
        dtype=problem.dtype,
        low_base=lowering.base_dtype == "bfloat16" and problem.dtype != jnp.float64,
        dustbin=problem.dustbin is not None,
        values=problem.inputs.value is not None,
        residuals=residuals,
        neighbours=neighbours_of(problem.statics),
    )
    return Call(problem, options)


def centred(problem: sinkhorn.Augmented, rows: Array, cols: Array) -> tuple[Array, Array]:
    """The gauge of u^0 and v^0, taken on by all that follow: half-steps of balanced problems pass it on."""
    u, v = centre_gauge(rows[0], cols[0], problem.log_a, problem.log_b, problem.components())
    return rows + (u - rows[0]), cols + (v - cols[0])


class Call:
    """One launch of the forward kernel: operands, results and scratch by name."""

    def __init__(self, problem: sinkhorn.Augmented, options: SolveStatics):
        self.problem, self.o, self.strip = problem, options, options.strip
        constants, dtype = problem.constants, problem.dtype
        self.log_a, self.log_b = constants.log_row_mass.astype(dtype), constants.log_col_mass.astype(dtype)
        if not options.dustbin and problem.statics.banded:  # lines that only the window empties
            self.log_a = jnp.where((constants.row_lo >= constants.row_hi)[:, None], -jnp.inf, self.log_a)
            self.log_b = jnp.where((constants.col_lo >= constants.col_hi)[:, None], -jnp.inf, self.log_b)

    def dead(self, augmented: Array, real: Array) -> Array:
        """`[N, H, n(+G)]`: lines whose potential is 0."""
        return jnp.concatenate([real, augmented[..., real.shape[-1] :]], -1) == -jnp.inf

    def operands(self) -> dict[str, Array]:
        problem, strip, inputs, constants = self.problem, self.strip, self.problem.inputs, self.problem.constants
        lp, sp = strip.padded_length, strip.padded_size
        found: dict[str, Array] = {}
        if self.o.dustbin:
            assert problem.dustbin is not None
            found["bins"] = self._bins()
        u, v = problem.initial_potentials()
        found |= operands(inputs, constants, problem.statics, strip, u[..., : problem.length])
        if self.o.values:
            assert inputs.value is not None
            found["value"] = pad_lanes(tokens_last(inputs.value), sp)
        if problem.statics.banded:
            found["col_lo"], found["col_hi"] = (pad_lanes(x, sp)[:, None] for x in (constants.col_lo, constants.col_hi))
        vectors = {
            "log_a": pad_lanes(jnp.maximum(self.log_a, DEAD), lp, DEAD),
            "log_b": pad_lanes(jnp.maximum(self.log_b, DEAD), sp, DEAD),
            "start_row": pad_lanes(u[..., : problem.length], lp),
            "start_col": pad_lanes(v[..., : problem.size], sp),
        }
        if problem.dustbin is not None:
            for name, score, log_mass, n in (
                ("row_score", problem.dustbin.row, constants.log_row_mass, lp),
                ("col_score", problem.dustbin.col, constants.log_col_mass, sp),
            ):
                vectors[name] = pad_lanes(jnp.where(log_mass == -jnp.inf, DEAD, score), n, DEAD)
        return found | {name: x[:, :, None] for name, x in vectors.items()}

    def _bins(self) -> Array:
        """The dustbin's scalars, one a row, in every lane."""
        problem = self.problem
        assert problem.dustbin is not None
        u, v = problem.initial_potentials()
        corner = problem.dustbin.corner
        ends = [corner, problem.log_a[..., -1:], problem.log_b[..., -1:], u[..., -1:], v[..., -1:]]
        scalars = jnp.concatenate([jnp.maximum(x, DEAD) for x in ends], -1)
        scalars = jnp.pad(scalars, ((0, 0), (0, 0), (0, SUBLANES - len(ends))))
        return jnp.broadcast_to(scalars[..., None], (*scalars.shape, BLOCK))

    def results(self) -> Shapes:
        """Shapes of one head's results."""
        kept, lp, sp = self.problem.statics.kept + 1, self.strip.padded_length, self.strip.padded_size
        found: Shapes = {"rows": (kept, lp), "cols": (kept, sp), "scale": (1, lp), "row_total": (1, lp)}
        if self.o.values:
            assert self.problem.inputs.value is not None
            found = {"mass": (lp, self.problem.inputs.value.shape[-1])} | found
        if self.o.residuals:
            found["col_total"] = (1, sp)
        if self.o.dustbin:
            found |= {"bin_rows": (kept, BLOCK), "bin_cols": (kept, BLOCK)}
        return found | {"range": (1, BLOCK)}

    def scratch(self) -> Scratch:
        """Shape and dtype of one head's workspace."""
        strip, dtype = self.strip, self.problem.dtype
        lp, sp, rep = strip.padded_length, strip.padded_size, (strip.padded_length, BLOCK)
        found: Scratch = {"strip": ((lp, strip.columns), dtype)}
        if self.o.low_base:
            low_shapes = {"low": (lp // 2, strip.columns), "low_mass": (lp // 2, BLOCK), "low_y": (SUBLANES, sp)}
            found |= {name: (shape, jnp.uint32) for name, shape in low_shapes.items()}
        found["row_rep"] = (rep, dtype)
        if self.o.dustbin:
            found |= {"bin_col": (rep, dtype), "bin_row": ((1, sp), dtype)}
        found["y"] = ((SUBLANES, sp), dtype)
        names = ["col_mass", "col_share", "col_dead"] if self.o.plain_columns else []
        names += ["sums"] + ["log_y"] * self.o.remembers + ["log_before"] * self.o.accelerated
        found |= {name: ((SUBLANES, sp), dtype) for name in names}
        if self.o.accelerated:
            found["momentum"] = ((5, SUBLANES, BLOCK), dtype)
        found["col_abs"] = ((1, sp), dtype)
        found["x"] = ((1, lp), dtype)
        if self.problem.statics.over_relaxation != 1:
            found |= {"log_x": (rep, dtype), "top_x": ((SUBLANES, BLOCK), dtype)}
        if self.o.values:
            low = matmul_dtype(self.problem.inputs.query)
            found["plan"] = ((strip.unroll, BLOCK, strip.columns), low)
        if self.o.dustbin:
            found["bin"] = ((SUBLANES, BLOCK), dtype)
        return found
