"""Sizes of blocks and of programs: a small table, in one place.

Measured on compiled code for sm_90 (bfloat16, 64 features): instructions for a score of the largest loop, and no
register spilled. Nothing is tuned at a call. `OVERRIDE` takes the place of the table where it is not None.
"""

from __future__ import annotations

from typing import NamedTuple

from torch_sinkhorn_attn.engines.triton import interpreted
from torch_sinkhorn_attn.engines.triton.layout import Static, power_of_two


class Blocks(NamedTuple):
    """Outer and inner lines of a tile; warps of a program and stages of its loads."""

    outer: int
    inner: int
    warps: int
    stages: int


OVERRIDE: Blocks | None = None
INTERPRETED = Blocks(32, 64, 4, 1)
LARGEST_LINE = 512  # bytes of a line's features that a tile takes at once


def half_step_blocks(outer: int, static: Static) -> Blocks:
    """For `outer` lines outside: half-steps and sums of the plan, which multiply nothing but features."""
    if OVERRIDE is not None:
        return OVERRIDE
    if interpreted():
        return INTERPRETED
    small = static.exact or static.features > 128
    found = Blocks(64, 64, 4, 2) if small else Blocks(64, 128, 4, 3)
    return found._replace(outer=min(found.outer, power_of_two(outer)))


def value_blocks(outer: int, static: Static, value_features: int) -> Blocks:
    """For the output, which multiplies plan tiles with values as well."""
    if OVERRIDE is not None:
        return OVERRIDE
    if interpreted():
        return INTERPRETED
    if static.exact:
        found = Blocks(64, 16, 4, 2)
    else:
        found = Blocks(64, 64, 4, 2) if max(static.features, value_features) > 64 else Blocks(128, 64, 4, 3)
    return found._replace(outer=min(found.outer, power_of_two(outer)))


def adjoint_blocks(outer: int, features: int, bytes_each: int, deferred: bool, shared: int) -> Blocks:
    """For passes of the adjoint, which hold two tiles and up to three products with features. `features`: E or Ev,
    whichever is more; `deferred`: a factor of dK has a sum of its own; `shared`: bytes of shared memory."""
    if OVERRIDE is not None:
        return OVERRIDE
    if interpreted():
        return INTERPRETED
    line = power_of_two(features) * bytes_each
    if line <= 128:
        found = Blocks(128, 64, 8, 2)
    elif bytes_each == 2:
        found = Blocks(128, 32 if deferred else 64, 8, 2)
    else:
        found = Blocks(32 if deferred or line > 256 else 64, 32 if line <= 256 else 16, 8, 2)
    found = found._replace(outer=min(found.outer, power_of_two(outer)))
    line = 2 * min(line, LARGEST_LINE)  # two sides
    while (found.outer + found.stages * found.inner) * line > 0.9 * shared:
        if found.stages > 1:
            found = found._replace(stages=1)
        elif found.inner > 16:
            found = found._replace(inner=found.inner // 2)
        elif found.outer > 16:
            found = found._replace(outer=found.outer // 2)
        else:
            break
    return found
