"""Everything a user can get wrong stops here: user arguments in, `Inputs` and `Problem` out.

Shape and type checks come first, then the canonical layout, then (where data may be looked at) the checks of the data.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.engines import traits_of
from torch_sinkhorn_attn.problem import data_checks, scalars
from torch_sinkhorn_attn.problem.argument_checks import (
    constant,
    dustbin_tensors,
    given_capacities,
    integers,
    no_tensors,
    potentials,
    score_mask,
    solver,
    tokens,
)
from torch_sinkhorn_attn.problem.causal import checked_causal, refuse_balanced_causal
from torch_sinkhorn_attn.problem.feasibility.existence import Existence
from torch_sinkhorn_attn.problem.looking import data_checks_enabled, has_data
from torch_sinkhorn_attn.problem.masks.scan import extremes, scan_mask
from torch_sinkhorn_attn.problem.mass_scale import MassScale, find_scale, in_units
from torch_sinkhorn_attn.problem.masses import Side, dustbin_capacities, log_mass, marginal_masses
from torch_sinkhorn_attn.problem.problem import Inputs, Problem, compute_dtype
from torch_sinkhorn_attn.problem.support import build_support, token_ids


class Options(TypedDict, total=False):
    """The keyword options of `sinkhorn_attention`, documented there."""

    scale: float | None
    epsilon: float
    window: tuple[int, int] | None
    query_lengths: Tensor | None
    key_lengths: Tensor | None
    query_segment_ids: Tensor | None
    key_segment_ids: Tensor | None
    row_mass: Tensor | None
    col_mass: Tensor | None
    relaxation: float | tuple[float | None, float | None] | None
    dustbin: Dustbin | None
    base_iters: int
    tail_iters: int
    tolerance: float | None
    over_relaxation: float
    gradient: str
    initial_potentials: tuple[Tensor, Tensor] | None
    dropout_p: float
    is_causal: bool
    enable_gqa: bool
    mask_floor: float | None
    engine: str | None


class Prepared(NamedTuple):
    """Canonical tensors and problem, and what is needed to give the user's shapes back."""

    inputs: Inputs
    problem: Problem
    batch: torch.Size  # the user's leading dimensions, flattened to N
    dtype: torch.dtype  # of the output
    engine: str | None
    existence: Existence | None  # None in softmax mode, which asks for no plan
    scale: MassScale | None = None  # of the problem's masses, None where they are the user's

    def unflatten(self, x: Tensor) -> Tensor:
        """`[N, ...]` back to `(..., ...)`."""
        return x.reshape(*self.batch, *x.shape[1:])


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    epsilon: float = 1.0,
    window: tuple[int, int] | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_segment_ids: Tensor | None = None,
    key_segment_ids: Tensor | None = None,
    row_mass: Tensor | None = None,
    col_mass: Tensor | None = None,
    relaxation: float | tuple[float | None, float | None] | None = None,
    dustbin: Dustbin | None = None,
    base_iters: int = 20,
    tail_iters: int = 2,
    tolerance: float | None = None,
    over_relaxation: float = 1.0,
    gradient: str = "tail",
    initial_potentials: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
    mask_floor: float | None = -1e3,
    engine: str | None = None,
    check_data: bool = True,
) -> Prepared:
    """Check and canonicalise; `value` is None when only the plan is wanted, and without `check_data` no data is looked
    at, whatever `set_checks` says."""
    query, key, value = tokens(query, key, value, enable_gqa)
    batch, (heads, length, features), size = query.shape[:-3], query.shape[-3:], key.shape[-2]
    num, dtype = math.prod(batch), compute_dtype(query.dtype)
    o = solver(
        features, dtype, scale, epsilon, window, relaxation,
        base_iters, tail_iters, tolerance, over_relaxation, gradient, engine,
    )  # fmt: skip
    no_tensors(mask_floor=mask_floor, dropout_p=dropout_p)
    mask_floor, dropout_p = scalars.floor(mask_floor), scalars.dropout(dropout_p)
    if dustbin is not None and not isinstance(dustbin, Dustbin):
        raise TypeError(f"dustbin must be a Dustbin or None, got {dustbin!r}; pass Dustbin(row_score, col_score).")
    given = _given(
        query, key, value, attn_mask, (query_lengths, key_lengths), (query_segment_ids, key_segment_ids),
        (row_mass, col_mass), dustbin, initial_potentials,
    )  # fmt: skip
    softmax_mode = o.base_iters == o.tail_iters == 0 and o.rho == (1.0, 1.0) and dustbin is None
    softmax_mode = softmax_mode and row_mass is None and col_mass is None
    window, causal = o.window, False
    if checked_causal(is_causal, attn_mask):
        plain = not given.packed and query_lengths is None and key_lengths is None
        if plain and o.rho == (1.0, 1.0) and dustbin is None and row_mass is None and col_mass is None:
            refuse_balanced_causal(length, size, o.window, softmax_mode)
        causal = not (plain and length == size)
        if not causal:  # then it is a window, which engines know ahead of the data
            window = (-1 if o.window is None else o.window[0], 0)
    look = check_data and data_checks_enabled(query, key, value, *given.tensors())
    if look:
        data_checks.check_lengths(given.lengths[0], "query_lengths", length)
        data_checks.check_lengths(given.lengths[1], "key_lengths", size)
        data_checks.check_dustbin_scores(dustbin)
        data_checks.check_potentials(given.initial)

    ids = [
        token_ids(num, n, lengths, segments, query.device)
        for n, lengths, segments in zip((length, size), given.lengths, given.segments, strict=True)
    ]
    if look and given.packed:
        data_checks.check_segments(ids[0], ids[1])
    support = build_support(ids[0], ids[1], window, given.packed, causal)
    scan = None
    if given.mask is not None:
        scan = scan_mask(given.mask, support, given.packed, dtype, None if softmax_mode else mask_floor, hulls=look)
        if look and given.mask.dtype != torch.bool:
            data_checks.check_mask(extremes(given.mask, support, given.packed, dtype, scan), dtype, softmax_mode)
    row_active = (support.row_active[:, None] if scan is None else scan.row_active).expand(num, heads, length)
    col_active = (support.col_active[:, None] if scan is None else scan.col_active).expand(num, heads, size)
    row_segment, col_segment = (support.row_segment, support.col_segment) if given.packed else (None, None)

    groups = max(1, min(length, size)) if given.packed else 1
    mass_dtype = torch.float64 if look else _mass_dtype(dtype, query.device, *given.masses, *given.capacities)
    if look:
        data_checks.check_positive_mass("row_mass", given.masses[0], row_active)
        data_checks.check_positive_mass("col_mass", given.masses[1], col_active)
    rows = Side(given.masses[0], row_active, row_segment)
    cols = Side(given.masses[1], col_active, col_segment)
    a, b = marginal_masses(rows, cols, groups, dustbin is not None, mass_dtype)
    capacities = dustbin_capacities(given.capacities, a, b, rows, cols, given.bins)
    existence = None
    if not softmax_mode:
        existence = Existence(
            rows, cols, given.capacities, dustbin, given.bins, groups, support, given.mask, scan, o.rho,
            given.packed or o.window is not None or is_causal, o.window, is_causal, dtype, mask_floor,
        )  # fmt: skip
        if look:
            existence.check((a, b), capacities)

    unit = None
    if any(x is not None for x in (*given.masses, *given.capacities)):
        masses = [x for x in (a, b, *capacities) if x is not None]
        if look:
            data_checks.check_span(masses, dtype)
        unit = find_scale(masses, o.rho, o.base_iters + o.tail_iters > 0, look, dtype)
    initial = given.initial
    if unit is not None:
        a, b = in_units(unit, a), in_units(unit, b)
        if capacities[0] is not None and capacities[1] is not None:
            capacities = in_units(unit, capacities[0]), in_units(unit, capacities[1])
        if initial[0] is not None or o.rho != (1.0, 1.0):  # a balanced start from 0 does not depend on the unit
            zero = a.new_zeros((), dtype=dtype)
            row, col = (
                (zero if x is None else x).expand(num, heads, n + given.bins)
                for x, n in zip(initial, (length, size), strict=True)
            )
            initial = unit.shifted(row, col, back=True)

    problem = Problem(
        row_lo=support.row_lo, row_hi=support.row_hi, col_lo=support.col_lo, col_hi=support.col_hi,
        row_segment=row_segment, col_segment=col_segment,
        log_row_mass=log_mass(a, dtype), log_col_mass=log_mass(b, dtype),
        log_row_capacity=None if capacities[0] is None else log_mass(capacities[0], dtype),
        log_col_capacity=None if capacities[1] is None else log_mass(capacities[1], dtype),
        initial_row=initial[0], initial_col=initial[1],
        dropout_seed=_dropout_seed(dropout_p, query.device),
        scale=o.scale, epsilon=o.epsilon, rho_row=o.rho[0], rho_col=o.rho[1],
        base_iters=o.base_iters, tail_iters=o.tail_iters, tolerance=o.tolerance, over_relaxation=o.over_relaxation,
        gradient=o.gradient, dropout_p=dropout_p,
        banded=given.packed or window is not None or causal,
        window_left=-1 if window is None else window[0], window_right=-1 if window is None else window[1],
        uniform=not (given.packed or causal) and query_lengths is None and key_lengths is None,
    )  # fmt: skip
    flat = [None if x is None else x.reshape(num, *x.shape[len(batch) :]) for x in (query, key, value)]
    if given.mask is not None or not problem.uniform:
        by_head = given.mask is not None and given.mask.shape[1] > 1
        flat = _without_inactive(flat, row_active, col_active, by_head, look)
    inputs = Inputs(*flat, given.mask, *given.dustbin)  # type: ignore[arg-type, call-arg]
    if has_data(query):
        inputs = inputs._replace(query=traits_of(query.device).placed(inputs.query, query))
    return Prepared(inputs, problem, batch, query.dtype, engine, existence, unit)


Pair = tuple[Tensor | None, Tensor | None]  # a row side and a column side


class _Given(NamedTuple):
    """The user's tensors beside query, key and value: types, shapes and devices checked, batch flattened to N."""

    mask: Tensor | None
    lengths: Pair  # [N]
    segments: Pair  # [N, L], [N, S]
    masses: Pair  # [N, H, L], [N, H, S]
    dustbin: tuple[Tensor | None, ...]  # the last four fields of Inputs
    capacities: Pair  # [N, H, L], [N, H, S]
    initial: Pair
    packed: bool
    bins: int  # dustbins per head, G, or 0

    def tensors(self) -> list[Tensor | None]:
        return [self.mask, *self.lengths, *self.segments, *self.masses, *self.dustbin, *self.capacities, *self.initial]


def _given(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_mask: Tensor | None,
    lengths: Pair,
    segments: Pair,
    masses: Pair,
    dustbin: Dustbin | None,
    initial: Pair | None,
) -> _Given:
    batch, (heads, length, _), size = query.shape[:-3], query.shape[-3:], key.shape[-2]
    num, device = math.prod(batch), query.device

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(num, *x.shape[len(batch) :])

    query_segments = flat(integers("query_segment_ids", segments[0], (*batch, length), device))
    key_segments = flat(integers("key_segment_ids", segments[1], (*batch, size), device))
    if (query_segments is None) != (key_segments is None):
        raise ValueError(
            "query_segment_ids and key_segment_ids belong together: pass both (the same tensor in self-attention)."
        )
    packed = query_segments is not None
    bins = 0 if dustbin is None else (max(1, min(length, size)) if packed else 1)
    return _Given(
        mask=score_mask(attn_mask, (*batch, heads, length, size), query),
        lengths=(
            flat(integers("query_lengths", lengths[0], batch, device)),
            flat(integers("key_lengths", lengths[1], batch, device)),
        ),
        segments=(query_segments, key_segments),
        masses=(
            flat(constant("row_mass", masses[0], (*batch, heads, length), query)),
            flat(constant("col_mass", masses[1], (*batch, heads, size), query)),
        ),
        dustbin=dustbin_tensors(dustbin, batch, heads, length, size, value, query),
        capacities=given_capacities(dustbin, batch, heads, length, size, query),
        initial=potentials(initial, batch, heads, length + bins, size + bins, query),
        packed=packed,
        bins=bins,
    )


def _without_inactive(
    tensors: list[Tensor | None], row_active: Tensor, col_active: Tensor, by_head: bool, look: bool
) -> list[Tensor | None]:
    """Query, key and value with zeros in place of inactive tokens, whose NaN would spread through 0 * NaN. Where a mask
    makes a key inactive for some of the query heads that read it alone (it may if `by_head`), each head gets its own
    copy. Where all tokens turn out active nothing is copied."""
    query, key, value = tensors
    assert query is not None and key is not None
    group = query.shape[1] // key.shape[1]
    if look and bool(row_active.all()) and bool(col_active.all()):
        return tensors
    if group > 1:
        first = col_active[:, ::group]
        if by_head and not (look and torch.equal(first.repeat_interleave(group, 1), col_active)):
            key = key.repeat_interleave(group, 1)
            value = None if value is None else value.repeat_interleave(group, 1)
        else:
            col_active = first
    rows, cols = ~row_active[..., None], ~col_active[..., None]
    return [
        query.masked_fill(rows, 0.0),
        key.masked_fill(cols, 0.0),
        None if value is None else value.masked_fill(cols, 0.0),
    ]


def _mass_dtype(dtype: torch.dtype, device: torch.device, *given: Tensor | None) -> torch.dtype:
    """What masses are added up in: float64, in which no sum of float32 overflows, where some are given in it or the
    device is sure to have it; else the compute dtype."""
    wide = any(x is not None and x.dtype == torch.float64 for x in given)
    return torch.float64 if wide or device.type in ("cpu", "cuda") else dtype


def _dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """Two 32-bit words from torch's generator of the device, so that torch.manual_seed governs dropout."""
    return None if dropout_p == 0 else torch.randint(0, 2**32, (2,), dtype=torch.int64, device=device)
