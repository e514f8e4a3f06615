"""The XLA engine: pure JAX programs, with Pallas kernels on a TPU, inside torch_xla's lazy graph.

This package alone imports torch_xla, and only once a tensor is on one of its devices. `engines/tpu` holds the programs,
which JAX users may call. `set_lowering` chooses among the kernels; `spmd.sharding` says how tensors lie on several
devices, where their annotations do not.

torch's autograd counts the devices at the first backward of a process: where that may be one on the CPU, call
`torch_xla.device()` before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sinkhorn_attn.compat.releases import functionalized
from torch_sinkhorn_attn.engines.binding import engine
from torch_sinkhorn_attn.engines.binding.settings import Settings, lowering, set_lowering
from torch_sinkhorn_attn.engines.traits import Traits
from torch_sinkhorn_attn.engines.xla import tensors
from torch_sinkhorn_attn.problem.problem import Gradients, Inputs, OutputGrads, Potentials, Problem, Result

__all__ = [
    "NAME",
    "TRAITS",
    "Settings",
    "backward",
    "forward",
    "lowering",
    "plan",
    "plan_backward",
    "refusal",
    "set_lowering",
    "solve",
    "status",
]

NAME = "xla"
TRAITS = Traits(NAME, True, ("torch_xla",), functionalized, tensors.placed, tensors.fetched)
_LIBRARIES = ("torch_xla", "jax")
_REMEDY = "pip install 'torch_sinkhorn_attn[tpu]' (Linux on x86_64, Python 3.11 or 3.12)"
_missing = engine.absence(_LIBRARIES, _REMEDY)


def _binding() -> engine.Binding:
    from torch_sinkhorn_attn.engines.xla import sharded

    return sharded


def status() -> str:
    """Whether it can run, and how; or why not."""
    if _missing is not None:
        return f"missing: {_missing}"
    return f"{engine.versions(_LIBRARIES)}: Pallas kernels on TPUs, plain XLA on other XLA devices"


def refusal(inputs: Inputs, problem: Problem) -> str | None:
    """Why this engine cannot run the problem: the tensors are elsewhere, something is missing, or it is a float64 one
    on a TPU."""
    device = inputs.query.device.type
    if device != TRAITS.device:
        return f"it runs on XLA tensors, and query is on {device}: query.to(torch_xla.device())"
    if _missing is not None:
        return _missing
    return None if torch.compiler.is_compiling() else engine.refusal(_binding(), inputs)


def solve(inputs: Inputs, problem: Problem) -> Potentials:
    """T stopped and R kept iterations: the stacked duals."""
    return engine.solve(_binding(), inputs, problem)


def forward(inputs: Inputs, problem: Problem, residuals: bool = True) -> Result:
    """Output, duals and (unless `residuals` is False: NaN) the marginal residuals."""
    return engine.forward(_binding(), inputs, problem, residuals)


def backward(inputs: Inputs, problem: Problem, output: Tensor, potentials: Potentials, grads: OutputGrads) -> Gradients:
    """The adjoint, on the devices that have the output."""
    return engine.backward(_binding(), inputs, problem, output, potentials, grads)


def plan(inputs: Inputs, problem: Problem) -> tuple[Tensor, Potentials]:
    """The plan `[N, H, L, S]`, or `[N, H, L+1, S+1]` with a dustbin, and the stacked duals."""
    return engine.plan(_binding(), inputs, problem)


plan_backward = engine.plan_backward
