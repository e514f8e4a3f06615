"""Along which dimensions the arrays of `functions` can be split over devices: the batch and the heads, whose problems
are independent, and the tokens, whose devices tell each other (`sequence`)."""

from __future__ import annotations

BATCH, HEADS, TOKENS = 0, 1, 2
_BY_BATCH = {"row_lo", "row_hi", "col_lo", "col_hi", "row_segment", "col_segment"}  # [N, ...]; others [N, H, ...]
_UNSHARDED = {"dropout_seed"}
_STACKED = {"row_potentials", "col_potentials"}  # [R+1, N, H, ...]
BINS = "_bins"  # ends the name of the dustbins' part of an array, where the tokens lie on several devices
ROWS = {
    "query", "mask", "row_score", "row_lo", "row_hi", "row_segment", "log_row_mass", "initial_row", "row_potentials",
    "output", "grad_output", "grad_to_bin", "row_dustbin",
}  # fmt: skip
COLS = {
    "key", "value", "col_score", "col_lo", "col_hi", "col_segment", "log_col_mass", "initial_col", "col_potentials",
    "grad_from_bin", "col_dustbin",
}  # fmt: skip
EMPTY = {"log_row_mass", "log_col_mass", "log_row_capacity", "log_col_capacity"}  # where -inf stands for nothing


def axes(name: str, ndim: int) -> tuple[int | None, ...]:
    """The axis that each dimension of an array lies along: BATCH, HEADS, or None for neither."""
    name = name.removesuffix(BINS)
    if name in _UNSHARDED:
        return (None,) * ndim
    if name in _BY_BATCH:
        return (BATCH, *(None,) * (ndim - 1))
    front = (None,) if name in _STACKED else ()
    return (*front, BATCH, HEADS, *(None,) * (ndim - len(front) - 2))


def axes_with_tokens(name: str, ndim: int) -> tuple[int | None, ...]:
    """Likewise, and the tokens along TOKENS; of a mask the queries.

    >>> axes_with_tokens("row_potentials", 4), axes_with_tokens("row_potentials_bins", 4)
    ((None, 0, 1, 2), (None, 0, 1, None))
    """
    found = list(axes(name, ndim))
    if name in ROWS or name in COLS or name == "dropped":
        found[1 if name in _BY_BATCH else 3 if name in _STACKED else 2] = TOKENS
    return tuple(found)
