"""The mask that models get when they ask for ours, and what a mask that reaches the attention says."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from torch_sinkhorn_attn.engines import engine_of
from torch_sinkhorn_attn.problem.looking import has_data
from torch_sinkhorn_attn.problem.masks.module import as_float, both, forbidding
from torch_sinkhorn_attn.problem.problem import compute_dtype


class _Made(NamedTuple):
    version: int
    only_padding: bool


_MADE = WeakIdKeyDictionary()  # the masks made here -> _Made; what a model changed since, or made itself, is not in it


def sinkhorn_mask(
    *, dtype: torch.dtype = torch.float32, allow_is_bidirectional_skip: bool = False, **kwargs: Any
) -> Tensor | None:
    """The mask as transformers makes it for eager attention: float, 0 = keep, the lowest value of `dtype` = forbid,
    `(B, 1, L, S)`; None where nothing is masked, but never in favour of an is_causal flag.

    Models that keep their own attention add this mask to their scores, whatever their config says, so nothing else is
    right for them. Where it is nothing but padding, all rows are views of one, and take no L x S memory.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": allow_is_bidirectional_skip}
    keep: Tensor | None = sdpa_mask(**kwargs)
    if keep is None:
        return None
    only_padding = kwargs.get("mask_function") is bidirectional_mask_function and allow_is_bidirectional_skip
    length = keep.shape[-2]
    if only_padding:
        keep = keep[:, :, :1]
    zero = torch.zeros((), device=keep.device, dtype=dtype)
    # torch does not count the changes of what is made in inference mode, and the record below needs the count.
    with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
        mask = torch.where(keep, zero, torch.finfo(dtype).min)
        if only_padding:
            mask = mask.expand(-1, -1, length, -1)
    if not torch.compiler.is_compiling():
        _MADE[mask] = _Made(mask._version, only_padding)
    return mask


def _made(mask: Tensor) -> _Made | None:
    if torch.compiler.is_compiling():
        return None
    made: _Made | None = _MADE.get(mask)
    return made if made is not None and made.version == mask._version else None


def same_for_all_queries(mask: Tensor) -> bool:
    """Whether all queries provably see the same keys: nobody looks at data for it."""
    return mask.ndim >= 2 and (mask.shape[-2] == 1 or mask.stride(-2) == 0)


def visible(mask: Tensor, dtype: torch.dtype, low: float | None) -> Tensor:
    """Bool, True where a mask of any kind keeps the pair, for scores of `dtype`. `low`: the functional's mask_floor."""
    return mask if mask.dtype == torch.bool else forbidden_as_infinity(mask, dtype, low) > -torch.inf


def forbidden_as_infinity(mask: Tensor, dtype: torch.dtype, low: float | None) -> Tensor:
    """A float mask whose forbidden pairs, and no others, hold -inf: those at or below half the lowest value of its
    dtype or of `dtype`, and whole columns that are `low` (older models write -10000 for minus infinity)."""
    return forbidding(as_float(mask, mask.dtype, compute_dtype(dtype)), low)


def can_decide(mask: Tensor) -> bool:
    """Whether what is computed may depend on the mask's data: eagerly, and not where that is compiled each time."""
    return has_data(mask) and not engine_of(mask.device).compiles


def for_softmax(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as transformers' SDPA function takes it: bool if made here, else to be added, in the scores' dtype."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask == 0 if _made(mask) is not None else mask.to(dtype)


def for_sinkhorn(
    mask: Tensor | None,
    bias: Tensor | None,
    query: Tensor,
    key: Tensor,
    causal: bool,
    same: bool,
    low: float | None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The mask of the scores, and padding as inactive ids where all queries see the same keys, which takes no L x S
    memory. In self-attention (`same`) padded keys are padded queries. `causal`: what a missing mask means;
    `low`: the mask_floor that applies."""
    num, length, size = query.shape[0], query.shape[-2], key.shape[-2]
    ids = {}
    if mask is None and causal and length > 1:  # a model that leaves it to the flag; sinkhorn_mask never does
        mask = torch.ones(length, size, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.ndim == 4 and mask.shape[1] == 1 and length > 1 and same_for_all_queries(mask):
        row = mask[:, :, :1]
        seen = visible(row, query.dtype, low)
        key_ids = seen[:, 0, 0].expand(num, size).long() - 1
        ids = {"key_segment_ids": key_ids, "query_segment_ids": key_ids if same else key_ids.new_zeros(num, length)}
        made = _made(mask)
        plain = mask.dtype == torch.bool or (made is not None and made.only_padding)
        mask = None if plain else row.masked_fill(~seen, 0.0)
    elif mask is not None:
        mask = mask if mask.dtype == torch.bool else forbidden_as_infinity(mask, query.dtype, low)
        if same:
            seen = mask if mask.dtype == torch.bool else mask > -torch.inf
            mask = both(seen.any(-2, keepdim=True).transpose(-1, -2), mask)
    if bias is not None:
        mask = bias if mask is None else both(mask, bias) if mask.dtype == torch.bool else mask + bias
    return mask, ids
