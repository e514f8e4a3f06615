"""The schedule of the streaming kernels: that of the tiled engine, over a plan whose passes are kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.tiled.adjoint import OutputCotangent, attention_gradients
from torch_sinkhorn_attn.engines.tiled.engine import attention_output, iterate, marginal_errors
from torch_sinkhorn_attn.engines.triton.streaming.adjoint import OutputPasses
from torch_sinkhorn_attn.engines.triton.streaming.lines import StreamedPlan
from torch_sinkhorn_attn.engines.triton.streaming.plan_adjoint import plan_gradients
from torch_sinkhorn_attn.method import reference
from torch_sinkhorn_attn.problem.problem import Gradients, Inputs, OutputGrads, Potentials, Problem, Result
from torch_sinkhorn_attn.problem.segments import largest


def solve(inputs: Inputs, problem: Problem) -> Potentials:
    with torch.cuda.device_of(inputs.query):
        return iterate(StreamedPlan(inputs, problem))


def forward(inputs: Inputs, problem: Problem, residuals: bool = True) -> Result:
    with torch.cuda.device_of(inputs.query):
        scores = StreamedPlan(inputs, problem)
        potentials = iterate(scores)
        return result(scores.at(potentials.row[-1], potentials.col[-1]), potentials, residuals)


def result(plan: StreamedPlan, potentials: Potentials, residuals: bool) -> Result:
    """What a forward gives, of a plan at its potentials."""
    to_bin, from_bin, _ = plan.dustbin_plan
    if residuals:
        row, col = (largest(x) for x in marginal_errors(plan))
    else:
        row, col = (plan.u.new_full(plan.u.shape[:2], torch.nan) for _ in range(2))
    return Result(attention_output(plan), potentials, row, col, to_bin, from_bin)


def backward(inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads) -> Gradients:
    with torch.cuda.device_of(inputs.query):
        plan = StreamedPlan(inputs, problem).at(potentials.row[-1], potentials.col[-1])
        cotangent = OutputCotangent(plan, output, grads)
        return attention_gradients(OutputPasses(plan, cotangent, grads.mask), cotangent, potentials)


def plan_backward(
    inputs: Inputs, problem: Problem, potentials: Potentials, grad_plan: Tensor, mask_grad: bool, log: bool = False
) -> Gradients:
    with torch.cuda.device_of(inputs.query):
        plan = StreamedPlan(inputs._replace(value=None), problem).at(potentials.row[-1], potentials.col[-1])
        return plan_gradients(plan, potentials, grad_plan, mask_grad, log)


def plan(inputs: Inputs, problem: Problem, log: bool = False) -> tuple[Tensor, Potentials]:
    """`Engine.plan`: the real pairs by a kernel, the dustbin's vectors around them."""
    with torch.cuda.device_of(inputs.query):
        scores = StreamedPlan(inputs._replace(value=None), problem)
        potentials = iterate(scores)
        return dense_plan(scores.at(potentials.row[-1], potentials.col[-1]), log), potentials


def dense_plan(at: StreamedPlan, log: bool) -> Tensor:
    """The plan `[N, H, L, S]`, or `[N, H, L+1, S+1]` with a dustbin."""
    extra = int(at.dustbin is not None)
    found = at.u.new_zeros(at.num, at.heads, at.length + extra, at.size + extra)
    if extra:
        column, row, corner = at.log_dustbin_plan
        corner = reference.log_sum(corner, -1)
        bins = (column, row, corner) if log else tuple(x.exp() for x in (column, row, corner))
        found[..., : at.length, -1], found[..., -1, : at.size], found[..., -1, -1] = bins
    at.dense(found[..., : at.length, : at.size], log)
    return found
