"""What the resident kernels take, and their launch."""

from __future__ import annotations

from torch import Tensor

from torch_sinkhorn_attn.problem.problem import Gradients, Inputs, OutputGrads, Potentials, Problem, Result


def refusal(inputs: Inputs, problem: Problem, adjoint: bool = False) -> str | None:
    """Why they cannot take a problem; None if they can."""
    return "there are no resident kernels yet"


def solve(inputs: Inputs, problem: Problem) -> Potentials:
    raise NotImplementedError


def forward(inputs: Inputs, problem: Problem, residuals: bool = True) -> Result:
    raise NotImplementedError


def backward(inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads) -> Gradients:
    raise NotImplementedError
