"""Which tokens a mask leaves active: what `torch_sinkhorn_attn.problem.masks.scan` is for tensors.

Entries of a float mask that lie `-floor` or more below the highest of their problem are low, and a line that has no
others is inactive, as if they were -inf: its potential would absorb the number, and a padded key keep its mass. NaN is
not low: it stays, to be seen.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from torch_sinkhorn_attn.engines.tpu.front.support import Support
from torch_sinkhorn_attn.engines.tpu.method.blockwise import kept
from torch_sinkhorn_attn.problem.segments import by_segment, segment_max, segment_sum


def _here(x: Array) -> Array:
    return x


def active_tokens(
    mask: Array,
    support: Support,
    packed: bool,
    dtype: jnp.dtype,
    floor: float | None,
    highest: Callable[[Array], Array] = _here,
    number: int = 0,
) -> tuple[Array, Array]:
    """Rows `[N, h, L]` and columns `[N, h, S]` of which `mask [N or 1, h, L or 1, S or 1]`, added in `dtype`, keeps
    some pair that is not low. One row (padding) is read in O(S), others in passes that XLA fuses. Where the rows are
    those of one device, of `number` tokens on all, `highest` is the maximum over devices."""

    def some_row(x: Array) -> Array:
        return highest(x.any(-2).astype(jnp.int32)) > 0

    keep = kept(mask, dtype)
    row_index, col_index = (x[:, None] if packed else None for x in (support.row_segment, support.col_segment))
    length, size = support.row_lo.shape[-1], support.col_lo.shape[-1]
    groups = max(1, min(number or length, size)) if packed else 1
    wants_limit = floor is not None and mask.dtype != jnp.bool_ and length > 0 and size > 0
    if mask.shape[-2] == 1 and not (number and length == 1):  # else it may be the one row of this device
        within = keep[..., 0, :] & support.col_active[:, None]
        if wants_limit:
            values = jnp.broadcast_to(mask[..., 0, :], within.shape).astype(dtype)
            reached = highest((support.col_lo < support.col_hi).astype(jnp.int32)) > 0
            inside = within & reached[:, None]
            level = segment_max(jnp.where(inside, values, -jnp.inf), col_index, groups)
            within &= ~(values <= by_segment(_limit(level, floor), col_index, size))
        some = by_segment(segment_sum(within.astype(jnp.int32), col_index, groups), row_index, length) > 0
        return support.row_active[:, None] & some, within
    within = keep & support.row_active[:, None, :, None] & support.col_active[:, None, None, :]
    if packed:
        within &= support.row_segment[:, None, :, None] == support.col_segment[:, None, None, :]
    if not wants_limit:
        return within.any(-1), some_row(within)
    column = jnp.arange(size, dtype=jnp.int32)
    inside = within & (column >= support.row_lo[:, None, :, None]) & (column < support.row_hi[:, None, :, None])
    level = highest(segment_max(jnp.where(inside, mask.astype(dtype), -jnp.inf).max(-1), row_index, groups))
    high = within & ~(mask.astype(dtype) <= by_segment(_limit(level, floor), row_index, length)[..., None])
    rows = high.any(-1)
    inside = inside & rows[..., None]
    return rows, jnp.where(some_row(inside), some_row(inside & high), some_row(high))


def _limit(level: Array, floor: float | None) -> Array:
    """`[N, h, G]`: entries at or below it are low; -inf where nothing is."""
    assert floor is not None
    return jnp.where(jnp.isfinite(level), level + floor, -jnp.inf)
