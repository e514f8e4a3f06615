"""What would balance a plan that is not balanced: settings that were tried, by the engine, on the slowest problem.

Which to try the rate tells: more plain iterations, over-relaxed ones at 1.5 and at the optimum 2 / (1 + sqrt(1 -
rate)), and accelerated ones with it for their contraction. Each runs on, T growing, until it is balanced, or at the
pace of its last steps would not be soon: the slowest part of an error is the last to be seen, so this pace only falls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.options import CONVERGED_WITHIN
from torch_sinkhorn_attn.problem.arguments import Prepared
from torch_sinkhorn_attn.problem.status import Status
from torch_sinkhorn_attn.thermometer.passes import Passes
from torch_sinkhorn_attn.thermometer.quick import Returned

TARGET = CONVERGED_WITHIN  # of |log(column sum / b_j)|
MOST, CALLS = 8, 12  # times T + R: iterations of one setting, and of all
FEWEST = 10  # of T + R, where few were asked for
NOT_FINITE = "Potentials are not finite: the inputs hold NaN, or scores beyond the range of numbers."
HIGHEST_CONTRACTION, HIGHEST_OMEGA = 0.9999, 1.98


@dataclass(frozen=True)
class Setting:
    """Another base. `plain` goes on from where the call ended; the others start anew."""

    words: str
    options: dict[str, Any]
    plain: bool = False

    def said(self, base: int) -> str:
        return f"{self.words} with base_iters={base}" if self.words else f"base_iters={base}"


class Tried(NamedTuple):
    """A setting after T iterations, and how far off it leaves the problem."""

    setting: Setting
    base: int
    error: float

    @property
    def reached(self) -> bool:
        return self.error <= TARGET

    def __str__(self) -> str:
        return self.setting.said(self.base)


def advice(
    passes: Passes, at: Returned, rate: Tensor, status: Tensor, reasons: Sequence[str], prepared: Prepared
) -> str:
    """In words; "" where every problem is balanced. rate, status: `[N, H, G]` on the CPU. Where no plan exists the
    reason says what to do."""
    told = list(reasons[:1])
    movement = passes.movement(at.v, at.plain).cpu()
    loose = (status == Status.NOT_CONVERGED) | ((status == Status.RELAXED) & ~(movement <= TARGET))
    if not loose.any():
        return "\n".join(told)
    finite = torch.where(loose & movement.isfinite(), movement, 0.0)
    if not finite.any():
        return "\n".join([*told, NOT_FINITE])
    needed = (finite / TARGET).clamp(min=1 + 1e-6).log() / -rate.clamp(1e-6, 1 - 1e-6).log()
    n, h, g = _unravel(int(needed.masked_fill(~loose, -1.0).argmax()), needed.shape)
    packed = passes.problem.support.row_segment is not None
    place = (*_unravel(n, prepared.batch), *[h] * (not prepared.headless), *[g] * packed)
    one = passes.at(n, h)
    here = Returned(*(x[n : n + 1, h : h + 1] for x in at))
    error = float(movement[n, h, g])
    found = _search(one, here, error, float(rate[n, h, g]), g)
    where = f"problem {place}, the slowest," if needed.numel() > 1 else "the problem"
    off = f"sum of {where} is off" if one.problem.solver.rho_col == 1 else f"potential of {where} still moves"
    return "\n".join([*told, f"A column {off} by {_share(error)}: {found}"])


def _unravel(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The indices of an entry, which `torch.unravel_index` takes a second to find the first time."""
    found = []
    for size in reversed(shape):
        place, index = divmod(place, size)
        found.append(index)
    return tuple(reversed(found))


def _search(passes: Passes, at: Returned, error: float, rate: float, g: int) -> str:
    solver = passes.problem.solver
    asked = max(FEWEST, solver.base_iters + solver.tail_iters)
    budget, most = CALLS * asked, MOST * asked
    tried: list[Tried] = []
    for setting in _settings(passes, rate):
        fastest = [x.base for x in tried if x.reached]
        limit = min([most, *(2 * base for base in fastest if not setting.plain)])
        if fastest and fastest[0] <= 1.5 * solver.base_iters:
            break
        runs = [Tried(setting, solver.base_iters, error)] if setting.plain else []
        start = len(runs)
        for base, cost, movement in _runs(passes, setting, at, limit):
            runs.append(Tried(setting, base, float(movement[0, 0, g])))
            budget -= cost
            if budget <= 0 or runs[-1].reached or _hopeless(runs, limit):
                break
        tried += runs[start:][-1:]
        if budget <= 0:
            break
    best = _best(x for x in tried if x.reached)
    if best:
        return f"{', or '.join(map(str, best))}{',' * (len(best) > 1)} reaches {_share(TARGET)}."
    out = "A larger epsilon, or relaxation, takes fewer iterations."
    less = [f"{x} leaves {_share(x.error)}" for x in _best(x for x in tried if x.error < error)]
    return f"nothing tried reaches {_share(TARGET)}{': ' * bool(less)}{', '.join(less)}. {out}"


def _hopeless(runs: Sequence[Tried], limit: int) -> bool:
    """At the pace of its last step it would take more than `limit` iterations; or it did not improve in two."""
    if len(runs) < 2:
        return False
    before, last = runs[-2:]
    if not last.error < before.error:
        return not last.error < math.inf or (len(runs) > 2 and not last.error < runs[-3].error)
    pace = math.log(before.error / last.error) / (last.base - before.base)
    return last.base + math.log(last.error / TARGET) / pace > limit


def _best(tried: Iterable[Tried]) -> list[Tried]:
    """The best of each kind, of omegas above all."""
    found: dict[str, Tried] = {}
    for x in tried:
        kind = x.setting.words.partition("=")[0]
        if kind not in found or (x.base, x.error) < (found[kind].base, found[kind].error):
            found[kind] = x
    return list(found.values())


def _settings(passes: Passes, rate: float) -> Iterator[Setting]:
    """The simplest first."""
    solver = passes.problem.solver
    plain = solver.over_relaxation == 1 and solver.acceleration is None
    if plain:
        yield Setting("", {}, plain=True)
    if solver.gradient == "unrolled":
        return
    contraction = min(math.floor(rate * 1e4) / 1e4, HIGHEST_CONTRACTION)
    best = min(round(2 / (1 + math.sqrt(max(0.0, 1 - rate))), 2), HIGHEST_OMEGA)
    for omega in dict.fromkeys((*(() if plain else (solver.over_relaxation,)), 1.5, best)):
        if omega > 1:
            yield Setting(f"over_relaxation={omega}", {"over_relaxation": omega})
    if contraction > 0:
        words = f"acceleration='chebyshev', contraction={contraction}"
        yield Setting(words, {"acceleration": "chebyshev", "contraction": contraction})


def _runs(passes: Passes, setting: Setting, at: Returned, limit: int) -> Iterator[tuple[int, int, Tensor]]:
    """(T, iterations it cost, movement of the plan returned after it), T growing by a quarter or a half."""
    solver = passes.problem.solver
    tail, base = solver.tail_iters, solver.base_iters
    fresh = {"gradient": "tail", "tolerance": 0.0, "over_relaxation": 1.0, "acceleration": None, "contraction": 0.0}
    options = {**fresh, **setting.options}
    if setting.plain:
        u, v = at.u, at.v
        for more in _grid(base + 1, limit, 1.25):
            found = passes.solve(u, v, **options, base_iters=more - base, tail_iters=1)
            u, v = found.row[0], found.col[0]
            yield more, more - base + 1, passes.movement(found.col[0], found.col[1])
            base = more
        return
    continues = "acceleration" not in setting.options
    u, v = passes.start()
    done = 0
    for more in _grid(max(5, base), limit, 1.25 if continues else 1.5):
        found = passes.solve(u, v, **options, base_iters=more - done, tail_iters=tail + 1)
        yield more, more - done + tail + 1, _after(passes, found.row, found.col)
        if continues:
            u, v, done = found.row[0], found.col[0], more


def _after(passes: Passes, rows: Tensor, cols: Tensor) -> Tensor:
    """The movement at the plan returned, from its potentials and one iteration more."""
    if len(cols) > 2:
        return passes.movement(cols[-2], cols[-1])
    return passes.movement(cols[0], passes.column(passes.row(cols[0])))  # without a tail the row half-step is plain


def _grid(first: int, limit: int, growth: float) -> Iterator[int]:
    """Round numbers from the first on that are at most `limit`.

    >>> list(_grid(20, 100, 1.25)), list(_grid(5, 12, 1.25)), list(_grid(101, 300, 1.5))
    ([20, 25, 35, 45, 60, 75, 95], [5, 7, 9, 12], [120, 180, 280])
    """
    at = float(first)
    while True:
        step = 1 if at < 20 else 5 if at < 100 else 20
        found = math.ceil(at / step) * step
        if found > limit:
            return
        yield found
        at = found * growth


def _share(x: float) -> str:
    return f"{100 * x:.3g} %" if x < 10 else f"a factor of {math.exp(min(x, 700)):.3g}"
