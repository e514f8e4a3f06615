"""The schedule of the streaming kernels."""

from __future__ import annotations

from torch import Tensor

from torch_sinkhorn_attn.engines.tiled import engine as tiled
from torch_sinkhorn_attn.problem.problem import Gradients, Inputs, OutputGrads, Potentials, Problem, Result


def solve(inputs: Inputs, problem: Problem) -> Potentials:
    return tiled.ENGINE.solve(inputs, problem)


def forward(inputs: Inputs, problem: Problem, residuals: bool = True) -> Result:
    return tiled.ENGINE.forward(inputs, problem, residuals)


def backward(inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads) -> Gradients:
    from torch_sinkhorn_attn.engines.tiled.adjoint import OutputCotangent, attention_gradients
    from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
    from torch_sinkhorn_attn.engines.triton.layout import Layout
    from torch_sinkhorn_attn.engines.triton.streaming.adjoint import OutputPasses

    plan = Tiles(inputs, problem).at(potentials.row[-1], potentials.col[-1])
    cotangent = OutputCotangent(plan, output, grads)
    passes = OutputPasses(plan, Layout.of(inputs, problem), cotangent, grads.mask)
    return attention_gradients(passes, cotangent, potentials)


def plan_backward(
    inputs: Inputs, problem: Problem, potentials: Potentials, grad_plan: Tensor, mask_grad: bool, log: bool = False
) -> Gradients:
    from torch_sinkhorn_attn.engines.tiled.tiles import Tiles
    from torch_sinkhorn_attn.engines.triton.layout import Layout
    from torch_sinkhorn_attn.engines.triton.streaming.plan_adjoint import plan_gradients

    plan = Tiles(inputs, problem).at(potentials.row[-1], potentials.col[-1])
    return plan_gradients(plan, Layout.of(inputs, problem), potentials, grad_plan, mask_grad, log)
