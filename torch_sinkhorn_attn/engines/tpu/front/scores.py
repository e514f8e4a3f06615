"""Scores given in place of query and key: what `torch_sinkhorn_attn.problem.scores` is for tensors."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.front.checks import DTYPES, is_array
from torch_sinkhorn_attn.engines.tpu.front.mask_scan import active_tokens
from torch_sinkhorn_attn.engines.tpu.front.support import Support
from torch_sinkhorn_attn.engines.tpu.method.blockwise import kept
from torch_sinkhorn_attn.engines.tpu.method.problem import compute_dtype
from torch_sinkhorn_attn.options import Options


def tokens_of(scores: Any, value: Any, enable_gqa: bool) -> tuple[Array, Array]:
    """Query and key of one feature, all 0, in the value's dtype, for scores `(..., H, L, S)`."""
    for name, x in (("query", scores), ("value", value)):
        if not is_array(x):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}.")
    if scores.dtype not in DTYPES:
        raise TypeError(f"query (the scores, for key=None) has dtype {scores.dtype}; pass floating-point scores.")
    if scores.ndim < 3:
        raise ValueError(f"query has shape {scores.shape}; without a key it holds scores, (..., heads, L, S).")
    if compute_dtype(scores) != compute_dtype(value):
        raise TypeError(
            f"value has dtype {value.dtype} but the scores have {scores.dtype}; make both float64, or none."
        )
    heads = value.shape[-3] if enable_gqa and value.ndim >= 3 else scores.shape[-3]
    size = scores.shape[-1]
    return (
        jnp.zeros((*scores.shape[:-1], 1), value.dtype),
        jnp.zeros((*scores.shape[:-3], heads, size, 1), value.dtype),
    )


def as_mask(
    scores: Array, mask: Array | None, support: Support, packed: bool, options: Options, floor: float | None
) -> Array:
    """The float mask that scores `[N, H, L, S]` come to: scale * scores / epsilon + mask, -inf where either forbids the
    pair. The `floor` under low entries is the mask's alone."""
    dtype = compute_dtype(scores)
    factor = (1.0 if options.scale is None else options.scale) / options.epsilon
    scores = scores.astype(dtype)  # in which -inf alone forbids a pair
    keep = kept(scores, dtype)
    found = jnp.where(keep, scores, 0) * factor
    if mask is not None:
        keep &= kept(mask, dtype)
        if mask.dtype != jnp.bool_:
            rows, cols = active_tokens(lax.stop_gradient(mask), support, packed, dtype, floor)
            keep &= rows[..., :, None] & cols[..., None, :]
            found = found + jnp.where(keep, mask.astype(dtype), 0)
    return jnp.where(keep, found, -jnp.inf)
