"""Which kernels take a problem, and why: `choose` explains, `run` acts on it. Shapes and options decide, never data."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from torch_sinkhorn_attn.engines.tpu.method.low_base import not_in_bfloat16
from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Inputs, Statics
from torch_sinkhorn_attn.engines.tpu.method.sinkhorn import Augmented
from torch_sinkhorn_attn.engines.tpu.method.tiles import tile_bytes
from torch_sinkhorn_attn.engines.tpu.resident import adjoint as resident_adjoint, neighbours, passes as resident
from torch_sinkhorn_attn.engines.tpu.resident.spills import spilled
from torch_sinkhorn_attn.engines.tpu.resident.strip import BLOCK, strip_of
from torch_sinkhorn_attn.engines.tpu.streaming.passes import StreamingPasses
from torch_sinkhorn_attn.engines.tpu.streaming.spans import joins
from torch_sinkhorn_attn.engines.tpu.wavefront import fits as wavefront

WIDEST = 32  # column blocks of a row block: what one loop body may hold


class Choice(NamedTuple):
    """The shape of a direction's kernels, the reason, and the VMEM of the resident one (None where it has no size)."""

    shape: str
    reason: str
    vmem: int | None


def choose(
    inputs: Inputs,
    constants: Constants,
    statics: Statics,
    lowering: Lowering,
    adjoint: bool = False,
    mask_grad: bool = False,
) -> Choice:
    """What `run.forward` (or, with `adjoint`, `run.backward`) makes of a problem under `lowering`.

    Args:
        inputs, constants: arrays or `jax.ShapeDtypeStruct`s.
        mask_grad: whether the gradient of a float mask is wanted.
    """
    not_low = "" if adjoint else _in_float32(inputs, statics, lowering, resident=False)
    if lowering.shape in ("blockwise", "streaming"):
        return Choice(lowering.shape, f"asked for{not_low}", None)
    found: list[Choice] = []

    def look(inputs: Inputs, constants: Constants) -> None:
        nonlocal not_low
        problem, used = posed(inputs, constants, statics, lowering)
        choice = kernels(problem, used, adjoint, mask_grad)
        if choice.shape == "resident":
            not_low = "" if adjoint else _in_float32(inputs, statics, lowering, resident=True)
        found.append(choice._replace(reason=choice.reason + not_low))

    jax.eval_shape(look, inputs, constants)
    return found[0]


def kernels(problem: Augmented, lowering: Lowering, adjoint: bool, mask_grad: bool = False) -> Choice:
    """The Pallas kernels that take a problem: the resident ones where they can, for they are the fastest, then those of
    the wavefront, then the streaming ones, which take everything."""
    if lowering.shape == "streaming":
        return Choice("streaming", "asked for", None)
    size = None if _unsuited(problem, adjoint) else vmem(problem, lowering, adjoint)
    reason = "shape='wavefront' was asked for" if lowering.shape == "wavefront" else refusal(problem, lowering, adjoint)
    if reason is None:
        assert size is not None
        return Choice("resident", f"{_mebibytes(size)} of {_mebibytes(lowering.vmem_limit)} of VMEM", size)
    if lowering.shape == "resident":
        return Choice("streaming", reason, size)
    against = wavefront.refusal(problem, lowering, adjoint, mask_grad)
    if against is None:
        return Choice("wavefront", reason, size)
    if lowering.shape == "wavefront":
        return Choice("streaming", against, size)
    return Choice("streaming", f"resident: {reason}; wavefront: {against}", size)


def _in_float32(inputs: Inputs, statics: Statics, lowering: Lowering, resident: bool) -> str:
    why = not_in_bfloat16(inputs, statics, lowering, resident)
    return "" if why is None else f"; base_dtype='bfloat16' is not followed: {why}"


def posed(inputs: Inputs, constants: Constants, statics: Statics, lowering: Lowering) -> tuple[Augmented, Lowering]:
    """The problem as the Pallas kernels take it, and the lowering with the base's dtype that the resident one uses."""
    connected = statics.uniform and inputs.mask is None and window_joins(constants, statics)
    inputs = without_redundant_mask(inputs)
    lowering = base_of(inputs, statics, lowering)
    passes = StreamingPasses(inputs, constants, statics, lowering)
    return Augmented(inputs, constants, statics, passes, connected), lowering


def base_of(inputs: Inputs, statics: Statics, lowering: Lowering) -> Lowering:
    """The lowering with the base's dtype that the resident kernel uses."""
    if not_in_bfloat16(inputs, statics, lowering, resident=True) is None:
        return lowering
    return replace(lowering, base_dtype="float32")


def window_joins(constants: Constants, statics: Statics) -> bool:
    """Whether the window of all tokens makes one component of them."""
    if not statics.banded:
        return True
    length, size = constants.log_row_mass.shape[-1], constants.log_col_mass.shape[-1]
    return joins(length, size, statics.window_left, statics.window_right)


def without_redundant_mask(inputs: Inputs) -> Inputs:
    """A boolean mask of rows or of columns alone says what the masses say: its tokens are inactive."""
    mask = inputs.mask
    if mask is not None and mask.dtype == jnp.bool_ and 1 in mask.shape[-2:]:
        return inputs._replace(mask=None)
    return inputs


def refusal(problem: Augmented, lowering: Lowering, adjoint: bool) -> str | None:
    """Why the resident kernel cannot take a problem; None if it can."""
    reason = _unsuited(problem, adjoint)
    if reason is not None:
        return reason
    size = vmem(problem, lowering, adjoint)
    if size > lowering.vmem_limit:
        return f"a head needs {_mebibytes(size)} of VMEM, and {lowering.chip} has {_mebibytes(lowering.vmem_limit)}"
    return None


def _unsuited(problem: Augmented, adjoint: bool) -> str | None:
    statics, constants = problem.statics, problem.constants
    if 0 in (*constants.log_row_mass.shape, problem.size):
        return "it is empty"
    if problem.inputs.mask is not None:
        return "attn_mask is read tile by tile"
    if not adjoint and statics.acceleration and not statics.contraction and constants.row_segment is not None:
        return "the contraction of packed problems is measured segment by segment"
    if statics.kept == 0:
        return "without tail iterations there is little to keep for"
    if adjoint and statics.implicit:
        return "the implicit gradient solves a linear system pass by pass"
    if constants.row_segment is not None and (problem.dustbin is not None or statics.tolerance):
        return "packed problems with a dustbin or a tolerance are worked on segment by segment"
    if not statics.scale / statics.epsilon > wavefront.SMALLEST_FACTOR:
        return f"scale/epsilon={statics.scale / statics.epsilon:.3g} is not above {wavefront.SMALLEST_FACTOR}"
    if statics.sequence is not None:
        if statics.dropout_p:
            return "dropout is counted in places of the whole sequence"
        if (reason := neighbours.refusal(statics, problem.dustbin is not None)) is not None:
            return reason
    strip = strip_of(problem.length, problem.size, statics)
    if strip.width > WIDEST:
        return f"a block of {BLOCK} rows may reach {strip.columns} columns, and {WIDEST * BLOCK} are the most"
    return None


def vmem(problem: Augmented, lowering: Lowering, adjoint: bool) -> int:
    """Bytes a head takes at most: operands and results twice, for the next head's are fetched meanwhile, the workspace,
    and what the compiler spills."""
    strip = strip_of(problem.length, problem.size, problem.statics)
    if adjoint:
        operands, results, scratch = resident_adjoint.footprint(problem, strip)
    else:
        call = resident.call_of(problem, lowering, strip, residuals=True)
        operands, results, scratch = jax.eval_shape(call.operands), call.results(), call.scratch()
    moved = sum(tile_bytes(x.shape[-2:], x.dtype) for x in operands.values())
    moved += sum(tile_bytes(shape, problem.dtype) for shape in results.values())
    workspace = sum(tile_bytes(*x) for x in scratch.values())
    if (beside := neighbours.neighbours_of(problem.statics)) is not None:
        workspace += beside.vmem(problem.dtype)
    return 2 * moved + workspace + spilled(strip.width, adjoint)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
