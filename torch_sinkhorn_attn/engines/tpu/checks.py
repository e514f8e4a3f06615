"""Checks of one argument at a time, by type, dtype and shape: each returns the argument in canonical form or raises a
TypeError or ValueError that names it, its value and the way out. What needs a look at data cannot be checked in JAX."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from torch_sinkhorn_attn.engines.tpu.problem import compute_dtype

WIDEST_WINDOW = 1 << 24  # wider sides mean the same
LONGEST = 1 << 22  # tokens a side, up to which the window's integers are exact
GRADIENTS = ("tail", "implicit", "unrolled")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def tokens(query: Any, key: Any, value: Any, enable_gqa: bool) -> tuple[Array, Array, Array]:
    """Types, dtypes and shapes of query, key and value."""
    given = {"query": query, "key": key, "value": value}
    for name, x in given.items():
        if not is_array(x):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}.")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}; use float32, float64, bfloat16 or float16.")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {x.dtype} but query has {query.dtype}; cast them to one dtype.")
        if x.ndim < 3:
            raise ValueError(f"{name} has shape {x.shape}; (..., heads, tokens, features) is needed: use {name}[None].")
        if x.shape[:-3] != query.shape[:-3]:
            batches = f"{x.shape[:-3]} but query has {query.shape[:-3]}"
            raise ValueError(f"{name} has batch shape {batches}; broadcast them to one.")
        if x.shape[-2] > LONGEST:
            raise ValueError(f"{name} has {x.shape[-2]} tokens; at most {LONGEST} are supported.")
    if query.shape[-1] == 0:
        raise ValueError(f"query has shape {query.shape}: at least one feature is needed.")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has {key.shape[-1]} features but query has {query.shape[-1]}; they must agree.")
    if value.shape[-3:-1] != key.shape[-3:-1]:
        raise ValueError(
            f"value has (heads, tokens) {value.shape[-3:-1]} but key has {key.shape[-3:-1]}; they must agree."
        )
    heads, key_heads = query.shape[-3], key.shape[-3]
    if heads == 0:
        raise ValueError(f"query has shape {query.shape}: at least one head is needed.")
    if heads != key_heads and not enable_gqa:
        raise ValueError(f"query has {heads} heads but key has {key_heads}; pass enable_gqa=True for grouped queries.")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"enable_gqa needs query heads ({heads}) to be a multiple of key heads ({key_heads}).")
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    return query, key, value


class Solver(NamedTuple):
    """The checked scalars of the iteration."""

    scale: float
    epsilon: float
    window: tuple[int, int] | None
    rho: tuple[float, float]  # (row, column) damping
    base_iters: int
    tail_iters: int
    tolerance: float  # 0: never
    over_relaxation: float
    gradient: str
    dropout_p: float


def solver(query: Array, scale: Any, epsilon: Any, window: Any, relaxation: Any, **base: Any) -> Solver:
    """Everything about the iteration; `base` holds base_iters, tail_iters, tolerance, over_relaxation, gradient and
    dropout_p."""
    epsilon, dtype = positive("epsilon", epsilon), compute_dtype(query)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else number("scale", scale)
    if not abs(scale) / epsilon < float(jnp.finfo(dtype).max):
        raise ValueError(
            f"epsilon={epsilon} is too small: scale / epsilon overflows {dtype}; the plan needs epsilon > 0."
        )
    rho = [tau / (tau + epsilon) if tau < math.inf else 1.0 for tau in relaxation_pair(relaxation)]
    gradient, dropout_p = base["gradient"], number("dropout_p", base["dropout_p"])
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r} is unknown; choose one of {', '.join(map(repr, GRADIENTS))}.")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} must lie in [0, 1).")
    tolerance = 0.0 if base["tolerance"] is None else number("tolerance", base["tolerance"])
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance} must be 0 or more; None and 0 never stop early.")
    omega = number("over_relaxation", base["over_relaxation"])
    if not 0 < omega < 2:
        raise ValueError(f"over_relaxation={omega} must lie between 0 and 2, both excluded; 1 is the plain iteration.")
    if gradient == "unrolled" and (base["tolerance"] is not None or omega != 1):
        given = f"over_relaxation={omega}" if base["tolerance"] is None else f"tolerance={tolerance}"
        raise ValueError(
            f"{given} needs a stopped base, and gradient='unrolled' has none: it differentiates every iteration. Use "
            "gradient='tail' or 'implicit', or leave tolerance=None and over_relaxation=1."
        )
    stopped, kept = count("base_iters", base["base_iters"]), count("tail_iters", base["tail_iters"])
    sides = None if window is None else window_sides(window)
    return Solver(scale, epsilon, sides, (rho[0], rho[1]), stopped, kept, tolerance, omega, gradient, dropout_p)


def number(name: str, x: Any) -> float:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"{name} is traced, but it is compiled in: pass a Python number (mark it static in jax.jit).")
    try:
        value = float(x) if not isinstance(x, (bool, str)) else None
    except (TypeError, ValueError):
        value = None
    if value is None:
        raise TypeError(f"{name} must be a number, got {x!r}.")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}={value} must be finite.")
    return value


def positive(name: str, x: Any) -> float:
    value = number(name, x)
    if value <= 0:
        raise ValueError(f"{name}={value} must be positive.")
    return value


def mask_floor(x: Any) -> float | None:
    """A negative number, or None."""
    value = None if x is None else number("mask_floor", x)
    if value is not None and value >= 0:
        raise ValueError(f"mask_floor={value} must be negative, as -1e3, or None to keep every finite mask entry.")
    return value


def count(name: str, x: Any) -> int:
    try:
        value = operator.index(x) if not isinstance(x, bool) else None
    except TypeError:
        value = None
    if value is None:
        raise TypeError(f"{name} must be an integer, got {x!r}.")
    if value < 0:
        raise ValueError(f"{name}={value} must be 0 or more.")
    return value


def window_sides(window: Any) -> tuple[int, int]:
    try:
        sides = [operator.index(x) for x in window if not isinstance(x, bool)]
    except TypeError:
        sides = []
    if len(sides) != 2 or len(window) != 2:
        raise TypeError(f"window must be a pair of integers (left, right), got {window!r}; -1 lifts a side.")
    if min(sides) < -1:
        raise ValueError(f"window={tuple(sides)} must have sides of 0 or more, or -1 for unlimited.")
    return min(sides[0], WIDEST_WINDOW), min(sides[1], WIDEST_WINDOW)


def relaxation_pair(relaxation: Any) -> tuple[float, float]:
    """(row tau, column tau), inf where balanced."""
    pair = relaxation if isinstance(relaxation, (tuple, list)) else (relaxation, relaxation)
    if len(pair) != 2:
        raise TypeError(f"relaxation must be a number, a pair (row tau, column tau) or None, got {relaxation!r}.")
    row, col = (math.inf if tau is None or tau == math.inf else positive("relaxation", tau) for tau in pair)
    return row, col


def broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(x in (1, y) for x, y in zip(shape[::-1], target[::-1]))


def flattened(name: str, x: Any, kind: str, batch: tuple[int, ...], rest: tuple[int, ...]) -> Array | None:
    """An array of "integer" or "floating-point" numbers broadcast to (*batch, *rest) and reshaped to (N, *rest)."""
    if x is None:
        return None
    family = jnp.integer if kind == "integer" else jnp.floating
    if not is_array(x) or not jnp.issubdtype(x.dtype, family):
        found = x.dtype if is_array(x) else type(x).__name__
        raise TypeError(f"{name} must be an array of {kind} numbers broadcasting to {(*batch, *rest)}, got {found}.")
    if not broadcasts(x.shape, (*batch, *rest)):
        raise ValueError(f"{name} has shape {x.shape}, which does not broadcast to {(*batch, *rest)}.")
    return jnp.broadcast_to(jnp.asarray(x), (*batch, *rest)).reshape(math.prod(batch), *rest)


def score_mask(mask: Any, batch: tuple[int, ...], rest: tuple[int, int, int]) -> Array | None:
    """The caller's mask, 4-D, broadcasting to [N, H, L, S]; nothing is expanded beyond the batch."""
    if mask is None:
        return None
    if not is_array(mask):
        raise TypeError(f"mask must be an array, got {type(mask).__name__}.")
    if mask.dtype not in ("bool", *DTYPES):
        raise TypeError(f"mask has dtype {mask.dtype}; use bool (True = keep) or a float mask added to the scores.")
    if not broadcasts(mask.shape, (*batch, *rest)):
        raise ValueError(f"mask has shape {mask.shape}, which does not broadcast to {(*batch, *rest)}.")
    mask = jnp.asarray(mask)
    mask = mask.reshape(*(1,) * (len(batch) + 3 - mask.ndim), *mask.shape)
    lead, own = mask.shape[:-3], mask.shape[-3:]
    if math.prod(lead) == 1:
        return mask.reshape(1, *own)
    return jnp.broadcast_to(mask, (*batch, *own)).reshape(math.prod(batch), *own)
