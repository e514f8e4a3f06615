"""Which kernels take a problem, and why. Shapes, types and options decide, never data."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch_sinkhorn_attn.engines.triton.resident import run as resident
from torch_sinkhorn_attn.engines.triton.streaming import run as streaming
from torch_sinkhorn_attn.problem.problem import Inputs, Problem


class Choice(NamedTuple):
    """The shape of a direction's kernels, "resident" or "streaming", and the reason."""

    shape: str
    reason: str


def choose(inputs: Inputs, problem: Problem, adjoint: bool = False, mask_grad: bool = False) -> Choice:
    """What `forward` (or, with `adjoint`, `backward`) makes of a problem: resident kernels where they can, for they are
    the fastest, else the streaming ones, which take everything. `mask_grad`: whether the adjoint is to have the
    mask's cotangent."""
    against = resident.refusal(inputs, problem, adjoint, mask_grad)
    if against is None:
        return Choice("resident", "the plan of a problem fits the registers of one program")
    return Choice("streaming", against)


def kernels(inputs: Inputs, problem: Problem, adjoint: bool = False, mask_grad: bool = False) -> ModuleType:
    """The module that runs it: it has `solve`, `forward` and `backward`, as `Engine` has."""
    return resident if choose(inputs, problem, adjoint, mask_grad).shape == "resident" else streaming
