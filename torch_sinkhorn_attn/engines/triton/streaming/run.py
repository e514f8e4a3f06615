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
    return tiled.ENGINE.backward(inputs, problem, output, potentials, grads)
