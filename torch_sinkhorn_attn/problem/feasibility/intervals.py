"""Refusing problems without finite potentials before any iteration.

Finite potentials exist iff some plan is positive on the whole support: iff in each connected component of the support
the totals agree, and each set R of some but not all of its rows leaves something of the columns N(R) that it reaches,
a(R) < b(N(R)). For monotone intervals the first rows and the last rows of a component are sets enough, O(n) in all;
for an attn_mask see `mask_feasibility`. With a dustbin the real part must be able to carry strictly more than
sum(a) - col_capacity.

Everything is decided on the masses as given, by sums without rounding, so in any order of the tokens alike. Where
totals are asked to be equal they may differ by what the masses' own dtype rounds, and slack within 64 units in the last
place of float64, of the masses on the lighter side of its cut, counts as none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.problem.feasibility.exact_sums import ExactSums
from torch_sinkhorn_attn.problem.segments import by_segment, segment_sum

TOTALS_TOLERANCE = 1e-6  # a problem's totals may differ by this share; the iteration takes them to be equal
SLACK_TOLERANCE = 2.0**-46
_NONE = 1e-100  # in place of no mass, to divide by


class Request(NamedTuple):
    """The arguments that shape the support, as the user wrote them, for messages."""

    window: tuple[int, int] | None
    mask: bool
    masses: bool  # some were given
    is_causal: bool = False
    centered: bool = False  # the window lies around centres given

    def __str__(self) -> str:
        parts = [] if self.window is None else [f"window={self.window}{' around window_centers' * self.centered}"]
        return " with ".join(parts + ["is_causal=True"] * self.is_causal + ["attn_mask"] * self.mask) or "the support"

    def ways_out(self) -> str:
        own = [] if self.window is None else ["widen the window on both sides"]
        own += ["move window_centers"] * self.centered
        own += ["leave is_causal=False"] * self.is_causal
        own += ["let attn_mask keep more pairs"] * self.mask + ["change row_mass or col_mass"] * self.masses
        dustbin = "pass dustbin=Dustbin(...) to take what cannot be matched"
        return ", ".join([*own, dustbin, "or relaxation=tau to relax the marginals"])


class IntervalProblem(NamedTuple):
    """Everything the checks look at, float64 and on the CPU; masses are 0 where inactive."""

    row_mass: Tensor  # [N, H, L]
    col_mass: Tensor  # [N, H, S]
    row_lo: Tensor  # [N, H, L] interval, or hull of the mask inside it
    row_hi: Tensor
    col_covered: Tensor  # [N, H, S] bool
    request: Request
    row_segment: Tensor | None = None  # [N, 1, L]
    col_segment: Tensor | None = None
    groups: int = 1
    rounding: float = SLACK_TOLERANCE  # relative, of the masses given: by this the totals of a component may differ
    first: tuple[int, int] = (0, 0)  # batch element and head counted from, in messages

    def where(self, n: int, h: int) -> str:
        return f"batch {n + self.first[0]}, head {h + self.first[1]}"


def totals_tolerance(*masses: Tensor | None) -> float:
    """By what share totals may differ: rounding of the coarsest dtype in which masses were given."""
    return max([TOTALS_TOLERANCE, *(torch.finfo(x.dtype).eps for x in masses if x is not None)])


def rounding_of(*masses: Tensor | None) -> float:
    """By what share masses that are meant to be equal may differ."""
    return max([SLACK_TOLERANCE, *(4 * torch.finfo(x.dtype).eps for x in masses if x is not None)])


def check_balanced_totals(row_total: Tensor, col_total: Tensor, tolerance: float) -> None:
    """Equal totals in every problem `[N, H, G]` of a balanced request."""
    wrong = (row_total - col_total).abs() > tolerance * torch.maximum(row_total, col_total)
    if wrong.any():
        n, h, g = wrong.nonzero()[0].tolist()
        rows, cols = told_apart(row_total[n, h, g].item(), col_total[n, h, g].item())
        segment = f", segment {g}" if wrong.shape[-1] > 1 else ""
        raise ValueError(
            f"row_mass sums to {rows} and col_mass to {cols} (batch {n}, head {h}{segment}): a balanced plan needs "
            "equal totals. Rescale one, leave one out (it is then derived), or pass relaxation=tau or a dustbin."
        )


def check_lines(m: IntervalProblem) -> None:
    """No active line is emptied by the window."""
    bare_rows = (m.row_mass > 0) & (m.row_lo >= m.row_hi)
    if bare_rows.any():
        n, h, i = bare_rows.nonzero()[0].tolist()
        raise ValueError(
            f"{m.request} leaves query {i} ({m.where(n, h)}) without any key. Ways out: {m.request.ways_out()}."
        )
    bare_cols = (m.col_mass > 0) & ~m.col_covered
    if bare_cols.any():
        n, h, j = bare_cols.nonzero()[0].tolist()
        raise ValueError(
            f"{m.request} leaves key {j} ({m.where(n, h)}) uncovered by any query, but a balanced plan must use "
            f"its mass. Ways out: {m.request.ways_out()}."
        )


def check_intervals(m: IntervalProblem) -> None:
    """Some plan is positive on the whole support, which is monotone intervals; see the module's text."""
    if m.row_mass.shape[1] > 1 and all(bool((x == x[:, :1]).all()) for x in m[:5]):
        m = m._replace(**{name: getattr(m, name)[:, :1] for name in m._fields[:5]})  # heads alike
    live = m.row_mass > 0
    if not live.any():
        return
    spans = _Spans(m)
    apart = spans.begins & (spans.imbalance().abs() > m.rounding * spans.component_mass())
    starved = live & ~spans.begins & spans.lower_is_tight()
    crowded = live & ~spans.ends & spans.upper_is_tight()
    bad = apart | starved | crowded
    if bad.any():
        n, h, i = bad.nonzero()[0].tolist()
        row, col = (torch.arange(x.shape[-1], device=x.device) for x in (m.row_mass, m.col_mass))
        first_row, next_row, first_col, next_col = (
            int(x[n, h, i if x.shape[-1] > 1 else 0])
            for x in (spans.row_from, spans.row_to, spans.col_from, spans.col_to)
        )
        if not apart[n, h, i]:
            next_row = i + 1 if crowded[n, h, i] else i
            next_col = int((spans.hi if crowded[n, h, i] else spans.lo)[n, h, i])
        rows = (row >= first_row) & (row < next_row) & live[n, h]
        cols = (col >= first_col) & (col < next_col) & (m.col_mass[n, h] > 0)
        if starved[n, h, i] and not crowded[n, h, i] and not apart[n, h, i]:
            raise ValueError(refusal(m, n, h, rows, cols, by_keys=True))
        raise ValueError(refusal(m, n, h, rows, cols, apart=bool(apart[n, h, i])))


class _Spans:
    """Components of monotone intervals, and the cuts between a row and those before or after it: `[N, H, L]`, or
    `[N, H, 1]` for what all rows share."""

    def __init__(self, m: IntervalProblem):
        self.m, (length, size) = m, (m.row_mass.shape[-1], m.col_mass.shape[-1])
        live = (m.row_mass > 0) & (m.row_lo < m.row_hi)
        self.lo, self.hi = monotone_hull(m)
        rows_before, cols_before = (torch.nn.functional.pad((x > 0).cumsum(-1), (1, 0)) for x in m[:2])
        hi_before = torch.nn.functional.pad(self.hi[..., :-1], (1, 0))
        self.begins = live & (cols_before.gather(-1, self.lo) >= cols_before.gather(-1, hi_before))
        index = torch.arange(length, device=live.device).expand(live.shape)
        if bool((self.begins.sum(-1) <= 1).all()):  # one component each, in a fraction of the memory
            self.row_from = self.begins.to(torch.uint8).argmax(-1, keepdim=True)
            self.row_to = torch.full_like(self.row_from, length)
        else:
            self.row_from = torch.where(self.begins, index, 0).cummax(-1).values
            later = torch.where(self.begins, index, length)[..., 1:].flip(-1).cummin(-1).values.flip(-1)
            self.row_to = torch.nn.functional.pad(later, (0, 1), value=length)
        lo_or_end = torch.nn.functional.pad(self.lo, (0, 1), value=size)
        self.col_from, self.col_to = lo_or_end.gather(-1, self.row_from), lo_or_end.gather(-1, self.row_to)
        self.index, self.ends = index, rows_before[..., 1:] == rows_before.gather(-1, self.row_to)
        self.sums = ExactSums(m.row_mass, m.col_mass)
        whole, columns = (self.row_from, self.row_to), (self.col_from, self.col_to)
        self.mass = self.sums.between(*whole), self.sums.between(*columns, columns=True)
        self.excess = self.sums.excess(whole, columns)
        self.surplus = self.excess / self.mass[1].clamp(min=_NONE)  # how much lighter the columns are

    def imbalance(self) -> Tensor:
        """How much the totals of a row's component miss those of its whole problem."""
        held, excess = self.sums.by_segment((self.m.row_segment, self.m.col_segment), self.m.groups)
        scale = by_segment(excess / (held - excess).clamp(min=_NONE), self.m.row_segment, self.index.shape[-1])
        return self.excess - scale * self.mass[1]

    def component_mass(self) -> Tensor:
        return torch.maximum(*self.mass)

    def lower_is_tight(self) -> Tensor:
        """Earlier rows of the component have nothing left for this one from the columns before its interval."""
        return self._tight(self.index, self.lo, -1.0)

    def upper_is_tight(self) -> Tensor:
        """This row and the earlier ones of its component leave nothing of the columns they reach."""
        return self._tight(self.index + 1, self.hi, 1.0)

    def _tight(self, end: Tensor, column: Tensor, sign: float) -> Tensor:
        held = self.sums.between(self.row_from, end)
        room = self.sums.between(self.col_from, column, columns=True)
        excess = self.sums.excess((self.row_from, end), (self.col_from, column)) - self.surplus * room
        inside = held + room
        lighter = torch.minimum(inside, self.mass[0] + self.mass[1] - inside).clamp(min=0)
        return -sign * excess <= SLACK_TOLERANCE * lighter


def refusal(
    m: IntervalProblem, n: int, h: int, rows: Tensor, cols: Tensor, apart: bool = False, by_keys: bool = False
) -> str:
    """Why there is no plan: `rows` and all the columns `cols` that they reach, boolean `[L]` and `[S]`."""
    held, room = float(m.row_mass[n, h][rows].sum()), float(m.col_mass[n, h][cols].sum())
    queries, keys = described(rows, "query", "queries"), described(cols, "key", "keys")
    tight = abs(held - room) <= m.rounding * max(held, room)
    mass, free = told_apart(held, room)
    if apart:
        why = f"{queries} and {keys} reach only each other, but hold mass {mass} and {free}"
    elif by_keys:
        hold, are = ("holds", "is") if int(cols.sum()) == 1 else ("hold", "are")
        why = f"{keys} {hold} mass {free} but {are} reached by {queries} of mass {mass} only"
    else:
        hold, reach = ("holds", "reaches") if int(rows.sum()) == 1 else ("hold", "reach")
        why = f"{queries} {hold} mass {mass} but {reach} {keys} of mass {free} only"
    forced = (
        " Masses that are equal, or nearly so, force a block (the identity, for a causal or one-sided support) and "
        "leave the rest of the support empty: the iteration would crawl towards it with diverging potentials."
        if tight and not apart
        else ""
    )
    return (
        f"{m.request} has no balanced plan that is positive on its support ({m.where(n, h)}): {why}.{forced} "
        f"Ways out: {m.request.ways_out()}."
    )


def told_apart(x: float, y: float) -> tuple[str, str]:
    """Two numbers with as many digits as show that they differ, at least six.

    >>> told_apart(10.0, 9.9999996)
    ('10', '9.9999996')
    """
    for digits in range(6, 17):
        shown = f"{x:.{digits}g}", f"{y:.{digits}g}"
        if shown[0] != shown[1]:
            break
    return shown


def described(tokens: Tensor, one: str, many: str, most: int = 4) -> str:
    """How many, and which ones.

    >>> described(torch.tensor([True, True, True, False, True]), "key", "keys")
    '4 keys (0 to 2, 4)'
    """
    places = tokens.nonzero()[:, 0]
    if len(places) == 1:
        return f"{one} {int(places[0])}"
    first = torch.cat([places[:1], places[1:][places.diff() > 1]])
    last = torch.cat([places[:-1][places.diff() > 1], places[-1:]])
    ends = zip(first[:most].tolist(), last[:most].tolist(), strict=True)
    runs = [str(i) if i == j else f"{i} to {j}" for i, j in ends]
    return f"{len(places)} {many} ({', '.join(runs)}{', ...' if len(first) > most else ''})"


def check_dustbin(m: IntervalProblem, needed: Tensor, flow: Tensor, tolerance: Tensor) -> None:
    """With a dustbin: every problem must carry strictly more real mass, `flow`, than `needed` = sum(a) - col_capacity,
    all `[N, H, G]`."""
    total = segment_sum(m.row_mass, m.row_segment, m.groups)
    wrong = (total > 0) & (needed + tolerance >= flow) & (needed >= -tolerance)
    if wrong.any():
        n, h, g = wrong.nonzero()[0].tolist()
        wanted, most = told_apart(needed[n, h, g].item(), flow[n, h, g].item())
        raise ValueError(
            f"Dustbin capacities leave {wanted} of mass to real pairs, but {m.request} can carry "
            f"{most} at most ({m.where(n, h)}, segment {g}), and the plan must stay below that: raise "
            "row_capacity and col_capacity together, or allow more pairs."
        )


def some_flow(m: IntervalProblem) -> Tensor:
    """`[N, H, G]` mass of the rows that reach something: more than 0 where any pair can carry mass."""
    reachable = m.row_mass * (m.row_lo < m.row_hi)
    return segment_sum(reachable, m.row_segment, m.groups)


def monotone_hull(m: IntervalProblem) -> tuple[Tensor, Tensor]:
    """The smallest monotone intervals holding the live rows' intervals; identity on monotone ones."""
    live = (m.row_mass > 0) & (m.row_lo < m.row_hi)
    hi = torch.where(live, m.row_hi, 0).cummax(-1).values
    lo = torch.where(live, m.row_lo, m.col_mass.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    return lo, hi


def interval_flow(m: IntervalProblem) -> Tensor:
    """`[N, H, G]` a largest flow along monotone intervals: keys are filled from the left, row after row.

    Up to which cumulative key mass x keys are used, each row changes by x -> min(top, max(x, bottom) + its mass): such
    functions, written min(top, max(x + shift, least)), compose to such functions, by doubling in O(n log n).
    """
    lo, hi = monotone_hull(m)
    before = torch.nn.functional.pad(m.col_mass.cumsum(-1), (1, 0))
    bottom, live = before.gather(-1, lo), (m.row_mass > 0) & (m.row_lo < m.row_hi)
    top = torch.where(live, before.gather(-1, hi), torch.inf)
    shift = torch.where(live, m.row_mass, 0.0)
    least = torch.where(live, bottom + shift, 0.0)
    step = 1
    while step < shift.shape[-1]:
        earlier = [x[..., :-step] for x in (top, shift, least)]
        late = slice(step, None)
        joined = (
            torch.minimum(top[..., late], torch.maximum(earlier[0] + shift[..., late], least[..., late])),
            earlier[1] + shift[..., late],
            torch.maximum(earlier[2] + shift[..., late], least[..., late]),
        )
        first = (x[..., :step] for x in (top, shift, least))
        top, shift, least = (torch.cat(pair, -1) for pair in zip(first, joined, strict=True))
        step *= 2
    used = torch.minimum(top, torch.maximum(shift, least))
    used_before = torch.nn.functional.pad(used[..., :-1], (1, 0))
    taken = torch.where(live, used - torch.maximum(used_before, bottom), 0.0)
    return segment_sum(taken, m.row_segment, m.groups)
