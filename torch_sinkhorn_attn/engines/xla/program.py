"""A problem as the JAX half takes it: its arrays, its statics, and the lowering for the settings and the device."""

from __future__ import annotations

from typing import Any

import torch
import torch_xla
import torch_xla.runtime as xr
from torch import Tensor
from torch_xla import _XLAC  # type: ignore[attr-defined]

from torch_sinkhorn_attn.engines.tpu import problem as tpu
from torch_sinkhorn_attn.engines.tpu.lowering import Lowering
from torch_sinkhorn_attn.engines.xla import binding, settings
from torch_sinkhorn_attn.engines.xla.sharded import Tensors
from torch_sinkhorn_attn.problem import Inputs, Problem, compute_dtype

_GENERATIONS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "TPU7x": "tpu7x", "TPU v7x": "tpu7x",
}  # fmt: skip


def arrays(inputs: Inputs, problem: Problem) -> tuple[Tensors, Tensors]:
    """The fields of the JAX half's `Inputs` and `Constants`: integers of 32 bits, vectors in the compute dtype."""
    dtype = compute_dtype(inputs.query.dtype)
    given = {name: getattr(problem, name) for name in tpu.Constants._fields if name != "head_index"}
    vectors = {name: _vector(x, dtype) for name, x in inputs._asdict().items() if name in Inputs._fields[4:]}
    constants = {name: _constant(name, x, dtype) for name, x in given.items()}
    if problem.dropout_seed is not None:  # so that each shard knows its heads
        num, heads = problem.log_row_mass.shape[:2]
        index = torch.arange(num * heads, dtype=torch.int32, device=inputs.query.device)
        constants["head_index"] = index.view(num, heads)
    return {**inputs._asdict(), **vectors}, constants


def _vector(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _constant(name: str, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if x is None or x.is_floating_point():
        return _vector(x, dtype)
    return x.to(torch.uint32 if name == "dropout_seed" else torch.int32)


def statics(problem: Problem, placed: bool) -> dict[str, Any]:
    """`statics` and `lowering` of the JAX half's functions.

    Raises:
        ValueError: a kernel for several devices, of which nothing says how they share the problem (`placed`).
    """
    stopped, kept = problem.schedule
    found = tpu.Statics(
        scale=problem.scale, epsilon=problem.epsilon, rho_row=problem.rho_row, rho_col=problem.rho_col,
        stopped=stopped, kept=kept, tolerance=problem.tolerance, over_relaxation=problem.over_relaxation,
        implicit=problem.gradient == "implicit", dropout_p=problem.dropout_p, banded=problem.banded,
        window_left=problem.window_left, window_right=problem.window_right, uniform=problem.uniform,
    )  # fmt: skip
    chosen = lowering()
    if xr.is_spmd() and not placed and chosen.shape != "blockwise":
        raise ValueError(
            "XLA cannot split a kernel over devices, and nothing says how query is sharded: mark the attention's input "
            "(xs.mark_sharding along batch and heads), or say it: with "
            "torch_sinkhorn_attn.engines.xla.spmd.sharding(mesh, batch=..., heads=...)."
        )
    return {"statics": found, "lowering": chosen}


def lowering() -> Lowering:
    """What was asked for, or what suits the device.

    Raises:
        ValueError: a kernel was asked for where only its interpreter runs.
    """
    asked, on_tpu = settings.lowering(), binding.platform() == "tpu"
    shape = asked.shape or ("auto" if on_tpu else "blockwise")
    if shape != "blockwise" and not on_tpu and not asked.interpret:
        raise ValueError(
            f"shape={shape!r} is a Pallas kernel for TPUs, and this device is {binding.platform()}: "
            f"set_lowering({shape!r}, interpret=True) interprets it, and shape=None takes what suits the device."
        )
    return Lowering(shape, asked.interpret, asked.base_dtype, generation() if on_tpu else Lowering.generation)


def generation() -> str:
    """Of the TPU, by JAX's names; the default of `Lowering` for one that is not known."""
    kind = _XLAC._xla_device_kind(str(torch_xla.device()))
    return _GENERATIONS.get(kind, Lowering.generation)
