"""Problems packed side by side: sums and maxima by segment, components of the support, and the gauge of each.

Index arrays broadcast against `[..., n]` vectors; None stands for one segment that holds all.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Statics


class Components(NamedTuple):
    """A partition of the lines, by labels that broadcast to `[N, H, L(+G)]` and `[N, H, S(+G)]`; None: all in one."""

    row: Array | None
    col: Array | None
    number: int


def segment_sum(x: Array, index: Array | None, count: int) -> Array:
    """Sum over the last dimension by segment: `[..., n]` and `index [..., n]` (broadcasting) to `[..., count]`."""
    if index is None or count == 1:
        return x.sum(-1, keepdims=True)
    flat, where = _flat(x, index)
    line = jnp.arange(flat.shape[0])[:, None]
    out = jnp.zeros_like(flat, shape=(flat.shape[0], count)).at[line, where].add(flat)
    return out.reshape(*x.shape[:-1], count)


def segment_max(x: Array, index: Array | None, count: int) -> Array:
    """Maximum likewise; -inf over none."""
    if index is None or count == 1:
        return x.max(-1, keepdims=True, initial=-jnp.inf)
    flat, where = _flat(x, index)
    line = jnp.arange(flat.shape[0])[:, None]
    out = jnp.full_like(flat, -jnp.inf, shape=(flat.shape[0], count)).at[line, where].max(flat)
    return out.reshape(*x.shape[:-1], count)


def _flat(x: Array, index: Array) -> tuple[Array, Array]:
    return x.reshape(-1, x.shape[-1]), jnp.broadcast_to(index, x.shape).reshape(-1, x.shape[-1])


def by_segment(x: Array, index: Array | None, length: int) -> Array:
    """The inverse look-up: `x [..., G]` read at each of `length` tokens, `[..., length]`."""
    if index is None or x.shape[-1] == 1:
        return jnp.broadcast_to(x, (*x.shape[:-1], length))
    return jnp.take_along_axis(x, jnp.broadcast_to(index, (*x.shape[:-1], length)), -1)


def segment_logsumexp(x: Array, index: Array | None, count: int) -> Array:
    """LSE over the last dimension by segment, `[..., n]` to `[..., count]`; -inf for an empty segment."""
    top = segment_max(x, index, count)
    safe = jnp.where(top == -jnp.inf, 0, top)
    return jnp.log(segment_sum(jnp.exp(x - by_segment(safe, index, x.shape[-1])), index, count)) + safe


def segments(constants: Constants) -> Components:
    """Which problem of its batch element and head each line belongs to, the dustbins' lines included."""
    if constants.row_segment is None or constants.col_segment is None:
        return Components(None, None, 1)
    pair = constants.row_segment, constants.col_segment
    row, col = (with_own_bins(s[:, None], constants.num_dustbins) for s in pair)
    return Components(row, col, max(1, min(pair[0].shape[-1], pair[1].shape[-1])))


def components(constants: Constants, statics: Statics) -> Components:
    """Connected components of the intervals with active ends, one gauge freedom each; a dustbin joins all tokens of its
    segment. A mask may split them further; a gauge shared by several components is still a gauge."""
    if constants.num_dustbins:
        if constants.row_segment is None:
            return Components(None, None, 1)
        return segments(constants)._replace(number=constants.num_dustbins)
    if not statics.banded:
        return Components(None, None, 1)
    row_active, col_active = constants.log_row_mass > -jnp.inf, constants.log_col_mass > -jnp.inf
    if not row_active.size or not col_active.size:
        return Components(None, None, 1)
    lo, hi = (jnp.broadcast_to(x[:, None], row_active.shape) for x in (constants.row_lo, constants.row_hi))
    live = row_active & (lo < hi)
    axis = lo.ndim - 1
    active_before = _pad_front(jnp.cumsum(col_active, -1, dtype=jnp.int32))  # number of active columns before each
    reach = _pad_front(lax.cummax(jnp.where(live, hi, 0), axis))[..., :-1]
    starts = live & (_read(active_before, lo) >= _read(active_before, reach))
    row = jnp.maximum(jnp.cumsum(starts, -1, dtype=jnp.int32) - 1, 0)
    begun = segment_sum(starts.astype(jnp.int32), lo, active_before.shape[-1])
    col = jnp.maximum(jnp.cumsum(begun, -1)[..., :-1] - 1, 0)
    return Components(row, col, max(1, row.shape[-1]))


def centre_gauge(u: Array, v: Array, log_a: Array, log_b: Array, parts: Components) -> tuple[Array, Array]:
    """Subtract the mean of u over each component's active rows from u and add it to v: the plan does not change."""
    row_active, col_active = ((x > -jnp.inf).astype(u.dtype) for x in (log_a, log_b))
    size = jnp.maximum(segment_sum(row_active, parts.row, parts.number), 1)
    mean = segment_sum(u * row_active, parts.row, parts.number) / size
    return (
        (u - by_segment(mean, parts.row, u.shape[-1])) * row_active,
        (v + by_segment(mean, parts.col, v.shape[-1])) * col_active,
    )


def with_dustbin(real: Array, bins: Array | None) -> Array:
    """`[..., n]` and `[..., G]` to `[..., n+G]`; the real part alone without a dustbin."""
    return real if bins is None else jnp.concatenate([real, bins], -1)


def with_own_bins(index: Array, bins: int) -> Array:
    """The segments of n tokens, followed by those of the dustbins: 0..bins-1."""
    own = jnp.broadcast_to(jnp.arange(bins, dtype=index.dtype), (*index.shape[:-1], bins))
    return jnp.concatenate([index, own], -1)


def mass_of(log_mass: Array) -> Array:
    """exp, with 1 for inactive tokens, by which their zero rows of the plan may be divided."""
    return jnp.exp(jnp.where(log_mass == -jnp.inf, 0, log_mass))


def largest(error: Array) -> Array:
    """Largest absolute value over the last dimension, 0 over none."""
    return jnp.abs(error).max(-1, initial=0)


def _pad_front(x: Array) -> Array:
    return jnp.concatenate([jnp.zeros_like(x, shape=(*x.shape[:-1], 1)), x], -1)


def _read(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index, -1)
