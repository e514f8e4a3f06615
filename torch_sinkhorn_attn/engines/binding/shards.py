"""Along which dimensions a problem can be split over devices: the batch and the heads. Its tokens stay together."""

from __future__ import annotations

BATCH, HEADS = 0, 1
_TOKENS_ONLY = {"row_lo", "row_hi", "col_lo", "col_hi", "row_segment", "col_segment"}  # [N, ...]; others [N, H, ...]
_UNSHARDED = {"dropout_seed"}


def axes(name: str, ndim: int) -> tuple[int | None, ...]:
    """The axis that each dimension of an array of `functions` lies along: BATCH, HEADS, or None for neither."""
    if name in _UNSHARDED:
        return (None,) * ndim
    if name in _TOKENS_ONLY:
        return (BATCH, *(None,) * (ndim - 1))
    front = (None,) if name in ("row_potentials", "col_potentials") else ()
    return (*front, BATCH, HEADS, *(None,) * (ndim - len(front) - 2))
