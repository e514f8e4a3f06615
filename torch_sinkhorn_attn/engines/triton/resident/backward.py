"""The adjoint of one problem by one program: the plan made again once, 2R passes on it in registers, and the cotangents
of query, key and value, and of the dustbin.

The formulas are those of `method.staircase`. A plan factor is P times exponentials of dual differences, which are
applied to the vectors of a pass where none of them is too large, and entry by entry else: each program decides. The
score cotangent begins as P * D and loses every term of the field as soon as its weights are known.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from torch_sinkhorn_attn.engines.triton import tiles
from torch_sinkhorn_attn.engines.triton.launch import launch
from torch_sinkhorn_attn.engines.triton.layout import Lines, Number, lines_of
from torch_sinkhorn_attn.engines.triton.resident import solve
from torch_sinkhorn_attn.engines.triton.resident.arguments import Arguments, prepare, threshold, warps
from torch_sinkhorn_attn.engines.triton.tiles import LOG2E, number
from torch_sinkhorn_attn.method.staircase import LARGEST_EXPONENT
from torch_sinkhorn_attn.problem.problem import Gradients, Inputs, OutputGrads, Potentials, Problem


class Adjoint(NamedTuple):
    """What the kernel reads and writes beside `arguments.Arguments`."""

    grad_output: Lines
    grad_to_bin: Tensor  # [N, H, L], any tensor where there is none
    grad_from_bin: Tensor  # [N, H, S]
    limit: Number  # largest exponent applied to vectors, base 2
    feature_scale: Number  # scale / epsilon
    score_scale: Number  # 1 / epsilon
    row_terms: Tensor  # scratch for the field's terms: [N*H, max(2 R, 1), ROWS] and COLS
    col_terms: Tensor
    query: Tensor  # results: [N, H, L, E]
    key: Tensor  # of each query head, [N, H, S, E]
    value: Tensor  # of each query head, [N, H, S, Ev]
    dropped: Tensor
    row_score: Tensor
    col_score: Tensor
    corner_score: Tensor
    bin_value: Tensor


class Given(NamedTuple):
    """Which cotangents of the dustbin's masses there are."""

    to_bin: bool
    from_bin: bool


@triton.jit(do_not_specialize=["kept", "threshold"])
def backward_kernel(A, G, kept, seed, threshold, S: tl.constexpr, V: tl.constexpr, C: tl.constexpr, IF: tl.constexpr):
    A, G = Arguments(*A), Adjoint(*G)  # as in `forward_kernel`
    flat = tl.program_id(0).to(tl.int64)
    n, h = flat // A.heads, flat % A.heads
    log_a = solve.row_mass(A, flat, C)
    p = solve.exp2(log_plan(A, n, h, flat, log_a, kept, S, C), C.fast)
    write_value(A, G, n, h, flat, log_a, p, seed, threshold, V, C)
    weighted = p * plan_cotangent(A, G, n, h, flat, log_a, seed, threshold, V, C, IF)
    z, sums = tl.sum(weighted, 1), tl.sum(weighted, 0)
    if safe_exponents(A, G, flat, log_a, kept, C):
        passes(A, G, flat, log_a, p, z, sums, kept, True, C)
        grad = plan_cotangent(A, G, n, h, flat, log_a, seed, threshold, V, C, IF)
        grad = p * less_field(A, G, flat, log_a, p, grad, kept, True, C)
    else:  # rare: the plan's logarithm is made again
        p = log_plan(A, n, h, flat, log_a, kept, S, C)
        passes(A, G, flat, log_a, p, z, sums, kept, False, C)
        grad = plan_cotangent(A, G, n, h, flat, log_a, seed, threshold, V, C, IF)
        grad = less_field(A, G, flat, log_a, p, solve.exp2(p, C.fast) * grad, kept, False, C)
    write_scores(A, G, n, h, flat, grad, S, C)


@triton.jit
def log_plan(A, n, h, flat, log_a, kept, S: tl.constexpr, C: tl.constexpr):
    """S + u^R + v^R."""
    x = solve.scores_of(A, n, h, flat, log_a, 0, S, C)
    return (x + row_dual(A, flat, kept, C)[:, None]) + col_dual(A, flat, kept, C)[None, :]


@triton.jit
def row_dual(A, flat, r, C: tl.constexpr):
    """u^r to base 2."""
    i, length = tl.arange(0, C.rows), A.rows.size + C.dustbin
    place = A.row_potential + (r * tl.num_programs(0).to(tl.int64) + flat) * length + i
    return tl.load(place, mask=i < length, other=0.0).to(C.acc) * LOG2E


@triton.jit
def col_dual(A, flat, r, C: tl.constexpr):
    j, size = tl.arange(0, C.cols), A.cols.size + C.dustbin
    place = A.col_potential + (r * tl.num_programs(0).to(tl.int64) + flat) * size + j
    return tl.load(place, mask=j < size, other=0.0).to(C.acc) * LOG2E


# Factors


@triton.jit
def row_factor(A, flat, log_a, r, kept, C: tl.constexpr):
    """Exponents of A^r: u^r / rho_r - log a - u^R and v^r - v^R."""
    row = row_dual(A, flat, r, C)
    if C.relaxed:
        row = row / number(A.rho_row, C)
    row = tl.where(log_a == float("-inf"), 0.0, row - log_a - row_dual(A, flat, kept, C))
    return row, col_dual(A, flat, r, C) - col_dual(A, flat, kept, C)


@triton.jit
def column_factor(A, flat, r, kept, C: tl.constexpr):
    """Exponents of B^r: u^(r-1) - u^R and v^r / rho_c - log b - v^R."""
    log_b, col = solve.col_mass(A, flat, C), col_dual(A, flat, r, C)
    if C.relaxed:
        col = col / number(A.rho_col, C)
    col = tl.where(log_b == float("-inf"), 0.0, col - log_b - col_dual(A, flat, kept, C))
    return row_dual(A, flat, r - 1, C) - row_dual(A, flat, kept, C), col


@triton.jit
def none_beyond(x, limit):
    return tl.min(tl.where(x <= limit, 1, 0), 0) == 1


@triton.jit
def safe_exponents(A, G, flat, log_a, kept, C: tl.constexpr):
    """Whether every factor may be written as P times exponentials of rows and columns."""
    row, col = row_factor(A, flat, log_a, kept, kept, C)
    safe = none_beyond(row, number(G.limit, C))
    for r in range(1, kept + 1):
        row, col = row_factor(A, flat, log_a, r, kept, C)
        safe = safe & none_beyond(row, number(G.limit, C)) & none_beyond(col, number(G.limit, C))
        row, col = column_factor(A, flat, r, kept, C)
        safe = safe & none_beyond(row, number(G.limit, C)) & none_beyond(col, number(G.limit, C))
    return safe


@triton.jit
def term_factor(A, flat, log_a, k, kept, C: tl.constexpr):
    """Exponents of the k-th factor: A^R, B^R, A^(R-1), ...; for R = 0 that of the one row half-step."""
    r = kept - k // 2
    row, col = row_factor(A, flat, log_a, r, kept, C)
    if k % 2 == 1:  # never for R = 0
        row, col = column_factor(A, flat, r, kept, C)
    return row, col


@triton.jit
def applied(m, row, col, SCALED: tl.constexpr, C: tl.constexpr):
    """A factor as (tile, row weights, column weights): P and exponentials; or all in the tile, from m = log P."""
    if SCALED:
        return m, tl.exp2(row), tl.exp2(col)
    return solve.exp2((m + row[:, None]) + col[None, :], C.fast), (row * 0 + 1), (col * 0 + 1)


@triton.jit
def row_term(A, G, flat, k, C: tl.constexpr):
    """Where the row weights of the k-th term of the field lie."""
    return G.row_terms + (flat * C.terms + k) * C.rows + tl.arange(0, C.rows)


@triton.jit
def col_term(A, G, flat, k, C: tl.constexpr):
    return G.col_terms + (flat * C.terms + k) * C.cols + tl.arange(0, C.cols)


@triton.jit
def passes(A, G, flat, log_a, m, z, sums, kept, SCALED: tl.constexpr, C: tl.constexpr):
    """The weights of the field's terms, to their places, and the dropped cotangent. m is P, or its logarithm if not
    `SCALED`; z and `sums` are the row and column sums of P * D."""
    i, j = tl.arange(0, C.rows), tl.arange(0, C.cols)
    length, size = A.rows.size + C.dustbin, A.cols.size + C.dustbin
    if C.differentiated:
        tl.store(col_term(A, G, flat, 0, C), sums)
        tl.debug_barrier()
        for step in range(kept):
            row, col = row_factor(A, flat, log_a, kept - step, kept, C)
            tile, row, col = applied(m, row, col, SCALED, C)
            row = row * z * number(A.rho_row, C)
            w = -tl.sum(tile * row[:, None], 0) * col
            w += tl.load(col_term(A, G, flat, 0, C), mask=(j >= 0) & (step == 0), other=0.0)
            tl.debug_barrier()
            tl.store(row_term(A, G, flat, 2 * step, C), row)
            tl.store(col_term(A, G, flat, 2 * step, C), col)
            row, col = column_factor(A, flat, kept - step, kept, C)
            tile, row, col = applied(m, row, col, SCALED, C)
            col = col * w * number(A.rho_col, C)
            z = -tl.sum(tile * col[None, :], 1) * row
            tl.store(row_term(A, G, flat, 2 * step + 1, C), row)
            tl.store(col_term(A, G, flat, 2 * step + 1, C), col)
        tl.store(G.dropped + flat * length + i, z, mask=i < length)
    else:
        row, col = row_factor(A, flat, log_a, 0, 0, C)
        tile, row, col = applied(m, row, col, SCALED, C)
        row = row * z * number(A.rho_row, C)
        tl.store(row_term(A, G, flat, 0, C), row)
        tl.store(col_term(A, G, flat, 0, C), col)
        w = sums - tl.sum(tile * row[:, None], 0) * col
        tl.store(G.dropped + flat * size + j, w, mask=j < size)
    tl.debug_barrier()


@triton.jit
def less_field(A, G, flat, log_a, m, grad, kept, SCALED: tl.constexpr, C: tl.constexpr):
    """D less the field from D; if not `SCALED`, P * D less P times the field from P * D, and m is log P."""
    terms = tl.where(kept == 0, 1, 2 * kept)
    for k in range(terms):
        row, col = tl.load(row_term(A, G, flat, k, C)), tl.load(col_term(A, G, flat, k, C))
        if SCALED:
            grad -= row[:, None] * col[None, :]
        else:
            row_exponent, col_exponent = term_factor(A, flat, log_a, k, kept, C)
            tile, _, _ = applied(m, row_exponent, col_exponent, SCALED, C)
            grad -= tile * (row[:, None] * col[None, :])
    return grad


# What goes in and comes out


@triton.jit
def row_scale(log_a):
    """1 / a, and 0 on inactive rows."""
    return tl.where(log_a == float("-inf"), 0.0, tl.exp2(-log_a))


@triton.jit
def output_cotangent(A, G, n, h, log_a, e, V: tl.constexpr, C: tl.constexpr):
    """dO of the features from e on, 0 on inactive rows."""
    i = tl.arange(0, C.rows)
    pointers = tiles.feature_pointers(G.grad_output, n, h, tiles.clamped(i, A.rows), V.chunk)
    x = tiles.load_features(pointers, e, V.features, V.chunk, False)
    return tl.where((log_a > float("-inf"))[:, None] & (i < A.rows.size)[:, None], x.to(C.acc), 0.0)


@triton.jit
def dropped_out(A, flat, x, seed, threshold, C: tl.constexpr):
    if C.dropout:
        i, j = tl.arange(0, C.rows), tl.arange(0, C.cols)
        keep = tiles.keep_tile(seed, flat, i[:, None], j[None, :], threshold)
        x = tl.where(keep, x * number(A.keep_scale, C), 0.0)
    return x


@triton.jit
def plan_cotangent(A, G, n, h, flat, log_a, seed, threshold, V: tl.constexpr, C: tl.constexpr, IF: tl.constexpr):
    """D: <dO_i, V_j> / a_i after dropout, and what the dustbin's masses are told."""
    ROWS: tl.constexpr = C.rows
    COLS: tl.constexpr = C.cols
    i, j = tl.arange(0, C.rows), tl.arange(0, C.cols)
    length, size = A.rows.size, A.cols.size
    pointers = tiles.feature_pointers(A.value, n, h, tiles.clamped(j, A.value), V.chunk)
    d = tl.zeros([ROWS, COLS], C.acc)
    read = tl.zeros([ROWS], C.acc)
    for e in range(0, V.features, V.chunk):
        value = tiles.load_features(pointers, e, V.features, V.chunk, V.widen)
        x = output_cotangent(A, G, n, h, log_a, e, V, C)
        value = tl.trans(value.to(V.product))
        d += tl.dot(x.to(V.product), value, input_precision=V.plan_precision, out_dtype=C.acc)
        if C.bin_value:
            feature = e + tl.arange(0, V.chunk)
            learned = tl.load(A.bin_value + flat * V.features + feature, mask=feature < V.features, other=0.0)
            read += tl.sum(x * learned.to(C.acc)[None, :], 1)
    d = dropped_out(A, flat, d * row_scale(log_a)[:, None], seed, threshold, C)
    if C.dustbin:
        read = read * row_scale(log_a)
        if IF.to_bin:
            read += tl.load(G.grad_to_bin + flat * length + i, mask=i < length, other=0.0).to(C.acc)
        told = tl.zeros([COLS], C.acc)
        if IF.from_bin:
            told = tl.load(G.grad_from_bin + flat * size + j, mask=j < size, other=0.0).to(C.acc)
        d = tl.where((j == size)[None, :], tl.where(i < length, read, 0.0)[:, None], d)
        d = tl.where((i == length)[:, None], tl.where(j < size, told, 0.0)[None, :], d)
    return d


@triton.jit
def write_value(A, G, n, h, flat, log_a, p, seed, threshold, V: tl.constexpr, C: tl.constexpr):
    """dV = (P / a after dropout)^T dO, and that of the dustbin's value."""
    j = tl.arange(0, C.cols)
    size = A.cols.size
    p = p * row_scale(log_a)[:, None]
    if C.bin_value:
        to_bin = tl.sum(tl.where((j == size)[None, :], p, 0.0), 1)
    p = dropped_out(A, flat, p, seed, threshold, C)
    for e in range(0, V.features, V.chunk):
        feature = e + tl.arange(0, V.chunk)
        x = output_cotangent(A, G, n, h, log_a, e, V, C)
        if C.bin_value:
            place = G.bin_value + flat * V.features + feature
            tl.store(place, tl.sum(to_bin[:, None] * x, 0), mask=feature < V.features)
        found = tl.dot(tl.trans(p.to(V.product)), x.to(V.product), input_precision=V.plan_precision, out_dtype=C.acc)
        place = G.value + (flat * size + j)[:, None] * V.features + feature[None, :]
        tl.store(place, found, mask=(j < size)[:, None] & (feature < V.features)[None, :])


@triton.jit
def write_scores(A, G, n, h, flat, grad, S: tl.constexpr, C: tl.constexpr):
    """Cotangents of what the scores are made of, from dS: dQ = dS K, dK = dS^T Q, and the dustbin's line and column."""
    i, j = tl.arange(0, C.rows), tl.arange(0, C.cols)
    length, size = A.rows.size, A.cols.size
    if C.dustbin:
        last_row, last_col = (i == length)[:, None], (j == size)[None, :]
        column = tl.sum(tl.where(last_col, grad, 0.0), 1) * number(G.score_scale, C)
        tl.store(G.row_score + flat * length + i, column, mask=i < length)
        tl.store(G.corner_score + flat, tl.sum(tl.where(i == length, column, 0.0), 0))
        line = tl.sum(tl.where(last_row, grad, 0.0), 0) * number(G.score_scale, C)
        tl.store(G.col_score + flat * size + j, line, mask=j < size)
        grad = tl.where(last_row | last_col, 0.0, grad)
    grad = grad.to(S.product)
    rows = tiles.feature_pointers(A.rows, n, h, tiles.clamped(i, A.rows), S.chunk)
    cols = tiles.feature_pointers(A.cols, n, h, tiles.clamped(j, A.cols), S.chunk)
    for e in range(0, S.features, S.chunk):
        feature = e + tl.arange(0, S.chunk)
        x = tiles.load_features(cols, e, S.features, S.chunk, S.widen)
        found = tl.dot(grad, x.to(S.product), input_precision=S.plan_precision, out_dtype=C.acc)
        place = G.query + (flat * length + i)[:, None] * S.features + feature[None, :]
        inside = (i < length)[:, None] & (feature < S.features)[None, :]
        tl.store(place, found * number(G.feature_scale, C), mask=inside)
        x = tiles.load_features(rows, e, S.features, S.chunk, S.widen)
        found = tl.dot(tl.trans(grad), x.to(S.product), input_precision=S.plan_precision, out_dtype=C.acc)
        place = G.key + (flat * size + j)[:, None] * S.features + feature[None, :]
        inside = (j < size)[:, None] & (feature < S.features)[None, :]
        tl.store(place, found * number(G.feature_scale, C), mask=inside)


def backward(inputs: Inputs, problem: Problem, potentials: Potentials, grads: OutputGrads) -> Gradients:
    """Launch it."""
    prepared = prepare(inputs, problem, adjoint=True)
    solver, case, dtype = problem.solver, prepared.case, prepared.dtype
    num, heads, length, size = problem.sizes
    query, key, value = inputs.query, inputs.key, inputs.value
    assert value is not None
    groups, bins = key.shape[1], problem.num_dustbins

    def new(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=dtype)

    def given(x: Tensor | None) -> Tensor:
        return query if x is None else x.contiguous()

    bin_side = num, heads
    adjoint = Adjoint(
        grad_output=lines_of(grads.output, prepared.arguments.rows),
        grad_to_bin=given(grads.to_bin),
        grad_from_bin=given(grads.from_bin),
        limit=Number.of(LARGEST_EXPONENT[dtype] * LOG2E.value),
        feature_scale=Number.of(solver.scale / solver.epsilon),
        score_scale=Number.of(1 / solver.epsilon),
        row_terms=new(num * heads, case.terms, case.rows),
        col_terms=new(num * heads, case.terms, case.cols),
        query=new(num, heads, length, query.shape[-1]),
        key=new(num, heads, size, key.shape[-1]),
        value=new(num, heads, size, value.shape[-1]),
        dropped=new(num, heads, (length if solver.kept else size) + bins),
        row_score=new(*bin_side, length) if bins else query,
        col_score=new(*bin_side, size) if bins else query,
        corner_score=new(*bin_side) if bins else query,
        bin_value=new(*bin_side, value.shape[-1]) if case.bin_value else query,
    )
    arguments = prepared.arguments._replace(
        row_potential=potentials.row.contiguous(), col_potential=potentials.col.contiguous()
    )
    constants = prepared.constants
    del constants["B"]
    launch(
        backward_kernel,
        (num * heads,),
        arguments,
        adjoint,
        solver.kept,
        query if problem.dropout_seed is None else problem.dropout_seed,
        threshold(solver.dropout_p),
        **constants,
        IF=Given(grads.to_bin is not None, grads.from_bin is not None),
        num_warps=warps(case.rows, case.cols, 2),
        num_stages=1,
    )

    def shared(x: Tensor) -> Tensor:
        """Summed over the query heads that share a key head."""
        return x if groups == heads else x.unflatten(1, (groups, heads // groups)).sum(2)

    found = Inputs(adjoint.query, shared(adjoint.key), shared(adjoint.value))
    if bins:
        scores = {"row_score": adjoint.row_score, "col_score": adjoint.col_score, "corner_score": adjoint.corner_score}
        found = found._replace(**scores, dustbin_value=adjoint.bin_value if case.bin_value else None)
    return Gradients(found, adjoint.dropped)
