"""Checks of one argument at a time, by type, dtype and shape: each returns the argument in canonical form or raises a
TypeError or ValueError that names it, its value and the way out. What needs a look at data cannot be checked in JAX;
numbers and shapes are checked as the torch function's, by `torch_sinkhorn_attn.problem.shapes`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from torch_sinkhorn_attn.problem import shapes

LONGEST = 1 << 22  # tokens a side, up to which the window's integers are exact
DTYPES = ("float16", "bfloat16", "float32", "float64")


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def tokens(query: Any, key: Any, value: Any, enable_gqa: bool) -> tuple[Array, Array, Array]:
    """Types, dtypes and shapes of query, key and value."""
    given = {"query": query, "key": key, "value": value}
    for name, x in given.items():
        if not is_array(x):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}.")
    for name, x in given.items():
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}; use float32, float64, bfloat16 or float16.")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {x.dtype} but query has {query.dtype}; cast them to one dtype.")
    shapes.token_shapes(query.shape, key.shape, value.shape, enable_gqa)
    for name, x in given.items():
        if x.shape[-2] > LONGEST:
            raise ValueError(f"{name} has {x.shape[-2]} tokens; at most {LONGEST} are supported.")
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    return query, key, value


def not_traced(**options: Any) -> None:
    """TypeError for a traced value where a Python number is compiled in."""
    for name, given in options.items():
        for x in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(x, jax.core.Tracer):
                raise TypeError(
                    f"{name} is traced, but it is compiled in: pass a Python number (mark it static in jax.jit)."
                )


def flattened(name: str, x: Any, kind: str, batch: tuple[int, ...], rest: tuple[int, ...]) -> Array | None:
    """An array of "integer" or "floating-point" numbers broadcast to (*batch, *rest) and reshaped to (N, *rest)."""
    if x is None:
        return None
    family = jnp.integer if kind == "integer" else jnp.floating
    if not is_array(x) or not jnp.issubdtype(x.dtype, family):
        found = x.dtype if is_array(x) else type(x).__name__
        raise TypeError(f"{name} must be an array of {kind} numbers broadcasting to {(*batch, *rest)}, got {found}.")
    if not shapes.broadcasts(x.shape, (*batch, *rest)):
        raise ValueError(f"{name} has shape {x.shape}, which does not broadcast to {(*batch, *rest)}.")
    return jnp.broadcast_to(jnp.asarray(x), (*batch, *rest)).reshape(math.prod(batch), *rest)


def positions(name: str, x: Any, batch: tuple[int, ...], length: int) -> Array | None:
    """Places on an axis of tokens, or between them, as `flattened` has them."""
    if x is None:
        return None
    integer = is_array(x) and jnp.issubdtype(x.dtype, jnp.integer)
    if not (integer or (is_array(x) and x.dtype in ("float32", "float64"))):
        found = x.dtype if is_array(x) else type(x).__name__
        raise TypeError(shapes.not_positions(name, (*batch, length), found))
    return flattened(name, x, "integer" if integer else "floating-point", batch, (length,))


def score_mask(mask: Any, batch: tuple[int, ...], rest: tuple[int, int, int]) -> Array | None:
    """The caller's mask, 4-D, broadcasting to [N, H, L, S]; nothing is expanded beyond the batch."""
    if mask is None:
        return None
    if not is_array(mask):
        raise TypeError(f"attn_mask must be an array, got {type(mask).__name__}.")
    return jnp.asarray(shapes.score_mask(mask, (*batch, *rest), ("bool", *DTYPES)))
