"""The solve of one problem by one program: scalings of a plan in registers, logarithms where those leave their range.

In the scaled form the plan is diag(x) K diag(y), K = exp(S + u + v) of the potentials (u, v) that were *absorbed* last,
and an iteration is two products, y = b / (K^T x), x = a / (K y), without an exponential. In the logarithmic form a
half-step has maxima, walks blocks of columns, and holds for any scores. A program starts with one logarithmic
iteration, absorbs it, and goes on scaled; where scalings leave their range they are dropped, and that iteration is made
by logarithms. (Absorption: B. Schmitzer, Stabilized sparse scaling algorithms for entropy regularized transport
problems, SIAM J. Sci. Comput. 41(3), 2019.)

Vectors are `[ROWS]` and `[COLS]`, powers of two, with the dustbin's line after the last token; logarithms are to base
2. The absorbed column potential is in memory, as registers are full: `[COLS]` numbers behind `A.scratch`, and as many
behind them for what comes of a walk over blocks. A line's mass a or b is 0 where it has no support.

What every function takes: `A` (`arguments.Arguments`), the head as n, h and flat = n H + h, and what is known when it
is compiled, `S` (tiles of the whole problem) and `B` (blocks of its columns), both `layout.Static`, and `C`
(`arguments.Case`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from torch_sinkhorn_attn.engines.triton import tiles
from torch_sinkhorn_attn.engines.triton.tiles import LOG2E, number

LARGEST_SCALING, SMALLEST_SCALING = tl.constexpr(2.0**40), tl.constexpr(2.0**-40)
LARGEST_SUM, SMALLEST_SUM = tl.constexpr(2.0**50), tl.constexpr(2.0**-50)  # of a line of K, whose entries end at 2^-126
TINY = tl.constexpr(2.0**-60)
LONGEST_RUN = tl.constexpr(8)  # iterations between two looks at the range


# Functions of one instruction, where the chip has them


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x for normal x, to the last bit but one."""
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """2^x, 0 below the normal numbers."""
    if FAST:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


# What a problem is made of


@triton.jit
def log_mass(masses, capacity, flat, index, size, C: tl.constexpr):
    """log2 of the masses of the lines `index`; -inf on dead ones and after the last."""
    x = tl.load(masses + flat * size + index, mask=index < size, other=float("-inf")).to(C.acc)
    if C.dustbin:
        x = tl.where(index == size, tl.load(capacity + flat).to(C.acc), x)
    return x * LOG2E


@triton.jit
def row_mass(A, flat, C: tl.constexpr):
    return log_mass(A.row_mass, A.row_capacity, flat, tl.arange(0, C.rows), A.rows.size, C)


@triton.jit
def col_mass(A, flat, C: tl.constexpr):
    return log_mass(A.col_mass, A.col_capacity, flat, tl.arange(0, C.cols), A.cols.size, C)


@triton.jit
def scores_of(A, n, h, flat, log_a, first, S: tl.constexpr, C: tl.constexpr):
    """S of the columns from `first` on, `[ROWS, S.inner]`, -inf off the support, the dustbin's lines among them."""
    rows, cols = A.rows, A.cols
    i, j = tl.arange(0, S.outer), first + tl.arange(0, S.inner)
    log_b = log_mass(A.col_mass, A.col_capacity, flat, j, cols.size, C)
    at = tiles.clamped(i, rows)
    left = tiles.feature_pointers(rows, n, h, at, S.chunk)
    right = tiles.feature_pointers(cols, n, h, tiles.clamped(j, cols), S.chunk)
    dots = tiles.products(tiles.own_features(left, S), left, right, S)
    x = tiles.scores(dots, number(A.scale, C), rows, cols, A.mask, n, h, at, first, log_b, True, S)
    if C.dustbin:
        row = tl.load(A.row_score + flat * rows.size + i, mask=i < rows.size, other=0.0).to(C.acc) * number(
            A.dustbin_scale, C
        )
        col = tl.load(A.col_score + flat * cols.size + j, mask=j < cols.size, other=0.0).to(C.acc) * number(
            A.dustbin_scale, C
        )
        corner = tl.load(A.corner_score + flat).to(C.acc) * number(A.dustbin_scale, C)
        x = tl.where((j == cols.size)[None, :], tl.where(i == rows.size, corner, row)[:, None], x)
        x = tl.where((i == rows.size)[:, None] & (j < cols.size)[None, :], col[None, :], x)
        x = tl.where((log_b > float("-inf"))[None, :], x, float("-inf"))
    return tl.where((log_a > float("-inf"))[:, None], x, float("-inf"))


# Logarithmic half-steps


@triton.jit
def column_lse(A, n, h, flat, log_a, u, B: tl.constexpr, C: tl.constexpr):
    """LSE_i(S + u) of all columns."""
    place = A.scratch + (2 * flat + 1) * C.cols
    for first in range(0, C.cols, B.inner):
        x = scores_of(A, n, h, flat, log_a, first, B, C)
        top = tl.max(x + u[:, None], 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(exp2((x - top[None, :]) + u[:, None], C.fast), 0)
        tl.store(place + first + tl.arange(0, B.inner), top + tl.log2(total))
    tl.debug_barrier()
    lse = tl.load(place + tl.arange(0, C.cols))
    tl.debug_barrier()
    return lse


@triton.jit
def row_lse(A, n, h, flat, log_a, B: tl.constexpr, C: tl.constexpr):
    """LSE_j(S + v) of all rows, v the absorbed one."""
    ROWS: tl.constexpr = C.rows
    place = A.scratch + 2 * flat * C.cols
    top = tl.full([ROWS], float("-inf"), C.acc)
    total = tl.zeros([ROWS], C.acc)
    for first in range(0, C.cols, B.inner):
        x = scores_of(A, n, h, flat, log_a, first, B, C)
        v = tl.load(place + first + tl.arange(0, B.inner))
        higher = tl.maximum(top, tl.max(x + v[None, :], 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * exp2(top - safe, C.fast)
        total += tl.sum(exp2((x - safe[:, None]) + v[None, :], C.fast), 1)
        top = higher
    return tl.where(total == 0, float("-inf"), top + tl.log2(total))


@triton.jit
def potential(lse, mass, rho, RELAXED: tl.constexpr):
    """rho (log mass - LSE); 0 on lines that are dead or without support."""
    found = mass - lse
    if RELAXED:
        found = rho * found
    return tl.where((lse == float("-inf")) | (mass == float("-inf")), 0.0, found)


@triton.jit
def absorbed_v(A, flat, C: tl.constexpr):
    return tl.load(A.scratch + 2 * flat * C.cols + tl.arange(0, C.cols))


@triton.jit
def absorb_v(A, flat, v, C: tl.constexpr):
    """Put it where it lies, once nobody reads the old one any more."""
    tl.debug_barrier()
    tl.store(A.scratch + 2 * flat * C.cols + tl.arange(0, C.cols), v)
    tl.debug_barrier()


@triton.jit
def absorbed(A, n, h, flat, log_a, u, S: tl.constexpr, C: tl.constexpr):
    """K = exp(S + u + v) and the masses of its lines, 0 where they have no support."""
    x = scores_of(A, n, h, flat, log_a, 0, S, C)
    a = tl.where(tl.max(x, 1) == float("-inf"), 0.0, tl.exp2(log_a))
    b = tl.where(tl.max(x, 0) == float("-inf"), 0.0, tl.exp2(col_mass(A, flat, C)))
    return exp2((x + u[:, None]) + absorbed_v(A, flat, C)[None, :], C.fast), a, b


# Scaled iterations


@triton.jit
def column_sums(k, x):
    return tl.sum(k * x[:, None], 0)


@triton.jit
def row_sums(k, y):
    return tl.sum(k * y[None, :], 1)


@triton.jit
def scaled(k, a, b, x, y, count, C: tl.constexpr):
    """So many balanced iterations: the scalings x and y."""
    for _ in range(count):
        y = b * reciprocal(tl.maximum(column_sums(k, x), TINY), C.fast)
        x = a * reciprocal(tl.maximum(row_sums(k, y), TINY), C.fast)
    return x, y


@triton.jit
def in_range(scaling, mass):
    """Whether K still holds all that counts beside the scaling mass / sum."""
    good = (scaling > SMALLEST_SCALING) & (scaling < LARGEST_SCALING)
    good = good & (mass > scaling * SMALLEST_SUM) & (mass < scaling * LARGEST_SUM)
    return tl.min(tl.where(good | (mass == 0), 1, 0), 0) == 1


@triton.jit
def sums_in_range(sums, scaling, mass):
    """The same of a relaxed line, whose scaling is something else."""
    good = (scaling > SMALLEST_SCALING) & (scaling < LARGEST_SCALING)
    good = good & (sums > SMALLEST_SUM) & (sums < LARGEST_SUM)
    return tl.min(tl.where(good | (mass == 0), 1, 0), 0) == 1


@triton.jit
def moved(potential, scaling, mass):
    """The potential after a scaling."""
    return potential + tl.where(mass == 0, 0.0, tl.log2(scaling))


@triton.jit
def plain_base(A, n, h, flat, log_a, u, stopped, S: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """So many balanced iterations from u: u, its plan, the masses of its lines, and whether there is a plan."""
    ROWS: tl.constexpr = C.rows
    COLS: tl.constexpr = C.cols
    k = tl.zeros([ROWS, COLS], C.acc)
    x, a = tl.full([ROWS], 1.0, C.acc), tl.zeros([ROWS], C.acc)
    y, b = tl.full([COLS], 1.0, C.acc), tl.zeros([COLS], C.acc)
    t, run = 0, 1
    while t < stopped:
        v = potential(column_lse(A, n, h, flat, log_a, u, B, C), col_mass(A, flat, C), 1.0, False)
        absorb_v(A, flat, v, C)
        u = potential(row_lse(A, n, h, flat, log_a, B, C), log_a, 1.0, False)
        t += 1
        k, a, b = absorbed(A, n, h, flat, log_a, u, S, C)
        x, y = tl.full([ROWS], 1.0, C.acc), tl.full([COLS], 1.0, C.acc)
        good, safe = 0, True
        while safe & (t + good < stopped):
            count = tl.minimum(run, stopped - t - good)
            x, y = scaled(k, a, b, x, y, count, C)
            safe = in_range(x, a) & in_range(y, b)
            good = tl.where(safe, good + count, good)
            run = tl.where(safe, tl.minimum(2 * run, LONGEST_RUN), 1)
        if not safe:  # again, as far as it went well
            x, y = tl.full([ROWS], 1.0, C.acc), tl.full([COLS], 1.0, C.acc)
            x, y = scaled(k, a, b, x, y, good, C)
        t += good
        u = moved(u, x, a)
        absorb_v(A, flat, moved(absorbed_v(A, flat, C), y, b), C)
    return u, k * x[:, None] * y[None, :], a, b, stopped > 0
