"""Scores given in place of query and key: a matrix `(..., H, L, S)`, or `(L, S)`, that the engines read as a float mask
beside tokens whose products are 0, so it takes every option and runs on every engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.options import Options
from torch_sinkhorn_attn.problem.argument_checks import DTYPES, lower_precision
from torch_sinkhorn_attn.problem.masks.entries import kept
from torch_sinkhorn_attn.problem.masks.lines import MaskScan
from torch_sinkhorn_attn.problem.problem import compute_dtype
from torch_sinkhorn_attn.problem.shapes import token_shapes
from torch_sinkhorn_attn.problem.tensor_kinds import check_kind


def tokens_of(
    scores: Any, value: Any, enable_gqa: bool, keys: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Query and key of one feature, all 0, for scores `(..., H, L, S)`; and the value, autocast applied. `keys`: how
    many of the S keys are here, None for all.

    Raises:
        TypeError, ValueError: scores are no floating-point matrix, or lie elsewhere than the value.
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"query must be a tensor, got {type(scores).__name__}; without a key it holds the scores.")
    check_kind("query (the scores)", scores)
    if scores.dtype not in DTYPES:
        raise TypeError(f"query (the scores, for key=None) has dtype {scores.dtype}; pass floating-point scores.")
    if scores.ndim < 3:
        raise ValueError(
            f"query has shape {tuple(scores.shape)}; without a key it holds scores, (..., heads, L, S) or (L, S)."
        )
    heads, dtype = scores.shape[-3], compute_dtype(scores.dtype)
    size = scores.shape[-1] if keys is None else keys
    if value is not None:
        if not isinstance(value, Tensor):
            raise TypeError(f"value must be a tensor, got {type(value).__name__}.")
        if value.dtype not in DTYPES:
            raise TypeError(f"value has dtype {value.dtype}; use float32, float64, bfloat16 or float16.")
        check_kind("value", value)
        value = lower_precision(value)
        if compute_dtype(value.dtype) != dtype:
            raise TypeError(
                f"value has dtype {value.dtype} but the scores have {scores.dtype}; make both float64, or neither."
            )
        if value.device != scores.device:
            raise ValueError(f"value is on {value.device} but the scores are on {scores.device}; move one of them.")
        dtype = value.dtype
        heads = value.shape[-3] if enable_gqa and value.ndim >= 3 else heads
    zero = scores.detach().new_zeros((), dtype=dtype)
    query, key = zero.expand(*scores.shape[:-1], 1), zero.expand(*scores.shape[:-3], heads, size, 1)
    token_shapes(tuple(query.shape), tuple(key.shape), None if value is None else tuple(value.shape), enable_gqa)
    return query, key, value


def as_mask(scores: Tensor, mask: Tensor | None, left: MaskScan | None, options: Options) -> Tensor:
    """The float mask that the scores `[N, H, L, S]` come to: scale * scores / epsilon + mask, -inf where the scores or
    the mask forbid the pair. `left`: the scan of a float mask by its floor, which is the mask's alone: scores may lie
    as far apart as they do. Not copied where nothing changes."""
    dtype = compute_dtype(scores.dtype)
    found = scaled(scores, options.scale, options.epsilon)
    if mask is None:
        return found
    if mask.dtype == torch.bool:
        return found.masked_fill(~mask, -torch.inf)
    forbidden = ~kept(mask.detach(), dtype)
    if left is not None:
        forbidden = forbidden | ~left.row_active[..., :, None] | ~left.col_active[..., None, :]
    added = found.to(dtype) + mask.to(dtype).masked_fill(forbidden, 0.0)
    return added.masked_fill(forbidden, -torch.inf)


def scaled(scores: Tensor, scale: float | None, epsilon: float) -> Tensor:
    """scale * scores / epsilon in the compute dtype, in which -inf alone forbids a pair; the scores themselves where
    nothing changes."""
    factor = (1.0 if scale is None else scale) / epsilon
    found = scores.to(compute_dtype(scores.dtype))
    return found if factor == 1 else found * factor
