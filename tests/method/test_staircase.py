"""The adjoint by hand against autograd of the definition, and against page 1's formulas written out."""

from __future__ import annotations

import problems
import pytest
import torch
from conformance import relative_error, weights
from marks import slow_after

from torch_sinkhorn_attn.method import reference, staircase
from torch_sinkhorn_attn.problem.arguments import prepare


def dense_of(call: problems.Call):
    o = call.options | {"dropout_p": 0.0}
    prepared = prepare(call.query, call.key, call.value, call.mask, **o)
    dense = reference.dense_problem(prepared.inputs, prepared.problem)
    return dense._replace(scores=dense.scores.detach().requires_grad_()), prepared.problem


@pytest.mark.parametrize("start", slow_after(2, range(0, 320, 40)))
def test_score_cotangent_equals_autograd(start: int) -> None:
    """Any cotangent of the whole augmented plan, over every R and option."""
    for seed in range(start, start + 40):
        call = problems.make(seed)
        dense, problem = dense_of(call)
        plan, potentials = reference.plan_and_potentials(dense, problem)
        grad = weights(plan)
        (truth,) = torch.autograd.grad(plan, dense.scores, grad)
        found = staircase.backward(dense._replace(scores=dense.scores.detach()), grad, potentials, problem)
        assert torch.isfinite(found.scores).all(), call
        assert relative_error(found.scores, truth) < 1e-10, call


@pytest.mark.parametrize("seed", range(60))
def test_dropped_cotangent_is_that_of_the_stopped_dual(seed: int) -> None:
    call = problems.make(seed)
    call.options |= {"gradient": "tail"}
    dense, problem = dense_of(call)
    plan, potentials = reference.plan_and_potentials(dense, problem)
    found = staircase.backward(dense._replace(scores=dense.scores.detach()), weights(plan), potentials, problem)
    scores = dense.scores.detach()
    start = (potentials.row if problem.solver.tail_iters else potentials.col)[0].clone().requires_grad_()
    u, v = start, start
    for _ in range(problem.solver.tail_iters):
        v = reference.half_step(scores, u, dense.log_b, problem.solver.rho_col, dim=-2)
        u = reference.half_step(scores, v, dense.log_a, problem.solver.rho_row, dim=-1)
    if problem.solver.tail_iters == 0:
        u = reference.half_step(scores, v, dense.log_a, problem.solver.rho_row, dim=-1)
    loss = (torch.exp(scores + u[..., :, None] + v[..., None, :]) * weights(plan)).sum()
    (truth,) = torch.autograd.grad(loss, start)
    assert relative_error(found.dropped, truth) < 1e-10, call


def test_page_one_for_two_tail_iterations() -> None:
    """The modifier field and the four passes, as the mathematics prints them (unit masses, balanced, R = 2)."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(7, 4, generator=g, dtype=torch.float64) for _ in range(4))
    call = problems.Call(0, q[None], k[None], v[None], options={"base_iters": 5})
    dense, problem = dense_of(call)
    plan, potentials = reference.plan_and_potentials(dense, problem)
    P, S = plan[0, 0].detach(), dense.scores[0, 0].detach()
    (u0, u1, u2), (_, v1, v2) = potentials.row[:, 0, 0], potentials.col[:, 0, 0]
    D, alpha = grad @ v.T, (grad * (P @ v)).sum(-1)
    A, B = (u1 - u2).exp(), (v1 - v2).exp()
    C = (u0 - u2).exp()
    w2 = ((P.T @ grad) * v).sum(-1) - P.T @ alpha
    z1 = -(P @ w2) * A
    w1 = -(P.T @ (z1 * A)) * B
    z0 = -(P @ (w1 * B)) * C
    field = D - alpha[:, None] - A[:, None] * w2 - (z1 * A)[:, None] * B - C[:, None] * (w1 * B)
    found = staircase.backward(dense._replace(scores=S[None, None]), D[None, None], potentials, problem)
    assert torch.allclose(found.scores[0, 0], P * field, atol=1e-14)
    assert torch.allclose(found.dropped[0, 0], z0, atol=1e-14)


def test_score_gradients_equal_autograd_of_the_scores() -> None:
    for seed in range(60):
        call = problems.make(seed)
        prepared = prepare(call.query, call.key, None, call.mask, **(call.options | {"dropout_p": 0.0}))
        inputs, problem = prepared.inputs, prepared.problem
        dense = reference.dense_problem(inputs, problem)
        grad = weights(dense.scores) * (dense.scores > -torch.inf)
        found = staircase.score_gradients(grad, inputs, problem, mask_grad=True)
        for name, x in inputs._asdict().items():
            if x is not None and x.requires_grad:
                (truth,) = torch.autograd.grad(dense.scores, x, grad, retain_graph=True)
                assert relative_error(getattr(found, name), truth) < 1e-10, (name, call)
