"""The TorchTPU engine: the JAX programs of `engines/tpu` as ops of torch_tpu, the library whose device is "tpu".

This package alone touches torch_tpu, whose Pallas entry is marked experimental, and imports it only once a tensor is on
its device. `set_lowering` chooses among the kernels, as for torch_xla; `mesh.set_sharding` says how a problem is spread
over the ranks of a job, where that matters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.binding import engine
from torch_sinkhorn_attn.engines.binding.settings import Settings, lowering, set_lowering
from torch_sinkhorn_attn.engines.traits import Traits, each_tensor
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


def _fetched(tree: Any) -> Any:
    return each_tensor(tree, lambda x: x.cpu())


NAME = "torchtpu"
TRAITS = Traits("tpu", compiles=True, wrappers=("torch_tpu",), fetched=_fetched)
_LIBRARIES = ("torch_tpu", "jax")
_REMEDY = "pip install 'torch_sinkhorn_attn[torchtpu]' (Linux on x86_64, Python 3.11 or later, torch 2.11 or later)"
_missing = engine.absence(_LIBRARIES, _REMEDY)


def _binding() -> engine.Binding:
    from torch_sinkhorn_attn.engines.torchtpu import binding

    return binding


def status() -> str:
    """Whether it can run, and how; or why not."""
    if _missing is not None:
        return f"missing: {_missing}"
    return f"{engine.versions(_LIBRARIES)}: Pallas kernels on TPUs"


def refusal(inputs: Inputs, problem: Problem) -> str | None:
    """Why this engine cannot run the problem: the tensors are elsewhere, something is missing, or it is a float64
    one."""
    device = inputs.query.device.type
    if device != TRAITS.device:
        return f"it runs on TorchTPU's tensors, and query is on {device}: query.to('tpu')"
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
    """The adjoint."""
    return engine.backward(_binding(), inputs, problem, output, potentials, grads)


def plan(inputs: Inputs, problem: Problem) -> tuple[Tensor, Potentials]:
    """The plan `[N, H, L, S]`, or `[N, H, L+1, S+1]` with a dustbin, and the stacked duals."""
    return engine.plan(_binding(), inputs, problem)


plan_backward = engine.plan_backward
