"""JAX's functions, as `torch_sinkhorn_attn.arrays.of_torch` has torch's."""

from __future__ import annotations

import builtins

import jax.numpy as jnp
from jax import Array, lax
from jax.nn import logsumexp  # noqa: F401
from jax.numpy import (  # noqa: F401
    abs,
    broadcast_to,
    clip,
    concatenate as concat,
    exp,
    inf,
    log,
    log2,
    logaddexp,
    max,
    min,
    round,
    take_along_axis,
    where,
    zeros_like,
)


def astype(x: Array, dtype: jnp.dtype) -> Array:
    return x.astype(dtype)


def arange(count: int, like: Array) -> Array:
    return jnp.arange(count, dtype=jnp.int32)


def cumsum(x: Array, axis: int) -> Array:
    return jnp.cumsum(x, axis, dtype=x.dtype)  # which would widen int32 where there is an int64


def add_at(x: Array, index: Array, count: int) -> Array:
    flat, line, place = _lines(x, index)
    out = jnp.zeros_like(flat, shape=(flat.shape[0], count)).at[line, place].add(flat)
    return out.reshape(*x.shape[:-1], count)


def max_at(x: Array, index: Array, count: int) -> Array:
    flat, line, place = _lines(x, index)
    out = jnp.full_like(flat, -jnp.inf, shape=(flat.shape[0], count)).at[line, place].max(flat)
    return out.reshape(*x.shape[:-1], count)


def _lines(x: Array, index: Array) -> tuple[Array, Array, Array]:
    """The vectors of x one below the other, the number of each, and the index alike."""
    flat = x.reshape(-1, x.shape[-1])
    return flat, jnp.arange(flat.shape[0])[:, None], jnp.broadcast_to(index, x.shape).reshape(flat.shape)


def last_marked(x: Array, marked: Array, before: bool = False) -> Array:
    """For an x that is not negative and never falls from one marked entry to the next, as ends of intervals."""
    highest = lax.cummax(jnp.where(marked, x, 0), x.ndim - 1)
    return jnp.concatenate([jnp.zeros_like(x[..., :1]), highest[..., :-1]], -1) if before else highest


def whole(x: Array, up: bool, limit: int) -> Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jnp.clip(jnp.nan_to_num(x), -limit, limit)
        x = jnp.ceil(x) if up else jnp.floor(x)
    else:
        known = jnp.iinfo(x.dtype)
        x = jnp.clip(x, builtins.max(int(known.min), -limit), builtins.min(int(known.max), limit))
    return x.astype(jnp.int32)


def running_max(x: Array) -> Array:
    return lax.cummax(x, x.ndim - 1)


def times_exp2(x: Array, power: Array) -> Array:
    power = power.astype(jnp.int32).reshape(*power.shape, *[1] * (x.ndim - power.ndim))
    half = power // 2  # the whole may leave the range where the product does not
    one = jnp.ones((), x.dtype)
    return x * jnp.ldexp(one, half) * jnp.ldexp(one, power - half)


def over_exp2(x: Array, power: Array) -> Array:
    return times_exp2(x, -power)
