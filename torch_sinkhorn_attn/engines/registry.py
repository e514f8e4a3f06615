"""The engines, in the order `engine=None` tries them, and the choice among them."""

from __future__ import annotations

import torch

from torch_sinkhorn_attn.compat.releases import forward_level
from torch_sinkhorn_attn.compat.tracing import for_onnx, recording
from torch_sinkhorn_attn.engines import cpu, missing, torchtpu, triton, xla
from torch_sinkhorn_attn.engines.base import Engine
from torch_sinkhorn_attn.engines.tiled import engine as tiled
from torch_sinkhorn_attn.problem.problem import Inputs, Problem

ENGINES: dict[str, Engine] = {x.name: x for x in (cpu.ENGINE, triton.ENGINE, xla.ENGINE, torchtpu.ENGINE, tiled.ENGINE)}
REFERENCE = "reference"  # the definition: dense and differentiated by autograd, so not behind the ops


def check_name(name: str | None) -> None:
    """ValueError for a name that no engine has."""
    if name is not None and name != REFERENCE and name not in ENGINES:
        known = ", ".join(repr(x) for x in (*ENGINES, REFERENCE))
        raise ValueError(f"engine={name!r} is unknown; choose one of {known}, or None for the fastest that can.")


def engine_of(device: torch.device) -> Engine:
    """The engine whose own the tensors of the device are, for what it does with them; where there is none, the tiled
    one, which takes them as they are."""
    for engine in ENGINES.values():
        if engine.device == device.type:
            return engine
    return tiled.ENGINE


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
    reasons, device = [], inputs.query.device.type
    refused: tuple[str, str] | None = None  # the engine made for the device, and why it cannot
    for candidate in [name] if name else ENGINES:
        own = ENGINES[candidate].device
        if name is None and own not in (None, device):
            continue  # another device's: to be had by name alone
        reason = ENGINES[candidate].refusal(inputs, problem)
        if reason is None:
            if refused is not None:
                missing.warn_once(device, *refused, candidate)
            return candidate
        if name is None and own is not None:
            refused = candidate, reason
        reasons.append(f"{candidate}: {reason}")
    raise ValueError(f"engine={name!r} cannot run this problem. " + "; ".join(reasons))
