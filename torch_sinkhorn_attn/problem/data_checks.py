"""The checks that look at data, each raising a ValueError that names the argument, the value and the way out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_sinkhorn_attn.dustbin import Dustbin
from torch_sinkhorn_attn.problem.centers import fallen
from torch_sinkhorn_attn.problem.feasibility import intervals as feasibility, masks as mask_feasibility
from torch_sinkhorn_attn.problem.masks.lines import MaskScan
from torch_sinkhorn_attn.problem.masks.scan import Extremes, largest_addend
from torch_sinkhorn_attn.problem.segments import segment_sum
from torch_sinkhorn_attn.problem.support import Support


def check_lengths(lengths: Tensor | None, name: str, limit: int) -> None:
    if lengths is None or lengths.numel() == 0:
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > limit:
        raise ValueError(f"{name} holds {low if low < 0 else high}; lengths must lie between 0 and {limit}.")


def check_segments(row_ids: Tensor, col_ids: Tensor) -> None:
    """Active ids `[N, L]` and `[N, S]` (-1 = inactive) are contiguous runs, in the same order on both sides."""
    for n, (row, col) in enumerate(zip(row_ids.cpu(), col_ids.cpu(), strict=True)):
        runs = []
        for name, ids in (("query_segment_ids", row), ("key_segment_ids", col)):
            run = torch.unique_consecutive(ids[ids >= 0]).tolist()
            if len(set(run)) != len(run):
                twice = next(x for i, x in enumerate(run) if x in run[:i])
                raise ValueError(f"{name}: id {twice} of batch {n} is not one contiguous run; give each its own id.")
            runs.append(run)
        both = set(runs[0]) & set(runs[1])
        order = [[x for x in run if x in both] for run in runs]
        if order[0] != order[1]:
            raise ValueError(
                f"query_segment_ids and key_segment_ids of batch {n} hold the same ids in different order "
                f"({order[0][:6]} and {order[1][:6]}); sort both by segment."
            )


def check_centers(centers: Tensor, active: Tensor) -> None:
    """The centres of active queries `[N, L]` are finite and do not fall."""
    if centers.numel() == 0:
        return
    places = centers.double()
    wrong = active & ~torch.isfinite(places)
    if wrong.any():
        n, i = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"window_centers is {places[n, i].item()} at batch {n}, query {i}; the centre of an active query is a "
            "finite place on the axis of the keys."
        )
    wrong = fallen(places, active)
    if wrong.any():
        n, i = wrong.nonzero()[0].tolist()
        before = places[n, :i][active[n, :i]].max().item()
        raise ValueError(
            f"window_centers falls from {before:.6g} to {places[n, i].item():.6g} at batch {n}, query {i}; centres "
            "must not fall from one active query to the next: torch.cummax(window_centers, -1).values does not."
        )


def check_mask(found: Extremes, dtype: torch.dtype, softmax_mode: bool, of_scores: bool = False) -> None:
    """Between the tokens it leaves active a float mask is free of NaN, +inf and finite values that swallow the scores
    they are added to, if it is not the scores itself."""
    if of_scores:
        if not found.highest < torch.inf:
            raise ValueError(
                f"the scores (query, without a key) hold {'NaN' if found.highest.isnan() else '+inf'}, after scale, "
                "epsilon and mask; use finite scores, and -inf to forbid a pair."
            )
        return
    if not found.highest < torch.inf:
        raise ValueError(
            f"attn_mask holds {'NaN' if found.highest.isnan() else '+inf'}; a float mask is added to the scores: use "
            "finite values, and -inf (or False in a bool mask) to forbid a pair."
        )
    if found.lowest < -largest_addend(dtype) and not softmax_mode:
        raise ValueError(
            f"attn_mask holds {found.lowest.item():.4g} between a query and a key that are left active by others: such "
            f"a pair stays in the support, but in {dtype} the score is lost in it. Use -inf (or False in a bool mask) "
            "to forbid a pair."
        )


def check_dustbin_scores(dustbin: Dustbin | None) -> None:
    if dustbin is None:
        return
    for name in ("row_score", "col_score", "corner_score", "value"):
        x = getattr(dustbin, name)
        if isinstance(x, Tensor) and not torch.isfinite(x.detach()).all():
            raise ValueError(
                f"Dustbin {name} holds NaN or infinity; finite values are needed (no dustbin: dustbin=None)."
            )


def check_potentials(initial: tuple[Tensor | None, Tensor | None]) -> None:
    for side, x in zip(("row", "column"), initial, strict=True):
        if x is not None and not torch.isfinite(x).all():
            raise ValueError(f"initial_potentials ({side}) holds NaN or infinity; pass the potentials of SinkhornAux.")


def check_positive_mass(name: str, mass: Tensor | None, active: Tensor) -> None:
    if mass is None:
        return
    wrong = active & ~((mass > 0) & (mass < torch.inf))
    if wrong.any():
        index = wrong.nonzero()[0]
        n, h, i = index.tolist()
        raise ValueError(
            f"{name} is {mass[n, h, i].item():.6g} at batch {n}, head {h}, token {i}; active tokens need a positive "
            "finite mass: mask the token out (lengths, segment ids or attn_mask) to give it none."
        )


def check_span(masses: list[Tensor], dtype: torch.dtype) -> None:
    """The masses `[N, H, n]` of one head, 0 where inactive, are within what numbers of the compute dtype can span."""
    every = torch.cat(masses, -1)
    if every.numel() == 0:
        return
    high, low = every.amax(-1), torch.where(every > 0, every, torch.inf).amin(-1)
    # In a unit amid them (mass_scale.py) they lie evenly about 1; sums and scalings need some of the range too.
    wide = high.log2() - low.log2() > -1.25 * math.log2(torch.finfo(dtype).tiny)
    if wide.any():
        n, h = wide.nonzero()[0].tolist()
        raise ValueError(
            f"Masses of batch {n}, head {h} span {low[n, h].item():.6g} to {high[n, h].item():.6g}, more than {dtype} "
            "can hold in one plan: mask tokens of next to no mass out, or use float64."
        )


def check_feasibility(
    a: Tensor,
    b: Tensor,
    row_capacity: Tensor | None,
    col_capacity: Tensor | None,
    support: Support,
    mask: Tensor | None,
    scan: MaskScan | None,
    given: tuple[Tensor | None, ...],
    *,
    row_segment: Tensor | None,
    col_segment: Tensor | None,
    groups: int,
    rho: tuple[float, float],
    banded: bool,
    window: tuple[int, int] | None,
    centered: bool,
    is_causal: bool,
    dtype: torch.dtype,
    first: tuple[int, int] = (0, 0),
) -> None:
    """Totals, capacities and the support, for masses a [N, H, L], b [N, H, S] and capacities [N, H, G]. `given` are the
    user's masses and capacities, two each; `banded` says that the intervals do not hold all pairs of active tokens,
    `dtype` is that in which the mask is added, and messages count from batch element and head `first`."""
    rows = None if row_segment is None else row_segment.cpu()[:, None]
    cols = None if col_segment is None else col_segment.cpu()[:, None]
    a, b = a.cpu().double(), b.cpu().double()
    balanced = rho == (1.0, 1.0)
    totals = [segment_sum(x, s, groups) for x, s in ((a, rows), (b, cols))]
    capacities = None
    if row_capacity is not None and col_capacity is not None:
        capacities = row_capacity.cpu().double(), col_capacity.cpu().double()
        tolerance = feasibility.totals_tolerance(*given)
        check_capacities(capacities, given[2:], (a, b), (rows, cols), totals, tolerance if balanced else None)
    elif balanced:
        feasibility.check_balanced_totals(totals[0], totals[1], feasibility.totals_tolerance(*given))
    if (mask is None and not banded) or (rho[0] < 1 and rho[1] < 1) or 0 in (a.numel(), b.numel()):
        return
    lo, hi, covered = support.row_lo[:, None], support.row_hi[:, None], (support.col_lo < support.col_hi)[:, None]
    if scan is not None:
        lo, hi, covered = scan.row_lo, scan.row_hi, scan.col_covered
    m = feasibility.IntervalProblem(
        a, b, lo.cpu().expand(a.shape), hi.cpu().expand(a.shape), covered.cpu().expand(b.shape),
        feasibility.Request(window, mask is not None, given[:2] != (None, None), is_causal, centered),
        rows, cols, groups, feasibility.rounding_of(*given[:2]), first,
    )  # fmt: skip
    masked = None
    if mask is not None:
        intervals = support.row_lo.cpu(), support.row_hi.cpu()
        masked = mask_feasibility.MaskedSupport(mask.detach().cpu(), *intervals, banded, dtype)
    if capacities is not None:
        if balanced:
            _check_dustbin(m, masked, totals[0], capacities[1], derived=given[2:] == (None, None))
        return
    feasibility.check_lines(m)
    if not balanced:
        return
    if masked is not None:
        mask_feasibility.check_masked(m, masked)
    else:
        feasibility.check_intervals(m)


def _check_dustbin(
    m: feasibility.IntervalProblem,
    masked: mask_feasibility.MaskedSupport | None,
    row_total: Tensor,
    col_capacity: Tensor,
    derived: bool,
) -> None:
    """The largest flow is looked for only where the capacities leave mass to real pairs; `derived` capacities leave
    none, exactly."""
    needed = torch.zeros_like(row_total) if derived else row_total - col_capacity
    tolerance = 0.0 if derived else feasibility.SLACK_TOLERANCE
    margin = tolerance * (row_total + col_capacity)
    flow = feasibility.some_flow(m)
    if (needed > margin).any():
        largest = feasibility.interval_flow(m) if masked is None else mask_feasibility.masked_flow(m, masked)
        flow = torch.where(needed > margin, largest, flow)
    feasibility.check_dustbin(m, needed, flow, margin)


def check_capacities(
    capacities: tuple[Tensor, Tensor],
    given: tuple[Tensor | None, ...],
    masses: tuple[Tensor, Tensor],
    segments: tuple[Tensor | None, Tensor | None],
    totals: list[Tensor],
    tolerance: float | None,
) -> None:
    """Capacities are positive, constant in each problem, and leave the augmented totals equal to a relative
    `tolerance` (None: whatever they are)."""
    live = (totals[0] > 0) & (totals[1] > 0)
    for name, capacity, x, mass, segment in zip(
        ("row_capacity", "col_capacity"), capacities, given, masses, segments, strict=True
    ):
        if x is not None:
            tokens = x.cpu().double()
            own = capacity if segment is None else capacity.gather(-1, segment.expand(tokens.shape))
            differs = (mass > 0) & ~(tokens == own)
            if differs.any():
                n, h, i = differs.nonzero()[0].tolist()
                raise ValueError(
                    f"Dustbin {name} is {tokens[n, h, i].item():.6g} at batch {n}, head {h}, token {i}; it must be "
                    "positive, finite and constant within each problem."
                )
        wrong = live & ~((capacity > 0) & (capacity < torch.inf))
        if wrong.any():
            n, h, g = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"Dustbin {name} is {capacity[n, h, g].item():.6g} (batch {n}, head {h}, segment {g}) where balance "
                "needs a positive finite mass: sum(a) + row_capacity = sum(b) + col_capacity. Raise the other capacity."
            )
    rows, cols = totals[0] + capacities[0], totals[1] + capacities[1]
    if tolerance is not None:
        wrong = live & ((rows - cols).abs() > tolerance * torch.maximum(rows, cols))
        if wrong.any():
            n, h, g = wrong.nonzero()[0].tolist()
            held, room = feasibility.told_apart(rows[n, h, g].item(), cols[n, h, g].item())
            raise ValueError(
                f"Dustbin capacities are out of balance (batch {n}, head {h}, segment {g}): sum(a) + row_capacity "
                f"= {held} but sum(b) + col_capacity = {room}. Give one capacity only: the "
                "other is then derived."
            )
