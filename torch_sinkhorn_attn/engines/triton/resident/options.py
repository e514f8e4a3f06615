"""Bases that are relaxed, over-relaxed, accelerated or end early, and the gauge: what `solve` needs beyond the plain
balanced iteration. In their scaled form the scalings are made of the potentials, x = exp(u - absorbed u)."""

from __future__ import annotations

import triton
import triton.language as tl

from torch_sinkhorn_attn.engines.triton.resident import solve
from torch_sinkhorn_attn.engines.triton.tiles import number

LARGEST_ESTIMATE = tl.constexpr(0.9)


@triton.jit
def over_relaxed(A, plain, old, dead, C: tl.constexpr):
    """(1 - omega) old + omega plain."""
    if C.over_relaxed:
        plain = tl.where(dead, 0.0, (1 - number(A.omega, C)) * old + number(A.omega, C) * plain)
    return plain


@triton.jit
def still(A, t, plain, v, C: tl.constexpr):
    """Whether the next column half-step moves nothing by more than the tolerance; NaN moves."""
    if not C.tolerance:
        return t < 0
    change = tl.abs(plain - v)
    if C.over_relaxed:
        change = change / number(A.omega, C)
    return (tl.max(tl.where(change <= number(A.tolerance, C), 0, 1), 0) == 0) & (t > 0)


@triton.jit
def log_norm(change, log_b):
    """log ||x||_b, `acceleration.log_norm`."""
    terms = log_b + 2 * tl.log2(tl.abs(change))
    terms = tl.where(log_b == float("-inf"), float("-inf"), terms)
    top = tl.max(terms, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    return (top + tl.log2(tl.sum(tl.exp2(terms - top), 0))) / 2


@triton.jit
def advance(A, t, v, plain, before, log_change, lam, omega, log_b, C: tl.constexpr):
    """`acceleration.step`: v^(t+1), log_change, lambda and omega."""
    if not C.accelerated:
        return plain, log_change, lam, omega
    if C.measured:  # noqa: SIM102 (it is decided by the compiler, the next one by the chip)
        if (t == 1) | (t == 2):
            now = log_norm(plain - v, log_b)
            nothing = log_change == float("-inf")
            r = tl.exp2(tl.minimum(now - tl.where(nothing, 0.0, log_change), 0.0))
            found = 1 - (1 - tl.where(nothing, 0.0, r)) / 4
            found = tl.minimum(tl.maximum(found, 0.0), LARGEST_ESTIMATE)
            lam = tl.where(t == 2, found, lam)
            log_change = now
    g, mu = 2 / (2 - lam), lam / (2 - lam)
    moving = t >= C.plain_iterations
    found = v + omega * g * (plain - v) + (omega - 1) * (v - before)
    weight = tl.where(t == C.plain_iterations, 2 * omega, omega)
    next_omega = tl.where(moving, 1 / (1 - weight * mu * mu / 4), omega)
    return tl.where(moving, found, plain), log_change, lam, next_omega


@triton.jit
def any_base(A, n, h, flat, log_a, u, v, stopped, S: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """So many iterations from u and v by `reference.stopped_base`: as `solve.plain_base`."""
    ROWS: tl.constexpr = C.rows
    COLS: tl.constexpr = C.cols
    k = tl.zeros([ROWS, COLS], C.acc)
    x, a = tl.full([ROWS], 1.0, C.acc), tl.zeros([ROWS], C.acc)
    y, b = tl.full([COLS], 1.0, C.acc), tl.zeros([COLS], C.acc)
    log_b = solve.col_mass(A, flat, C)
    before = v
    omega, log_change = tl.full([], 1.0, C.acc), tl.full([], 0.0, C.acc)
    lam = omega * number(A.contraction, C)
    t, done, formed = 0, False, False
    while (t < stopped) & (not done):
        lse = solve.column_lse(A, n, h, flat, log_a, u, B, C)
        dead = (lse == float("-inf")) | (log_b == float("-inf"))
        plain = over_relaxed(A, solve.potential(lse, log_b, number(A.rho_col, C), C.relaxed), v, dead, C)
        done = still(A, t, plain, v, C)
        if not done:
            old = v
            v, log_change, lam, omega = advance(A, t, v, plain, before, log_change, lam, omega, log_b, C)
            before = old
            solve.absorb_v(A, flat, v, C)
            lse = solve.row_lse(A, n, h, flat, log_a, B, C)
            dead = (lse == float("-inf")) | (log_a == float("-inf"))
            u = over_relaxed(A, solve.potential(lse, log_a, number(A.rho_row, C), C.relaxed), u, dead, C)
            t += 1
            k, a, b = solve.absorbed(A, n, h, flat, log_a, u, S, C)
            from_u, safe = u, True
            while safe & (t < stopped) & (not done):
                from_v = solve.absorbed_v(A, flat, C)
                sums = solve.column_sums(k, tl.exp2(u - from_u))
                plain = tl.where(b == 0, 0.0, number(A.rho_col, C) * ((log_b + from_v) - tl.log2(sums)))
                plain = over_relaxed(A, plain, v, b == 0, C)
                end = still(A, t, plain, v, C)
                new_v, new_change, new_lam, new_omega = advance(
                    A, t, v, plain, before, log_change, lam, omega, log_b, C
                )
                y = tl.exp2(new_v - from_v)
                safe = solve.sums_in_range(sums, y, b)
                sums = solve.row_sums(k, y)
                new_u = tl.where(a == 0, 0.0, number(A.rho_row, C) * ((log_a + from_u) - tl.log2(sums)))
                new_u = over_relaxed(A, new_u, u, a == 0, C)
                safe = safe & solve.sums_in_range(sums, tl.exp2(new_u - from_u), a)
                done = safe & end
                if safe & (not end):
                    before = v
                    v, u, log_change, lam, omega = new_v, new_u, new_change, new_lam, new_omega
                    t += 1
            formed = safe
            x, y = tl.exp2(u - from_u), tl.exp2(v - solve.absorbed_v(A, flat, C))
    solve.absorb_v(A, flat, v, C)
    return u, k * x[:, None] * y[None, :], a, b, formed


# Gauge


@triton.jit
def centred(A, n, flat, log_a, u, v, C: tl.constexpr):
    """`segments.centre_gauge`."""
    row_active, col_active = log_a > float("-inf"), solve.col_mass(A, flat, C) > float("-inf")
    weight = tl.where(row_active, 1.0, 0.0).to(C.acc)
    if C.components:
        row_label, col_label = components(A, n, row_active, col_active, C)
        own = row_label[:, None] == row_label[None, :]
        mean = mean_of(u, weight, own)
        to_col = mean_of(u, weight, col_label[:, None] == row_label[None, :])
    else:
        mean = tl.sum(u * weight, 0) / tl.maximum(tl.sum(weight, 0), 1.0)
        to_col = mean
    return tl.where(row_active, u - mean, 0.0), tl.where(col_active, v + to_col, 0.0)


@triton.jit
def mean_of(u, weight, own):
    """Mean of u over the rows that are a line's own, `[lines, ROWS]`."""
    total = tl.sum(tl.where(own, (u * weight)[None, :], 0.0), 1)
    return total / tl.maximum(tl.sum(tl.where(own, weight[None, :], 0.0), 1), 1.0)


@triton.jit
def components(A, n, row_active, col_active, C: tl.constexpr):
    """`segments.components` of intervals: the component of each row and column."""
    i, j = tl.arange(0, C.rows), tl.arange(0, C.cols)
    at = n * A.rows.size + i
    inside = i < A.rows.size
    lo = tl.load(A.rows.lo + at, mask=inside, other=0).to(tl.int32)
    hi = tl.load(A.rows.hi + at, mask=inside, other=0).to(tl.int32)
    live = row_active & (lo < hi)
    earlier = (i[None, :] < i[:, None]) & live[None, :]
    reach = tl.max(tl.where(earlier, hi[None, :], 0), 1)
    between = (j[None, :] >= lo[:, None]) & (j[None, :] < reach[:, None]) & col_active[None, :]
    starts = live & (tl.max(tl.where(between, 1, 0), 1) == 0)
    row_label = tl.sum(tl.where((i[None, :] <= i[:, None]) & starts[None, :], 1, 0), 1) - 1
    col_label = tl.sum(tl.where((lo[None, :] <= j[:, None]) & starts[None, :], 1, 0), 1) - 1
    return tl.maximum(row_label, 0), tl.maximum(col_label, 0)
