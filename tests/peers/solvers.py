"""The peers, each asked in its own conventions for what `problems` defines: POT, GeomLoss and OTT-JAX.

Every function gives a dictionary of lists: `value`, `linear`, `plan`, `f`, `g` (potentials, up to a constant where both
sides are balanced), `grad_x` (of the value with respect to x) and `divergence`, `divergence_grad_x`, as far as the peer
computes them; None for a problem that it does not take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peers.problems import PointProblem

Found = dict[str, Any]


def _lists(**found: Any) -> Found:
    return {name: x.tolist() if hasattr(x, "tolist") else x for name, x in found.items() if x is not None}


def pot(p: PointProblem) -> Found | None:
    """`ot.solve` with reg_type="KL", balanced; its gradient by its envelope mode. Unbalanced the matrix scaling of
    `ot.sinkhorn_unbalanced`, reg_type="kl", whose value is summed up here: its own reports another sum for KL terms.
    `empirical_sinkhorn_divergence` is made of linear parts, another divergence, and is left out."""
    import ot

    x = p.x.clone().requires_grad_()
    cost = (x[:, None] - p.y[None]).square().sum(-1)
    if p.tau == (None, None):
        solved = ot.solve(cost, p.a, p.b, reg=p.epsilon, reg_type="KL", grad="envelope", max_iter=100_000, tol=1e-14)
        (grad,) = torch.autograd.grad(solved.value, x)
        u, v = solved.potentials  # P = exp(u + v - C / epsilon)
        f, g = p.epsilon * (u - p.a.log()), p.epsilon * (v - p.b.log())
        return _lists(value=solved.value.detach(), linear=solved.value_linear.detach(), plan=solved.plan.detach(),
                      f=f.detach(), g=g.detach(), grad_x=grad)  # fmt: skip
    limits = tuple(float("inf") if t is None else t for t in p.tau)
    plan, log = ot.sinkhorn_unbalanced(
        p.a, p.b, cost.detach(), p.epsilon, limits, reg_type="kl", numItermax=100_000, stopThr=1e-15, log=True
    )
    return _lists(value=_value(p, plan), linear=(plan * p.cost).sum(), plan=plan,
                  f=p.epsilon * log["logu"], g=p.epsilon * log["logv"])  # fmt: skip


def _value(p: PointProblem, plan: Tensor) -> Tensor:
    def kl(found: Tensor, wanted: Tensor) -> Tensor:
        return (found * (found / wanted).log() - found + wanted).sum()

    total = (plan * p.cost).sum() + p.epsilon * kl(plan, p.a[:, None] * p.b)
    for tau, found, wanted in zip(p.tau, (plan.sum(1), plan.sum(0)), (p.a, p.b), strict=True):
        total = total + (0.0 if tau is None else tau * kl(found, wanted))
    return total


def geomloss(p: PointProblem) -> Found | None:
    """`SamplesLoss("sinkhorn", p=2)`, whose cost is |x - y|^2 / 2: with half of epsilon and tau, its value is half of
    ours. `scaling` close to 1 lets the temperature fall slowly, so that the last of its iterations have converged."""
    from geomloss import SamplesLoss

    if p.tau[0] != p.tau[1]:
        return None
    options: Any = {"blur": (p.epsilon / 2) ** 0.5, "reach": None if p.tau[0] is None else (p.tau[0] / 2) ** 0.5,
                    "scaling": 0.9995, "backend": "tensorized"}  # fmt: skip
    x = p.x.clone().requires_grad_()
    value = 2 * SamplesLoss("sinkhorn", p=2, debias=False, **options)(p.a, x, p.b, p.y)
    divergence = 2 * SamplesLoss("sinkhorn", p=2, debias=True, **options)(p.a, x, p.b, p.y)
    f, g = SamplesLoss("sinkhorn", p=2, debias=False, potentials=True, **options)(p.a, x.detach(), p.b, p.y)
    grad, divergence_grad = (torch.autograd.grad(total, x)[0] for total in (value, divergence))
    return _lists(value=value.detach(), f=2 * f.flatten(), g=2 * g.flatten(), grad_x=grad,
                  divergence=divergence.detach(), divergence_grad_x=divergence_grad)  # fmt: skip


def ott(p: PointProblem) -> Found | None:
    """`Sinkhorn` on a `PointCloud` (|x - y|^2, its default), rho = tau / (tau + epsilon) for each side, gradients by
    jax.grad of `reg_ot_cost`; `sinkhorn_divergence`. In float64, which is switched on for the call alone."""
    import jax
    from ott.geometry.pointcloud import PointCloud
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn
    from ott.tools.sinkhorn_divergence import sinkhorn_divergence

    with jax.enable_x64(True):
        x, y, a, b = (jax.numpy.asarray(t.numpy()) for t in p[:4])
        rho = [1.0 if tau is None else tau / (tau + p.epsilon) for tau in p.tau]
        settings: Any = {"threshold": 1e-14, "max_iterations": 100_000, "lse_mode": True}

        def value(x: Any) -> Any:
            problem = LinearProblem(PointCloud(x, y, epsilon=p.epsilon), a, b, tau_a=rho[0], tau_b=rho[1])
            solved = Sinkhorn(**settings)(problem)
            return solved.reg_ot_cost, solved

        def divergence(x: Any) -> Any:
            return sinkhorn_divergence(
                PointCloud, x, y, a=a, b=b, epsilon=p.epsilon, solve_kwargs={"tau_a": rho[0], "tau_b": rho[1], **settings}
            )[0]  # fmt: skip

        (total, solved), grad = jax.value_and_grad(value, has_aux=True)(x)
        found = _lists(value=total, linear=(solved.matrix * ((x[:, None] - y[None]) ** 2).sum(-1)).sum(),
                       plan=solved.matrix, f=solved.f - p.epsilon * jax.numpy.log(a),
                       g=solved.g - p.epsilon * jax.numpy.log(b), grad_x=grad)  # fmt: skip
        if p.tau[0] == p.tau[1]:
            debiased, debiased_grad = jax.value_and_grad(divergence)(x)
            found |= _lists(divergence=debiased, divergence_grad_x=debiased_grad)
        return found


SOLVERS: dict[str, tuple[str, Callable[[PointProblem], Found | None]]] = {
    "POT": ("ot", pot),
    "GeomLoss": ("geomloss", geomloss),
    "OTT-JAX": ("ott", ott),
}
