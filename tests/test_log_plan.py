"""The logarithm of the plan: the plan's own, with the digits and the gradient that exp would lose."""

from __future__ import annotations

import problems
import pytest
import torch
from conformance import ENGINES, relative_error, weights
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, sinkhorn_plan

D = torch.float64


def grads_of(loss: Tensor, call: problems.Call) -> list[Tensor]:
    found = torch.autograd.grad(loss, call.leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(call.leaves, found, strict=True)]


def weighted(log_plan: Tensor) -> Tensor:
    return (log_plan.masked_fill(log_plan == -torch.inf, 0.0) * weights(log_plan)).sum()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("start", slow_after(1, range(9000, 9100, 20)))
def test_it_is_the_logarithm_of_the_plan(start: int, engine: str) -> None:
    for seed in range(start, start + 20):
        call = problems.make(seed, dropout=False)
        plan = sinkhorn_plan(call.query, call.key, call.mask, engine="reference", **call.options)
        found = sinkhorn_plan(call.query, call.key, call.mask, log=True, engine=engine, **call.options)
        assert torch.equal(found == -torch.inf, plan == 0), call
        assert relative_error(found.exp(), plan) < 1e-10, call
        if not plan.requires_grad or not (plan > 0).any():
            continue
        inside = plan > 0
        truth = grads_of((torch.where(inside, plan, 1.0).log() * weights(plan)).sum(), call)
        for x, y in zip(grads_of(weighted(found), call), truth, strict=True):
            assert torch.isfinite(x).all() and relative_error(x, y) < 1e-8, call


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cotangent_off_the_support_is_nobodys(engine: str) -> None:
    scores = torch.randn(1, 6, 6, dtype=D, requires_grad=True)
    found = sinkhorn_plan(scores, log=True, window=(2, 2), engine=engine)
    cotangent = torch.where(found == -torch.inf, torch.nan, 1.0)
    (grad,) = torch.autograd.grad(found, scores, cotangent)
    assert torch.isfinite(grad).all() and (grad[found == -torch.inf] == 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_underflows_keeps_value_and_gradient(engine: str) -> None:
    """SuperGlue's loss, -log P of the true matches, at a score deviation of 20: infinite through exp in float32."""
    scores = 20 * torch.randn(1, 256, 256, generator=torch.Generator().manual_seed(0), dtype=D)
    options = {"dustbin": Dustbin(1.0, 1.0, 1.0), "base_iters": 100, "engine": engine}
    found = []
    for kind in (D, torch.float32):
        x = scores.to(kind).requires_grad_()
        loss = -sinkhorn_plan(x, log=True, **options).diagonal(dim1=-2, dim2=-1)[..., :-1].mean()
        found.append((loss.detach().double(), torch.autograd.grad(loss, x)[0].double()))
        assert torch.isfinite(found[-1][0])
    assert torch.isinf(sinkhorn_plan(scores.float(), **options).log()).any()
    (truth, grad), (value, other) = found
    assert abs(value - truth) < 1e-5 * abs(truth) and relative_error(other, grad) < 1e-5


def test_float32_for_shorter_inputs_and_under_autocast() -> None:
    for kind in (torch.float16, torch.bfloat16):
        q = torch.randn(1, 5, 4).to(kind)
        assert sinkhorn_plan(q, q, log=True).dtype == torch.float32
        truth = sinkhorn_plan(q.double(), q.double(), log=True)
        assert (sinkhorn_plan(q, q, log=True) - truth).abs().max() < 1e-5
    scores = torch.randn(1, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn_plan(scores, log=True), sinkhorn_plan(scores.clone(), log=True))
        found = sinkhorn_plan(scores, log=True)
    assert found.dtype == torch.float32 and torch.equal(found, sinkhorn_plan(scores, log=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_masses_in_any_unit(engine: str) -> None:
    scores, mass = torch.randn(2, 5, 6), torch.rand(2, 5) + 0.5
    plain = sinkhorn_plan(scores, log=True, row_mass=mass, engine=engine)
    tiny = sinkhorn_plan(scores, log=True, row_mass=mass * 2.0**-120, engine=engine)
    assert (tiny + 120 * torch.log(torch.tensor(2.0)) - plain).abs().max() < 1e-4


@pytest.mark.slow
def test_derivatives_of_every_order_compiled_and_mapped() -> None:
    scores = torch.randn(4, 5, dtype=D, requires_grad=True)

    def plan(x: Tensor) -> Tensor:
        return sinkhorn_plan(x, log=True, base_iters=0)

    assert torch.autograd.gradcheck(plan, (scores,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(plan, (scores,))
    compiled = torch.compile(plan, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(scores), plan(scores)) < 1e-14
    (grad,), (truth,) = (torch.autograd.grad(f(scores).sin().sum(), scores) for f in (compiled, plan))
    assert relative_error(grad, truth) < 1e-12
    many = torch.randn(3, 4, 5, dtype=D)
    mapped = torch.vmap(torch.func.grad(lambda x: plan(x).sin().sum()))(many)
    for x, y in zip(mapped, many, strict=True):
        assert relative_error(x, torch.func.grad(lambda x: plan(x).sin().sum())(y)) < 1e-12


def test_log_is_a_flag() -> None:
    with pytest.raises(TypeError, match="log must be True or False, got 'natural'"):
        sinkhorn_plan(torch.zeros(2, 3), log="natural")  # type: ignore[arg-type]


def test_empty_sizes() -> None:
    for shape in ((2, 0, 3), (2, 3, 0), (0, 1, 3, 4)):
        assert sinkhorn_plan(torch.zeros(shape), log=True, relaxation=1.0).shape == shape
