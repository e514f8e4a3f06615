"""Chebyshev semi-iteration of the stopped base. For torch and for JAX.

With u the row half-step of v, an iteration is a map v -> F(v) of the column potentials. Near its fixed point it is
linear, symmetric under <x, y>_b = sum_j b_j x_j y_j, and its eigenvalues lie in [0, lambda]: a plain iteration shrinks
the error by lambda at worst. The iterates

    v^(t+1) = omega_k (v^t + g (F(v^t) - v^t) - v^(t-1)) + v^(t-1),   g = 2 / (2 - lambda),   mu = lambda / (2 - lambda)
    omega_1 = 1,   omega_2 = 1 / (1 - mu^2 / 2),   omega_(k+1) = 1 / (1 - omega_k mu^2 / 4)

shrink it as fast as any combination of them can (G. Golub and R. Varga, Chebyshev semi-iterative methods, successive
overrelaxation iterative methods, and second order Richardson iterative methods, Numerische Mathematik 3, 1961). An
eigenvalue between lambda and 1 is not shrunk as well, but never grows. The steps' weights sum to 1, so that neither the
gauge nor the unit of mass is felt.

Row half-steps stay plain, and so do the first iterations (`options.plain_iterations`): far from the fixed point nothing
is linear. Where lambda is not given it is estimated from how the change shrinks,

    r = ||v^3 - v^2||_b / ||v^2 - v^1||_b,   lambda = min(1 - (1 - r) / 4, 0.9),

for each problem (batch element, head, segment) on its own: r is nearer to the fast eigenvalues than to the slowest.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch_sinkhorn_attn.arrays import Array, namespace
from torch_sinkhorn_attn.options import plain_iterations
from torch_sinkhorn_attn.problem.segments import Components, by_segment

LARGEST_ESTIMATE = 0.9


class Momentum(NamedTuple):
    """What an iteration leaves to the next: one number for each problem `[N, H, G]`, and the potentials before."""

    before: Array  # v^(t-1) [N, H, S(+G)]
    log_change: Array  # log ||v^t - v^(t-1)||_b, where lambda is estimated
    contraction: Array  # lambda, once known
    omega: Array  # of the next step


def start(v: Array, own: Components, contraction: float) -> Momentum:
    """Before the first iteration. `contraction` is the lambda given; 0: it is estimated."""
    zero = namespace(v).zeros_like(own.col_max(v))
    return Momentum(v, zero, zero + contraction, zero + 1)


def step(
    t: Any, v: Array, plain: Array, last: Momentum, log_b: Array, own: Components, contraction: float
) -> tuple[Array, Momentum]:
    """v^(t+1) from v^t and `plain` = F(v^t), and what the next iteration needs. `t` counts from 0: a Python integer, or
    of JAX a traced one."""
    first = plain_iterations(contraction)
    log_change, lam = last.log_change, last.contraction
    if not contraction and not (isinstance(t, int) and t not in (1, 2)):
        log_change = log_norm(plain - v, log_b, own)
        lam = _where(t == 2, estimate(log_change, last.log_change), lam)
    g, mu = 2 / (2 - lam), lam / (2 - lam)
    size = v.shape[-1]
    by_g, by_omega = (by_segment(x, own.col, size) for x in (last.omega * g, last.omega - 1))
    accelerated = v + by_g * (plain - v) + by_omega * (v - last.before)
    weight = _where(t == first, 2 * last.omega, last.omega)  # of mu^2 / 4: omega_2 counts omega_1 twice
    omega = _where(t >= first, 1 / (1 - weight * mu**2 / 4), last.omega)
    return _where(t >= first, accelerated, plain), Momentum(v, log_change, lam, omega)


def log_norm(change: Array, log_b: Array, own: Components) -> Array:
    """log ||x||_b of each problem, `[N, H, S(+G)]` to `[N, H, G]`; -inf for 0. By logarithms, for the squares of
    potentials may leave the range of float32."""
    xp = namespace(change)
    return own.col_logsumexp(log_b + 2 * xp.log(xp.abs(change))) / 2


def estimate(log_change: Array, log_change_before: Array) -> Array:
    """lambda of each problem, from the log norms of two changes in a row. Where the first is 0, so is r."""
    xp = namespace(log_change)
    still = log_change_before == -math.inf
    r = xp.exp(xp.clip(log_change - xp.where(still, 0.0, log_change_before), -math.inf, 0))
    return xp.clip(1 - (1 - xp.where(still, 0.0, r)) / 4, 0, LARGEST_ESTIMATE)


def _where(condition: Any, x: Array, y: Array) -> Array:
    if isinstance(condition, bool):
        return x if condition else y
    return namespace(x).where(condition, x, y)
