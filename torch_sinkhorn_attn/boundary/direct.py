"""Calls of the CPU engine without the ops: the same numbers, for eager calls of plain tensors that share what was made
of a problem (`problem/remembered.py`), where the way through torch's dispatcher and back takes longer than the engine.

No dustbin, no transform, no mode, no forward-mode differentiation. Derivatives beyond the first, and a backward under
any of those, go the way of `autograd.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.boundary import autograd, ops
from torch_sinkhorn_attn.compat.releases import plain, undisturbed
from torch_sinkhorn_attn.engines import cpu
from torch_sinkhorn_attn.problem.problem import Inputs, OutputGrads, Potentials, Problem, Result


class _Call:
    """A call, and what its forward finds beside what is differentiated."""

    result: Result
    potentials: Potentials

    def __init__(self, problem: Problem, constants: cpu.Constants, residuals: bool = False):
        self.problem, self.constants, self.residuals = problem, constants, residuals

    def attention(self, inputs: Inputs) -> Result:
        return cpu.forward(inputs, self.problem, self.residuals, self.constants)

    def plan(self, inputs: Inputs) -> tuple[Tensor, Potentials]:
        return cpu.plan(inputs, self.problem, self.constants)


def attention(inputs: Inputs, problem: Problem, constants: cpu.Constants, residuals: bool) -> Result:
    """The result, its output differentiable; residuals that are not asked for are empty."""
    call = _Call(problem, constants, residuals)
    if not _differentiated(inputs):
        return call.attention(inputs)
    output = _Attention.apply(call, *inputs[:4])
    return call.result._replace(output=output)


def plan(inputs: Inputs, problem: Problem, constants: cpu.Constants) -> tuple[Tensor, Potentials]:
    """The plan, differentiable, and the stacked duals."""
    call = _Call(problem, constants)
    if not _differentiated(inputs):
        return call.plan(inputs)
    found = _Plan.apply(call, *inputs[:4])
    return found, call.potentials


def _differentiated(inputs: Inputs) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:4])


def _direct(grad: Tensor) -> bool:
    return not torch.is_grad_enabled() and undisturbed() and plain(grad)


def _wanted(ctx: Any, inputs: Inputs, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    found = (
        g.to(x.dtype) if wanted and x is not None and g is not None else None
        for x, g, wanted in zip(inputs[:4], grads[:4], ctx.needs_input_grad[1:], strict=True)
    )
    return (None, *found)


class _Attention(torch.autograd.Function):
    """The output of a call and of its query, key, value and mask."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> Tensor:
        result = call.attention(Inputs(*tensors))  # type: ignore[arg-type]
        ctx.save_for_backward(*tensors, result.output, *result.potentials)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.constants = call.problem, call.constants
        call.result = result
        return result.output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        *tensors, output, row, col = ctx.saved_tensors
        inputs, potentials, mask_grad = Inputs(*tensors), Potentials(row, col), bool(ctx.needs_input_grad[4])
        if _direct(grad):
            grads = OutputGrads(grad, mask=mask_grad)
            found = cpu.backward(inputs, ctx.problem, output, potentials, grads, ctx.constants).inputs
            return _wanted(ctx, inputs, found)
        flat = ops.flatten(inputs, ctx.problem, cpu.NAME)
        return _wanted(ctx, inputs, autograd.attention_gradients(grad, None, None, mask_grad, output, row, col, *flat))


class _Plan(torch.autograd.Function):
    """The plan of a call, and of its query, key and mask."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> Tensor:
        found, potentials = call.plan(Inputs(*tensors))  # type: ignore[arg-type]
        ctx.save_for_backward(*tensors, *potentials)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.constants = call.problem, call.constants
        call.potentials = potentials
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        *tensors, row, col = ctx.saved_tensors
        inputs, potentials, mask_grad = Inputs(*tensors), Potentials(row, col), bool(ctx.needs_input_grad[4])
        if _direct(grad):
            found = cpu.plan_backward(inputs, ctx.problem, potentials, grad, mask_grad, ctx.constants).inputs
            return _wanted(ctx, inputs, found)
        flat = ops.flatten(inputs, ctx.problem, cpu.NAME)
        return _wanted(ctx, inputs, autograd.plan_gradients("plan", grad, row, col, mask_grad, *flat))
