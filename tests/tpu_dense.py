"""The definition in plain JAX, dense and differentiated by JAX: what the JAX engines must give, without torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.special import logsumexp

Scores = tuple[Array | float, Array | float, Array | float]  # of a dustbin: row, column, corner


def attention(
    query: Array,
    key: Array,
    value: Array,
    keep: Array,
    *,
    bias: Array | float = 0.0,
    epsilon: float = 1.0,
    masses: tuple[Array, Array] | None = None,
    rho: tuple[float, float] = (1.0, 1.0),
    dustbin: Scores | None = None,
    stopped: int = 20,
    kept: int = 2,
) -> Array:
    """`[..., L, Ev]` of `[..., L, E]`, `[..., S, E]`, `[..., S, Ev]` and the pairs kept, bool `[..., L, S]`."""
    scores = jnp.einsum("...ie,...je->...ij", query, key) / (query.shape[-1] ** 0.5 * epsilon) + bias
    keep = jnp.broadcast_to(keep, scores.shape)
    scores = jnp.where(keep, scores, -jnp.inf)
    rows, cols = keep.any(-1), keep.any(-2)
    if masses is None and dustbin is None:
        share = rows.sum(-1, keepdims=True) / jnp.maximum(cols.sum(-1, keepdims=True), 1)
        masses = jnp.ones_like(scores[..., 0]), jnp.ones_like(scores[..., 0, :]) * share
    elif masses is None:
        masses = jnp.ones_like(scores[..., 0]), jnp.ones_like(scores[..., 0, :])
    a, b = jnp.where(rows, masses[0], 0), jnp.where(cols, masses[1], 0)
    if dustbin is not None:
        scores, a, b = _augmented(scores, a, b, rows, cols, [x / epsilon for x in dustbin])
    log_a, log_b = jnp.log(a), jnp.log(b)

    def half(scores: Array, potential: Array, log_mass: Array, rho: float, axis: int) -> Array:
        lse = logsumexp(scores + jnp.expand_dims(jnp.where(jnp.isfinite(potential), potential, 0), -3 - axis), axis)
        live = jnp.isfinite(log_mass) & jnp.isfinite(lse)
        return jnp.where(live, rho * (jnp.where(live, log_mass, 0) - jnp.where(live, lse, 0)), 0)

    scores = jnp.where(jnp.isfinite(scores), scores, -1e30)  # finite, so that no gradient is NaN
    u, v = jnp.zeros_like(log_a), jnp.zeros_like(log_b)
    for t in range(stopped + kept):
        if t == stopped:
            u, v = lax.stop_gradient((u, v))
        v = half(scores, u, log_b, rho[1], -2)
        u = half(scores, v, log_a, rho[0], -1)
    if kept == 0:
        u = half(scores, lax.stop_gradient(v), log_a, rho[0], -1)
    plan = jnp.exp(scores + u[..., :, None] + v[..., None, :])[..., : rows.shape[-1], :]
    plan = plan / jnp.where(rows, a[..., : rows.shape[-1]], 1)[..., None]
    return jnp.where(rows[..., None], plan[..., : cols.shape[-1]] @ value, 0)


def _augmented(
    scores: Array, a: Array, b: Array, rows: Array, cols: Array, dustbin: list[Array | float]
) -> tuple[Array, Array, Array]:
    """With the dustbin's row and column, which hold as much as the other side."""
    column = jnp.where(rows, dustbin[0], -jnp.inf)[..., None]
    row = jnp.where(cols, dustbin[1], -jnp.inf)[..., None, :]
    corner = jnp.broadcast_to(dustbin[2], (*scores.shape[:-2], 1, 1))
    scores = jnp.concatenate([jnp.concatenate([scores, column], -1), jnp.concatenate([row, corner], -1)], -2)
    row_total, col_total = a.sum(-1, keepdims=True), b.sum(-1, keepdims=True)
    return scores, jnp.concatenate([a, col_total], -1), jnp.concatenate([b, row_total], -1)


def band(length: int, size: int, window: tuple[int, int]) -> Array:
    """The pairs of a window, bool `[L, S]`, all tokens active."""
    centre = (jnp.arange(length)[:, None] + 0.5) * size / length - 0.5
    offset = jnp.arange(size) - centre
    return (offset >= -window[0] - 1e-9) & (offset <= window[1] + 1e-9)


def worst(found: object, expected: object) -> float:
    """The largest difference between two trees of arrays."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs)
