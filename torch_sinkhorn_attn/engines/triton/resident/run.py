"""What the resident kernels take, and their launch."""

from __future__ import annotations

from torch import Tensor

from torch_sinkhorn_attn.engines.triton.launch import chip_of
from torch_sinkhorn_attn.problem.problem import Gradients, Inputs, OutputGrads, Potentials, Problem, Result

LARGEST = 128  # lines of a side, the dustbin's among them
LARGEST_WITH_TENSOR_MEMORY = 64  # where products come a row to a thread: of 128 lines half would spill
TENSOR_MEMORY = range(100, 120)  # compute capabilities 10.x and 11.x
LONGEST_TAIL = 8  # iterations whose adjoint it takes: as many would be as cheap by tiles


def refusal(inputs: Inputs, problem: Problem, adjoint: bool = False, mask_grad: bool = False) -> str | None:
    """Why they cannot take a problem; None if they can. Shapes and options decide, never data."""
    num, heads, length, size = problem.sizes
    bins = problem.num_dustbins
    if 0 in (num, heads, length, size, inputs.query.shape[-1]):
        return "a side of the problem is empty"
    most = LARGEST_WITH_TENSOR_MEMORY if chip_of(inputs.query.device).arch in TENSOR_MEMORY else LARGEST
    if max(length, size) + bins > most:
        own = ", the dustbin among them" if bins else ""
        return f"{length + bins} x {size + bins} lines{own}: registers hold the plan of {most} x {most}"
    if problem.support.row_segment is not None:
        return "packed segments are several problems in one"
    if adjoint and problem.solver.gradient == "implicit":
        return "the implicit gradient solves a linear system of its own"
    if adjoint and problem.solver.kept > LONGEST_TAIL:
        return f"{problem.solver.kept} iterations are differentiated: the resident adjoint takes up to {LONGEST_TAIL}"
    if adjoint and mask_grad:
        return "the cotangent of a mask is summed over the heads that share it"
    return None


def solve(inputs: Inputs, problem: Problem) -> Potentials:
    return forward(inputs._replace(value=None, dustbin_value=None), problem).potentials


def forward(inputs: Inputs, problem: Problem, residuals: bool = True) -> Result:
    from torch_sinkhorn_attn.engines.triton.resident import forward as kernels

    return kernels.forward(inputs, problem, residuals)


def backward(inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads) -> Gradients:
    from torch_sinkhorn_attn.engines.triton.resident import backward as kernels

    return kernels.backward(inputs, problem, potentials, grads)
