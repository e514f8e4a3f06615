"""Everything a user can get wrong stops here: user arguments in, `Inputs` and `Problem` out.

Shape and type checks come first, then the canonical layout, then (where data may be looked at) the checks of the data.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from torch_sinkhorn_attn import data_checks
from torch_sinkhorn_attn.argument_checks import constant, integers, number, potentials, score_mask, solver, tokens
from torch_sinkhorn_attn.checks import data_checks_enabled
from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.mask_scan import scan_mask
from torch_sinkhorn_attn.masses import (
    dustbin_capacities,
    dustbin_tensors,
    given_capacities,
    log_mass,
    marginal_masses,
)
from torch_sinkhorn_attn.problem import Inputs, Problem, compute_dtype
from torch_sinkhorn_attn.support import build_support, token_ids


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
    gradient: str
    initial_potentials: tuple[Tensor, Tensor] | None
    dropout_p: float
    enable_gqa: bool
    engine: str | None


class Prepared(NamedTuple):
    """Canonical tensors and problem, and what is needed to give the user's shapes back."""

    inputs: Inputs
    problem: Problem
    batch: torch.Size  # the user's leading dimensions, flattened to N
    dtype: torch.dtype  # of the output
    engine: str | None

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
    gradient: str = "tail",
    initial_potentials: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    engine: str | None = None,
) -> Prepared:
    """Check and canonicalise; `value` is None when only the plan is wanted."""
    query, key, value = tokens(query, key, value, enable_gqa)
    batch, (heads, length, features), size = query.shape[:-3], query.shape[-3:], key.shape[-2]
    num, device, dtype = math.prod(batch), query.device, compute_dtype(query.dtype)
    o = solver(features, dtype, scale, epsilon, window, relaxation, base_iters, tail_iters, gradient, engine)
    dropout_p = number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} must lie in [0, 1).")
    if dustbin is not None and not isinstance(dustbin, Dustbin):
        raise TypeError(f"dustbin must be a Dustbin or None, got {dustbin!r}; pass Dustbin(row_score, col_score).")

    mask = score_mask(attn_mask, (*batch, heads, length, size), query)
    lengths = [
        integers(name, x, batch, device) for name, x in (("query_lengths", query_lengths), ("key_lengths", key_lengths))
    ]
    segments = [
        integers(name, x, (*batch, n), device)
        for name, x, n in (("query_segment_ids", query_segment_ids, length), ("key_segment_ids", key_segment_ids, size))
    ]
    if (segments[0] is None) != (segments[1] is None):
        raise ValueError(
            "query_segment_ids and key_segment_ids belong together: pass both (the same tensor in self-attention)."
        )
    masses = [
        constant(name, x, (*batch, heads, n), query)
        for name, x, n in (("row_mass", row_mass, length), ("col_mass", col_mass, size))
    ]
    packed = segments[0] is not None
    num_bins = 0 if dustbin is None else (max(1, min(length, size)) if packed else 1)
    scores = dustbin_tensors(dustbin, batch, heads, length, size, value, query)
    capacities = given_capacities(dustbin, batch, heads, length, size, query)
    initial = potentials(initial_potentials, batch, heads, length + num_bins, size + num_bins, query)
    balanced = o.rho == (1.0, 1.0)
    softmax_mode = o.base_iters == o.tail_iters == 0 and balanced and dustbin is None
    softmax_mode = softmax_mode and row_mass is None and col_mass is None

    constants = [*lengths, *segments, *masses, *capacities, *initial, *scores]
    look = data_checks_enabled(query, key, value, mask, *constants)
    if look:
        data_checks.check_lengths(lengths[0], "query_lengths", length)
        data_checks.check_lengths(lengths[1], "key_lengths", size)
        data_checks.check_mask(mask, dtype, softmax_mode)
        data_checks.check_dustbin_scores(dustbin)
        data_checks.check_potentials(initial)

    row_ids, col_ids = (
        token_ids(num, n, None if x is None else x.reshape(num), None if ids is None else ids.reshape(num, n), device)
        for n, x, ids in zip((length, size), lengths, segments, strict=True)
    )
    if look and packed:
        data_checks.check_segments(row_ids, col_ids)
    support = build_support(row_ids, col_ids, o.window, packed)
    scan = None if mask is None else scan_mask(mask, support, packed, dtype)
    row_active = (support.row_active[:, None] if scan is None else scan.row_active).expand(num, heads, length)
    col_active = (support.col_active[:, None] if scan is None else scan.col_active).expand(num, heads, size)
    row_segment, col_segment = (support.row_segment, support.col_segment) if packed else (None, None)

    groups = max(1, min(length, size)) if packed else 1
    mass_dtype = torch.float64 if look else dtype
    row_given, col_given = (
        None if x is None else x.to(mass_dtype).reshape(num, heads, n)
        for x, n in zip(masses, (length, size), strict=True)
    )
    if look:
        data_checks.check_positive_mass("row_mass", row_given, row_active)
        data_checks.check_positive_mass("col_mass", col_given, col_active)
    a, b = marginal_masses(
        row_given, col_given, row_active, col_active, row_segment, col_segment, groups, dustbin, mass_dtype
    )
    row_capacity, col_capacity = dustbin_capacities(capacities, a, b, row_segment, col_segment, num_bins, mass_dtype)
    if look and not softmax_mode:
        data_checks.check_feasibility(
            a, b, row_capacity, col_capacity, support, scan, capacities,
            row_segment=row_segment, col_segment=col_segment, groups=groups, rho=o.rho,
            full=not packed and o.window is None and mask is None, request=_request(o.window, mask),
        )  # fmt: skip

    problem = Problem(
        row_lo=support.row_lo, row_hi=support.row_hi, col_lo=support.col_lo, col_hi=support.col_hi,
        row_segment=row_segment, col_segment=col_segment,
        log_row_mass=log_mass(a, dtype), log_col_mass=log_mass(b, dtype),
        log_row_capacity=None if row_capacity is None else log_mass(row_capacity, dtype),
        log_col_capacity=None if col_capacity is None else log_mass(col_capacity, dtype),
        initial_row=initial[0], initial_col=initial[1],
        dropout_seed=_dropout_seed(dropout_p, device),
        scale=o.scale, epsilon=o.epsilon, rho_row=o.rho[0], rho_col=o.rho[1],
        base_iters=o.base_iters, tail_iters=o.tail_iters, gradient=o.gradient, dropout_p=dropout_p,
        banded=packed or o.window is not None,
        window_left=-1 if o.window is None else o.window[0], window_right=-1 if o.window is None else o.window[1],
        uniform=not packed and query_lengths is None and key_lengths is None,
    )  # fmt: skip
    flat = [None if x is None else x.reshape(num, *x.shape[len(batch) :]) for x in (query, key, value)]
    if mask is not None or not problem.uniform:
        flat = _without_inactive(flat, row_active, col_active, look)
    inputs = Inputs(*flat, mask, *scores)  # type: ignore[arg-type, call-arg]
    return Prepared(inputs, problem, batch, query.dtype, engine)


def _without_inactive(
    tensors: list[Tensor | None], row_active: Tensor, col_active: Tensor, look: bool
) -> list[Tensor | None]:
    """Query, key and value with zeros in place of inactive tokens, whose NaN would spread through 0 * NaN. A key is
    inactive if it is for every query head that reads it. Where all tokens turn out active nothing is copied."""
    query, key, value = tensors
    assert query is not None and key is not None
    by_key_head = (key.shape[1], query.shape[1] // key.shape[1])
    key_active = col_active.unflatten(1, by_key_head).any(2)
    if look and bool(row_active.all()) and bool(key_active.all()):
        return tensors
    rows, cols = ~row_active[..., None], ~key_active[..., None]
    return [
        query.masked_fill(rows, 0.0),
        key.masked_fill(cols, 0.0),
        None if value is None else value.masked_fill(cols, 0.0),
    ]


def _dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """Two 32-bit words from torch's generator of the device, so that torch.manual_seed governs dropout."""
    return None if dropout_p == 0 else torch.randint(0, 2**32, (2,), dtype=torch.int64, device=device)


def _request(window: tuple[int, int] | None, mask: Tensor | None) -> str:
    """The arguments that shape the support, for messages."""
    parts = [] if window is None else [f"window={window}"]
    if mask is not None:
        parts.append("attn_mask")
    return " with ".join(parts) if parts else "the support"
