"""The unit of mass. A balanced problem does not depend on it, but numbers do: in float32 a plan of masses of 1e-39 has
no digits left. So engines solve every head in a unit of its own, a power of two amid its masses, which leaves room on
both sides of twelve decades and of sixty; what they find is given back in the caller's. For torch and for JAX, which
leaves relaxed problems in the caller's.

With masses s a, s b for a, b the same half-steps lead to u + du, v + dv, if they start there:

    du = rho_r (log s - dv)        dv = rho_c (log s - du)

Balanced, that is any pair of sum log s, and the column half-step, which comes first, makes it (0, log s), from any u;
with T = R = 0 there is none and the row half-step makes it (log s, 0). Relaxed, it is log s times t_r / (t_r + t_c + 1)
and t_c / (t_r + t_c + 1), t = rho / (1 - rho), which is no longer log s in sum: plan and masses then scale differently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch_sinkhorn_attn.arrays import Array, namespace

COMFORT = 32  # problems relaxed on both sides change their unit only if a mass lies beyond 2^-32 .. 2^32


class MassScale(NamedTuple):
    """The unit s of each head, and where it went. A mass m of the caller's is m / s in the problem."""

    power: Array  # log2 s, whole numbers [N, H], in the compute dtype
    row_share: float  # du / log s
    col_share: float

    def shifted(self, row: Array, col: Array, back: bool = False) -> tuple[Array, Array]:
        """Potentials `[..., N, H, n]` as the caller has them, from those of the problem; or `back`."""
        log_unit = (-1 if back else 1) * math.log(2) * self.power[..., None]
        return row + self.row_share * log_unit, col + self.col_share * log_unit

    def of_plan(self, x: Array) -> Array:
        """Entries or sums of the plan `[N, H, ...]` in the caller's unit; 0 stays 0 beside any."""
        return namespace(x).times_exp2(x, (self.row_share + self.col_share) * self.power)

    def of_log_plan(self, x: Array) -> Array:
        """Logarithms `[N, H, L, S]` of its entries in the caller's unit."""
        return x + math.log(2) * (self.row_share + self.col_share) * self.power[..., None, None]

    def of_mass(self, x: Array) -> Array:
        """Masses `[N, H, ...]`, or residuals where they scale like the plan, in the caller's unit."""
        return namespace(x).times_exp2(x, self.power)

    def even(self) -> bool:  # a method: torch.compile does not trace properties of tuples
        """Whether plan and masses scale alike."""
        return self.row_share + self.col_share == 1

    def of_output(self, x: Array) -> Array:
        """Outputs `[N, H, L, Ev]`: of the plan over the rows' masses."""
        if self.even():
            return x
        return namespace(x).times_exp2(x, (self.row_share + self.col_share - 1) * self.power)

    def restored(self, row: Array, col: Array, log_row_mass: Array, log_col_mass: Array) -> tuple[Array, Array]:
        """`shifted`, and 0 where a token is inactive. Masses are augmented."""
        row, col = self.shifted(row, col)
        where = namespace(row).where
        return where(log_row_mass > -math.inf, row, 0.0), where(log_col_mass > -math.inf, col, 0.0)


def find_scale(
    masses: Sequence[Array], rho: tuple[float, float], half_steps: bool, look: bool, dtype: Any
) -> MassScale | None:
    """The unit of each head for its masses `[N, H, n]`, 0 where inactive: the power of two in the middle of the largest
    and the smallest. None where the caller's may stay: a problem relaxed on both sides, whose residuals cost another
    pass in any other, unless `look` finds masses that are far from 1."""
    xp = namespace(masses[0])
    every = xp.concat(masses, -1)
    if every.shape[-1] == 0 or (1.0 not in rho and not look):
        return None
    exponent = xp.log2(every)
    largest, smallest = xp.max(exponent, -1), xp.min(xp.where(every > 0, exponent, math.inf), -1)
    some = largest > -math.inf
    if 1.0 not in rho and not bool((some & ((largest > COMFORT) | (smallest < -COMFORT))).any()):
        return None
    middle = xp.where(some, xp.round((largest + smallest) / 2), 0.0)
    return MassScale(xp.astype(middle, dtype), *_shares(rho, half_steps))


def in_units(scale: MassScale, mass: Array) -> Array:
    """Masses `[N, H, n]` of the caller's in the problem's unit."""
    return namespace(mass).over_exp2(mass, scale.power)


def _shares(rho: tuple[float, float], half_steps: bool) -> tuple[float, float]:
    if rho == (1.0, 1.0):
        return (0.0, 1.0) if half_steps else (1.0, 0.0)
    if 1.0 in rho:  # the balanced side takes all of it
        return (1.0, 0.0) if rho[0] == 1.0 else (0.0, 1.0)
    strength = [x / (1 - x) for x in rho]
    total = sum(strength) + 1
    return strength[0] / total, strength[1] / total
