"""The wavefront shape: operands laid out for its kernels, their results for everyone else.

Data that leave the path compiled in, or the range, are computed by streaming, inside the same program (`lax.cond`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from torch_sinkhorn_attn.engines.tpu.method import sinkhorn
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Result as Found
from torch_sinkhorn_attn.engines.tpu.resident.launch import resident_or_streamed
from torch_sinkhorn_attn.engines.tpu.resident.passes import centred
from torch_sinkhorn_attn.engines.tpu.resident.strip import (
    BLOCK,
    DEAD,
    SUBLANES,
    Strip,
    operands,
    pad_lanes,
    tokens_last,
)
from torch_sinkhorn_attn.engines.tpu.wavefront.forward import PassStatics, kernel
from torch_sinkhorn_attn.engines.tpu.wavefront.launch import COLS, ROWS, Operand, Result, Scratch, launch
from torch_sinkhorn_attn.engines.tpu.wavefront.path import Path, entries_of, path_of


def forward(problem: sinkhorn.Augmented, lowering: Lowering, residuals: bool) -> Found:
    """`sinkhorn.forward` by the wavefront kernel, and by `problem`'s own passes where the data want that."""
    found, suited = solve(problem, lowering, residuals)
    streamed = functools.partial(sinkhorn.forward, problem, residuals)
    return resident_or_streamed(suited, lambda: found, streamed)


class Lines(NamedTuple):
    """Masses of the lines with a support, dead ones -inf; `[N, H, L]` and `[N, H, S]`."""

    log_a: Array
    log_b: Array


def lines_of(problem: sinkhorn.Augmented) -> Lines:
    constants = problem.constants
    log_a, log_b = (x.astype(problem.dtype) for x in (constants.log_row_mass, constants.log_col_mass))
    return Lines(
        jnp.where((constants.row_lo >= constants.row_hi)[:, None], -jnp.inf, log_a),
        jnp.where((constants.col_lo >= constants.col_hi)[:, None], -jnp.inf, log_b),
    )


def solve(problem: sinkhorn.Augmented, lowering: Lowering, residuals: bool) -> tuple[Found, Array]:
    """The result, and whether the data kept to the path and every scaling stayed in range."""
    statics, length, size = problem.statics, problem.length, problem.size
    path, lines = path_of(length, size, statics), lines_of(problem)
    start = problem.initial_potentials()
    saved = tuple(range(statics.stopped, statics.stopped + statics.kept + 1))
    o = PassStatics(
        path,
        statics,
        problem.dtype,
        base=statics.stopped,
        tail=statics.kept,
        saved=saved if statics.stopped else saved[1:],
        values=problem.inputs.value is not None,
        residuals=residuals,
    )
    entries = entries_of(problem.constants, path, statics, o.way.before, o.way.steps)
    results = results_of(problem, o)
    given = operands_of(problem, o, start)
    out = launch(
        "sinkhorn_wavefront_forward", functools.partial(kernel, o), problem, lowering, entries, o.way.before,
        given, results, scratch_of(problem, o, given[1].array),
    )  # fmt: skip
    named: dict[str, list[Array]] = {}
    for result, x in zip(results, out, strict=True):
        named.setdefault(result.name, []).append(without_padding(x, path, size) if result.side == COLS else x)
    rows, cols = (jnp.stack(named[name])[:, :, :, 0] for name in ("rows", "cols"))
    rows, cols = rows[..., :length], cols[..., :size]
    if not statics.stopped:
        rows, cols = jnp.concatenate([start[0][None], rows]), jnp.concatenate([start[1][None], cols])
    rows, cols = jnp.where(lines.log_a == -jnp.inf, 0, rows), jnp.where(lines.log_b == -jnp.inf, 0, cols)
    if statics.balanced and statics.stopped:
        rows, cols = centred(problem, rows, cols)
    alive = lines.log_a > -jnp.inf
    scale = named["scale"][0][:, :, 0, :length]
    mass = jnp.where(alive[..., None], named["mass"][0][:, :, :length] * scale[..., None], 0) if o.values else None
    row_sums = jnp.where(alive, named["row_total"][0][:, :, 0, :length] * scale, 0)
    col_sums = None
    if residuals:
        col_sums = jnp.where(lines.log_b > -jnp.inf, named["col_total"][0][:, :, 0, :size], 0)
    result = sinkhorn.finish(problem, (rows, cols), mass, row_sums, col_sums)
    return result, entries.fits & jnp.all(named["range"][0] > 0)


def without_padding(x: Array, path: Path, size: int) -> Array:
    """`[..., padded columns]` to `[..., size]`."""
    return x[..., path.width * BLOCK : path.width * BLOCK + size]


def pad_cols(x: Array, path: Path, value: float = 0.0) -> Array:
    """`[..., tokens]` to the padded columns, at most `path.cols` blocks of them."""
    before = path.width * BLOCK
    after = path.padded_cols * BLOCK - before - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((before, after),), constant_values=value)


def operands_of(problem: sinkhorn.Augmented, o: PassStatics, start: tuple[Array, Array]) -> list[Operand]:
    """What the forward kernel reads, for potentials to start from."""
    path, inputs, constants, lag = o.path, problem.inputs, problem.constants, o.path.lag
    u, v = start
    lines = lines_of(problem)
    found = operands(inputs, constants, problem.statics, Strip(path.rows, path.cols, path.width), u)
    pad = functools.partial(pad_lanes, size=path.padded_length)
    last = o.lag_of(o.iterations)
    given = [
        Operand("query", found["query"], ROWS),
        Operand("key", pad_cols(found["key"], path), COLS),
        Operand("col_lo", pad_cols(constants.col_lo[:, None, None], path), COLS),
        Operand("col_hi", pad_cols(constants.col_hi[:, None, None], path), COLS),
        Operand("log_a", pad(jnp.maximum(lines.log_a, DEAD), value=DEAD)[:, :, None], ROWS, lag),
        Operand("start_row", pad(u)[:, :, None], ROWS, lag),
        Operand("log_b", pad_cols(jnp.maximum(lines.log_b, DEAD), path, DEAD)[:, :, None], COLS, lag),
    ]
    if problem.statics.over_relaxation != 1:
        given.append(Operand("start_col", pad_cols(v, path)[:, :, None], COLS, lag))
    if o.values:
        assert inputs.value is not None
        given.append(Operand("value", pad_cols(tokens_last(inputs.value), path), COLS, last))
    return given


def results_of(problem: sinkhorn.Augmented, o: PassStatics) -> list[Result]:
    """What it writes."""
    lp, sp, last = o.path.padded_length, o.path.padded_cols * BLOCK, o.lag_of(o.iterations)
    found = [Result("rows", (1, lp), ROWS, o.lag_of(i)) for i in o.saved]
    found += [Result("cols", (1, sp), COLS, o.lag_of(i)) for i in o.saved]
    found += [Result("scale", (1, lp), ROWS, last), Result("row_total", (1, lp), ROWS, last)]
    if o.values:
        assert problem.inputs.value is not None
        found.append(Result("mass", (lp, problem.inputs.value.shape[-1]), ROWS, last, tokens_first=True))
    if o.residuals:
        found.append(Result("col_total", (1, sp), COLS, last + o.path.lag))
    return [*found, Result("range", (1, BLOCK), None)]


def scratch_of(problem: sinkhorn.Augmented, o: PassStatics, key: Array) -> Scratch:
    """Its workspace; `key` as the kernel is given it."""
    dtype, path, line = problem.dtype, o.path, (SUBLANES, BLOCK)
    way, stages = o.way, o.iterations + 1
    found: Scratch = {
        "strip": ((way.ring, BLOCK, path.columns), dtype),
        "row_rep": ((way.ring, BLOCK, BLOCK), dtype),
        "row_line": ((way.ring, *line), dtype),
        "keys": ((way.window, key.shape[2], BLOCK), key.dtype),
        "los": ((way.window, *line), jnp.int32),
        "his": ((way.window, *line), jnp.int32),
        "tops": ((way.touched, *line), dtype),
        "col_abs": ((way.held, *line), dtype),
        "col_mass": ((way.held, *line), dtype),
        "sums": ((stages, way.touched, *line), dtype),
        "y": ((stages, way.touched, *line), dtype),
        "worst": ((2, *line), dtype),
    }
    if problem.statics.over_relaxation != 1:
        found |= {"log_x": ((way.ring, BLOCK, BLOCK), dtype), "log_y": ((stages, way.touched, *line), dtype)}
    if o.values:
        assert problem.inputs.value is not None
        value = tokens_last(problem.inputs.value)
        found["values"] = ((way.window, value.shape[2], BLOCK), value.dtype)
    return found
