"""Which kernels take a problem, and why: `choose` explains, `run` acts on it. Shapes and options decide, never data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from torch_sinkhorn_attn.engines.tpu.method.lowering import Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Constants, Inputs, Statics
from torch_sinkhorn_attn.engines.tpu.method.sinkhorn import Augmented
from torch_sinkhorn_attn.engines.tpu.resident import adjoint as resident_adjoint, passes as resident
from torch_sinkhorn_attn.engines.tpu.resident.strip import BLOCK, strip_of
from torch_sinkhorn_attn.engines.tpu.streaming.passes import StreamingPasses

WIDEST = 32  # column blocks of a row block: what one loop body may hold
SMALLEST_FACTOR = 1e-6  # of q.k: what is added to the scores is held divided by it
SPILLS = 14 << 20  # bytes for what the unrolled loops spill and the compiler adds: the most that was seen is 13 MiB


class Choice(NamedTuple):
    """The shape of a direction's kernels, the reason, and the VMEM of the resident one (None where it has no size)."""

    shape: str
    reason: str
    vmem: int | None


def choose(inputs: Inputs, constants: Constants, statics: Statics, lowering: Lowering, adjoint: bool = False) -> Choice:
    """What `run.forward` (or, with `adjoint`, `run.backward`) makes of a problem under `lowering`.

    Args:
        inputs, constants: arrays or `jax.ShapeDtypeStruct`s.
    """
    if lowering.shape in ("blockwise", "streaming"):
        return Choice(lowering.shape, "asked for", None)
    found: list[Choice] = []

    def look(inputs: Inputs, constants: Constants) -> None:
        inputs = without_redundant_mask(inputs)
        problem = Augmented(inputs, constants, statics, StreamingPasses(inputs, constants, statics, lowering))
        reason = refusal(problem, lowering, adjoint)
        size = None if _unsuited(problem, adjoint) else vmem(problem, lowering, adjoint)
        if reason is None:
            assert size is not None
            reason = f"{_mebibytes(size)} of {_mebibytes(lowering.vmem_limit)} of VMEM"
            found.append(Choice("resident", reason, size))
        else:
            found.append(Choice("streaming", reason, size))

    jax.eval_shape(look, inputs, constants)
    return found[0]


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
        return (
            f"a head needs {_mebibytes(size)} of VMEM, and {lowering.generation} has {_mebibytes(lowering.vmem_limit)}"
        )
    return None


def _unsuited(problem: Augmented, adjoint: bool) -> str | None:
    statics, constants = problem.statics, problem.constants
    if 0 in (*constants.log_row_mass.shape, problem.size):
        return "it is empty"
    if problem.inputs.mask is not None:
        return "attn_mask is read tile by tile"
    if statics.acceleration is not None and not adjoint:
        return "acceleration is not in the resident kernel yet"
    if statics.kept == 0:
        return "without tail iterations there is little to keep for"
    if adjoint and statics.implicit:
        return "the implicit gradient solves a linear system pass by pass"
    if constants.row_segment is not None and (problem.dustbin is not None or statics.tolerance):
        return "packed problems with a dustbin or a tolerance are worked on segment by segment"
    if not statics.scale / statics.epsilon > SMALLEST_FACTOR:
        return f"scale/epsilon={statics.scale / statics.epsilon:.3g} is not above {SMALLEST_FACTOR}"
    strip = strip_of(problem.length, problem.size, statics)
    if strip.width > WIDEST:
        return f"a block of {BLOCK} rows may reach {strip.columns} columns, and {WIDEST * BLOCK} are the most"
    return None


def vmem(problem: Augmented, lowering: Lowering, adjoint: bool) -> int:
    """Bytes a head takes at most: operands and results twice, for the next head's are fetched meanwhile, the workspace,
    and `SPILLS`."""
    strip = strip_of(problem.length, problem.size, problem.statics)
    if adjoint:
        operands, results, scratch = resident_adjoint.footprint(problem, strip)
    else:
        call = resident.call_of(problem, lowering, strip, residuals=True)
        operands, results, scratch = jax.eval_shape(call.operands), call.results(), call.scratch()
    moved = sum(tile_bytes(x.shape[-2:], x.dtype) for x in operands.values())
    moved += sum(tile_bytes(shape, problem.dtype) for shape in results.values())
    return 2 * moved + sum(tile_bytes(*x) for x in scratch.values()) + SPILLS


def tile_bytes(shape: Iterable[int], dtype: Any) -> int:
    """Bytes of an array in VMEM, its last two dimensions in whole tiles of 8 x 128 words.

    >>> tile_bytes((8192, 64), jnp.bfloat16), tile_bytes((1, 8192), jnp.float32)
    (2097152, 262144)
    """
    size = jnp.dtype(dtype).itemsize
    *outer, lines, lanes = shape
    rows = 8 * max(1, 4 // size)
    return math.prod(outer) * (-(-lines // rows) * rows) * (-(-lanes // 128) * 128) * size


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
