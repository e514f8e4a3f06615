"""Small transport problems between point sets, of numbers that integer arithmetic makes: the same everywhere.

All of them: cost C_ij = |x_i - y_j|^2, reference measure a b^T, KL(P | Q) = sum P log(P / Q) - P + Q, and

    value  = min_P  sum P C + epsilon KL(P | a b^T) + tau_row KL(P 1 | a) + tau_col KL(P^T 1 | b)
    linear = sum P C at that P                    P = a b^T exp((f + g - C) / epsilon)
    divergence = value(x, y) - value(x, x) / 2 - value(y, y) / 2 + epsilon / 2 (sum a - sum b)^2

where a side without tau is balanced, and f, g are the dual potentials. Scores are -C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

D = torch.float64


class PointProblem(NamedTuple):
    x: Tensor  # [n, d]
    y: Tensor  # [m, d]
    a: Tensor  # [n]
    b: Tensor  # [m]
    epsilon: float
    tau: tuple[float | None, float | None] = (None, None)

    @property
    def cost(self) -> Tensor:
        return (self.x[:, None] - self.y[None]).square().sum(-1)


def _numbers(seed: int, *shape: int) -> Tensor:
    """In [0, 1), by a linear congruential generator of 31 bits."""
    state, found = seed, []
    for _ in range(torch.Size(shape).numel()):
        state = (1103515245 * state + 12345) % 2**31
        found.append(state / 2**31)
    return torch.tensor(found, dtype=D).reshape(shape)


def _problem(
    seed: int,
    sizes: tuple[int, int],
    features: int,
    epsilon: float,
    tau: tuple[float | None, float | None] = (None, None),
    totals: tuple[float, float] = (1.0, 1.0),
    uniform: bool = False,
) -> PointProblem:
    points = [_numbers(seed + side, n, features) + 0.25 * side for side, n in enumerate(sizes)]
    masses = [torch.ones(n, dtype=D) if uniform else _numbers(seed + 10 + n, n) + 0.25 for n in sizes]
    a, b = (x * total / x.sum() for x, total in zip(masses, totals, strict=True))
    return PointProblem(*points, a, b, epsilon, tau)


PROBLEMS = {
    "uniform": _problem(1, (6, 6), 2, 0.5, uniform=True),
    "rectangular": _problem(2, (5, 7), 3, 0.2),
    "sharp": _problem(3, (6, 5), 2, 0.05),
    "relaxed": _problem(4, (5, 6), 2, 0.3, tau=(1.0, 1.0)),
    "unequal totals": _problem(5, (7, 4), 3, 0.25, tau=(0.5, 0.5), totals=(1.0, 1.5)),
    "one side relaxed": _problem(6, (4, 5), 2, 0.4, tau=(0.7, None)),
}
