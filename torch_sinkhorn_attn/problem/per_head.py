"""Lengths, segments or centres of each head: then the heads are batch elements of one head each, which is how padded
batches of point sets `[B, N, E]` come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.problem.tensor_kinds import plain_mask

# Arguments that say something of each batch element, with the dimensions they have beside the batch's.
_OF_BATCH = {
    "query_lengths": 0, "key_lengths": 0, "query_segment_ids": 1, "key_segment_ids": 1, "window_centers": 1,
}  # fmt: skip
_OF_HEADS = {"row_mass": 1, "col_mass": 1}  # broadcasting to (..., H) and so many more


def wanted(batch: tuple[int, ...], heads: int, keywords: Mapping[str, Any]) -> bool:
    """Whether some of the arguments have the heads' dimension beside those of the batch."""
    for name, own in _OF_BATCH.items():
        x = keywords.get(name)
        if isinstance(x, Tensor) and x.ndim == len(batch) + 1 + own and x.shape[len(batch)] == heads:
            return True
    return False


def unfold(
    query: Tensor, key: Tensor, value: Tensor | None, attn_mask: Any, keywords: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, Any, Any]:
    """The same problem over the batch `(..., H)`, of one head each. Keys of grouped queries are repeated."""
    batch, heads = query.shape[:-3], query.shape[-3]
    group = heads // key.shape[-3]
    if group > 1:
        key = key.repeat_interleave(group, -3)
        value = None if value is None else value.repeat_interleave(group, -3)
    given = dict(keywords)
    for name, own in _OF_BATCH.items():
        x = given.get(name)
        if isinstance(x, Tensor) and x.ndim <= len(batch) + own and x.ndim >= own:
            given[name] = x.unsqueeze(x.ndim - own)
    for name, own in _OF_HEADS.items():
        given[name] = _with_head(given.get(name), own)
    initial = given.get("initial_potentials")
    if isinstance(initial, (tuple, list)):
        given["initial_potentials"] = tuple(_with_head(x, 1) for x in initial)
    dustbin = given.get("dustbin")
    if isinstance(dustbin, Dustbin):
        own_of = {"row_score": 1, "col_score": 1, "corner_score": 0, "row_capacity": 1, "col_capacity": 1, "value": 1}
        given["dustbin"] = replace(dustbin, **{n: _with_head(getattr(dustbin, n), own) for n, own in own_of.items()})
    mask = plain_mask(attn_mask, query.device)
    found = [None if x is None else x.unsqueeze(-3) for x in (query, key, value)]
    return found[0], found[1], found[2], _with_head(mask, 2), given  # type: ignore[return-value]


def _with_head(x: Any, own: int) -> Any:
    """A tensor that broadcasts to `(..., H, *own dimensions)` as one for `(..., H, 1, *own)`."""
    return x.unsqueeze(x.ndim - own) if isinstance(x, Tensor) and x.ndim > own else x
