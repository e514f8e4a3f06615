"""Where a stopped base in bfloat16 was asked for and float32 is computed: why, and a word of it."""

from __future__ import annotations

import warnings

import jax.numpy as jnp

from torch_sinkhorn_attn.compat.callers import users_level
from torch_sinkhorn_attn.engines.tpu.method.lowering import BFLOAT16_VECTORS, Lowering
from torch_sinkhorn_attn.engines.tpu.method.problem import Inputs, Statics

_LIBRARIES = "torch", "torch_xla", "torch_tpu", "jax", "functools", "contextlib"
_said: set[str] = set()


class Float32BaseWarning(UserWarning):
    """base_dtype="bfloat16" was asked for, and the stopped iterations are computed in float32."""


def not_in_bfloat16(inputs: Inputs, statics: Statics, lowering: Lowering, resident: bool) -> str | None:
    """Why the base is computed in float32 where `lowering.base_dtype` says bfloat16; None if it is not.

    >>> from jax import ShapeDtypeStruct
    >>> given = Inputs(*[ShapeDtypeStruct((1, 1, 8, 4), "float32")] * 2)
    >>> not_in_bfloat16(given, Statics(1.0), Lowering("auto", base_dtype="bfloat16", generation="v5e"), True)
    'v5e has no bfloat16 vector unit: float32 is faster'
    """
    if lowering.base_dtype == "float32":
        return None
    if lowering.shape != "blockwise" and lowering.chip not in BFLOAT16_VECTORS:
        return f"{lowering.chip} has no bfloat16 vector unit: float32 is faster"
    if not resident:
        return "the resident kernel alone has products in bfloat16"
    if inputs.query.dtype == jnp.float64:
        return "float64 stays float64"
    if statics.stopped < 2:
        return f"base_iters={statics.stopped} leaves no iteration to round"
    if not statics.balanced:
        return "with relaxation each half-step takes logarithms"
    if statics.over_relaxation != 1:
        return "with over_relaxation each half-step takes logarithms"
    if statics.tolerance:
        return "with a tolerance each half-step is measured"
    return None


def warn_of_float32(inputs: Inputs, statics: Statics, lowering: Lowering, resident: bool) -> None:
    """Warn, once for each reason in a process."""
    reason = not_in_bfloat16(inputs, statics, lowering, resident)
    if reason is None or reason in _said:
        return
    _said.add(reason)
    warnings.warn(
        f"base_dtype='bfloat16' is not followed, the base is computed in float32: {reason}. This is said once.",
        Float32BaseWarning,
        stacklevel=users_level(*_LIBRARIES),
    )
