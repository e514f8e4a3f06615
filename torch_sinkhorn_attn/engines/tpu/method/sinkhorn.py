"""The solve and its forward over any `Passes`: what is the same for every lowering.

The mathematics and the names are those of `torch_sinkhorn_attn.method.reference`; `staircase` is the other half. All
vectors are augmented by the dustbins, `[N, H, L(+G)]` and `[N, H, S(+G)]`; what a pass is given is their real part.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.method.dustbin import DustbinMatrix
from torch_sinkhorn_attn.engines.tpu.method.problem import (
    Constants,
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
        self.dustbin = self._dustbin() if constants.num_dustbins else None

    def real(self, u: Array, v: Array) -> tuple[Array, Array]:
        """The tokens' part of potentials."""
        return u[..., : self.length], v[..., : self.size]

    # What other devices may have a share in: `shared` overrides these

    def _dustbin(self) -> DustbinMatrix:
        return DustbinMatrix(self.inputs, self.constants, self.statics.epsilon, self.dtype)

    def own(self) -> Components:
        """The problem that each line belongs to."""
        return segments(self.constants)

    def components(self) -> Components:
        """Those with a gauge of their own. To find them takes scatters over all tokens, which a TPU does one by one."""
        return Components(None, None, 1) if self.connected else components(self.constants, self.statics)

    def complete_sums(self, partial: Array) -> Array:
        """Sums over all rows `[N, H, S]`, from those over the rows here."""
        return partial

    def largest(self, error: Array) -> Array:
        """The largest absolute value of a vector over lines, `[N, H]`."""
        return largest(error)

    def anywhere(self, marked: Array) -> Array:
        """Whether any entry is marked."""
        return jnp.any(marked)

    # Half-steps and products

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
    statics, own = problem.statics, problem.own()
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
        change = own.col_max(jnp.abs(plain - v) / statics.over_relaxation)  # of the plain step
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
        row_residual = problem.largest(problem.complete_rows(row_sums, u, v, jnp.ones_like(v)) - jnp.exp(problem.log_a))
        col_residual = problem.largest(problem.complete_cols(col_sums, u, v, jnp.ones_like(u)) - jnp.exp(problem.log_b))
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
