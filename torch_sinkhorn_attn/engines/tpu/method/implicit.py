"""The implicit gradient's adjoint system, by gauge-projected conjugate gradients over passes of the plan.

The system and its reduction are those of `torch_sinkhorn_attn.method.implicit`, whose names are kept:

    (diag(c)/rho_c - rho_r P^T diag(1/r) P) y = g - rho_r P^T (f / r)

with r, c the plan's own sums and f, g those of P*D, symmetrised by sqrt(c). Every problem (batch element, head,
segment) stops for itself; the loop ends when all have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.method.problem import Statics
from torch_sinkhorn_attn.problem.segments import Components, by_segment

MAX_ITERS = 500  # each iteration takes two passes
TOLERANCE = {"float32": 1e-7, "float64": 1e-14}  # relative residual, both near the dtype's rounding
ROUNDING = 8  # epsilons: what may be rounding of a right-hand side that cancels, or of a null vector's curvature

Pass = Callable[[Array], Array]


def implicit_duals(
    row_pass: Pass,
    column_pass: Pass,
    normal: Callable[[Array, Array], Array],
    row_sums: Array,
    col_sums: Array,
    statics: Statics,
    parts: Components,
    own: Components,
    anywhere: Callable[[Array], Array] = jnp.any,
) -> tuple[Array, Array]:
    """(x, y) of the adjoint system for the sums of P*D, `row_sums [N, H, L(+G)]` and `col_sums [N, H, S(+G)]`, and the
    passes P y, P^T x and, of y and d, P^T (d * P y), in problems `own` of these components. `anywhere` tells whether
    some problem is marked. Lines without mass get 0."""
    rho_r, rho_c = statics.rho_row, statics.rho_col
    r, c = row_pass(jnp.ones_like(col_sums)), column_pass(jnp.ones_like(row_sums))
    r_inv = _inverse(r)
    root = jnp.sqrt(jnp.maximum(c, 0))
    root_inv, mass_inv = _inverse(root), _inverse(parts.col_sum(c))

    def matrix(s: Array) -> Array:
        return s / rho_c - rho_r * (root_inv * normal(root_inv * s, r_inv))

    def project(s: Array) -> Array:
        """s off the singular vectors of 1, where the problem is balanced."""
        if not statics.balanced:
            return s
        share = parts.col_sum(root * s) * mass_inv
        return s - root * by_segment(share, parts.col, s.shape[-1])

    def dot(x: Array, y: Array) -> Array:
        """The inner product of each problem, at each of its entries."""
        return by_segment(own.col_sum(x * y), own.col, x.shape[-1])

    image = rho_r * column_pass(r_inv * row_sums)
    rhs, both = root_inv * (col_sums - image), root_inv * (jnp.abs(col_sums) + jnp.abs(image))
    y = root_inv * conjugate_gradients(matrix, project(rhs), project, dot, dot(both, both), anywhere)
    return rho_r * r_inv * (row_sums - row_pass(y)), y


def conjugate_gradients(
    matrix: Pass,
    rhs: Array,
    project: Pass,
    dot: Callable[[Array, Array], Array],
    scale: Array,
    anywhere: Callable[[Array], Array] = jnp.any,
) -> Array:
    """Solve `matrix(s) = rhs` for every problem at once, `matrix` symmetric and positive off the projection.

    `scale` is the inner product of the terms `rhs` is the difference of, by which its rounding is judged: a right-hand
    side that is all rounding has the solution 0, and a direction without curvature is a null vector, along which a step
    would be as long as rounding is small.
    """
    rounding = ROUNDING * float(jnp.finfo(rhs.dtype).eps)
    start = dot(rhs, rhs)
    tolerance = jnp.maximum(TOLERANCE[str(rhs.dtype)] ** 2 * start, rounding**2 * scale)

    def more(state: Any) -> Array:
        return (state[0] < MAX_ITERS) & state[-1]

    def iterate(state: Any) -> Any:
        iteration, solution, residual, direction, energy, _ = state
        image = project(matrix(direction))
        curvature = dot(direction, image)
        busy = (energy > tolerance) & (curvature > rounding * dot(direction, direction))
        step = jnp.where(busy, energy / curvature, 0)
        solution = solution + step * direction
        residual = residual - step * image
        new_energy = dot(residual, residual)
        direction = project(residual + jnp.where(busy, new_energy / energy, 0) * direction)
        energy = jnp.where(busy, new_energy, 0)
        return iteration + 1, solution, residual, direction, energy, anywhere(energy > tolerance)

    state = jnp.int32(0), jnp.zeros_like(rhs), rhs, rhs, start, anywhere(start > tolerance)
    return lax.while_loop(more, iterate, state)[1]


def _inverse(x: Array) -> Array:
    """1 / x, 0 where x is not positive."""
    return jnp.where(x > 0, 1 / x, 0)
