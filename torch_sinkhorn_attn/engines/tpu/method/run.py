"""The three entry points of the pure JAX half: `forward`, `backward`, `solve`, by the lowering asked for.

Pure functions of arrays, to be jitted with `Statics` and `Lowering` static. Lengths, segments, intervals and masses are
data: only shapes are compiled in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jax import Array

from torch_sinkhorn_attn.engines.tpu.method import shared, sinkhorn, staircase
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
    inputs: Inputs,
    constants: Constants,
    statics: Statics,
    lowering: Lowering,
    adjoint: bool = False,
    mask_grad: bool = False,
) -> tuple[sinkhorn.Augmented, Lowering]:
    """The problem with the passes of its lowering, and the lowering, its shape that of the kernels which take it.

    Raises:
        ValueError: shape="resident" or "wavefront" was asked for, and its kernels cannot take the problem.
    """
    if lowering.shape == "blockwise":
        return sinkhorn.Augmented(inputs, constants, statics, BlockwisePasses(inputs, constants, statics)), lowering
    from torch_sinkhorn_attn.engines.tpu.method import choice

    problem, used = choice.posed(inputs, constants, statics, lowering)
    found = choice.kernels(problem, used, adjoint, mask_grad)
    asked = lowering.shape
    apart = adjoint and asked == "resident" and (statics.implicit or mask_grad)  # which it has not
    if asked in ("resident", "wavefront") and found.shape != asked and not apart:
        raise ValueError(f"shape={asked!r} cannot take this problem: {found.reason}. Use shape='auto' or 'streaming'.")
    return problem, replace(used, shape=found.shape)


def solve(inputs: Inputs, constants: Constants, statics: Statics, lowering: Lowering) -> tuple[Array, Array]:
    """The stacked duals, `[R+1, N, H, L(+G)]` and `[R+1, N, H, S(+G)]`."""
    found = forward(inputs._replace(value=None), constants, statics, lowering, residuals=False)
    return found.row_potentials, found.col_potentials


def forward(
    inputs: Inputs, constants: Constants, statics: Statics, lowering: Lowering, residuals: bool = True
) -> Result:
    """Output (None without a value), duals, residuals (NaN unless asked for) and dustbin masses, in the compute dtype.

    Raises:
        ValueError: `lowering.shape` is "resident" or "wavefront" and its kernels cannot take the problem, with the
            reason.
    """
    if lowering.shape == "device":
        found: Result = _by_device("forward", inputs, constants, statics, lowering, residuals)
        return found
    if statics.sequence is not None:
        return shared.forward(inputs, constants, statics, lowering, residuals)
    problem, used = _problem(inputs, constants, statics, lowering)
    if lowering.base_dtype != "float32":
        warn_of_float32(inputs, statics, lowering, used.shape == "resident")
    if used.shape == "resident":
        from torch_sinkhorn_attn.engines.tpu.resident import passes as resident

        return resident.forward(problem, used, residuals)
    if used.shape == "wavefront":
        from torch_sinkhorn_attn.engines.tpu.wavefront import passes as wavefront, stepwise

        shape = wavefront if stepwise.coupled(problem, used) is None else stepwise
        return shape.forward(problem, used, residuals)
    return sinkhorn.forward(problem, residuals)


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
    duals, bins = (row_potentials, col_potentials), (grad_to_bin, grad_from_bin)
    if statics.sequence is not None:
        return shared.backward(inputs, constants, statics, lowering, output, duals, grad_output, bins, mask_grad)
    problem, used = _problem(inputs, constants, statics, lowering, adjoint=True, mask_grad=mask_grad)
    if used.shape == "resident":
        from torch_sinkhorn_attn.engines.tpu.resident import adjoint as resident

        return resident.backward(problem, used, output, duals, grad_output, bins)
    if used.shape == "wavefront":
        from torch_sinkhorn_attn.engines.tpu.wavefront import adjoint as wavefront

        return wavefront.backward(problem, used, output, duals, grad_output, bins, mask_grad)
    return staircase.backward(problem, output, duals, grad_output, bins, mask_grad)
