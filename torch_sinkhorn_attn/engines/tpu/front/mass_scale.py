"""The unit of mass of a balanced problem, which does not depend on it, as `torch_sinkhorn_attn.problem.mass_scale` has
it: a power of two amid the masses of each head, so that tiny and huge ones do not leave the range of numbers. A relaxed
problem stays in the caller's: nothing may look here whether it has to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class MassScale(NamedTuple):
    power: Array  # log2 of the unit, int32 [N, H]
    by_rows: bool  # whether its logarithm is part of the row potentials (T = R = 0), or of the columns'

    def into(self, mass: Array) -> Array:
        """Masses `[N, H, n]` of the caller's in the problem's unit."""
        return _times_exp2(mass, -self.power)

    def back(self, x: Array) -> Array:
        """Masses of the problem's `[N, H, ...]` in the caller's unit."""
        return _times_exp2(x, self.power)

    def shifts(self, dtype: jnp.dtype) -> tuple[Array, Array]:
        """What is added to row and column potentials `[N, H, n]` to have the caller's."""
        log_unit = (self.power * math.log(2)).astype(dtype)[..., None]
        zero = jnp.zeros_like(log_unit)
        return (log_unit, zero) if self.by_rows else (zero, log_unit)


def _times_exp2(x: Array, power: Array) -> Array:
    power = power.reshape(*power.shape, *[1] * (x.ndim - power.ndim))
    half = power // 2  # the whole may leave the range where the product does not
    one = jnp.ones((), x.dtype)
    return x * jnp.ldexp(one, half) * jnp.ldexp(one, power - half)


def find_scale(masses: Sequence[Array], half_steps: bool) -> MassScale | None:
    """The unit in the middle of the masses `[N, H, n]`, 0 where inactive."""
    every = jnp.concatenate(masses, -1)
    if every.shape[-1] == 0:
        return None
    exponent = jnp.log2(every)
    largest, smallest = exponent.max(-1), jnp.where(every > 0, exponent, jnp.inf).min(-1)
    middle = jnp.where(largest > -jnp.inf, jnp.round((largest + smallest) / 2), 0)
    return MassScale(lax.stop_gradient(middle).astype(jnp.int32), by_rows=not half_steps)
