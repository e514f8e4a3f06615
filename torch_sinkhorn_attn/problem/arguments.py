"""Everything a user can get wrong stops here: user arguments in, `Inputs` and `Problem` out.

Shape and type checks come first, then the canonical layout, then (where data may be looked at) the checks of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from torch_sinkhorn_attn.distributed.context import refuse_local
from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.engines import engine_of
from torch_sinkhorn_attn.engines.cpu import Constants
from torch_sinkhorn_attn.options import Relaxation
from torch_sinkhorn_attn.problem import data_checks, per_head
from torch_sinkhorn_attn.problem.argument_checks import (
    constant,
    dustbin_tensors,
    given_capacities,
    integers,
    options,
    positions,
    potentials,
    score_mask,
    tokens,
)
from torch_sinkhorn_attn.problem.causal import causal_window
from torch_sinkhorn_attn.problem.feasibility.existence import Existence
from torch_sinkhorn_attn.problem.looking import data_checks_enabled, has_data
from torch_sinkhorn_attn.problem.masks.lines import MaskScan
from torch_sinkhorn_attn.problem.masks.scan import extremes, keeps_all, scan_mask
from torch_sinkhorn_attn.problem.mass_scale import MassScale, find_scale, in_units
from torch_sinkhorn_attn.problem.masses import Side, dustbin_capacities, log_mass, marginal_masses
from torch_sinkhorn_attn.problem.problem import Inputs, Intervals, Marginals, Outline, Problem, compute_dtype
from torch_sinkhorn_attn.problem.scores import as_mask as scores_as_mask, tokens_of
from torch_sinkhorn_attn.problem.support import Support, build_support, token_ids, whole_support


class Keywords(TypedDict, total=False):
    """The keyword arguments of `sinkhorn_attention`, documented there: the scalars of `Options`, and tensors."""

    scale: float | None
    epsilon: float
    window: tuple[int, int] | None
    window_centers: Tensor | None
    query_lengths: Tensor | None
    key_lengths: Tensor | None
    query_segment_ids: Tensor | None
    key_segment_ids: Tensor | None
    row_mass: Tensor | None
    col_mass: Tensor | None
    relaxation: Relaxation
    dustbin: Dustbin | None
    base_iters: int
    tail_iters: int
    tolerance: float | None
    over_relaxation: float
    acceleration: str | None
    contraction: float | None
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
    headless: bool = False  # whether the one head of each problem is the user's batch, or nothing
    active: tuple[Tensor, Tensor, bool] | None = None  # how `without_inactive` was called; None: all were active
    constants: Constants | None = None  # of calls that may go straight to the CPU engine, and whose problem is shared

    def unflatten(self, x: Tensor) -> Tensor:
        """`[N, ...]` back to `(..., ...)`; without the head where the user gave none."""
        if len(self.batch) == 1 and not self.headless:
            return x
        return x.reshape((*self.batch, *x.shape[2 if self.headless else 1 :]))

    def returned(self, x: Tensor) -> Tensor:
        """Likewise, in the dtype of the output."""
        x = self.unflatten(x)
        return x if x.dtype == self.dtype else x.to(self.dtype)


def prepare(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    attn_mask: Tensor | None = None,
    *,
    check_data: bool = True,
    mask_reader: MaskReader | None = None,
    **keywords: Unpack[Keywords],
) -> Prepared:
    """Check and canonicalise; `value` is None when only the plan is wanted, `key` where `query` holds the scores, and
    without `check_data` no data is looked at, whatever `set_checks` says. `mask_reader` scans a mask that is not here
    whole, in place of `attn_mask`; whether it leaves a plan is not asked then."""
    refuse_local()
    query, key, value, attn_mask, scores, keywords, headless = canonical_tokens(query, key, value, attn_mask, keywords)
    if engine_of(query.device).over_ranks() is not None:
        raise ValueError(
            "With the sequence sharded over ranks (mesh.set_sharding) this function would see the local tokens alone, "
            "which is another problem. sinkhorn_attention knows the other ranks; set_sharding(None) computes on these "
            "alone."
        )
    batch, (heads, length, features), size = query.shape[:-3], query.shape[-3:], key.shape[-2]
    num, dtype = math.prod(batch), compute_dtype(query.dtype)
    o = options(keywords)
    solver = o.solver(features, "float64" if dtype == torch.float64 else "float32")
    given = _given(query, key, value, attn_mask, scores, keywords)
    dustbin, whole = keywords.get("dustbin"), not given.packed and _absent(given.lengths)
    uniform = solver.balanced and dustbin is None and _absent(given.masses)
    softmax_mode = uniform and o.base_iters == o.tail_iters == 0
    centered = given.centers is not None
    of_mask = attn_mask if mask_reader is None else mask_reader
    window, causal = causal_window(o, of_mask, length, size, whole, uniform, centered)
    look = check_data and data_checks_enabled(query, key, value, *given.tensors())
    if look:
        data_checks.check_lengths(given.lengths[0], "query_lengths", length)
        data_checks.check_lengths(given.lengths[1], "key_lengths", size)
        data_checks.check_dustbin_scores(dustbin)
        data_checks.check_potentials(given.initial)

    if whole and not causal and not centered:
        support = whole_support(num, length, size, window, query.device)
    else:
        support = _support(given, (num, length, size), query.device, window, causal, look)
    scan, mask, floor = None, given.mask, None if softmax_mode else o.mask_floor
    if given.scores is not None:
        left = None
        if floor is not None and mask is not None and mask.dtype != torch.bool:
            left = scan_mask(mask, support, given.packed, dtype, floor, hulls=False)
        mask, floor = scores_as_mask(given.scores, mask, left, o), None
    of_pairs = mask  # the mask where it may forbid some
    if look and mask is not None and (window is None or 1 in mask.shape[-2:]) and keeps_all(mask, dtype, floor):
        of_pairs = None
    if of_pairs is not None:
        scan = scan_mask(of_pairs, support, given.packed, dtype, floor, hulls=look)
        if look and of_pairs.dtype != torch.bool:
            found = extremes(of_pairs, support, given.packed, dtype, scan)
            data_checks.check_mask(found, dtype, softmax_mode, of_scores=given.scores is not None)
    split = mask_reader is not None
    if mask_reader is not None:
        scan = mask_reader(support, given.packed, dtype, floor, softmax_mode)
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
    free = uniform and whole and window is None and not causal and scan is None  # any such has a plan
    if free:
        each = (1.0, length / size) if length and size else (0.0, 0.0)
        a = torch.full((num, heads, length), each[0], dtype=mass_dtype, device=query.device)
        b = torch.full((num, heads, size), each[1], dtype=mass_dtype, device=query.device)
    else:
        a, b = marginal_masses(rows, cols, groups, dustbin is not None, mass_dtype)
    capacities = dustbin_capacities(given.capacities, a, b, rows, cols, given.bins)
    existence, rho = None, (solver.rho_row, solver.rho_col)
    if not softmax_mode:
        existence = Existence(
            rows, cols, given.capacities, dustbin, given.bins, groups, support, of_pairs, None if split else scan, rho,
            not split and (given.packed or o.window is not None or o.is_causal), o.window, centered, o.is_causal,
            dtype, floor,
        )  # fmt: skip
        if look and not free:
            existence.check((a, b), capacities)

    masses: list[Tensor | None] = [a, b, *capacities]
    unit = None
    if any(x is not None for x in (*given.masses, *given.capacities)):
        present = [x for x in masses if x is not None]
        if look:
            data_checks.check_span(present, dtype)
        unit = find_scale(present, rho, o.base_iters + o.tail_iters > 0, look, dtype)
    initial = given.initial
    if unit is not None:
        masses = [None if x is None else in_units(unit, x) for x in masses]
        if initial[0] is not None or not solver.balanced:  # a balanced start from 0 does not depend on the unit
            zero = a.new_zeros((), dtype=dtype)
            row, col = (
                (zero if x is None else x).expand(num, heads, n + given.bins)
                for x, n in zip(initial, (length, size), strict=True)
            )
            initial = unit.shifted(row, col, back=True)

    diagonal = not causal and not centered
    paired = diagonal and not whole and length == size and _same_on_both_sides(keywords)
    outline = Outline(given.packed or window is not None or causal, *(window or (-1, -1)), diagonal and whole, paired)
    intervals = Intervals(support.row_lo, support.row_hi, support.col_lo, support.col_hi, row_segment, col_segment)
    marginals = Marginals(*(None if x is None else log_mass(x, dtype) for x in masses))  # type: ignore[arg-type]
    problem = Problem(intervals, marginals, *initial, dropout_seed(o.dropout_p, query.device), solver, outline)
    flat = [None if x is None else x.reshape(num, *x.shape[len(batch) :]) for x in (query, key, value)]
    active = None
    if scan is not None or not outline.uniform:
        active = row_active, col_active, scan is not None and scan.row_active.shape[1] > 1
        flat = without_inactive(flat, *active, look)
    inputs = Inputs(*flat, mask, *given.dustbin)  # type: ignore[arg-type, call-arg]
    if has_data(query):
        inputs = inputs._replace(query=engine_of(query.device).placed(inputs.query, query))
    kind = query.dtype if scores is None or value is not None else scores.dtype
    return Prepared(inputs, problem, batch, kind, o.engine, existence, unit, headless, active)


MaskReader = Callable[
    [Support, bool, torch.dtype, "float | None", bool], MaskScan
]  # packed, dtype, floor, softmax mode


def canonical_tokens(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    attn_mask: Tensor | None,
    keywords: Keywords,
    keys: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Any, Tensor | None, Keywords, bool]:
    """Query, key, value, mask, scores `(..., H, L, S)` (without a key), keywords, and whether what is found has a head
    that the user did not give: of scores `(L, S)`, or of heads that are batch elements. `keys`: how many of the scores'
    S keys are here, None for all."""
    enable_gqa, scores = keywords.get("enable_gqa", False), None
    headless = key is None and isinstance(query, Tensor) and query.ndim == 2
    if headless:
        query, value = query[None], value[None] if isinstance(value, Tensor) and value.ndim == 2 else value
    if key is None:
        scores = query
        query, key, value = tokens_of(scores, value, enable_gqa, keys)
    else:
        query, key, value = tokens(query, key, value, enable_gqa)
    if not headless and per_head.wanted(query.shape[:-3], query.shape[-3], keywords):
        query, key, value, attn_mask, keywords = per_head.unfold(query, key, value, attn_mask, keywords)
        scores, headless = None if scores is None else scores.unsqueeze(-3), True
    return query, key, value, attn_mask, scores, keywords, headless


def _support(
    given: _Given,
    sizes: tuple[int, int, int],
    device: torch.device,
    window: tuple[int, int] | None,
    causal: bool,
    look: bool,
) -> Support:
    """Of N batch elements, L queries and S keys, some inactive, packed, or in windows that are data."""
    num, *lengths_of = sizes
    row_ids, col_ids = (
        token_ids(num, n, lengths, segments, device)
        for n, lengths, segments in zip(lengths_of, given.lengths, given.segments, strict=True)
    )
    if look and given.packed:
        data_checks.check_segments(row_ids, col_ids)
    if look and given.centers is not None:
        data_checks.check_centers(given.centers, row_ids >= 0)
    return build_support(row_ids, col_ids, window, given.packed, causal, given.centers)


Pair = tuple[Tensor | None, Tensor | None]  # a row side and a column side


def _same_on_both_sides(keywords: Keywords) -> bool:
    """Whether queries and keys have one tensor of lengths, and one of segments."""
    pairs = ("query_lengths", "key_lengths"), ("query_segment_ids", "key_segment_ids")
    return all(keywords.get(one) is keywords.get(other) for one, other in pairs)


def _absent(pair: Pair) -> bool:
    return pair[0] is None and pair[1] is None  # == would compare tensors


class _Given(NamedTuple):
    """The user's tensors beside query, key and value: types, shapes and devices checked, batch flattened to N."""

    mask: Tensor | None
    scores: Tensor | None  # [N, H, L, S]
    centers: Tensor | None  # [N, L]
    lengths: Pair  # [N]
    segments: Pair  # [N, L], [N, S]
    masses: Pair  # [N, H, L], [N, H, S]
    dustbin: tuple[Tensor | None, ...]  # the last four fields of Inputs
    capacities: Pair  # [N, H, L], [N, H, S]
    initial: Pair
    packed: bool
    bins: int  # dustbins per head, G, or 0

    def tensors(self) -> list[Tensor | None]:
        pairs = (self.lengths, self.segments, self.masses, self.capacities, self.initial)
        return [self.mask, self.scores, self.centers, *self.dustbin, *(x for pair in pairs for x in pair)]


def _given(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_mask: Tensor | None,
    scores: Tensor | None,
    keywords: Keywords,
) -> _Given:
    dustbin = keywords.get("dustbin")
    if dustbin is not None and not isinstance(dustbin, Dustbin):
        raise TypeError(f"dustbin must be a Dustbin or None, got {dustbin!r}; pass Dustbin(row_score, col_score).")
    batch, (heads, length, _), size = query.shape[:-3], query.shape[-3:], key.shape[-2]
    num, device = math.prod(batch), query.device

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(num, *x.shape[len(batch) :])

    query_segments = flat(integers("query_segment_ids", keywords.get("query_segment_ids"), (*batch, length), device))
    key_segments = flat(integers("key_segment_ids", keywords.get("key_segment_ids"), (*batch, size), device))
    if (query_segments is None) != (key_segments is None):
        raise ValueError(
            "query_segment_ids and key_segment_ids belong together: pass both (the same tensor in self-attention)."
        )
    packed = query_segments is not None
    bins = 0 if dustbin is None else (max(1, min(length, size)) if packed else 1)
    return _Given(
        mask=score_mask(attn_mask, (*batch, heads, length, size), query),
        scores=flat(scores),
        centers=flat(positions("window_centers", keywords.get("window_centers"), (*batch, length), query)),
        lengths=(
            flat(integers("query_lengths", keywords.get("query_lengths"), batch, device)),
            flat(integers("key_lengths", keywords.get("key_lengths"), batch, device)),
        ),
        segments=(query_segments, key_segments),
        masses=(
            flat(constant("row_mass", keywords.get("row_mass"), (*batch, heads, length), query)),
            flat(constant("col_mass", keywords.get("col_mass"), (*batch, heads, size), query)),
        ),
        dustbin=dustbin_tensors(dustbin, batch, heads, length, size, value, query),
        capacities=given_capacities(dustbin, batch, heads, length, size, query),
        initial=potentials(keywords.get("initial_potentials"), batch, heads, length + bins, size + bins, query),
        packed=packed,
        bins=bins,
    )


def without_inactive(
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


def dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """Two 32-bit words from torch's generator of the device, so that torch.manual_seed governs dropout."""
    return None if dropout_p == 0 else torch.randint(0, 2**32, (2,), dtype=torch.int64, device=device)
