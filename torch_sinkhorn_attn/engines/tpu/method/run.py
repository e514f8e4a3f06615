"""The three entry points of the pure JAX half: `forward`, `backward`, `solve`, by the lowering asked for.

Pure functions of arrays, to be jitted with `Statics` and `Lowering` static. Lengths, segments, intervals and masses are
data: only shapes are compiled in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jax import Array

from torch_sinkhorn_attn.engines.tpu.method import sinkhorn
from torch_sinkhorn_attn.engines.tpu.method.blockwise import BlockwisePasses
from torch_sinkhorn_attn.engines.tpu.method.low_base import warn_of_float32
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.platforms import by_platform
from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Inputs, Result, Statics


@dataclass(frozen=True)
class _On:
    """An entry point with what is compiled in, by a lowering whose shape is not "device"."""

    function: str
    statics: Statics
    lowering: Lowering
    option: bool

    def __call__(self, inputs: Inputs, constants: Constants, *given: Any) -> Any:
        return globals()[self.function](inputs, constants, self.statics, self.lowering, *given, self.option)


def _by_device(
    function: str, inputs: Inputs, constants: Constants, statics: Statics, lowering: Lowering, option: bool, *given: Any
) -> Any:
    """The function by the kernels of "auto" where it is lowered for a TPU, by plain XLA elsewhere."""
    elsewhere, on_tpu = (_On(function, statics, replace(lowering, shape=shape), option) for shape in _BY_DEVICE)
    return by_platform(elsewhere, on_tpu, inputs, constants, *given)


_BY_DEVICE = ("blockwise", "auto")


def _problem(
    inputs: Inputs, constants: Constants, statics: Statics, lowering: Lowering, adjoint: bool = False
) -> tuple[sinkhorn.Augmented, Lowering | None]:
    """The problem with the passes of its lowering, and the lowering of the resident kernels where they take it.

    Raises:
        ValueError: shape="resident" was asked for, and they do not.
    """
    if lowering.shape == "blockwise":
        return sinkhorn.Augmented(inputs, constants, statics, BlockwisePasses(inputs, constants, statics)), None
    from torch_sinkhorn_attn.engines.tpu.method import choice

    problem, lowering = choice.posed(inputs, constants, statics, lowering)
    if lowering.shape == "streaming":
        return problem, None
    reason = choice.refusal(problem, lowering, adjoint)
    if reason is not None and lowering.shape == "resident" and not (adjoint and statics.implicit):
        raise ValueError(f"shape='resident' cannot take this problem: {reason}. Use shape='auto' or 'streaming'.")
    return problem, lowering if reason is None else None


def solve(inputs: Inputs, constants: Constants, statics: Statics, lowering: Lowering) -> tuple[Array, Array]:
    """The stacked duals, `[R+1, N, H, L(+G)]` and `[R+1, N, H, S(+G)]`."""
    found = forward(inputs._replace(value=None), constants, statics, lowering, residuals=False)
    return found.row_potentials, found.col_potentials


def forward(
    inputs: Inputs, constants: Constants, statics: Statics, lowering: Lowering, residuals: bool = True
) -> Result:
    """Output (None without a value), duals, residuals (NaN unless asked for) and dustbin masses, in the compute dtype.

    Raises:
        ValueError: `lowering.shape` is "resident" and its kernel cannot take the problem, with the reason.
    """
    if lowering.shape == "device":
        found: Result = _by_device("forward", inputs, constants, statics, lowering, residuals)
        return found
    problem, resident_lowering = _problem(inputs, constants, statics, lowering)
    if lowering.base_dtype != "float32":
        warn_of_float32(inputs, statics, lowering, resident_lowering is not None)
    if resident_lowering is None:
        return sinkhorn.forward(problem, residuals)
    from torch_sinkhorn_attn.engines.tpu.resident import passes as resident

    return resident.forward(problem, resident_lowering, residuals)


def backward(
    inputs: Inputs,
    constants: Constants,
    statics: Statics,
    lowering: Lowering,
    output: Array,
    row_potentials: Array,
    col_potentials: Array,
    grad_output: Array,
    grad_to_bin: Array | None = None,
    grad_from_bin: Array | None = None,
    mask_grad: bool = False,
) -> tuple[Inputs, Array]:
    """The adjoint of `forward`, from its output `[N, H, L, Ev]` and duals.

    Returns:
        Cotangents of the inputs in the compute dtype, None where absent (the mask's unless `mask_grad`), and the
        dropped cotangent: z^0 `[N, H, L(+G)]`, w^0 `[N, H, S(+G)]` for R = 0, zeros when implicit.
    """
    if lowering.shape == "device":
        given = output, row_potentials, col_potentials, grad_output, grad_to_bin, grad_from_bin
        gradients: tuple[Inputs, Array] = _by_device(
            "backward", inputs, constants, statics, lowering, mask_grad, *given
        )
        return gradients
    problem, resident_lowering = _problem(inputs, constants, statics, lowering, adjoint=True)
    duals, bins = (row_potentials, col_potentials), (grad_to_bin, grad_from_bin)
    if resident_lowering is None:
        return sinkhorn.backward(problem, output, duals, grad_output, bins, mask_grad)
    from torch_sinkhorn_attn.engines.tpu.resident import adjoint as resident_adjoint

    return resident_adjoint.backward(problem, resident_lowering, output, duals, grad_output, bins)
