"""How the tokens of a call inside `jax.shard_map` lie along `sequence_axis`, and their support.

Bands are told by shapes and by what the call says, never by data: a window closed on both sides around the diagonal,
where the k-th query of L lies beside the k-th key of S on the same device. With lengths or segments it does where both
sides are given the same array, and L = S. Everything else holds all keys.

Lengths alone need no token of another device. Segments, centres and masks are looked at with the ids of all: 4 bytes a
token, for a moment.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from torch_sinkhorn_attn.engines.tpu.front.support import Support, build_support, transpose_intervals
from torch_sinkhorn_attn.engines.tpu.method.sequence import Sequence
from torch_sinkhorn_attn.engines.tpu.streaming.spans import joins


def sequence_of(axis: Any, rows: int, cols: int) -> Sequence:
    """The tokens of a call with so many here.

    Raises:
        TypeError: an axis that is no name.
        ValueError: one that no surrounding shard_map has.
    """
    if not isinstance(axis, str):
        raise TypeError(f"sequence_axis must be the name of a mesh axis, got {axis!r}.")
    try:
        size = lax.axis_size(axis)
    except NameError as error:
        raise ValueError(
            f"sequence_axis={axis!r} is no axis of a surrounding jax.shard_map: call sinkhorn_attention inside one, "
            "its in_specs with that axis at the tokens of query, key and value, or leave sequence_axis out."
        ) from error
    return Sequence(axis, size, rows, cols)


class Outline(NamedTuple):
    """What decides, ahead of the data, which columns a device's rows reach."""

    window: tuple[int, int] | None
    aligned: bool  # query k of L beside key k of S, whatever the data
    plain: bool  # neither segments nor a mask


def banded(sequence: Sequence, outline: Outline) -> Sequence:
    """With its halos, if it is a band narrower than the whole, and whether that is known to be connected."""
    rows, cols, window = sequence.rows, sequence.cols, outline.window
    length, size = sequence.size * rows, sequence.size * cols
    if window is None or not outline.aligned:
        return replace(sequence, joined=window is None and outline.plain)
    sequence = replace(sequence, joined=outline.plain and joins(length, size, *window))
    shared = cols + 2 * sum(window)  # numbers a device sends for a column half-step, and more beyond neighbours
    if min(window) < 0 or shared > size:
        return sequence
    return replace(sequence, halo=window)


def support_of_shard(
    sequence: Sequence,
    ids: list[Array],
    window: tuple[int, int] | None,
    packed: bool,
    causal: bool,
    centers: Array | None,
    whole: bool,
) -> Support:
    """Of the rows here. Columns are all, if asked for as a `whole`; else the owned are active or in segments, and the
    held have intervals, of the rows here."""
    row_ids, col_ids = ids
    if packed or centers is not None or whole:
        every = None if centers is None else sequence.gathered(centers)
        rows, cols = (sequence.gathered(x) for x in ids)
        found = build_support(rows, cols, window, packed, causal, every)
        row_lo, row_hi, row_segment, row_active = (
            sequence.own_rows(x) for x in (found.row_lo, found.row_hi, found.row_segment, found.row_active)
        )
        found = found._replace(row_lo=row_lo, row_hi=row_hi, row_segment=row_segment, row_active=row_active)
        return found if whole else of_held(sequence, found)

    def count(marked: Array) -> Array:
        return sequence.total(marked.sum(-1, keepdims=True, dtype=jnp.int32))

    first = sequence.first_row, sequence.place * sequence.cols
    found = build_support(row_ids, col_ids, window, packed, causal, None, first, count)
    return _intervals_of_held(sequence, found)


def of_held(sequence: Sequence, found: Support) -> Support:
    """From a support of all columns."""
    start = sequence.place * sequence.cols
    col_segment, col_active = (
        lax.dynamic_slice_in_dim(x, start, sequence.cols, -1) for x in (found.col_segment, found.col_active)
    )
    return _intervals_of_held(sequence, found._replace(col_segment=col_segment, col_active=col_active))


def _intervals_of_held(sequence: Sequence, found: Support) -> Support:
    row_lo, row_hi, col_lo, col_hi = held_intervals(sequence, found.row_lo, found.row_hi)
    return found._replace(row_lo=row_lo, row_hi=row_hi, col_lo=col_lo, col_hi=col_hi)


def held_intervals(sequence: Sequence, row_lo: Array, row_hi: Array) -> tuple[Array, Array, Array, Array]:
    """Row intervals counted from the first held column, and their transpose."""
    some, first = row_lo < row_hi, sequence.first_held
    row_lo, row_hi = (jnp.where(some, x - first, 0) for x in (row_lo, row_hi))
    return row_lo, row_hi, *transpose_intervals(row_lo, row_hi, sequence.held_count)


def extremes(sequence: Sequence, mass: Array) -> Array:
    """The largest and the smallest positive mass of each head on all devices, `[..., n]` to `[..., 2]`."""
    largest = sequence.highest(mass.max(-1, initial=0.0))
    smallest = -sequence.highest(-jnp.where(mass > 0, mass, jnp.inf).min(-1, initial=jnp.inf))
    return jnp.stack([largest, jnp.where(jnp.isfinite(smallest), smallest, 0)], -1)
