"""The residual history is that of the iterates that engines go through, by the definition run to each of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import problems
import pytest
import torch
from conformance import ENGINES
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, iterations_used, residual_history, sinkhorn_plan
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.problem.arguments import Prepared, prepare
from torch_sinkhorn_attn.problem.segments import segment_max, segments

D = torch.float64
engines = pytest.mark.parametrize("engine", [*ENGINES, "reference"])
BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "over-relaxed": {"over_relaxation": 1.5},
    "accelerated": {"acceleration": "chebyshev"},
    "accelerated, given": {"acceleration": "chebyshev", "contraction": 0.9},
}


def tensors(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=D), torch.randn(shape, generator=g, dtype=D)


def by_the_definition(p: Prepared) -> Tensor:
    """`[N, H, G, T + R]`, each from a solve of its own."""
    dense, own, found = reference.dense_problem(p.inputs, p.problem), segments(p.problem), []
    base, tail = p.problem.solver.base_iters, p.problem.solver.tail_iters
    unrolled = p.problem.solver.gradient == "unrolled"
    for t in range(1, base + tail + 1):
        # An iterate of the base may stand still by the tolerance of an earlier one, and is kept by a base of just t.
        counts = {"base_iters": min(t, base), "tail_iters": max(1, t - base + 1)}
        if unrolled:
            counts = {"base_iters": 0, "tail_iters": t + 1}
        solver = replace(p.problem.solver, **counts, gradient="tail")
        col = reference.plan_and_potentials(dense, replace(p.problem, solver=solver))[1].col
        if t == base and tail == 0 and not unrolled:  # the plan returned has the plain row half-step of the last v
            u = reference.half_step(dense.scores, col[0], dense.log_a, solver.rho_row, dim=-1)
            col = torch.stack([col[0], reference.half_step(dense.scores, u, dense.log_b, solver.rho_col, dim=-2)])
        change = (col[-1] - col[-2]).abs().masked_fill(dense.log_b == -torch.inf, 0.0)
        found.append(segment_max(change, own.col, own.number).clamp(min=0))
    return torch.stack(found, -1) if found else torch.zeros(*p.problem.sizes[:2], own.number, 0, dtype=D)


@engines
@pytest.mark.parametrize("seed", slow_after(5, range(80)))
def test_it_is_that_of_the_iterates(engine: str, seed: int) -> None:
    call = problems.make(seed, dropout=False)
    options = {**call.options, "engine": engine}
    p = prepare(call.query.detach(), call.key.detach(), None, call.mask, **options)
    truth = by_the_definition(p)
    found = residual_history(call.query, call.key, call.mask, **options)
    packed = p.problem.support.row_segment is not None
    expected = p.unflatten(truth if packed else truth[:, :, 0])
    assert found.shape == expected.shape and not found.requires_grad
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-10), call


@engines
@pytest.mark.parametrize("name", BASES)
def test_its_last_entry_is_the_plans_column_error(engine: str, name: str) -> None:
    q, k = tensors(2, 2, 12, 4)
    for options in ({"window": (3, 3)}, {"dustbin": Dustbin(0.5, 0.1)}, {}):
        options = {**BASES[name], **options, "epsilon": 0.3, "base_iters": 7, "engine": engine}
        plan = sinkhorn_plan(q, k, **options)
        mass = torch.ones(plan.shape[-1], dtype=D)
        if "dustbin" in options:
            mass[-1] = 12.0
        error = (plan.sum(-2) / mass).log().abs().amax(-1)
        assert torch.allclose(residual_history(q, k, **options)[..., -1], error, rtol=1e-9)


@engines
@pytest.mark.parametrize("name", slow_after(2, BASES))
def test_iterations_that_a_tolerance_leaves(engine: str, name: str) -> None:
    """Heads that end at different times; the base stands still, and the tail follows."""
    q, k = tensors(1, 3, 10, 4)
    q = q * torch.tensor([0.2, 1.0, 4.0], dtype=D)[:, None, None]
    options = {**BASES[name], "base_iters": 40, "tail_iters": 2, "engine": engine}
    free = residual_history(q, k, **options)
    for tolerance in (1e-1, 1e-4):
        used = iterations_used(q, k, **options, tolerance=tolerance)
        history = residual_history(q, k, **options, tolerance=tolerance)
        for head in range(3):
            small = (free[0, head, :39] <= tolerance).nonzero()
            end = int(small[0]) + 1 if len(small) else 40
            assert int(used[0, head]) == end + 2
            assert torch.allclose(history[0, head, :end], free[0, head, :end], atol=1e-12)
            assert torch.allclose(history[0, head, end - 1 : 40], history[0, head, end - 1], atol=1e-12)
            stopped = {**options, "base_iters": end}  # the tail is that of a base of so many
            assert torch.allclose(history[0, head, 40:], residual_history(q, k, **stopped)[0, head, -2:], atol=1e-12)
        assert used[0, 0] < used[0, 2]
    assert (iterations_used(q, k, **options) == 42).all()


def test_long_histories_are_kept_in_parts() -> None:
    q, k = tensors(1, 1, 8, 4)
    options = {"window": (1, 1), "base_iters": 70, "tail_iters": 3}
    found = residual_history(q, k, **options)
    assert torch.allclose(found, by_the_definition(prepare(q, k, None, **options))[:, :, 0], rtol=1e-9, atol=1e-13)
    assert int(iterations_used(q, k, **options, tolerance=1e-3)) < 73


def test_shapes() -> None:
    scores = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    assert residual_history(scores).shape == (3, 22) and residual_history(scores[0]).shape == (22,)
    assert iterations_used(scores[0]).shape == () and iterations_used(scores[None]).shape == (1, 3)
    assert residual_history(scores, base_iters=0, tail_iters=0).shape == (3, 0)
    assert residual_history(torch.zeros(2, 0, 5)).shape == (2, 22)
    x, ids = torch.randn(1, 6, 4), torch.tensor([0, 0, 1, 1, 1, -1])
    packed = residual_history(x, x, query_segment_ids=ids, key_segment_ids=ids)
    assert packed.shape == (1, 6, 22) and (packed[:, 2:] == 0).all() and (packed[:, :2, 0] > 0).all()
    half = x.bfloat16()
    assert residual_history(half, half).dtype == torch.float32
    with pytest.raises(TypeError, match=r"residual_history\(\) got unknown option 'iters'"):
        residual_history(x, x, iters=3)
    with pytest.raises(ValueError, match="base_iters"):
        iterations_used(x, x, base_iters=-1)
