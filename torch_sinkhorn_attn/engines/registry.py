"""The engines, in the order `engine=None` tries them. An engine is a module with NAME, TRAITS, status, refusal, solve,
forward, backward, plan and plan_backward."""

from __future__ import annotations

from types import ModuleType

import torch

from torch_sinkhorn_attn.compat.releases import forward_level
from torch_sinkhorn_attn.compat.tracing import for_onnx, recording
from torch_sinkhorn_attn.engines import cpu, missing, torchtpu, xla
from torch_sinkhorn_attn.engines.tiled import engine as tiled
from torch_sinkhorn_attn.engines.traits import PLAIN, Traits
from torch_sinkhorn_attn.problem.problem import Inputs, Problem

ENGINES: dict[str, ModuleType] = {engine.NAME: engine for engine in (cpu, xla, torchtpu, tiled)}
REFERENCE = "reference"  # the definition: dense and differentiated by autograd, so not behind the ops


def check_name(name: str | None) -> None:
    """ValueError for a name that no engine has."""
    if name is not None and name != REFERENCE and name not in ENGINES:
        known = ", ".join(repr(x) for x in (*ENGINES, REFERENCE))
        raise ValueError(f"engine={name!r} is unknown; choose one of {known}, or None for the fastest that can.")


def traits_of(device: torch.device) -> Traits:
    """What the engine whose own the tensors of the device are says of them."""
    for engine in ENGINES.values():
        if engine.TRAITS.device == device.type:
            found: Traits = engine.TRAITS
            return found
    return PLAIN


def choose(name: str | None, inputs: Inputs, problem: Problem) -> str:
    """The engine that runs the problem: the one named, or the first that can.

    The name is one that `check_name` let pass.

    Raises:
        ValueError: the engine named cannot run the problem (with its reason).
    """
    if name == REFERENCE or (torch.compiler.is_compiling() and forward_level() >= 0):
        return REFERENCE  # a compiled op drops the tangents of forward mode; the definition is traced through
    if name is None and recording() and for_onnx():
        return REFERENCE
    reasons = []
    for candidate in [name] if name else ENGINES:
        reason = ENGINES[candidate].refusal(inputs, problem)
        if reason is None:
            if name is None and inputs.query.device.type == "cpu" and candidate != cpu.NAME:
                missing.warn_once(candidate)
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise ValueError(f"engine={name!r} cannot run this problem. " + "; ".join(reasons))
