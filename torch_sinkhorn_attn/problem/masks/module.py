"""The masks of nn.MultiheadAttention, which forbid, turned into the functional's, which keep."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_sinkhorn_attn.options import window_sides
from torch_sinkhorn_attn.problem.looking import can_look, has_tangent
from torch_sinkhorn_attn.problem.masks.entries import kept
from torch_sinkhorn_attn.problem.problem import compute_dtype
from torch_sinkhorn_attn.problem.support import build_support
from torch_sinkhorn_attn.problem.tensor_kinds import check_kind, plain_mask


class Masks(NamedTuple):
    """Padding as inactive ids, everything else as a mask of the scores."""

    query_ids: Tensor | None  # [N, L], 0 active, -1 inactive
    key_ids: Tensor | None  # [N, S]
    scores: Tensor | None  # bool True = keep, or float; broadcasts to [N, H, L, S]


def convert(
    attn_mask: Tensor | None,
    key_padding: Tensor | None,
    query_padding: Tensor | None,
    shape: tuple[int, int, int, int],
    query: Tensor,
    queries_as_keys: bool,
    floor: float | None,
    all_keys: bool = False,
) -> Masks:
    """The module's three masks, True = ignore, for a problem of `shape` (N, H, L, S) on the device and in the dtype of
    `query`.

    `queries_as_keys`: without `query_padding`, the padded keys are inactive queries too. `floor`: as `mask_floor` of
    `sinkhorn_attention`; of a padding mask everything at or below it is padding, whatever its other values are.
    `all_keys`: S counts the keys of this rank alone, and `attn_mask` has those of all.
    """
    if attn_mask is None and key_padding is None and query_padding is None:
        return Masks(None, None, None)
    num, _, length, size = shape
    device, dtype = query.device, compute_dtype(query.dtype)
    if query_padding is not None and not (isinstance(query_padding, Tensor) and query_padding.dtype == torch.bool):
        raise TypeError("query_padding_mask must be a bool tensor, True = inactive.")
    keep = plain_mask(attn_mask, device)
    attn_mask = attn_mask if keep is attn_mask else ~keep
    given = {"attn_mask": attn_mask, "key_padding_mask": key_padding, "query_padding_mask": query_padding}
    for name, mask in given.items():
        if isinstance(mask, Tensor):
            check_kind(name, mask)
        if isinstance(mask, Tensor) and mask.device != device:
            raise ValueError(f"{name} is on {mask.device} but the query on {device}; move it there.")
    wide = all_keys and isinstance(attn_mask, Tensor) and attn_mask.ndim > 0
    scores = _score_mask(attn_mask, (*shape[:3], attn_mask.shape[-1]) if wide else shape)
    key_off, added = _padding("key_padding_mask", key_padding, num, size, dtype, floor)
    query_off, _ = _padding("query_padding_mask", query_padding, num, length, dtype, None)
    if query_off is None and queries_as_keys:
        query_off = key_off
    if added is not None:
        scores = added[:, None, None, :] + (0.0 if scores is None else as_float(scores, added.dtype, dtype))
    if key_off is None and query_off is None:
        return Masks(None, None, scores)
    key_ids, query_ids = (
        torch.zeros(num, n, dtype=torch.int64, device=device) if off is None else -off.to(torch.int64)
        for off, n in ((key_off, size), (query_off, length))
    )
    return Masks(query_ids, key_ids, scores)


def with_extra_keys(
    masks: Masks, count: int, window: tuple[int, int] | None, length: int, size: int, device: torch.device
) -> Masks:
    """`count` more keys, visible to every query; a window becomes part of the mask, so that it cannot hide them."""
    scores = masks.scores
    if window is not None:
        band = _window_mask(masks, window, length, size, device)
        scores = band if scores is None else both(band, scores)
    if scores is not None:
        scores = F.pad(scores, (0, count), value=True if scores.dtype == torch.bool else 0.0)
    return Masks(masks.query_ids, None if masks.key_ids is None else F.pad(masks.key_ids, (0, count)), scores)


def _window_mask(masks: Masks, window: tuple[int, int], length: int, size: int, device: torch.device) -> Tensor:
    """The window as a bool mask `[N, 1, L, S]` or `[1, 1, L, S]`."""
    ids = [torch.zeros(1, n, dtype=torch.int64, device=device) for n in (length, size)]
    if masks.query_ids is not None and masks.key_ids is not None:
        ids = [masks.query_ids, masks.key_ids]
    support = build_support(ids[0], ids[1], window_sides("window", window), packed=True)
    column = torch.arange(size, device=device)
    lo, hi = support.row_lo[:, None, :, None], support.row_hi[:, None, :, None]
    return (column >= lo) & (column < hi)


def _score_mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"attn_mask must be a bool (True = ignore) or float tensor, got {kind}.")
    num, heads, length, size = shape
    shapes = [(length, size), (num * heads, length, size)]
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"attn_mask has shape {tuple(mask.shape)}; {shapes[0]} or {shapes[1]} is needed.")
    mask = mask if mask.ndim == 2 else mask.reshape(num, heads, length, size)
    return ~mask if mask.dtype == torch.bool else mask


def _padding(
    name: str, mask: Any, num: int, length: int, dtype: torch.dtype, floor: float | None
) -> tuple[Tensor | None, Tensor | None]:
    """(inactive `[N, n]` bool, what to add to the scores, of `dtype`, `[N, n]` or None) of a padding mask."""
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool (True = ignore) or float tensor, got {kind}.")
    if tuple(mask.shape) not in ((num, length), *([(length,)] if num == 1 else [])):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; {(num, length)} is needed.")
    mask = mask.reshape(num, length)
    if mask.dtype == torch.bool:
        return mask, None
    off = ~kept(mask, dtype) & ~mask.isnan()
    if floor is not None:
        off = off | (mask <= floor)
    added = mask.masked_fill(off, 0.0)
    # Nothing but -inf is what nn.TransformerEncoderLayer makes of a bool mask; zeros that learn are something else.
    if can_look(mask) and not (mask.requires_grad or has_tangent(mask) or added.any()):
        return off, None
    return off, added


def both(keep: Tensor, mask: Tensor) -> Tensor:
    """A mask that keeps what a bool mask and another mask keep."""
    return keep & mask if mask.dtype == torch.bool else mask + as_float(keep, mask.dtype, mask.dtype)


def forbidding(mask: Tensor, floor: float | None) -> Tensor:
    """A float mask `[..., L, S]` with -inf in each column that lies wholly `-floor` or more below its highest entry:
    what `mask_floor` of `sinkhorn_attention` does to keys, for callers that must know the padding themselves."""
    if floor is None or mask.dtype == torch.bool or mask.numel() == 0:
        return mask
    level = mask.amax(-2, keepdim=True)
    highest = level.amax(-1, keepdim=True)
    return mask.masked_fill((level <= highest + floor) & highest.isfinite(), -torch.inf)


def as_float(mask: Tensor, dtype: torch.dtype, compute: torch.dtype) -> Tensor:
    """A mask to add to another of `dtype`: what it forbids, judged in its own dtype or in that of the scores, becomes
    -inf, which no promotion of dtypes revives."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    return mask.masked_fill(~kept(mask, compute) & ~mask.isnan(), -torch.inf)
