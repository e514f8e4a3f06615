"""A problem as the JAX half takes it: its arrays, its statics, and the lowering for the settings and the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_sinkhorn_attn.engines.binding import settings
from torch_sinkhorn_attn.engines.binding.library import Tensors
from torch_sinkhorn_attn.engines.tpu.method import problem as tpu
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering, generation_of
from torch_sinkhorn_attn.problem.problem import LEAF, Inputs, Problem, compute_dtype


def arrays(inputs: Inputs, problem: Problem) -> tuple[Tensors, Tensors]:
    """The fields of the JAX half's `Inputs` and `Constants`: integers of 32 bits, vectors in the compute dtype."""
    dtype = compute_dtype(inputs.query.dtype)
    given = {name: LEAF[name](problem) for name in tpu.Constants._fields if name != "head_index"}
    vectors = {name: _vector(x, dtype) for name, x in inputs._asdict().items() if name in Inputs._fields[4:]}
    constants = {name: _constant(name, x, dtype) for name, x in given.items()}
    if problem.dropout_seed is not None:  # so that each shard knows its heads
        num, heads = problem.sizes[:2]
        index = torch.arange(num * heads, dtype=torch.int32, device=inputs.query.device)
        constants["head_index"] = index.view(num, heads)
    return {**inputs._asdict(), **vectors}, constants


def _vector(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _constant(name: str, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if x is None or x.is_floating_point():
        return _vector(x, dtype)
    return x.to(torch.uint32 if name == "dropout_seed" else torch.int32)


def statics(problem: Problem) -> tpu.Statics:
    """The numbers and the outline of the support."""
    return tpu.Statics.of(problem.solver, **vars(problem.outline))


def lowering(platform: str, device_kind: Callable[[], str]) -> Lowering:
    """What was asked for, or what suits a device of JAX's `platform`; of a TPU the kind is asked, which tells
    its generation.

    Raises:
        ValueError: a kernel was asked for where only its interpreter runs.
    """
    asked, on_tpu = settings.lowering(), platform == "tpu"
    shape = asked.shape or ("auto" if on_tpu else "blockwise")
    if shape != "blockwise" and not on_tpu and not asked.interpret:
        raise ValueError(
            f"shape={shape!r} is a Pallas kernel for TPUs, and this device is {platform}: "
            f"set_lowering({shape!r}, interpret=True) interprets it, and shape=None takes what suits the device."
        )
    return Lowering(shape, asked.interpret, asked.base_dtype, generation_of(device_kind() if on_tpu else None))
