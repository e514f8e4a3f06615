"""The solve, its forward and its adjoint over any `Passes`: what is the same for every lowering.

The mathematics and the names are those of `torch_sinkhorn_attn.method.reference` and
`torch_sinkhorn_attn.method.staircase`. The factors of the staircase are M(p, q) = exp(S + p + q) at other potentials
than the plan's own,

    A^r = M(u^r/rho_r - log a, v^r)        B^r = M(u^(r-1), v^r/rho_c - log b)

formed entry by entry: no entry exceeds 1, so nothing overflows however far the potentials move. All vectors here are
augmented by the dustbins, `[N, H, L(+G)]` and `[N, H, S(+G)]`; what a pass is given is their real part.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.method.dustbin import DustbinMatrix
from torch_sinkhorn_attn.engines.tpu.method.implicit import implicit_duals
from torch_sinkhorn_attn.engines.tpu.method.problem import (
    Constants,
    Field,
    Inputs,
    Passes,
    Result,
    Statics,
    compute_dtype,
)
from torch_sinkhorn_attn.method import acceleration
from torch_sinkhorn_attn.problem.segments import (
    Components,
    by_segment,
    centre_gauge,
    components,
    largest,
    mass_of,
    segment_max,
    segments,
    with_dustbin,
)


class Augmented:
    """Half-steps and products of a problem, the dustbin's part added to that of the passes. `connected`: every head is
    known to be one component."""

    def __init__(self, inputs: Inputs, constants: Constants, statics: Statics, passes: Passes, connected: bool = False):
        self.inputs, self.constants, self.statics, self.passes = inputs, constants, statics, passes
        self.connected = connected
        self.dtype = compute_dtype(inputs.query)
        self.log_a = with_dustbin(constants.log_row_mass, constants.log_row_capacity).astype(self.dtype)
        self.log_b = with_dustbin(constants.log_col_mass, constants.log_col_capacity).astype(self.dtype)
        self.length, self.size = constants.log_row_mass.shape[-1], constants.log_col_mass.shape[-1]
        self.dustbin = DustbinMatrix(inputs, constants, statics.epsilon, self.dtype) if constants.num_dustbins else None

    def real(self, u: Array, v: Array) -> tuple[Array, Array]:
        """The tokens' part of potentials."""
        return u[..., : self.length], v[..., : self.size]

    def components(self) -> Components:
        """Those with a gauge of their own. To find them takes scatters over all tokens, which a TPU does one by one."""
        return Components(None, None, 1) if self.connected else components(self.constants, self.statics)

    def live(self, p: Array, q: Array) -> tuple[Array, Array]:
        """-inf on inactive lines, as the dustbin reads potentials."""
        return jnp.where(self.log_a == -jnp.inf, -jnp.inf, p), jnp.where(self.log_b == -jnp.inf, -jnp.inf, q)

    def initial_potentials(self) -> tuple[Array, Array]:
        """u and v to start from: the warm start or 0."""
        given = self.constants.initial_row, self.constants.initial_col
        u, v = (
            jnp.zeros_like(mass) if x is None else jnp.where(mass == -jnp.inf, 0, x.astype(self.dtype))
            for x, mass in zip(given, (self.log_a, self.log_b), strict=True)
        )
        return u, v

    def column_half_step(self, u: Array, old: Array | None = None) -> Array:
        """v = rho_c (log b - LSE_i(S + u)); over-relaxed where the old v is given."""
        lse = self.passes.column_lse(u[..., : self.length])
        if self.dustbin is not None:
            lse = self.dustbin.column_lse(lse, self.live(u, self.log_b)[0])
        return potential(lse, self.log_b, self.statics.rho_col, old, self.statics.over_relaxation)

    def row_half_step(self, v: Array, old: Array | None = None) -> Array:
        """u = rho_r (log a - LSE_j(S + v)); over-relaxed where the old u is given."""
        lse = self.passes.row_lse(v[..., : self.size])
        if self.dustbin is not None:
            lse = self.dustbin.row_lse(lse, self.live(self.log_a, v)[1])
        return potential(lse, self.log_a, self.statics.rho_row, old, self.statics.over_relaxation)

    def rows(self, p: Array, q: Array, y: Array) -> Array:
        """M(p, q) y."""
        return self.complete_rows(self.passes.rows(*self.real(p, q), y[..., : self.size]), p, q, y)

    def complete_rows(self, real: Array, p: Array, q: Array, y: Array) -> Array:
        """M(p, q) y from its real part."""
        if self.dustbin is None:
            return real
        return self.dustbin.complete_rows(real, self.dustbin.matrix(*self.live(p, q)), y)

    def columns(self, p: Array, q: Array, x: Array) -> Array:
        """M(p, q)^T x."""
        return self.complete_cols(self.passes.columns(*self.real(p, q), x[..., : self.length]), p, q, x)

    def normal(self, p: Array, q: Array, y: Array, weight: Array) -> Array:
        """M(p, q)^T (weight * M(p, q) y)."""
        more = jnp.zeros_like(p[..., : self.length])
        if self.dustbin is not None:
            more = self.dustbin.matrix(*self.live(p, q)).column * self.dustbin.at_rows(y[..., self.size :])
        rows, cols = self.passes.both(*self.real(p, q), y[..., : self.size], weight[..., : self.length], more)
        return self.complete_cols(cols, p, q, weight * self.complete_rows(rows, p, q, y))

    def complete_cols(self, real: Array, p: Array, q: Array, x: Array) -> Array:
        """M(p, q)^T x from its real part."""
        if self.dustbin is None:
            return real
        return self.dustbin.complete_cols(real, self.dustbin.matrix(*self.live(p, q)), x)


def potential(lse: Array, log_mass: Array, rho: float, old: Array | None, omega: float) -> Array:
    """rho (log mass - LSE), over-relaxed from the old potential where given, 0 on inactive lines and on lines without
    support."""
    found = rho * (log_mass - lse)
    if old is not None and omega != 1:
        found = (1 - omega) * old + omega * found
    return jnp.where((lse == -jnp.inf) | (log_mass == -jnp.inf), 0, found)


def solve(problem: Augmented) -> tuple[Array, Array]:
    """Stopped and kept iterations: the stacked duals u^0..u^R `[R+1, N, H, L(+G)]` and v^0..v^R. For R = 0 they are
    the row half-step taken from the stopped v^0, and v^0."""
    statics = problem.statics
    u, v = stopped_base(problem)
    if statics.balanced and statics.stopped:
        u, v = centre_gauge(u, v, problem.log_a, problem.log_b, problem.components())
    if statics.kept == 0:
        return problem.row_half_step(v)[None], v[None]

    def iterate(u: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        v = problem.column_half_step(u)
        u = problem.row_half_step(v)
        return u, (u, v)

    _, (rows, cols) = lax.scan(iterate, u, None, length=statics.kept)
    return jnp.concatenate([u[None], rows]), jnp.concatenate([v[None], cols])


def stopped_base(problem: Augmented) -> tuple[Array, Array]:
    """T iterations, each half-step over-relaxed from the potential it replaces; with acceleration v moves on from
    there.

    With a tolerance each problem (batch element, head, segment) ends at the first (u^t, v^t), t >= 1, from which the
    next column half-step, before over-relaxation and momentum, would move no v_j by more. It stands still from then
    on; the loop itself ends when all do.
    """
    statics, own = problem.statics, segments(problem.constants)
    u, v = problem.initial_potentials()
    if statics.stopped == 0:
        return u, v
    momentum = None if statics.acceleration is None else acceleration.start(v, own, statics.contraction)

    def moved_on(t: Any, v: Array, plain: Array, momentum: Any) -> tuple[Array, Any]:
        if momentum is None:
            return plain, None
        return acceleration.step(t, v, plain, momentum, problem.log_b, own, statics.contraction)

    if not statics.tolerance:

        def iterate(t: Any, state: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            u, v, momentum = state
            next_v, momentum = moved_on(t, v, problem.column_half_step(u, v), momentum)
            return problem.row_half_step(next_v, u), next_v, momentum

        return lax.fori_loop(0, statics.stopped, iterate, (u, v, momentum))[:2]

    def more(state: Any) -> Array:
        t, done = state[0], state[-1]
        return (t < statics.stopped) & ~jnp.all(done)

    def guarded(state: Any) -> Any:
        t, u, v, momentum, done = state
        plain = problem.column_half_step(u, v)
        change = segment_max(jnp.abs(plain - v) / statics.over_relaxation, own.col, own.number)  # of the plain step
        done = (t > 0) & (done | (change <= statics.tolerance))
        next_v, momentum = moved_on(t, v, plain, momentum)
        next_v = jnp.where(by_segment(done, own.col, v.shape[-1]), v, next_v)
        next_u = jnp.where(by_segment(done, own.row, u.shape[-1]), u, problem.row_half_step(next_v, u))
        return t + 1, next_u, next_v, momentum, done

    done = jnp.zeros_like(v, bool, (*v.shape[:2], own.number))
    return lax.while_loop(more, guarded, (jnp.int32(0), u, v, momentum, done))[1:3]


def forward(problem: Augmented, residuals: bool) -> Result:
    """Output (None without a value), duals and (unless `residuals` is False: NaN) the largest marginal errors."""
    return evaluate(problem, solve(problem), residuals)


def evaluate(problem: Augmented, potentials: tuple[Array, Array], residuals: bool) -> Result:
    """What `forward` returns, for the stacked duals."""
    u, v = problem.real(*(x[-1] for x in potentials))
    mass = row_sums = col_sums = None
    if problem.inputs.value is not None:
        mass, row_sums = problem.passes.values(u, v)
    elif residuals:
        row_sums = problem.passes.rows(u, v, jnp.ones_like(v))
    if residuals:
        col_sums = problem.passes.columns(u, v, jnp.ones_like(u))
    return finish(problem, potentials, mass, row_sums, col_sums)


def finish(
    problem: Augmented,
    potentials: tuple[Array, Array],
    mass: Array | None,
    row_sums: Array | None,
    col_sums: Array | None,
) -> Result:
    """What `forward` returns, from P V `[N, H, L, Ev]` and the sums of P (real parts); None: not asked for."""
    inputs, constants, statics = problem.inputs, problem.constants, problem.statics
    u, v = (x[-1] for x in potentials)
    row_residual, col_residual = (jnp.full_like(u, jnp.nan, shape=u.shape[:2]) for _ in range(2))
    if row_sums is not None and col_sums is not None:
        row_residual = largest(problem.complete_rows(row_sums, u, v, jnp.ones_like(v)) - jnp.exp(problem.log_a))
        col_residual = largest(problem.complete_cols(col_sums, u, v, jnp.ones_like(u)) - jnp.exp(problem.log_b))
    to_bin = from_bin = None
    if problem.dustbin is not None:
        to_bin, from_bin, _ = problem.dustbin.matrix(*problem.live(u, v))
    if mass is None or row_sums is None:
        return Result(None, *potentials, row_residual, col_residual, to_bin, from_bin)
    if to_bin is not None:
        row_sums = row_sums + to_bin
    if to_bin is not None and inputs.dustbin_value is not None:
        mass = mass + to_bin[..., None] * inputs.dustbin_value.astype(mass.dtype)[:, :, None]
    # Balanced rows of P sum to a_i exactly: divided by their own sum, the rounding of large scores cancels.
    divisor = mass_of(constants.log_row_mass).astype(mass.dtype)
    if statics.rho_row == 1:
        divisor = jnp.where(row_sums > 0, row_sums, divisor)
    return Result(mass / divisor[..., None], *potentials, row_residual, col_residual, to_bin, from_bin)


class Cotangent(NamedTuple):
    """D = dL/dP: <grad_i, V_j> (dropped out) on real pairs and a vector each for the dustbin column and row; and the
    row and column sums of P*D, augmented."""

    grad: Array  # dO / a, [N, H, L, Ev]
    to_bin: Array | None  # [N, H, L]
    from_bin: Array | None  # [N, H, S]
    row_sums: Array
    col_sums: Array


def backward(
    problem: Augmented,
    output: Array,
    potentials: tuple[Array, Array],
    grad_output: Array,
    grad_bins: tuple[Array | None, Array | None],
    mask_grad: bool,
) -> tuple[Inputs, Array]:
    """Cotangents of the inputs, field by field (None where absent or not wanted), and the dropped cotangent: z^0, or
    w^0 for R = 0; zeros when implicit."""
    statics = problem.statics
    u, v = (x[-1] for x in potentials)
    real = problem.real(u, v)
    d = plan_cotangent(problem, u, v, output, grad_output, grad_bins)
    grad_value = problem.passes.value_cotangent(*real, d.grad)
    d = d._replace(col_sums=d.col_sums + value_sums(problem, grad_value))
    if statics.implicit:
        x, y = implicit_duals(
            lambda y: problem.rows(u, v, y), lambda x: problem.columns(u, v, x), partial(problem.normal, u, v),
            d.row_sums, d.col_sums, problem.constants, statics, problem.components(),
        )  # fmt: skip
        field = Field(*(jnp.stack(z) for z in ((u, u), (v, v), (x, jnp.ones_like(x)), (jnp.ones_like(y), y))))
        dropped = jnp.zeros_like(u)
    else:
        field, dropped = tail_field(problem, potentials, d)
    inner = Field(*problem.real(field.p, field.q), *problem.real(field.x, field.y))
    grad_query, grad_mask = problem.passes.query_cotangent(*real, d.grad, inner, mask_grad)
    grad_key = problem.passes.key_cotangent(*real, d.grad, inner)
    return gather(problem, u, v, d, field, Cotangents(grad_query, grad_key, grad_value, grad_mask)), dropped


class Cotangents(NamedTuple):
    """What the readings of the scores give: dS K and dS^T Q, not yet scaled, and P^T dO, per query head; dmask."""

    query: Array
    key: Array
    value: Array
    mask: Array | None = None


def gather(problem: Augmented, u: Array, v: Array, d: Cotangent, field: Field, found: Cotangents) -> Inputs:
    """The cotangents of all inputs, from those of the readings and the (augmented) field."""
    inputs, statics = problem.inputs, problem.statics
    factor = statics.scale / statics.epsilon
    row_score = col_score = corner_score = dustbin_value = None
    if problem.dustbin is not None and d.to_bin is not None and d.from_bin is not None:
        plan = problem.dustbin.matrix(*problem.live(u, v))
        live = field._replace(**dict(zip(("p", "q"), problem.live(field.p, field.q), strict=True)))
        column, row, corner = problem.dustbin.score_cotangent(plan, d.to_bin, d.from_bin, live)
        row_score, col_score = column / statics.epsilon, row / statics.epsilon
        corner_score = corner.sum(-1) / statics.epsilon
        if inputs.dustbin_value is not None:
            dustbin_value = (plan.column[..., None] * d.grad).sum(-2)
    groups = inputs.key.shape[1]
    return Inputs(
        found.query * factor, over_group(found.key, groups) * factor, over_group(found.value, groups), found.mask,
        row_score, col_score, corner_score, dustbin_value,
    )  # fmt: skip


def plan_cotangent(
    problem: Augmented,
    u: Array,
    v: Array,
    output: Array,
    grad_output: Array,
    grad_bins: tuple[Array | None, Array | None],
) -> Cotangent:
    """D, and the sums of P*D: the rows' by <dO_i, O_i>, the columns' only as far as the dustbin goes."""
    active = problem.constants.log_row_mass > -jnp.inf
    grad_output = jnp.where(active[..., None], grad_output.astype(problem.dtype), 0)
    grad = grad_output / mass_of(problem.constants.log_row_mass).astype(problem.dtype)[..., None]
    row_sums, bins = (grad_output * output).sum(-1), problem.dustbin
    if bins is None:
        return Cotangent(grad, None, None, row_sums, jnp.zeros_like(v))
    plan = bins.matrix(*problem.live(u, v))
    grad_to, grad_from = (
        jnp.zeros_like(p) if g is None else g.astype(p.dtype)
        for g, p in zip(grad_bins, (plan.column, plan.row), strict=True)
    )
    to_bin = grad_to
    if problem.inputs.dustbin_value is not None:
        to_bin = grad_to + (grad * problem.inputs.dustbin_value.astype(grad.dtype)[:, :, None]).sum(-1)
    rows = jnp.concatenate([row_sums + plan.column * grad_to, bins.sum_cols(plan.row * grad_from)], -1)
    cols = jnp.concatenate([plan.row * grad_from, bins.sum_rows(plan.column * to_bin)], -1)
    return Cotangent(grad, to_bin, grad_from, rows, cols)


def value_sums(problem: Augmented, grad_value: Array) -> Array:
    """<dV_j, V_j>: the column sums of P*D on real pairs `[N, H, S(+G)]`, 0 at the dustbin, from dV per query head."""
    value = problem.inputs.value
    assert value is not None
    by_group = _by_group(grad_value, value.shape[1])
    sums = (by_group * value.astype(grad_value.dtype)[:, :, None]).sum(-1).reshape(grad_value.shape[:-1])
    return jnp.pad(sums, ((0, 0), (0, 0), (0, problem.constants.num_dustbins)))


def tail_field(problem: Augmented, potentials: tuple[Array, Array], d: Cotangent) -> tuple[Field, Array]:
    """The modifier field of the tail, by max(2 R, 1) passes, and the dropped cotangent:

    z^R = rowsum(P*D), w^R = colsum(P*D) - rho_r A^R^T z^R, z^(r-1) = -rho_c B^r w^r, w^r = -rho_r A^r^T z^r
    """
    u, v = potentials
    rho_r, rho_c = problem.statics.rho_row, problem.statics.rho_col
    at_a = row_exponent(problem, u)
    if problem.statics.kept == 0:
        z = rho_r * d.row_sums
        field = Field(at_a, v, z[None], jnp.ones_like(v))
        return field, d.col_sums - problem.columns(at_a[0], v[0], z)
    at_b = col_exponent(problem, v)

    def step(state: tuple[Array, Array], duals: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        z, col_sums = state
        u_before, v_here, p_a, q_b = duals
        w = col_sums - problem.columns(p_a, v_here, rho_r * z)
        next_z = -problem.rows(u_before, q_b, rho_c * w)
        return (next_z, jnp.zeros_like(col_sums)), (z, w)

    duals = u[:-1], v[1:], at_a[1:], at_b[1:]
    (dropped, _), (z, w) = lax.scan(step, (d.row_sums, d.col_sums), duals, reverse=True)
    return staircase_field(problem, potentials, z, w), dropped


def staircase_field(problem: Augmented, potentials: tuple[Array, Array], z: Array, w: Array) -> Field:
    """The field of R >= 1 kept iterations for the vector cotangents z^1..z^R and w^1..w^R."""
    u, v = potentials
    rho_r, rho_c = problem.statics.rho_row, problem.statics.rho_col
    at_a, at_b = row_exponent(problem, u), col_exponent(problem, v)
    p, q = jnp.concatenate([at_a[1:], u[:-1]]), jnp.concatenate([v[1:], at_b[1:]])
    x, y = jnp.concatenate([rho_r * z, jnp.ones_like(z)]), jnp.concatenate([jnp.ones_like(w), rho_c * w])
    return Field(p, q, x, y)


def row_exponent(problem: Augmented, u: Array) -> Array:
    """p of A^r."""
    return jnp.where(problem.log_a == -jnp.inf, 0, u / problem.statics.rho_row - problem.log_a)


def col_exponent(problem: Augmented, v: Array) -> Array:
    """q of B^r."""
    return jnp.where(problem.log_b == -jnp.inf, 0, v / problem.statics.rho_col - problem.log_b)


def over_group(x: Array, groups: int) -> Array:
    """`[N, H, ...]` summed over the query heads of each key head, `[N, Hk, ...]`."""
    return _by_group(x, groups).sum(2) if x.shape[1] != groups else x


def _by_group(x: Array, groups: int) -> Array:
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
