"""Oracles of the existence of a plan that is positive on a whole support: by linear programs, and by trying all sets of
rows; and random problems for them.

A cut is a set R of rows and the columns N(R) that they reach. With exact fractions of the masses, totals brought to 1,
there is such a plan iff every cut has slack b(N(R)) - a(R) > 0, or = 0 where no other row reaches N(R). Fractions stand
for floats, which are rounded: slack within 2^-46 of the masses on a cut's lighter side counts as none.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

D = torch.float64
KINDS = ("integers", "uniform", "decades", "sums of a plan", "sums of an integer plan")


def draw(seed: int, most: int = 7) -> tuple[str, Tensor, Tensor, Tensor]:
    """(kind of masses, support `[n, m]`, a, b): no line of the support is empty, totals are equal up to rounding."""
    g = torch.Generator().manual_seed(seed)
    while True:
        n, m = (int(torch.randint(1, most + 1, (1,), generator=g)) for _ in range(2))
        keep = torch.rand(n, m, generator=g) < float(torch.rand(1, generator=g) * 0.8 + 0.2)
        kind = KINDS[int(torch.randint(0, len(KINDS), (1,), generator=g))]
        a, b = _masses(kind, keep, g)
        if keep.any(0).all() and keep.any(1).all() and (a > 0).all() and (b > 0).all():
            return kind, keep, a, b


def _masses(kind: str, keep: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    n, m = keep.shape

    def decades(*shape: int) -> Tensor:
        return 10 ** (12 * torch.rand(*shape, generator=g, dtype=D) - 12)

    if kind == "integers":  # ties are common
        a, b = (torch.randint(1, 4, (k,), generator=g).to(D) for k in (n, m))
        more = float(a.sum() - b.sum())
        (b if more > 0 else a)[int(torch.randint(0, m if more > 0 else n, (1,), generator=g))] += abs(more)
        return a, b
    if kind == "uniform":
        return torch.ones(n, dtype=D), torch.full((m,), n / m, dtype=D)
    if kind == "decades":
        a, b = decades(n), decades(m)
        return a, b * (a.sum() / b.sum())
    if kind == "sums of a plan":
        plan = decades(n, m) * keep
    else:  # zeros on some pairs: cuts that are tight
        plan = torch.randint(1, 10, (n, m), generator=g).to(D) * keep * (torch.rand(n, m, generator=g) < 0.7)
    return plan.sum(1), plan.sum(0)


class Cuts:
    """The exact masses of a problem, and the judgement of single cuts."""

    def __init__(self, keep: Tensor, a: Tensor, b: Tensor):
        self.keep = keep.numpy()
        rows, cols = ([Fraction(x) for x in mass.tolist()] for mass in (a, b))
        self.a, self.b = [x / sum(rows) for x in rows], [x / sum(cols) for x in cols]

    def blocks(self, rows: np.ndarray) -> bool:
        """Whether the cut of these rows (bool) leaves no plan positive on the support."""
        cols = self.keep[rows].any(0)
        if not cols.any() or rows.all():
            return False
        held = sum((x for x, inside in zip(self.a, rows, strict=True) if inside), Fraction(0))
        room = sum((x for x, inside in zip(self.b, cols, strict=True) if inside), Fraction(0))
        if self.keep[~rows][:, cols].any():
            return (room - held) * 2**46 <= min(held + room, 2 - held - room)
        return abs(room - held) * 2**46 > max(held, room)


def has_plan_by_enumeration(keep: Tensor, a: Tensor, b: Tensor) -> bool:
    cuts, n = Cuts(keep, a, b), keep.shape[0]
    return not any(cuts.blocks(np.array([r >> i & 1 for i in range(n)], dtype=bool)) for r in range(1, 2**n - 1))


def has_plan_by_programs(keep: Tensor, a: Tensor, b: Tensor) -> bool:
    """Linear programs for the cuts of least slack: one for all of them, and one for each pair (i, j) of the support,
    among the cuts that j is in and i is not. Their vertices are whole cuts, which are then judged exactly."""
    cuts = Cuts(keep, a, b)
    return not any(cuts.blocks(rows) for rows in _least_slack(keep.numpy(), cuts))


def _least_slack(keep: np.ndarray, cuts: Cuts) -> Iterator[np.ndarray]:
    (n, m), pairs = keep.shape, np.argwhere(keep)
    smallest = min(*cuts.a, *cuts.b)
    objective = np.array([-float(x / smallest) for x in cuts.a] + [float(x / smallest) for x in cuts.b])
    within = np.zeros((len(pairs), n + m))  # row i inside takes column j inside
    within[range(len(pairs)), pairs[:, 0]], within[range(len(pairs)), n + pairs[:, 1]] = 1, -1
    for i, j in [(None, None), *pairs]:
        bounds = [(0, 1)] * (n + m)
        if i is not None:
            bounds[i], bounds[n + j] = (0, 0), (1, 1)
        found = linprog(objective, A_ub=within, b_ub=np.zeros(len(pairs)), bounds=bounds, method="highs-ds")
        assert found.status == 0, found.message
        yield found.x[:n] > 0.5
