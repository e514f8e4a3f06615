"""The three entry points of the pure JAX half: `forward`, `backward`, `solve`, by the lowering asked for.

Pure functions of arrays, to be jitted with `Statics` and `Lowering` static. Lengths, segments, intervals and masses are
data: only shapes are compiled in.
"""

from __future__ import annotations

from jax import Array

from torch_sinkhorn_attn.engines.tpu.method import sinkhorn
from torch_sinkhorn_attn.engines.tpu.method.blockwise import BlockwisePasses
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Inputs, Result, Statics


def _problem(
    inputs: Inputs, constants: Constants, statics: Statics, lowering: Lowering, adjoint: bool = False
) -> tuple[sinkhorn.Augmented, bool]:
    """The problem with the passes of its lowering, and whether the resident kernels take it.

    Raises:
        ValueError: shape="resident" was asked for, and they do not.
    """
    if lowering.shape == "blockwise":
        return sinkhorn.Augmented(inputs, constants, statics, BlockwisePasses(inputs, constants, statics)), False
    from torch_sinkhorn_attn.engines.tpu.method import choice
    from torch_sinkhorn_attn.engines.tpu.streaming import passes as streaming

    inputs = choice.without_redundant_mask(inputs)
    problem = sinkhorn.Augmented(
        inputs, constants, statics, streaming.StreamingPasses(inputs, constants, statics, lowering)
    )
    if lowering.shape == "streaming":
        return problem, False
    reason = choice.refusal(problem, lowering, adjoint)
    if reason is not None and lowering.shape == "resident" and not (adjoint and statics.implicit):
        raise ValueError(f"shape='resident' cannot take this problem: {reason}. Use shape='auto' or 'streaming'.")
    return problem, reason is None


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
    problem, is_resident = _problem(inputs, constants, statics, lowering)
    if not is_resident:
        return sinkhorn.forward(problem, residuals)
    from torch_sinkhorn_attn.engines.tpu.resident import passes as resident
    from torch_sinkhorn_attn.engines.tpu.wavefront import passes as wavefront

    shape = wavefront if lowering.shape == "wavefront" else resident
    return shape.forward(problem, lowering, residuals)


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
    problem, is_resident = _problem(inputs, constants, statics, lowering, adjoint=True)
    duals, bins = (row_potentials, col_potentials), (grad_to_bin, grad_from_bin)
    if not is_resident:
        return sinkhorn.backward(problem, output, duals, grad_output, bins, mask_grad)
    from torch_sinkhorn_attn.engines.tpu.resident import adjoint as resident
    from torch_sinkhorn_attn.engines.tpu.wavefront import adjoint as wavefront

    shape = wavefront if lowering.shape == "wavefront" else resident
    return shape.backward(problem, lowering, output, duals, grad_output, bins)
