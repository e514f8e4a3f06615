"""The wavefront shape: operands laid out for its kernels, their results for everyone else.

Data that leave the path compiled in, or the range, are computed by streaming, inside the same program (`lax.cond`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.method import sinkhorn
from torch_sinkhorn_attn.engines.tpu.method.blockwise import lowest_kept
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Result as Found
from torch_sinkhorn_attn.engines.tpu.method.tiles import tile_bytes
from torch_sinkhorn_attn.engines.tpu.resident.launch import resident_or_streamed
from torch_sinkhorn_attn.engines.tpu.resident.passes import centred
from torch_sinkhorn_attn.engines.tpu.resident.strip import (
    BLOCK,
    DEAD,
    SUBLANES,
    UNROLLED,
    Strip,
    operands,
    pad_lanes,
    tokens_last,
)
from torch_sinkhorn_attn.engines.tpu.wavefront.forward import PassStatics, kernel
from torch_sinkhorn_attn.engines.tpu.wavefront.launch import (
    COLS,
    PAIRS,
    ROWS,
    Operand,
    Result,
    Scratch,
    launch,
)
from torch_sinkhorn_attn.engines.tpu.wavefront.path import Path, entries_of, path_of
from torch_sinkhorn_attn.method.acceleration import estimate, log_norm
from torch_sinkhorn_attn.options import plain_iterations
from torch_sinkhorn_attn.problem.segments import segments

SPILLS = 4 << 20  # bytes for what the unrolled loops spill and the compiler adds


def forward(problem: sinkhorn.Augmented, lowering: Lowering, residuals: bool) -> Found:
    """`sinkhorn.forward` by the wavefront kernel, and by `problem`'s own passes where the data want that."""
    found, suited = solve(problem, lowering, residuals)
    streamed = functools.partial(sinkhorn.forward, problem, residuals)
    return resident_or_streamed(suited, lambda: found, streamed)


class Lines(NamedTuple):
    """Masses of the lines with a support (the dustbin is one), dead ones -inf; `[N, H, L]` and `[N, H, S]`."""

    log_a: Array
    log_b: Array


def lines_of(problem: sinkhorn.Augmented) -> Lines:
    constants = problem.constants
    log_a, log_b = (x.astype(problem.dtype) for x in (constants.log_row_mass, constants.log_col_mass))
    if problem.dustbin is not None:
        return Lines(log_a, log_b)
    return Lines(
        jnp.where((constants.row_lo >= constants.row_hi)[:, None], -jnp.inf, log_a),
        jnp.where((constants.col_lo >= constants.col_hi)[:, None], -jnp.inf, log_b),
    )


def passes_of(problem: sinkhorn.Augmented, lowering: Lowering, residuals: bool) -> list[PassStatics] | None:
    """The passes over the sequence: one, or more where a core's memory does not hold all iterations in flight, or where
    lambda of an accelerated base is measured first; None where it does not hold a pass of one iteration.

    With a tolerance there are two of the whole base: one to see where each head ends it, and one that does."""
    statics, values = problem.statics, problem.inputs.value is not None
    path = path_of(problem.length, problem.size, statics)
    watched = statics.tolerance > 0 and statics.stopped > 0
    momentum = statics.acceleration is not None or watched
    # Interpreted, a loop body takes long to compile and gains nothing.
    floor, unrolled = mask_floor(problem), 1 if lowering.interpret else UNROLLED // path.width

    def last(base: int) -> PassStatics:
        saved = tuple(range(base if statics.stopped else 1, base + statics.kept + 1))
        return PassStatics(
            path, statics, problem.dtype, base, statics.kept, saved, True, values, residuals, floor, unrolled,
            momentum and base > 0,
        )  # fmt: skip

    def earlier(base: int, plain: bool = False) -> PassStatics:
        saved = tuple(range(1 if plain else max(1, base - momentum), base + 1))
        return PassStatics(
            path, statics, problem.dtype, base, 0, saved, False, False, False, floor, unrolled, momentum and not plain
        )

    def held(o: PassStatics) -> bool:
        return vmem(problem, o) <= lowering.vmem_limit

    if watched:
        both = [earlier(statics.stopped)._replace(watched=True), last(statics.stopped)]
        return both if all(held(o) for o in both) else None
    measured = momentum and not statics.contraction and statics.stopped > plain_iterations(0)
    first = [earlier(plain_iterations(0), plain=True)] if measured else []
    stopped = statics.stopped - sum(o.base for o in first)
    own = stopped
    while own > min(1, stopped) and not held(last(own)):
        own -= 1
    if not all(held(o) for o in (*first, last(own))):
        return None
    rest, most = stopped - own, stopped - own
    while most > 1 and not held(earlier(most)):
        most -= 1
    count = -(-rest // max(1, most))
    sizes = [rest // count + (k < rest % count) for k in range(count)]
    return [*first, *(earlier(size) for size in sizes), last(own)]


def solve(problem: sinkhorn.Augmented, lowering: Lowering, residuals: bool) -> tuple[Found, Array]:
    """The result, and whether the data kept to the path and every scaling stayed in range."""
    statics, size = problem.statics, problem.size
    lines, own = lines_of(problem), segments(problem.constants)
    passes = passes_of(problem, lowering, residuals)
    assert passes is not None
    u, v = problem.initial_potentials()
    state, suited, done = Start(u, v, v), jnp.bool_(True), 0
    factors = momentum_of(problem, jnp.full((*u.shape[:2], 1), statics.contraction, problem.dtype))
    if passes[0].watched:
        on = jnp.ones((*u.shape[:2], statics.stopped), problem.dtype)
        factors = {"to_plain": on, "onwards": jnp.zeros_like(on)}
        scalars = {name: x.reshape(-1) for name, x in factors.items()}
        named, suited = run_pass(problem, lowering, passes.pop(0), state, lines, scalars)
        factors["to_plain"] = jnp.where(ended(named["changes"][0], statics.tolerance), 0, on)
    for o in passes:
        scalars = (
            {name: x[..., done : done + o.base].reshape(-1) for name, x in factors.items()} if o.accelerated else {}
        )
        named, fine = run_pass(problem, lowering, o, state, lines, scalars)
        suited &= fine
        done += o.base
        before, *kept = state.col, *named["cols"]
        state = Start(named["rows"][len(o.saved) - 1], kept[-1], kept[-2] if len(kept) > 1 else before)
        if o.base and not o.last and not o.accelerated and statics.acceleration:
            changes = (log_norm(x - y, problem.log_b, own) for x, y in (kept[-1:-3:-1], kept[-2:-4:-1]))
            factors = momentum_of(problem, estimate(*changes))
    rows, cols = jnp.stack(named["rows"][: len(o.saved)]), jnp.stack(named["cols"])
    scale, total, *features = named["rows"][len(o.saved) :]
    if not statics.stopped:  # and so R > 0
        rows, cols = jnp.concatenate([u[None], rows]), jnp.concatenate([v[None], cols])
    if statics.balanced and statics.stopped:
        rows, cols = centred(problem, rows, cols)
    mass = jnp.stack(features, -1) * scale[..., None] if o.values else None
    row_sums = scale * total
    col_sums = None
    if residuals:
        col_sums = jnp.where(lines.log_b > -jnp.inf, named["col_total"][0][:, :, 0, :size], 0)
    return sinkhorn.finish(problem, (rows, cols), mass, row_sums, col_sums), suited


def ended(changes: Array, tolerance: float) -> Array:
    """Whether each stopped iteration finds its head's base at its end, `[N, H, T]`: never the first, and from one on
    whose plain half-step would move no v_j by more than the tolerance. v then stands still, and so does u, which
    follows from it.

    Args:
        changes: the kernel's, `[N, H, 8 (T + 1), 128]`.
    """
    largest = changes.reshape(*changes.shape[:2], -1, SUBLANES * BLOCK).max(-1)[..., 1:]
    small = (largest <= tolerance) & (jnp.arange(largest.shape[-1]) > 0)
    return lax.cummax(small.astype(jnp.int32), 2) > 0


class Start(NamedTuple):
    """What a pass goes on from: u, v, and the v before it; scores of the dustbin + its potentials, for rows and for
    columns."""

    row: Array
    col: Array
    before: Array
    row_bin: Array | None = None
    col_bin: Array | None = None


def momentum_of(problem: sinkhorn.Augmented, contraction: Array) -> dict[str, Array]:
    """How each stopped iteration of an accelerated base moves v (`method.acceleration`), `[N, H, T]`: towards the plain
    half-step's value, and on from the potential before; plain iterations too.

    Args:
        contraction: lambda of each head, `[N, H, 1]`.
    """
    statics = problem.statics
    first = plain_iterations(statics.contraction)
    g, mu = 2 / (2 - contraction), contraction / (2 - contraction)
    omega, found = jnp.ones_like(contraction), []
    for t in range(statics.stopped):
        if t < first:
            found.append((jnp.ones_like(g), jnp.zeros_like(g)))
            continue
        found.append((omega * g, omega - 1))
        omega = 1 / (1 - (2 if t == first else 1) * omega * mu**2 / 4)
    to_plain, onwards = (jnp.concatenate([x[k] for x in found], -1) if found else g[..., :0] for k in (0, 1))
    return {"to_plain": to_plain, "onwards": onwards}


def run_pass(
    problem: sinkhorn.Augmented,
    lowering: Lowering,
    o: PassStatics,
    start: Start,
    lines: Lines,
    scalars: dict[str, Array],
) -> tuple[dict[str, list[Array]], Array]:
    """Its results by name, `rows` and `cols` as potentials, and whether it was suited."""
    path = o.path
    entries = entries_of(problem.constants, path, problem.statics, o.way.before, o.way.steps)
    given, results = operands_of(problem, o, start), results_of(problem, o)
    out = launch(
        "sinkhorn_wavefront_forward", functools.partial(kernel, o), problem, lowering, entries, path, o.way.before,
        given, results, scratch_of(problem, o, given[1].array), scalars,
    )  # fmt: skip
    named: dict[str, list[Array]] = {}
    for result, x in zip(results, out, strict=True):
        named.setdefault(result.name, []).append(without_padding(x, path, problem.size) if result.side == COLS else x)
    for name, log_mass in (("rows", lines.log_a), ("cols", lines.log_b)):
        found = jnp.moveaxis(named[name][0], 2, 0)[..., : log_mass.shape[-1]]
        named[name] = list(jnp.where(log_mass == -jnp.inf, 0, found))
    return named, entries.fits & jnp.all(named["range"][0] > 0)


def vmem(problem: sinkhorn.Augmented, o: PassStatics) -> int:
    """Bytes of a core's memory that a pass takes at most."""

    def look() -> list[Operand]:
        u, v = problem.real(*problem.initial_potentials())
        return operands_of(problem, o, Start(u, v, v, u, v))

    given, results = shapes_of(look), results_of(problem, o)
    return bytes_of(given, results, scratch_of(problem, o, given[1].array), problem.dtype)


def shapes_of(look: Callable[[], list[Operand]]) -> list[Operand]:
    """Operands by shape alone."""
    kept: list[Operand] = []

    def arrays() -> list[Array]:
        kept[:] = look()
        return [x.array for x in kept]

    shapes = jax.eval_shape(arrays)
    return [x._replace(array=shape) for x, shape in zip(kept, shapes, strict=True)]


def bytes_of(given: list[Operand], results: list[Result], scratch: Scratch, dtype: Any) -> int:
    """Operands and results twice, for the next blocks are fetched meanwhile, the workspace, and `SPILLS`."""
    moved = sum(
        tile_bytes((BLOCK, BLOCK) if x.side == PAIRS else (x.array.shape[2], BLOCK), x.array.dtype) for x in given
    )
    moved += sum(tile_bytes((x.shape[0], BLOCK), dtype) for x in results)
    return 2 * moved + sum(tile_bytes(*x) for x in scratch.values()) + SPILLS


def without_padding(x: Array, path: Path, size: int) -> Array:
    """`[..., padded columns]` to `[..., size]`."""
    return x[..., path.width * BLOCK : path.width * BLOCK + size]


def pad_cols(x: Array, path: Path, value: float = 0.0) -> Array:
    """`[..., tokens]` to the padded columns, at most `path.cols` blocks of them."""
    before = path.width * BLOCK
    after = path.padded_cols * BLOCK - before - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((before, after),), constant_values=value)


def operands_of(problem: sinkhorn.Augmented, o: PassStatics, start: Start) -> list[Operand]:
    """What the forward kernel reads, for potentials to start from."""
    path, inputs, lag = o.path, problem.inputs, o.path.lag
    u, v, before, row_bin, col_bin = start
    lines = lines_of(problem)
    found = operands(inputs, problem.constants, problem.statics, Strip(path.rows, path.cols, path.width), u)
    pad = functools.partial(pad_lanes, size=path.padded_length)
    last = o.lag_of(o.iterations)
    row_lines = [pad(u), pad(jnp.maximum(lines.log_a, DEAD), value=DEAD)]
    col_lines = [*intervals(problem, path), pad_cols(jnp.maximum(lines.log_b, DEAD), path, DEAD)]
    if problem.statics.over_relaxation != 1 or o.accelerated:
        col_lines += [pad_cols(v, path), pad_cols(before, path)]
    if o.dustbin:
        assert row_bin is not None and col_bin is not None
        row_lines.append(pad(jnp.maximum(row_bin + u, DEAD), value=DEAD))
        col_lines.append(pad_cols(jnp.maximum(col_bin, DEAD), path, DEAD))
    given = [
        Operand("query", found["query"], ROWS),
        Operand("key", pad_cols(found["key"], path), COLS),
        Operand("row_lines", jnp.stack(row_lines, 2), ROWS, lag),
        Operand("col_lines", jnp.stack(col_lines, 2), COLS),
    ]
    given += mask_operands(problem, path)
    if o.values:
        assert inputs.value is not None
        given.append(Operand("value", pad_cols(tokens_last(inputs.value), path), COLS, last))
    return given


def intervals(problem: sinkhorn.Augmented, path: Path) -> list[Array]:
    """Where those of the columns begin and end, each `[N, H, padded columns]`, as numbers of the compute dtype, which
    hold them exactly; empty beside a mask for inactive ones, whose entries may hold anything."""
    lo, hi = (x[:, None] for x in (problem.constants.col_lo, problem.constants.col_hi))
    if problem.inputs.mask is not None:
        hi = jnp.where(problem.constants.log_col_mass == -jnp.inf, lo, hi)
    shape = problem.constants.log_col_mass.shape
    return [pad_cols(jnp.broadcast_to(x, shape).astype(problem.dtype), path) for x in (lo, hi)]


def mask_operands(problem: sinkhorn.Augmented, path: Path) -> list[Operand]:
    """The mask's tiles of a strip, and who is active beside a float mask."""
    mask = problem.inputs.mask
    if mask is None:
        return []
    if mask.dtype == jnp.bool_:
        mask = mask.astype(jnp.int8)
    tiles = [Operand("mask", mask, PAIRS, column=j) for j in range(path.width)]
    if mask.dtype == jnp.int8:
        return tiles
    alive = (problem.constants.log_row_mass > -jnp.inf).astype(problem.dtype)[:, :, None]
    return [*tiles, Operand("alive", pad_lanes(alive, path.padded_length), ROWS)]


def mask_floor(problem: sinkhorn.Augmented) -> float:
    """A float mask drops what is at or below."""
    mask = problem.inputs.mask
    return 0.0 if mask is None or mask.dtype == jnp.bool_ else lowest_kept(mask.dtype, problem.dtype)


def results_of(problem: sinkhorn.Augmented, o: PassStatics) -> list[Result]:
    """What it writes."""
    lp, sp, last = o.path.padded_length, o.path.padded_cols * BLOCK, o.lag_of(o.iterations)
    saved = len(o.saved)
    beside = 2 if o.last else 0
    if o.values:
        assert problem.inputs.value is not None
        beside += problem.inputs.value.shape[-1]
    found = [Result("rows", (saved + beside, lp), ROWS, last), Result("cols", (saved, sp), COLS, last)]
    if o.residuals:
        found.append(Result("col_total", (1, sp), COLS, last + o.path.lag))
    if o.watched:
        found.append(Result("changes", (SUBLANES * (o.iterations + 1), BLOCK), None))
    return [*found, Result("range", (1, BLOCK), None)]


def scratch_of(problem: sinkhorn.Augmented, o: PassStatics, key: Array) -> Scratch:
    """Its workspace; `key` as the kernel is given it."""
    dtype, path, line = problem.dtype, o.path, (SUBLANES, BLOCK)
    way, stages = o.way, o.iterations + 1
    found: Scratch = {
        "strip": ((way.ring + 1, BLOCK, path.columns), dtype),
        "row_rep": ((way.ring + 1, BLOCK, BLOCK), dtype),
        "row_kept": ((way.ring + 1, lines_for(2 + len(o.saved)), BLOCK), dtype),
        "col_kept": ((way.held, lines_for(len(o.saved)), BLOCK), dtype),
        "keys": ((way.window, key.shape[2], BLOCK), key.dtype),
        "lines": ((way.held, lines_for(5), BLOCK), dtype),
        "tops": ((way.touched, *line), dtype),
        "col_abs": ((way.held, *line), dtype),
        "col_mass": ((way.held, *line), dtype),
        "sums": ((stages, way.touched, *line), dtype),
        "y": ((stages, way.touched, *line), dtype),
        "worst": ((2, *line), dtype),
    }
    if o.dustbin:
        found["row_bin"] = ((way.ring + 1, BLOCK, BLOCK), dtype)
        found["col_bin"] = ((way.held, *line), dtype)
    if problem.statics.over_relaxation != 1:
        found["log_x"] = ((way.ring + 1, BLOCK, BLOCK), dtype)
    if problem.statics.over_relaxation != 1 or o.accelerated:
        found["log_y"] = ((stages + 1, way.touched, *line), dtype)
    if o.values:
        assert problem.inputs.value is not None
        value = tokens_last(problem.inputs.value)
        found["values"] = ((way.window, value.shape[2], BLOCK), value.dtype)
    return found


def lines_for(count: int) -> int:
    """`count` lines in whole registers."""
    return -(-count // SUBLANES) * SUBLANES
