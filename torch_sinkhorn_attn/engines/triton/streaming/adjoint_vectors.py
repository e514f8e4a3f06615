"""The vectors of a pass of the adjoint, brought to the kernels' form: padded, exponents to base 2, and, where data
decide whether exponentials may be applied outside of the plan, both ways and the flags that tell which."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.triton import interpreted
from torch_sinkhorn_attn.engines.triton.layout import LOG2E, Layout, power_of_two
from torch_sinkhorn_attn.engines.triton.streaming.adjoint_tiles import Vectors
from torch_sinkhorn_attn.method.staircase import LARGEST_EXPONENT, Factor, Field


class Prepared(NamedTuple):
    """Vectors for exponentials outside of the plan and, where data decide, for those formed entry by entry, with the
    flags of the heads whose exponentials may be outside, `[N * Hk]`; `split` and `round_inside` as in `Riders`."""

    scaled: Vectors
    entrywise: Vectors | None
    flags: Tensor
    split: int
    round_inside: bool


class Reference(NamedTuple):
    """The reference tile W: its live vectors, rows and columns, and what it is divided by, `shift` = log a
    `[N, H, L(+G)]`; None where it is P."""

    row_live: Tensor
    col_live: Tensor
    shift: Tensor | None


class Terms(NamedTuple):
    """What a pass is given: the vector and its factor (None: the factor is W), the field and the deferred factor.
    `exact`: the field's exponents for W are zero."""

    x: Tensor
    factor: Factor | None
    field: Field | None = None
    deferred: Factor | None = None
    beside: Tensor | None = None
    exact: bool = False


def prepared(layout: Layout, reference: Reference, given: Terms, column: bool) -> Prepared:
    """The vectors of a pass; `column`: columns are outside."""
    none = reference.row_live
    outer, inner = (reference.col_live, reference.row_live) if column else (reference.row_live, reference.col_live)
    weight = layout.padded(given.x, not column)
    count = 0 if given.field is None else given.field.row_terms.shape[-1]
    lives = {"outer_live": outer, "inner_live": inner, "weight": weight}
    fields: dict[str, Any] = {**dict.fromkeys(Vectors._fields, none), **lives}
    vectors = Vectors(**fields | {"terms": count, "stride": layout.num * layout.heads})
    if given.beside is not None:
        vectors = vectors._replace(beside=layout.padded(given.beside, column))
    scaled, exponents = vectors, list[Tensor]()
    if given.factor is not None:
        outer, inner = _exponents(layout, reference, given.factor, column)
        exponents += [outer, inner]
        vectors = vectors._replace(factor_outer=outer, factor_inner=inner)
        scaled = vectors._replace(weight=weight * inner.exp2())
    if given.deferred is not None:
        outer, inner = _exponents(layout, reference, given.deferred, column)
        exponents += [outer, inner]
        vectors = vectors._replace(deferred_outer=outer, deferred_inner=inner)
        scaled = scaled._replace(deferred_outer=outer.exp2(), deferred_inner=inner.exp2())
    if given.field is not None:
        changes, changes_scaled, more = _field(layout, reference, given.field, given.exact, column)
        exponents += more
        vectors, scaled = vectors._replace(**changes), scaled._replace(**changes_scaled)
    kind, split = layout.rows.data.dtype, 0
    if given.field is not None and kind in (torch.float16, torch.bfloat16) and reference.shift is not None:
        split = _width(count)
    if split:
        signs = (1, -1) if column else (-1, 1)
        outer, inner = scaled.field_outer, scaled.field_inner
        scaled = scaled._replace(
            field_outer=_split(signs[0] * outer, split, True), field_inner=_split(signs[1] * inner, split, False)
        )
    if not exponents:
        return Prepared(scaled, None, none, split, False)
    largest = torch.stack([x.amax((0, -1) if x.dim() == 3 else -1) for x in exponents]).amax(0)
    safe = (largest <= LARGEST_EXPONENT[layout.dtype] * LOG2E).view(layout.num, -1, layout.cols.share)
    return Prepared(scaled, vectors, safe.all(-1).to(torch.int32), split, kind == torch.float16)


def _exponents(layout: Layout, reference: Reference, factor: Factor, column: bool) -> tuple[Tensor, Tensor]:
    """Of a factor for W, to base 2: of the outer and the inner lines."""
    row = factor.row if reference.shift is None else factor.row + reference.shift
    sides = layout.padded(row * LOG2E, False), layout.padded(factor.col * LOG2E, True)
    return sides[::-1] if column else sides


def _field(
    layout: Layout, reference: Reference, field: Field, exact: bool, column: bool
) -> tuple[dict[str, Any], dict[str, Any], list[Tensor]]:
    """What a field replaces in `Vectors`, entry by entry and scaled, and its exponents."""
    x, y = _stacked(layout, field.row_terms, False), _stacked(layout, field.col_terms, True)
    shift = reference.shift
    if exact or field.row_exponents is None or field.col_exponents is None:
        if shift is not None and not exact:
            x = x * layout.padded(shift.exp(), False)
        found = _by_side(x, y, column, "")
        return found, found, []
    rows = field.row_exponents if shift is None else field.row_exponents + shift[..., None]
    r, c = _stacked(layout, rows * LOG2E, False), _stacked(layout, field.col_exponents * LOG2E, True)
    raw = _by_side(x, y, column, "") | _by_side(r, c, column, "_exponents")
    return raw, _by_side(x * r.exp2(), y * c.exp2(), column, ""), [r, c]


def _by_side(row: Tensor, col: Tensor, column: bool, suffix: str) -> dict[str, Any]:
    outer, inner = (col, row) if column else (row, col)
    return {f"field_outer{suffix}": outer, f"field_inner{suffix}": inner}


def _stacked(layout: Layout, x: Tensor, column: bool) -> Tensor:
    """`[N, H, lines(+G), K]` as `[K, N*H, width]`, 0 after the last line."""
    side = layout.cols if column else layout.rows
    found = x.new_zeros(x.shape[-1], layout.num, layout.heads, side.width)
    found[..., : side.size] = x.movedim(-1, 0)[..., : side.size]
    return found.flatten(1, 2)


MOST_SPLIT = 128  # features
PARTS = 3  # products of halves that a term takes


def _width(terms: int) -> int:
    """Features that a field of 16-bit problems is told by; 0: too many."""
    width = power_of_two(PARTS * terms)
    return width if width <= MOST_SPLIT else 0


def _split(x: Tensor, width: int, outer: bool) -> Tensor:
    """Terms `[K, N*H, lines]` as features `[N*H, lines, width]` in bfloat16, whose products over outer and inner lines
    are those of the terms to 17 bits: x y = x_high y_high + x_high y_low + x_low y_high."""
    high = x.to(torch.bfloat16)
    low = (x - high).to(torch.bfloat16)
    parts = torch.stack((high, high, low) if outer else (high, low, high)).flatten(0, 1)
    found = parts.new_zeros(*x.shape[1:], width)
    found[..., : parts.shape[0]] = parts.movedim(0, -1)
    return found.float() if interpreted() else found  # whose products of bfloat16 are wrong
