"""The suite every engine runs: the same calls, compared with the reference in float64.

An engine is one entry in `ENGINES`, those that run on CPU tensors; `engines/xla/test_engine.py` runs the other one.
"""

from __future__ import annotations

from typing import Any

import problems
import torch
from torch import Tensor

from torch_sinkhorn_attn import engines, sinkhorn_attention, sinkhorn_plan

ENGINES = [name for name, engine in engines.ENGINES.items() if engine.device in (None, "cpu")]


def weights(x: Tensor) -> Tensor:
    """A fixed cotangent that no symmetry of the problem annihilates."""
    return torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x).sin()


def results(call: problems.Call, engine: str, plan: bool = True) -> dict[str, Tensor]:
    """Output, aux, plan, and the gradients of a loss on all of them."""
    torch.manual_seed(call.seed)  # for dropout
    output, aux = sinkhorn_attention(
        call.query, call.key, call.value, call.mask, engine=engine, return_aux=True, **call.options
    )
    found: dict[str, Tensor] = {"output": output}
    found |= {k: v for k, v in aux._asdict().items() if v is not None}
    loss = (output * weights(output)).sum()
    if aux.row_dustbin is not None:
        loss = loss + (aux.row_dustbin * weights(aux.row_dustbin)).sum() + (aux.col_dustbin**2).sum()
    _add_gradients(found, "", loss, call)
    if plan:
        options = {k: v for k, v in call.options.items() if k != "dropout_p"}
        found["plan"] = sinkhorn_plan(call.query, call.key, call.mask, engine=engine, **options)
        _add_gradients(found, "plan ", (found["plan"] * weights(found["plan"])).sum(), call)
    return {name: x.detach() for name, x in found.items()}


def _add_gradients(found: dict[str, Tensor], prefix: str, loss: Tensor, call: problems.Call) -> None:
    if not loss.requires_grad:
        return
    gradients = torch.autograd.grad(loss, call.leaves, allow_unused=True)
    for i, (x, g) in enumerate(zip(call.leaves, gradients, strict=True)):
        found[f"{prefix}gradient {i} {list(x.shape)}"] = torch.zeros_like(x) if g is None else g


def relative_error(x: Tensor, y: Tensor, floor: float = 1e-3) -> float:
    """||x - y|| / ||y||; the floor keeps sums that cancel from being judged by their rounding."""
    if y.numel() == 0:
        return 0.0
    x, y = x.detach(), y.detach()
    return float((x - y).norm()) / max(float(y.norm()), floor)


def assert_agrees(
    call: problems.Call, engine: str, tolerance: float = 1e-10, expected: dict[str, Tensor] | None = None, **extra: Any
) -> None:
    """Every result of the engine agrees with the reference, whose may be given, to `tolerance`, and is finite."""
    expected = expected or results(call, "reference", **extra)
    found = results(call, engine, **extra)
    assert expected.keys() == found.keys(), call
    for name, y in expected.items():
        x = found[name]
        assert x.shape == y.shape and x.dtype == y.dtype, (name, call)
        assert torch.isfinite(y).all() and torch.isfinite(x).all(), f"{name} is not finite in {call}"
        error = relative_error(x, y, floor=1.0 if "residual" in name else 1e-3)
        assert error < tolerance, f"{name}: {error:.1e} in {call}"
