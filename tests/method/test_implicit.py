"""The implicit gradient against a direct solve and against the limit of unrolling."""

from __future__ import annotations

import problems
import pytest
import torch
from marks import slow_after

from torch_sinkhorn_attn import Dustbin, sinkhorn_plan
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.method.implicit import DensePlan, implicit_duals
from torch_sinkhorn_attn.problem.arguments import prepare
from torch_sinkhorn_attn.problem.segments import components


@pytest.mark.parametrize("seed", range(60))
def test_duals_solve_the_adjoint_system(seed: int) -> None:
    """[diag(P1)/rho_r, P; P^T, diag(P^T 1)/rho_c] [x; y] = [row sums; column sums], on lines with mass."""
    call = problems.make(seed)
    prepared = prepare(call.query, call.key, call.value, call.mask, **(call.options | {"dropout_p": 0.0}))
    problem = prepared.problem
    plan, _ = reference.plan_and_potentials(reference.dense_problem(prepared.inputs, problem), problem)
    plan = plan.detach()
    grad = torch.randn(plan.shape, dtype=plan.dtype) * plan
    f, g = grad.sum(-1), grad.sum(-2)
    x, y = implicit_duals(DensePlan(plan.log()), f, g, problem, components(problem))
    rows = plan.sum(-1) * x / problem.solver.rho_row + (plan @ y[..., None])[..., 0]
    cols = plan.sum(-2) * y / problem.solver.rho_col + (x[..., None, :] @ plan)[..., 0, :]
    scale = f.norm() + g.norm() + 1e-30
    assert (rows - f).norm() / scale < 1e-9, call
    assert (cols - g).norm() / scale < 1e-9, call


OPTIONS = {
    "balanced": {},
    "band": {"window": (4, 4), "base_iters": 3000},
    "dustbin": {"dustbin": Dustbin(0.4, -0.3)},
    "relaxed": {"relaxation": 1.5},
    "rows relaxed": {"relaxation": (0.8, None)},
    "blocks": {"mask": torch.block_diag(torch.ones(3, 4), torch.ones(4, 4)).bool(), "base_iters": 2000},
}


@pytest.mark.parametrize("name", slow_after(1, OPTIONS))
def test_implicit_is_the_limit_of_unrolling(name: str) -> None:
    options = {"base_iters": 1000, **OPTIONS[name]}
    mask = options.pop("mask", None)
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 7, 4, generator=g, dtype=torch.float64).requires_grad_()
    k = torch.randn(1, 8, 4, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(1, 7, 8, generator=g, dtype=torch.float64)
    if name == "blocks":
        options["row_mass"] = torch.tensor([4 / 3] * 3 + [1.0] * 4, dtype=torch.float64)
        options["col_mass"] = torch.ones(8, dtype=torch.float64)
    gradients = []
    for gradient in ("implicit", "unrolled"):
        plan = sinkhorn_plan(q, k, mask, gradient=gradient, engine="tiled", **options)
        gradients.append(torch.autograd.grad((plan[:, :7, :8] * weight).sum(), (q, k)))
    for x, y in zip(*gradients, strict=True):
        assert (x - y).norm() / y.norm() < 1e-8
