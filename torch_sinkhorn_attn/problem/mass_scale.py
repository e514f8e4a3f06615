"""The unit of mass. A balanced problem does not depend on it, but numbers do: in float32 a plan of masses of 1e-39 has
no digits left. So engines solve every head in a unit of its own, a power of two amid its masses, which leaves room on
both sides of twelve decades and of sixty; what they find is given back in the caller's.

With masses s a, s b for a, b the same half-steps lead to u + du, v + dv, if they start there:

    du = rho_r (log s - dv)        dv = rho_c (log s - du)

Balanced, that is any pair of sum log s, and the column half-step, which comes first, makes it (0, log s), from any u;
with T = R = 0 there is none and the row half-step makes it (log s, 0). Relaxed, it is log s times t_r / (t_r + t_c + 1)
and t_c / (t_r + t_c + 1), t = rho / (1 - rho), which is no longer log s in sum: plan and masses then scale differently.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torch_sinkhorn_attn.problem.problem import Result

COMFORT = 32  # problems relaxed on both sides change their unit only if a mass lies beyond 2^-32 .. 2^32


class MassScale(NamedTuple):
    """The unit s of each head, and where it went. A mass m of the caller's is m / s in the problem."""

    power: Tensor  # log2 s, whole numbers [N, H], in the compute dtype
    row_share: float  # du / log s
    col_share: float

    def shifted(self, row: Tensor, col: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
        """Potentials `[..., N, H, n]` as the caller has them, from those of the problem; or `back`."""
        log_unit = (-1 if back else 1) * math.log(2) * self.power[..., None]
        return row + self.row_share * log_unit, col + self.col_share * log_unit

    def of_plan(self, x: Tensor) -> Tensor:
        """Entries or sums of the plan `[N, H, ...]` in the caller's unit; 0 stays 0 beside any."""
        return _times_exp2(x, (self.row_share + self.col_share) * self.power)

    def of_mass(self, x: Tensor) -> Tensor:
        """Masses `[N, H, ...]`, or residuals where they scale like the plan, in the caller's unit."""
        return _times_exp2(x, self.power)

    def even(self) -> bool:  # a method: torch.compile does not trace properties of tuples
        """Whether plan and masses scale alike."""
        return self.row_share + self.col_share == 1

    def of_output(self, x: Tensor) -> Tensor:
        """Outputs `[N, H, L, Ev]`: of the plan over the rows' masses."""
        if self.even():
            return x
        return _times_exp2(x, (self.row_share + self.col_share - 1) * self.power)

    def restored(self, result: Result, log_row_mass: Tensor, log_col_mass: Tensor) -> Result:
        """What an engine found, in the caller's unit; 0 where a token is inactive. Masses are augmented. Residuals
        only where plan and masses scale alike."""
        row, col = result.potentials
        moved = self.shifted(row, col)
        active = log_row_mass > -torch.inf, log_col_mass > -torch.inf
        pair = (torch.where(on, x, 0.0) for on, x in zip(active, moved, strict=True))
        bins = (x if x.numel() == 0 else self.of_plan(x) for x in (result.row_dustbin, result.col_dustbin))
        return Result(
            self.of_output(result.output), type(result.potentials)(*pair),
            self.of_mass(result.row_residual), self.of_mass(result.col_residual), *bins,
        )  # fmt: skip


def _times_exp2(x: Tensor, exponent: Tensor) -> Tensor:
    factor = exponent.to(x.device, x.dtype).exp2().reshape(*exponent.shape, *[1] * (x.ndim - exponent.ndim))
    return torch.where(x == 0, x, x * factor)


def find_scale(
    masses: list[Tensor], rho: tuple[float, float], half_steps: bool, look: bool, dtype: torch.dtype
) -> MassScale | None:
    """The unit of each head for its masses `[N, H, n]`, 0 where inactive: the power of two in the middle of the largest
    and the smallest. None where the caller's may stay: a problem relaxed on both sides, whose residuals cost another
    pass in any other, unless `look` finds masses that are far from 1."""
    every = torch.cat(masses, -1)
    if every.shape[-1] == 0:
        return None
    exponent = every.log2()
    largest = exponent.amax(-1)
    smallest = torch.where(every > 0, exponent, torch.inf).amin(-1)
    some = largest > -torch.inf
    far = some & ((largest > COMFORT) | (smallest < -COMFORT))
    if 1.0 not in rho and not (look and bool(far.any())):
        return None
    middle = torch.where(some, ((largest + smallest) / 2).round(), 0.0)
    shares = _shares(rho, half_steps)
    return MassScale(middle.to(dtype), *shares)


def in_units(scale: MassScale, mass: Tensor) -> Tensor:
    """Masses `[N, H, n]` of the caller's in the problem's unit."""
    return mass / scale.power.to(mass.dtype).exp2()[..., None]


def _shares(rho: tuple[float, float], half_steps: bool) -> tuple[float, float]:
    if rho == (1.0, 1.0):
        return (0.0, 1.0) if half_steps else (1.0, 0.0)
    if 1.0 in rho:  # the balanced side takes all of it
        return (1.0, 0.0) if rho[0] == 1.0 else (0.0, 1.0)
    strength = [x / (1 - x) for x in rho]
    total = sum(strength) + 1
    return strength[0] / total, strength[1] / total
