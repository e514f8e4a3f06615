"""Derivatives beyond the first, forward mode, vmap: the tiled engine's against the reference's and numerical ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import conformance
import pytest
import torch
from marks import slow_after
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention, sinkhorn_plan

D = torch.float64
ENGINES = (*conformance.ENGINES, "reference")
OPTIONS: dict[str, dict[str, Any]] = {
    "tail": {},
    "no tail": {"tail_iters": 0},
    "softmax": {"base_iters": 0, "tail_iters": 0},
    "unrolled": {"gradient": "unrolled", "base_iters": 3},
    "window": {"window": (2, 2)},
    "relaxed": {"relaxation": (1.0, None)},
    "dustbin": {"dustbin": Dustbin(0.1, 0.3, 0.2, value=torch.ones(2, 3, dtype=D))},
    "lengths": {"query_lengths": torch.tensor(3), "key_lengths": torch.tensor(4)},
    "segments": {x: torch.tensor([0, 0, 1, 1]) for x in ("query_segment_ids", "key_segment_ids")},
    "dropout": {"dropout_p": 0.3},
    "warm start": {"initial_potentials": (torch.ones(2, 4, dtype=D), torch.zeros(2, 4, dtype=D)), "base_iters": 0},
}
options = pytest.mark.parametrize("name", slow_after(3, OPTIONS))


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """torch warns where it takes a slow path under vmap."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")  # torch's own call of it, since 2.14
        yield


def tensors(*batch: int) -> list[Tensor]:
    """Query, key, value `[..., 2, 4, 3]` and a float mask `[4, 4]`."""
    g = torch.Generator().manual_seed(1)
    qkv = [torch.randn(*batch, 2, 4, 3, generator=g, dtype=D) for _ in range(3)]
    return [*qkv, torch.randn(4, 4, generator=g, dtype=D)]


def loss(engine: str, name: str) -> Callable[..., Tensor]:
    """A scalar of (query, key, value, mask) that has all derivatives."""

    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        torch.manual_seed(0)  # for dropout
        out, aux = sinkhorn_attention(query, key, value, mask, engine=engine, return_aux=True, **OPTIONS[name])
        bins = 0 if aux.row_dustbin is None else aux.row_dustbin.sin().sum() + aux.col_dustbin.square().sum()
        return out.sin().sum() + bins

    return function


def plan_loss(engine: str, name: str) -> Callable[..., Tensor]:
    """The same of the plan."""
    given = {k: v for k, v in OPTIONS[name].items() if k != "dropout_p"}

    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return (5 * sinkhorn_plan(query, key, mask, engine=engine, **given)).sin().sum() + value.sum()

    return function


def close(found: Any, truth: Any) -> bool:
    pairs = zip(found, truth, strict=True) if isinstance(found, tuple) else [(found, truth)]
    return all(close(*p) if isinstance(p[0], tuple) else torch.allclose(*p, atol=1e-12) for p in pairs)


@pytest.mark.slow
@options
@pytest.mark.parametrize("make", [loss, pytest.param(plan_loss, marks=pytest.mark.exhaustive)])
def test_second_derivatives_are_the_references(make: Callable[..., Any], name: str) -> None:
    inputs = tuple(tensors())
    *found, truth = (torch.autograd.functional.hessian(make(engine, name), inputs) for engine in ENGINES)
    assert all(close(one, truth) for one in found) and max(x.abs().max() for row in truth for x in row) > 1e-3
    if name == "dropout":  # hessian does not say to vmap that its samples share their random numbers
        return
    for engine in conformance.ENGINES:
        by_func = hessian(make(engine, name), argnums=(0, 3))(*inputs)
        assert close(by_func, tuple((truth[i][0], truth[i][3]) for i in (0, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("engine", slow_after(0, ENGINES, ENGINES[:-1]))  # which do not compute them
@pytest.mark.parametrize("name", ["tail", "no tail", "dustbin", "window", "relaxed", "unrolled"])
def test_gradgradcheck(engine: str, name: str) -> None:
    """Numerically, so with nothing stopped."""
    given = dict(OPTIONS[name])
    given["base_iters"] = given.get("base_iters", 0) if name == "unrolled" else 0
    inputs = [x.requires_grad_() for x in tensors()]

    def function(*x: Tensor) -> tuple[Tensor, Tensor]:
        plan = sinkhorn_plan(x[0], x[1], x[3], engine=engine, **given)
        return sinkhorn_attention(*x, engine=engine, **given), plan

    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-6)


def test_gradients_of_the_dustbins_own_gradients() -> None:
    inputs = tensors()
    scores = [torch.zeros(2, 1, dtype=D), torch.ones(4, dtype=D), torch.zeros(2, dtype=D), torch.ones(3, dtype=D)]

    def function(engine: str) -> Callable[..., Tensor]:
        def of(row: Tensor, col: Tensor, corner: Tensor, value: Tensor) -> Tensor:
            dustbin = Dustbin(row, col, corner, value=value)
            return sinkhorn_attention(*inputs, dustbin=dustbin, engine=engine).sin().sum()

        return of

    *found, truth = (torch.autograd.functional.hessian(function(engine), tuple(scores)) for engine in ENGINES)
    assert all(close(one, truth) for one in found)


@pytest.mark.parametrize("make", [loss, plan_loss])
def test_third_derivatives(make: Callable[..., Any]) -> None:
    results = []
    for engine in ENGINES:
        inputs = [x.requires_grad_() for x in tensors()]
        first = torch.autograd.grad(make(engine, "tail")(*inputs), inputs[0], create_graph=True)[0]
        second = torch.autograd.grad(first.sin().sum(), inputs[1], create_graph=True)[0]
        results.append(torch.autograd.grad(second.sin().sum(), inputs[0])[0])
    assert all(close(x, results[-1]) for x in results) and results[0].abs().max() > 1e-3


@options
@pytest.mark.parametrize("make", [loss, plan_loss])
def test_forward_mode_is_reverse_mode(make: Callable[..., Any], name: str) -> None:
    inputs = tensors()
    truth = jacrev(make("reference", name), argnums=(0, 1, 3))(*inputs)
    for engine in ENGINES:
        assert close(jacfwd(make(engine, name), argnums=(0, 1, 3), randomness="same")(*inputs), truth)
    with forward_ad.dual_level():
        out = make("tiled", name)(forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0])), *inputs[1:])
        assert torch.allclose(forward_ad.unpack_dual(out).tangent, truth[0].sum(), atol=1e-12)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "dropout"])
def test_gradients_per_sample(name: str) -> None:
    *qkv, mask = tensors(3)
    for make in (loss, plan_loss):
        found = vmap(grad(make("tiled", name), argnums=(0, 1, 2, 3)), in_dims=(0, 0, 0, None))(*qkv, mask)
        for i in range(3):
            truth = grad(make("reference", name), argnums=(0, 1, 2, 3))(*(x[i] for x in qkv), mask)
            assert close(tuple(x[i] for x in found), truth)


def test_gradients_per_sample_of_a_batch_with_a_shared_and_a_mapped_mask() -> None:
    *qkv, mask = tensors(3, 5)
    masks = torch.stack([mask, -mask, 2 * mask])
    for make in (loss, plan_loss):
        for in_dim, given in ((None, mask), (0, masks)):
            function = grad(make("tiled", "tail"), argnums=(0, 3))
            found = vmap(function, in_dims=(1, 1, 1, in_dim))(*(x.transpose(0, 1) for x in qkv), given)
            for i in range(3):
                one = mask if in_dim is None else masks[i]
                assert close(
                    tuple(x[i] for x in found),
                    grad(make("reference", "tail"), argnums=(0, 3))(*(x[i] for x in qkv), one),
                )


@pytest.mark.slow
def test_checks_of_batched_gradients() -> None:
    inputs = [x.requires_grad_() for x in tensors()]

    def function(*x: Tensor) -> tuple[Tensor, ...]:
        out, aux = sinkhorn_attention(*x, dustbin=Dustbin(0.1, 0.2), base_iters=0, return_aux=True)
        return out, aux.row_dustbin, aux.col_dustbin

    assert torch.autograd.gradcheck(
        function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_the_implicit_gradient_is_given_once(engine: str) -> None:
    q, k, v, _ = tensors()

    def function(q: Tensor) -> Tensor:
        return sinkhorn_attention(q, k, v, gradient="implicit", engine=engine).sin().sum()

    q.requires_grad_()
    truth = torch.autograd.grad(function(q), q, create_graph=True)[0]
    assert close(grad(function)(q.detach()), truth.detach())
    for call in (
        lambda: torch.autograd.grad(truth.sum(), q),
        lambda: jvp(function, (q.detach(),), (q.detach(),)),
    ):
        with pytest.raises(RuntimeError, match=r"gradient='implicit' has no derivative.*gradient='unrolled'"):
            call()


def test_half_inputs_have_second_derivatives_in_their_dtype() -> None:
    q, k, v, mask = (x.to(torch.bfloat16) for x in tensors())
    first = torch.autograd.grad(loss("tiled", "tail")(q.requires_grad_(), k, v, mask), q, create_graph=True)[0]
    (second,) = torch.autograd.grad(first.float().sum(), q)
    assert first.dtype == second.dtype == torch.bfloat16 and second.isfinite().all()
    truth = torch.autograd.grad(loss("reference", "tail")(q, k, v, mask), q, create_graph=True)[0]
    assert torch.allclose(second, torch.autograd.grad(truth.float().sum(), q)[0], atol=0.05)


def test_second_derivatives_beside_a_mask_that_is_constant() -> None:
    q, k, v, mask = tensors()
    results = []
    for engine in ENGINES:
        leaf = q.clone().requires_grad_()
        first = torch.autograd.grad(loss(engine, "tail")(leaf, k, v, mask), leaf, create_graph=True)[0]
        results.append(torch.autograd.grad(first.sin().sum(), leaf)[0])
    assert all(close(one, results[-1]) for one in results)
    *found, truth = (hessian(lambda q, e=e: loss(e, "tail")(q, k, v, mask))(q) for e in ENGINES)
    assert all(close(one, truth) for one in found)


def test_plain_first_gradients_stay_linear_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.func and create_graph=True run the engine's own backward; only a second derivative is dense."""
    from torch_sinkhorn_attn.method import reference

    *inputs, _ = tensors()
    monkeypatch.setattr(reference, "dense_problem", None)
    grad(lambda q: sinkhorn_attention(q, *inputs[1:]).sum())(inputs[0])
    leaf = inputs[0].requires_grad_()
    torch.autograd.grad(sinkhorn_attention(leaf, *inputs[1:]).sum(), leaf, create_graph=True)
