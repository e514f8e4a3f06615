"""The quick certificates, in about two forward passes of the engine: residuals, and the rate from below.

Residuals: u is the row half-step of v, so rows are met where they are enforced; the column sums are
c_j = exp(v_j + log b_j - v'_j / rho_c), v' the next column half-step.

Rate: of a balanced problem lambda = max <P d, P d>_(1/r) / <d, d>_c over the d off the null vectors, one constant per
connected component. Over the span of some fifty vectors this maximum (Rayleigh and Ritz) takes one product P D. They
are what moves slowly: the differences of `ITERATES` plain iterates from potentials shaken a little (a Krylov space),
the slow waves of a band (cosines along the tokens), and single columns, those that moved most before and after, which
sharp problems exchange with one another. A relaxed problem's rate is rho_r rho_c, for N = diag(r)^(-1/2) P
diag(c)^(-1/2) has the largest singular value 1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.problem.arguments import Prepared
from torch_sinkhorn_attn.problem.mass_scale import MassScale
from torch_sinkhorn_attn.problem.problem import Potentials
from torch_sinkhorn_attn.problem.segments import Components, by_segment, segment_max, segment_sum
from torch_sinkhorn_attn.thermometer.passes import Passes, solved
from torch_sinkhorn_attn.thermometer.probes import probe

ITERATES, WAVES, COLUMNS = 16, 8, 16
SHAKEN = 0.1
INDEPENDENT = 1e-5  # eigenvalues of a Gram matrix below this share of the largest are left out: rounding decides them


class Returned(NamedTuple):
    """The potentials that a call returns, and the column half-step that would follow."""

    u: Tensor
    v: Tensor
    plain: Tensor


def returned(prepared: Prepared) -> tuple[Passes, Returned]:
    """Solve, where there is a tail by one iteration more than asked for."""
    passes, _, found = solved(prepared, more=True)
    return passes, at_end(passes, found)


def at_end(passes: Passes, found: Potentials) -> Returned:
    """Of the potentials of a solve, which may have had one iteration more than the problem's own."""
    if len(found.col) > passes.problem.solver.kept + 1:
        return Returned(found.row[-2], found.col[-2], found.col[-1])
    return following(passes, Potentials(found.row[-1], found.col[-1]))


def following(passes: Passes, at: Potentials) -> Returned:
    """Where the potentials are known already."""
    return Returned(*at, passes.column(at.row))


def numbers(passes: Passes, at: Returned, scale: MassScale | None) -> tuple[Any, ...]:
    """The fields of a `Certificate` up to its status, `[N, H, G]` each: NaN, and None for `positive`, where they are
    not computed."""
    r, c = sums(passes, at)
    off = residuals(passes, r, c, scale)
    unknown = torch.full_like(off[0], torch.nan)
    return (*off, None, unknown, unknown, rate(passes, at, r, c), *[unknown] * 5)


def sums(passes: Passes, at: Returned) -> tuple[Tensor, Tensor]:
    """(P 1, P^T 1), augmented. Lines without support have potentials that stay at 0, and sums of 0."""
    solver = passes.problem.solver
    r = (passes.log_a + at.u - at.u / solver.rho_row).exp()
    c = (passes.log_b + at.v - at.plain / solver.rho_col).exp()
    still = (at.v == 0) & (at.plain == 0) & (passes.log_b > -torch.inf)
    if still.any():
        shaken = at.u + probe(at.u.shape, at.u, seed=3)
        c = c.masked_fill(still & (passes.column(shaken) == 0), 0.0)
    still = (at.u == 0) & (passes.log_a > -torch.inf)
    if still.any():
        shaken = at.v + probe(at.v.shape, at.v, seed=3)
        r = r.masked_fill(still & (passes.row(shaken) == 0), 0.0)
    return r, c


def residuals(passes: Passes, r: Tensor, c: Tensor, scale: MassScale | None) -> tuple[Tensor, ...]:
    """L1 and L-infinity norms of P 1 - a and of P^T 1 - b, `[N, H, G]` each, in the caller's unit of mass."""
    found: list[Tensor] = []
    count = passes.own.number
    for line_sums, log_mass, index in ((r, passes.log_a, passes.own.row), (c, passes.log_b, passes.own.col)):
        total, mass = line_sums, log_mass.exp()
        if scale is not None:
            total, mass = scale.of_plan(total), scale.of_mass(mass)
        error = (total - mass).abs()
        found += [segment_sum(error, index, count), segment_max(error, index, count).clamp(min=0)]
    return tuple(found)


def rate(passes: Passes, at: Returned, r: Tensor, c: Tensor) -> Tensor:
    """`[N, H, G]`: of plain iterations near the fixed point, at most the true one but for rounding; 0 where a problem
    has no tokens."""
    solver, own = passes.problem.solver, passes.own
    present = segment_sum(c, own.col, own.number) > 0
    if not solver.balanced:
        return present.to(c) * (solver.rho_row * solver.rho_col)
    vectors = _slow_vectors(passes, at, c)
    vectors = _off_constants(vectors, c, passes.parts())
    image = passes.times(at.v, vectors)
    used = own.number if own.col is None else 1 + int(own.col.max())
    row, col = (None if x is None else x[:, 0] for x in own[:2])
    found = c.new_zeros(*c.shape[:2], own.number)
    for n in range(c.shape[0]):  # one batch element at a time: float64 copies are large
        grams = (
            _gram(x[:, n].double(), weight[n].double(), None if index is None else index[n], used)
            for x, weight, index in (
                (vectors, c, col),
                (image, torch.where(r > 0, 1 / r, 0.0), row),
            )
        )
        found[n, :, :used] = _largest_quotient(*grams).to(c)
    return found.masked_fill(~present, 0.0)


def _slow_vectors(passes: Passes, at: Returned, c: Tensor) -> Tensor:
    """`[K, N, H, S(+G)]`, 0 on inactive columns."""
    live = passes.log_a > -torch.inf
    shaken = at.u + SHAKEN * probe(at.u.shape, at.u, seed=2) * live
    iterates = passes.iterates(shaken, at.v, ITERATES).col[1:]
    moves = iterates[1:] - iterates[:-1]
    size = c.shape[-1] - passes.problem.num_dustbins
    index, count = passes.own.col, passes.own.number
    waves = _waves(c[..., :size], None if index is None else index[..., :size], count)
    waves = torch.nn.functional.pad(waves, (0, c.shape[-1] - size))
    last = (at.plain - at.v, moves[-1])
    columns = [_columns(move.abs() * c.sqrt(), index, count) for move in last]
    return torch.cat([moves, waves, *columns]) * (c > 0)


def _waves(mass: Tensor, index: Tensor | None, count: int) -> Tensor:
    """cos(pi k t), k = 1..WAVES, t from 0 to 1 the share of a problem's mass before each token: `[WAVES, N, H, S]`."""
    total = segment_sum(mass, index, count)
    before = total.cumsum(-1) - total
    share = mass.cumsum(-1) - mass / 2 - by_segment(before, index, mass.shape[-1])
    share = share / by_segment(total, index, mass.shape[-1]).clamp(min=torch.finfo(mass.dtype).tiny)
    return torch.stack([(math.pi * k * share).cos() for k in range(1, WAVES + 1)])


def _columns(weight: Tensor, index: Tensor | None, count: int) -> Tensor:
    """1 at the column with the k-th largest weight of each problem, k = 1..COLUMNS: `[COLUMNS, N, H, n]`."""
    order = weight.argsort(-1, descending=True)
    start = torch.zeros_like(order)
    if index is not None:
        index = index.expand(weight.shape)
        order = order.gather(-1, index.gather(-1, order).argsort(dim=-1, stable=True))
        sizes = segment_sum(torch.ones_like(order), index, count)
        start = by_segment(sizes.cumsum(-1) - sizes, index, weight.shape[-1])
    place = order.argsort(-1) - start
    return torch.stack([place == k for k in range(COLUMNS)]).to(weight.dtype)


def _off_constants(x: Tensor, mass: Tensor, parts: Components) -> Tensor:
    total = segment_sum(mass, parts.col, parts.number)
    mean = segment_sum(x * mass, parts.col, parts.number) * torch.where(total > 0, 1 / total, 0.0)
    return (x - by_segment(mean, parts.col, x.shape[-1])) * (mass > 0)


def _gram(x: Tensor, weight: Tensor, index: Tensor | None, count: int) -> Tensor:
    """sum_j w_j x_kj x_lj of each problem: `[K, H, n]` to `[H, G, K, K]`."""
    if index is None:
        return torch.einsum("khn,hn,lhn->hkl", x, weight, x)[:, None]
    lines = [segment_sum(x * (weight * y), index.expand(weight.shape), count) for y in x]  # [K, H, G] each
    return torch.stack(lines).permute(2, 3, 0, 1)


def _largest_quotient(gram: Tensor, image: Tensor) -> Tensor:
    """max over w of (w' image w) / (w' gram w), `[..., K, K]` to `[...]`; NaN where they hold it, 0 without vectors."""
    bad = ~(gram.isfinite().all(-1).all(-1) & image.isfinite().all(-1).all(-1))
    gram, image = (x.masked_fill(bad[..., None, None], 0.0) for x in (gram, image))
    size = gram.diagonal(dim1=-2, dim2=-1)
    size = torch.where(size > 0, size.rsqrt(), 0.0)
    scale = size[..., :, None] * size[..., None, :]
    values, basis = torch.linalg.eigh(gram * scale)
    kept = values > INDEPENDENT * values[..., -1:]
    basis = basis * torch.where(kept, values.rsqrt(), 0.0)[..., None, :]
    found = torch.linalg.eigvalsh(basis.mT @ (image * scale) @ basis)[..., -1].clamp(0, 1)
    return found.masked_fill(bad, torch.nan)
