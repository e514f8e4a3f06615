"""The peers, each asked in its own conventions for what `problems` defines: POT, GeomLoss and OTT-JAX.

Every function gives a dictionary of lists: `value`, `linear`, `plan`, `f`, `g` (potentials, up to a constant where both
sides are balanced), `grad_x` (of the value with respect to x) and `divergence`, `divergence_grad_x`, as far as the peer
computes them; None for a problem that it does not take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peers.problems import PointProblem
from torch import Tensor

Found = dict[str, Any]


def _lists(**found: Any) -> Found:
    return {name: x.tolist() if hasattr(x, "tolist") else x for name, x in found.items() if x is not None}


def pot(p: PointProblem) -> Found | None:
    """`ot.solve` with reg_type="KL", balanced; its gradient by its envelope mode. Unbalanced the matrix scaling of
    `ot.sinkhorn_unbalanced`, reg_type="kl", which gives the plan; the value is summed up here, with its gradient by
    autograd through POT's iterations. `empirical_sinkhorn_divergence` is made of linear parts, another divergence, and
    is left out."""
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
        p.a, p.b, cost, p.epsilon, limits, reg_type="kl", numItermax=100_000, stopThr=1e-15, log=True
    )
    value = _value(p, plan, cost)
    (grad,) = torch.autograd.grad(value, x)
    f, g = (p.epsilon * log[name].detach() for name in ("logu", "logv"))
    return _lists(value=value.detach(), linear=(plan * cost).sum().detach(), plan=plan.detach(), f=f, g=g, grad_x=grad)


def _value(p: PointProblem, plan: Tensor, cost: Tensor) -> Tensor:
    def kl(found: Tensor, wanted: Tensor) -> Tensor:
        return (found * (found / wanted).log() - found + wanted).sum()

    total = (plan * cost).sum() + p.epsilon * kl(plan, p.a[:, None] * p.b)
    for tau, found, wanted in zip(p.tau, (plan.sum(1), plan.sum(0)), (p.a, p.b), strict=True):
        total = total + (0.0 if tau is None else tau * kl(found, wanted))
    return total


def geomloss(p: PointProblem) -> Found | None:
    """`geomloss.ot.solve` for value and plan; `SamplesLoss("sinkhorn", p=2)` for divergence and gradients, whose cost
    is |x - y|^2 / 2: with half of epsilon and tau, its values are half of ours. `scaling` close to 1 lets the
    temperature fall slowly. One tau for both sides.

    Two things of SamplesLoss 0.3.1, relaxed, are left out: the value without debiasing, which has
    epsilon (sum a + sum b) / 2 where the definition has epsilon sum a sum b; and gradients, which are
    (tau + epsilon / 2) / (tau + epsilon) of what finite differences of its own value give."""
    from geomloss import SamplesLoss, ot

    if p.tau[0] != p.tau[1]:
        return None
    solved = ot.solve(p.cost, reg=p.epsilon, a=p.a, b=p.b, unbalanced=p.tau[0], max_iter=2000)
    reach = None if p.tau[0] is None else (p.tau[0] / 2) ** 0.5
    options: Any = {"p": 2, "blur": (p.epsilon / 2) ** 0.5, "reach": reach, "scaling": 0.9995, "backend": "tensorized"}
    x = p.x.clone().requires_grad_()
    value, divergence = (
        2 * SamplesLoss("sinkhorn", debias=debias, **options)(p.a, x, p.b, p.y) for debias in (False, True)
    )
    relaxed = p.tau != (None, None)
    grad, divergence_grad = (None if relaxed else torch.autograd.grad(total, x)[0] for total in (value, divergence))
    return _lists(value=solved.value, linear=(solved.plan * p.cost).sum(), plan=solved.plan, grad_x=grad,
                  divergence=divergence.detach(), divergence_grad_x=divergence_grad)  # fmt: skip


def ott(p: PointProblem) -> Found | None:
    """`Sinkhorn` on a `PointCloud` (|x - y|^2, its default), gradients by jax.grad of `reg_ot_cost`, and
    `sinkhorn_divergence`. In float64, switched on for the call alone.

    Relaxed (rho = tau / (tau + epsilon)), ott 0.6.0 iterates as `sinkhorn_plan` does, to the optimum for the reference
    measure 1 1^T, where its `reg_ot_cost` is the dual for a b^T: a lower bound of either. So it gets the costs
    C - epsilon log a b^T, for which its plan is the one of a b^T, and the value is that of the plan.
    """
    import jax
    from jax import numpy as jnp
    from ott.geometry.geometry import Geometry
    from ott.geometry.pointcloud import PointCloud
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn
    from ott.tools.sinkhorn_divergence import sinkhorn_divergence

    settings: Any = {"threshold": 1e-15, "max_iterations": 200_000, "lse_mode": True}

    def relaxed(p: PointProblem) -> Found:
        rho = [1.0 if tau is None else tau / (tau + p.epsilon) for tau in p.tau]
        a, b = (jnp.asarray(t.numpy()) for t in (p.a, p.b))
        cost = jnp.asarray(p.cost.numpy()) - p.epsilon * jnp.log(a[:, None] * b)
        solved = Sinkhorn(**settings)(
            LinearProblem(Geometry(cost, epsilon=p.epsilon), a, b, tau_a=rho[0], tau_b=rho[1])
        )
        plan = torch.tensor(solved.matrix.tolist(), dtype=p.a.dtype)
        return _lists(value=_value(p, plan, p.cost), linear=(plan * p.cost).sum(), plan=plan, f=solved.f, g=solved.g)

    with jax.enable_x64(True):
        if p.tau != (None, None):
            found = relaxed(p)
            if None not in p.tau:
                own = [relaxed(p._replace(x=z, y=z, a=m, b=m))["value"] for z, m in ((p.x, p.a), (p.y, p.b))]
                excess = p.epsilon / 2 * float(p.a.sum() - p.b.sum()) ** 2
                found["divergence"] = found["value"] - sum(own) / 2 + excess
            return found
        x, y, a, b = (jnp.asarray(t.numpy()) for t in p[:4])

        def value(x: Any) -> Any:
            solved = Sinkhorn(**settings)(LinearProblem(PointCloud(x, y, epsilon=p.epsilon), a, b))
            return solved.reg_ot_cost, solved

        def divergence(x: Any) -> Any:
            return sinkhorn_divergence(PointCloud, x, y, a=a, b=b, epsilon=p.epsilon, solve_kwargs=settings)[0]

        (total, solved), grad = jax.value_and_grad(value, has_aux=True)(x)
        debiased, debiased_grad = jax.value_and_grad(divergence)(x)
        linear = (solved.matrix * ((x[:, None] - y[None]) ** 2).sum(-1)).sum()
        return _lists(value=total, linear=linear, plan=solved.matrix, f=solved.f - p.epsilon * jnp.log(a),
                      g=solved.g - p.epsilon * jnp.log(b), grad_x=grad, divergence=debiased,
                      divergence_grad_x=debiased_grad)  # fmt: skip


SOLVERS: dict[str, tuple[str, Callable[[PointProblem], Found | None]]] = {
    "POT": ("ot", pot),
    "GeomLoss": ("geomloss", geomloss),
    "OTT-JAX": ("ott", ott),
}
