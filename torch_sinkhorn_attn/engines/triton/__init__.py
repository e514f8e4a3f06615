"""The GPU engine: Triton kernels, for CUDA and ROCm tensors.

Two shapes, chosen by `choice`: *resident*, one program for each problem (batch element and head), which keeps the
whole plan in registers for the whole solve, and *streaming*, which makes tiles of the plan again in every half-step and
takes any size and any option. Neither looks at data on the host: a call can be captured in a CUDA graph, and a rerun
gives the same bits. float16, bfloat16 and float32 inputs; potentials and sums are float32. float64 goes to the tiled
engine.

Only this package imports triton, and only once a problem is computed. With TRITON_INTERPRET=1 set before Python starts,
`engine="triton"` takes CPU tensors too, float64 among them, and interprets the kernels: slow, and meant for proofs.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_sinkhorn_attn.compat.releases import constant_in_programs
from torch_sinkhorn_attn.engines.base import Engine
from torch_sinkhorn_attn.problem.problem import Gradients, Inputs, OutputGrads, Potentials, Problem, Result

if TYPE_CHECKING:
    from torch_sinkhorn_attn.distributed.share import Share
    from torch_sinkhorn_attn.distributed.tiles import OfRank

__all__ = ["ENGINE", "TritonEngine"]
OLDEST = (8, 0)  # compute capability: the first with bfloat16 tensor cores
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreted() -> bool:
    """Whether triton was asked to interpret kernels, which then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


class TritonEngine(Engine):
    """The engine of CUDA and ROCm tensors."""

    name = "triton"
    device = "cuda"
    of_ranks = True

    def status(self) -> str:
        if (missing := _missing()) is not None:
            return f"missing: {missing}"
        if interpreted():
            return "Triton kernels, interpreted on CPU tensors (TRITON_INTERPRET=1)"
        if not torch.cuda.is_available():
            return "Triton kernels for CUDA and ROCm tensors; this process sees no such device"
        return f"Triton kernels, {torch.cuda.get_device_name()}"

    def refusal(self, inputs: Inputs, problem: Problem) -> str | None:
        """triton is missing, the tensors are elsewhere or float64, or the chip is too old."""
        return _refusal(inputs.query.device, inputs.query.dtype)

    def solve(self, inputs: Inputs, problem: Problem) -> Potentials:
        from torch_sinkhorn_attn.engines.triton import choice

        return choice.kernels(inputs, problem).solve(inputs, problem)

    def forward(self, inputs: Inputs, problem: Problem, residuals: bool = True) -> Result:
        from torch_sinkhorn_attn.engines.triton import choice

        return choice.kernels(inputs, problem).forward(inputs, problem, residuals)

    def plan(self, inputs: Inputs, problem: Problem, log: bool = False) -> tuple[Tensor, Potentials]:
        from torch_sinkhorn_attn.engines.triton.streaming import run

        return run.plan(inputs, problem, log)

    def backward(
        self, inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads
    ) -> Gradients:
        from torch_sinkhorn_attn.engines.triton import choice

        kernels = choice.kernels(inputs, problem, adjoint=True, mask_grad=grads.mask)
        return kernels.backward(inputs, problem, output, potentials, grads)

    def plan_backward(
        self,
        inputs: Inputs,
        problem: Problem,
        potentials: Potentials,
        grad_plan: Tensor,
        mask_grad: bool,
        log: bool = False,
    ) -> Gradients:
        from torch_sinkhorn_attn.engines.triton.streaming import run

        return run.plan_backward(inputs, problem, potentials, grad_plan, mask_grad, log)

    def rank_missing(self) -> str | None:
        return _missing()

    def rank_refusal(self, inputs: Inputs, problem: Problem) -> str | None:
        if problem.dropout_seed is not None:
            return "its kernels draw dropout by the rows of one device"
        return self.refusal(inputs, problem)

    def rank_plan(self, inputs: Inputs, share: Share) -> OfRank:
        from torch_sinkhorn_attn.engines.triton import ranks

        return ranks.SharedStream(inputs, share)

    def rank_gradients(self, plan: OfRank, output: Tensor, potentials: Potentials, grads: OutputGrads) -> Inputs:
        from torch_sinkhorn_attn.engines.triton import ranks

        assert isinstance(plan, ranks.SharedStream)
        return ranks.gradients(plan, output, potentials, grads)


@cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch on Linux"
    return None


@constant_in_programs
def _refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if (missing := _missing()) is not None:
        return missing
    if device.type == "cpu" and interpreted():
        return None
    if device.type != TritonEngine.device:
        return f"it takes CUDA and ROCm tensors, and query is on {device}"
    if dtype not in TYPES:
        return f"its kernels compute in float32, and query is {dtype}"
    if torch.version.hip is None and torch.cuda.is_available():
        found = torch.cuda.get_device_capability(device)
        if found < OLDEST:
            return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]}, and {device} has {found[0]}.{found[1]}"
    return None


ENGINE = TritonEngine()
