"""The ops and the autograd around them."""

from __future__ import annotations

from typing import Any

import problems
import pytest
import torch
from conformance import ENGINES
from marks import slow_after
from torch import Tensor

from torch_sinkhorn_attn import Dustbin, sinkhorn_attention, sinkhorn_plan
from torch_sinkhorn_attn.boundary import ops
from torch_sinkhorn_attn.problem.arguments import prepare

D = torch.float64
lib = torch.ops.torch_sinkhorn_attn


def flat_of(call: problems.Call, value: bool = True, engine: str = "tiled") -> list[Any]:
    options = call.options if value else {k: v for k, v in call.options.items() if k != "dropout_p"}
    prepared = prepare(call.query, call.key, call.value if value else None, call.mask, **options)
    flat = ops.flatten(prepared.inputs, prepared.problem, engine)
    return [x.detach() if isinstance(x, Tensor) else x for x in flat]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", slow_after(0, [0, 5, 8, 11, 17, 23], {0, 5, 11, 17}))
def test_opcheck(seed: int, engine: str) -> None:
    call = problems.make(seed)
    flat = flat_of(call, engine=engine)
    arguments = ops.with_residuals(flat, True)
    torch.library.opcheck(lib.forward.default, tuple(arguments))
    results = lib.forward(*arguments)
    bins = (torch.ones_like(results[5]), torch.ones_like(results[6])) if results[5].ndim > 1 else (None, None)
    torch.library.opcheck(lib.backward.default, (torch.ones_like(results[0]), *bins, True, *results[:3], *flat))
    flat = flat_of(call, value=False, engine=engine)
    for op, adjoint in ((lib.plan, lib.plan_backward), (lib.log_plan, lib.log_plan_backward)):
        torch.library.opcheck(op.default, tuple(flat))
        plan, *potentials = op(*flat)
        torch.library.opcheck(adjoint.default, (torch.ones_like(plan), *potentials, True, *flat))


def test_opcheck_of_backward_without_the_masks_gradient() -> None:
    flat = flat_of(problems.make(11))
    assert flat[3] is not None and flat[3].is_floating_point()
    results = lib.forward(*ops.with_residuals(flat, True))
    grads = (torch.ones_like(results[0]), None, None, False, *results[:3], *flat)
    torch.library.opcheck(lib.backward.default, grads)
    assert lib.backward(*grads)[3].numel() == 0


def test_calls_from_before_acceleration_are_understood() -> None:
    """Programs exported then: torch.export writes an op's arguments down in order, without those at the end that have
    their default."""
    names = (*ops.Inputs._fields, *ops.PROBLEM_FIELDS, "engine")
    assert (*names, "acceleration", "contraction", "paired") == ops.NAMES
    flat = flat_of(problems.make(0), engine="tiled")
    before, results = flat[: len(names)], lib.forward(*ops.with_residuals(flat, True))
    assert flat[len(names) :] == [None, 0.0, False]
    assert all(torch.equal(x, y) for x, y in zip(lib.forward(*before, True), results, strict=True))
    given = (torch.ones_like(results[0]), None, None, False, *results[:3])
    found = zip(lib.backward(*given, *before), lib.backward(*given, *flat), strict=True)
    assert all(torch.equal(x, y) for x, y in found)
    (plan, *_), (again, *_) = (lib.plan(*x) for x in (flat_of(problems.make(0), value=False), before))
    assert torch.equal(plan, again)


@pytest.mark.parametrize("options", slow_after(1, [{}, {"acceleration": "chebyshev"}]))
def test_exported_programs_name_acceleration_where_it_is(options: dict[str, Any]) -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sinkhorn_attention(x, x, x, base_iters=5, **options)

    x = 3 * torch.randn(1, 2, 8, 4)
    program = torch.export.export(Attention(), (x,))
    (node,) = (node for node in program.graph.nodes if node.target is lib.forward.default)
    assert len(node.args) == len(ops.PROBLEM_FIELDS) + ops.NUM_INPUTS + 2 + len(options)
    assert torch.equal(program.module()(x), Attention()(x))


def test_opcheck_sees_both_kinds() -> None:
    kinds = {("dustbin" in problems.make(s).options, problems.make(s).mask is not None) for s in (0, 5, 8, 11, 17, 23)}
    assert len(kinds) >= 3


GRADCHECK: dict[str, dict[str, Any]] = {
    "plain": {},
    "no tail": {"tail_iters": 0},
    "softmax": {"tail_iters": 0, "base_iters": 0},
    "unrolled": {"gradient": "unrolled", "base_iters": 3},
    "implicit": {"gradient": "implicit", "base_iters": 40, "epsilon": 4.0},
    "window": {"window": (3, 3), "gradient": "unrolled", "base_iters": 2},
    "relaxed": {"relaxation": (1.0, 2.0), "base_iters": 0},
    "lengths": {"query_lengths": torch.tensor([3, 4]), "key_lengths": torch.tensor([5, 2]), "base_iters": 0},
    "dustbin": {"dustbin": True, "base_iters": 0},
    "masses": {"row_mass": torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=D), "base_iters": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADCHECK)
@pytest.mark.parametrize("engine", slow_after(0, [*ENGINES, "reference"], {"tiled", "reference"}))
def test_gradcheck(name: str, engine: str) -> None:
    """Numerical derivatives; where the base is stopped they do not see it, so it is 0, unrolled or converged here."""
    options = dict(GRADCHECK[name]) | {"engine": engine}
    if name in ("plain", "no tail"):
        options["base_iters"] = 0
    g = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=D).requires_grad_()

    q, k, v, mask = leaf(2, 2, 4, 3), leaf(2, 1, 5, 3), leaf(2, 1, 5, 2), leaf(4, 5)
    bins = (leaf(2, 1), leaf(5), leaf(2), leaf(2)) if options.pop("dustbin", False) else ()

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *bins: Tensor) -> tuple[Tensor, ...]:
        dustbin = Dustbin(bins[0], bins[1], bins[2], value=bins[3]) if bins else None
        out, aux = sinkhorn_attention(q, k, v, mask, enable_gqa=True, dustbin=dustbin, return_aux=True, **options)
        plan = sinkhorn_plan(q, k, mask, enable_gqa=True, dustbin=dustbin, **options)
        return (out, plan) if dustbin is None else (out, plan, aux.row_dustbin, aux.col_dustbin)

    assert torch.autograd.gradcheck(function, (q, k, v, mask, *bins), atol=1e-6)


def test_only_asked_for_gradients_are_returned() -> None:
    q, k, v = torch.randn(1, 4, 3), torch.randn(1, 5, 3, requires_grad=True), torch.randn(1, 5, 3)
    out = sinkhorn_attention(q, k, v, torch.zeros(4, 5))
    out.sum().backward()
    assert k.grad is not None and q.grad is None
    assert not sinkhorn_attention(q, k.detach(), v).requires_grad


def test_gradients_of_the_dustbin_masses_alone() -> None:
    q, k = torch.randn(1, 4, 3, dtype=D, requires_grad=True), torch.randn(1, 5, 3, dtype=D)
    losses = []
    for engine in ("reference", *ENGINES):
        _, aux = sinkhorn_attention(q, k, k, dustbin=Dustbin(0.1, 0.2), return_aux=True, engine=engine)
        losses.append(torch.autograd.grad(aux.row_dustbin.square().sum(), q)[0])
    assert all(torch.allclose(losses[0], x, atol=1e-12) for x in losses[1:])


def test_autocast_computes_in_the_lower_dtype_and_keeps_float64() -> None:
    x = torch.randn(1, 2, 8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sinkhorn_attention(x, x, x)
        assert out.dtype == torch.bfloat16
        assert sinkhorn_attention(x.double(), x.double(), x.double()).dtype == D
    assert (out.float() - sinkhorn_attention(x, x, x)).abs().max() < 0.05


def test_compiles_without_graph_breaks() -> None:
    x = torch.randn(1, 2, 8, 4, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return sinkhorn_attention(x, x, x, window=(3, 3))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, truth = (torch.autograd.grad(f(x).sin().sum(), x)[0] for f in (compiled, function))
    assert torch.allclose(found, truth, atol=1e-6)
