"""Everything a user can get wrong stops here: user arguments in, `Inputs` and `Problem` out.

Shape and type checks come first, then the canonical layout, then (where data may be looked at) the checks of the data.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from torch_sinkhorn_attn import data_checks
from torch_sinkhorn_attn.argument_checks import (
    constant,
    count,
    integers,
    number,
    positive,
    potentials,
    relaxation_pair,
    score_mask,
    tokens,
    window_sides,
)
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

GRADIENTS = ("tail", "implicit", "unrolled")


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
    epsilon = positive("epsilon", epsilon)
    scale = 1 / math.sqrt(features) if scale is None else number("scale", scale)
    left, right = window_sides(window)
    rho_row, rho_col = (tau / (tau + epsilon) if tau < math.inf else 1.0 for tau in relaxation_pair(relaxation))
    base_iters, tail_iters = count("base_iters", base_iters), count("tail_iters", tail_iters)
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r} is unknown; choose one of {', '.join(map(repr, GRADIENTS))}.")
    dropout_p = number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} must lie in [0, 1).")
    if engine is not None and not isinstance(engine, str):
        raise TypeError(f"engine must be a name or None, got {engine!r}.")
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
    softmax_mode = base_iters == tail_iters == 0 and rho_row == rho_col == 1 and dustbin is None
    softmax_mode = softmax_mode and masses == [None, None]

    look = data_checks_enabled(query, key, value, mask, *lengths, *segments, *masses)
    window_request = f"window={(left, right)}" if window is not None else ""
    if look:
        data_checks.check_lengths(lengths[0], "query_lengths", length)
        data_checks.check_lengths(lengths[1], "key_lengths", size)
        data_checks.check_segments(segments[0], segments[1])
        data_checks.check_mask(mask)
        data_checks.check_dustbin_scores(dustbin)
        data_checks.check_potentials(initial)

    flat = [None if x is None else x.reshape(num) for x in lengths]
    row_ids = token_ids(num, length, flat[0], None if segments[0] is None else segments[0].reshape(num, length), device)
    col_ids = token_ids(num, size, flat[1], None if segments[1] is None else segments[1].reshape(num, size), device)
    support = build_support(row_ids, col_ids, None if window is None else (left, right), packed)
    scan = None if mask is None else scan_mask(mask, support, packed)
    row_active = (support.row_active[:, None] if scan is None else scan.row_active).expand(num, heads, length)
    col_active = (support.col_active[:, None] if scan is None else scan.col_active).expand(num, heads, size)
    row_segment, col_segment = (support.row_segment, support.col_segment) if packed else (None, None)

    groups = max(1, min(length, size)) if packed else 1
    mass_dtype = torch.float64 if look else dtype
    row_given, col_given = (None if x is None else x.to(mass_dtype).reshape(num, heads, -1) for x in masses)
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
            row_segment=row_segment, col_segment=col_segment, groups=groups, rho=(rho_row, rho_col),
            full=not packed and window is None and mask is None, request=_request(window_request, mask),
        )  # fmt: skip

    problem = Problem(
        row_lo=support.row_lo, row_hi=support.row_hi, col_lo=support.col_lo, col_hi=support.col_hi,
        row_segment=row_segment, col_segment=col_segment,
        log_row_mass=log_mass(a, dtype), log_col_mass=log_mass(b, dtype),
        log_row_capacity=None if row_capacity is None else log_mass(row_capacity, dtype),
        log_col_capacity=None if col_capacity is None else log_mass(col_capacity, dtype),
        initial_row=initial[0], initial_col=initial[1],
        dropout_seed=_dropout_seed(dropout_p, device),
        scale=scale, epsilon=epsilon, rho_row=rho_row, rho_col=rho_col,
        base_iters=base_iters, tail_iters=tail_iters, gradient=gradient, dropout_p=dropout_p,
        banded=packed or window is not None, window_left=left, window_right=right,
        uniform=not packed and lengths == [None, None],
    )  # fmt: skip
    flat_tokens = (None if x is None else x.reshape(num, *x.shape[len(batch) :]) for x in (key, value))
    inputs = Inputs(query.reshape(num, heads, length, features), *flat_tokens, mask, *scores)  # type: ignore[arg-type, call-arg]
    return Prepared(inputs, problem, batch, query.dtype, engine)


def _dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """Two 32-bit words from torch's generator of the device, so that torch.manual_seed governs dropout."""
    return None if dropout_p == 0 else torch.randint(0, 2**32, (2,), dtype=torch.int64, device=device)


def _request(window: str, mask: Tensor | None) -> str:
    parts = [window] if window else []
    if mask is not None:
        parts.append("attn_mask")
    return " with ".join(parts) if parts else "the support"
