"""The adjoint of the solve over any `Passes`: what is the same for every lowering.

The mathematics and the names are those of `torch_sinkhorn_attn.method.staircase`. The factors of the staircase are
M(p, q) = exp(S + p + q) at other potentials than the plan's own,

    A^r = M(u^r/rho_r - log a, v^r)        B^r = M(u^(r-1), v^r/rho_c - log b)

formed entry by entry: no entry exceeds 1, so nothing overflows however far the potentials move.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.method.implicit import implicit_duals
from torch_sinkhorn_attn.engines.tpu.method.problem import Field, Inputs
from torch_sinkhorn_attn.engines.tpu.method.sinkhorn import Augmented
from torch_sinkhorn_attn.problem.segments import mass_of


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
            d.row_sums, d.col_sums, statics, problem.components(), problem.own(), problem.anywhere,
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
    """<dV_j, V_j>: the column sums of P*D on real pairs `[N, H, S(+G)]`, 0 at the dustbin, from dV per query head, of
    the rows here."""
    value = problem.inputs.value
    assert value is not None
    by_group = _by_group(grad_value, value.shape[1])
    sums = (by_group * value.astype(grad_value.dtype)[:, :, None]).sum(-1).reshape(grad_value.shape[:-1])
    return jnp.pad(problem.complete_sums(sums), ((0, 0), (0, 0), (0, problem.constants.num_dustbins)))


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
